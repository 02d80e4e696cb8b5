"""Recorded generations of the published code come out of the pipeline: classes, captions' features, given frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from nar import Pipeline
from nar.condition import TextFeatures
from test_golden_models import Case, cases
from toy_models import PaintTokenizer, paint

pytestmark = pytest.mark.golden


class Recorded:
    """A text encoder that looks up recorded features by number."""

    def __init__(self, text: TextFeatures) -> None:
        self.text = text

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [int(caption) for caption in captions]
        return self.text.features[rows], self.text.mask[rows]

    def blank(self, captions: Sequence[str]) -> Tensor:
        return torch.zeros(len(captions), dtype=torch.bool)

    def close(self) -> None:
        pass


def call(case: Case, pipe: Pipeline, **options: object) -> Tensor:
    """The codes (B, N) that a greedy call draws; every row is asked for as a user would ask."""
    options = {"output_type": "codes", "temperature": 0.0, **options}
    kind = case.fixture.meta["kind"]
    if kind == "nar-t2i":
        out = pipe(prompt=[str(row) for row in range(len(case.codes))], **options)
    elif kind == "nar-fp":
        given = case.fixture.io["cond"][:, :-1].reshape(-1, *case.grid)
        out = pipe(frames=np.stack([paint(codes) for codes in given]), **options)
    else:
        out = pipe(case.fixture.io["cond"].tolist(), **options)
    return (out.images if out.videos is None else out.videos).flatten(1)


def pipeline(case: Case) -> Pipeline:
    model, kind = case.model(), case.fixture.meta["kind"]
    recorded = case.condition.text
    text = Recorded(recorded) if recorded is not None else None
    given = case.grid[:1] if kind == "nar-fp" else ()  # frames of the recorded condition: all places are given
    return Pipeline(model, PaintTokenizer(model.config.vocab_size), text=text, given_frames=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases("nar-c2i", "nar-t2i", "nar-c2v", "nar-fp"), ids=str)
def test_greedy_generations(case: Case) -> None:
    recorded = case.recorded("greedy.tokens", "greedy").long()
    pipe = pipeline(case)
    assert torch.equal(call(case, pipe, guidance_scale=1.0), recorded)
    assert torch.equal(call(case, pipe, guidance_scale=1.0, batch_size=1), recorded)


@pytest.mark.parametrize("case", cases("nar-c2i", "nar-t2i", "nar-c2v"), ids=str)
def test_guided_generations(case: Case) -> None:
    pipe = pipeline(case)
    for tokens, _, scale, interval in case.guided_runs():
        made = call(case, pipe, guidance_scale=scale, guidance_interval=interval)
        assert torch.equal(made, tokens.long()), f"scale {scale}, interval {interval}"
