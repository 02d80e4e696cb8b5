"""Converted transformers give the numbers that the published code gives with the same weights, to the last token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_fixtures import Fixture, fixtures
from nar.condition import ClassCondition, Condition, PrefixCondition, TextCondition
from nar.convert import Checkpoint
from nar.convert.models import model_state
from nar.model import Transformer
from nar.sampling import Sampling, generate

pytestmark = pytest.mark.golden
LOGITS = {"atol": 2e-4, "rtol": 0.0}
IMAGES, VIDEOS = ("nar-c2i", "nar-t2i"), ("nar-c2v", "nar-fp")


class Case(NamedTuple):
    """One fixture under one mask: its recorded tensors under common names."""

    fixture: Fixture
    prefix_attention: str = "causal"

    def __str__(self) -> str:
        suffix = f"-{self.prefix_attention}" if self.fixture.meta["kind"] == "nar-fp" else ""
        return f"{self.fixture.name}{suffix}"

    @property
    def sizes(self) -> dict:
        return self.fixture.meta.get("config") or self.fixture.meta["args"]

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.sizes.get("latent_shape") or (self.fixture.meta["grid"],) * 2)

    def recorded(self, image: str, video: str) -> Tensor:
        """A tensor by its name in the image and in the video fixtures; tokens as (B, N), logits as (B, N, V)."""
        if self.fixture.meta["kind"] in IMAGES:
            found = self.fixture.io[image]
            return found.flatten(1, -2) if image.startswith("greedy") and "logits" in image else found
        suffix = f"_prefix_{self.prefix_attention}" if self.fixture.meta["kind"] == "nar-fp" else ""
        return self.fixture.io[video if video == "tokens" else video + suffix]

    @property
    def codes(self) -> Tensor:
        return self.recorded("train.idx", "tokens").reshape(-1, *self.grid)

    @property
    def condition(self) -> Condition:
        io, kind = self.fixture.io, self.fixture.meta["kind"]
        if kind == "nar-t2i":
            return TextCondition(io["cond"], io["emb_mask"].bool())
        if kind == "nar-fp":  # the last given token is the separator
            return PrefixCondition(io["cond"][:, :-1].reshape(-1, *self.grid))
        return ClassCondition(io["cond"])

    @property
    def null(self) -> Condition:
        return self.condition.drop(torch.ones(len(self.codes), dtype=torch.bool))

    def model(self, change: float = 1.0) -> Transformer:
        weights = {name: tensor * change for name, tensor in (self.fixture.weights or {}).items()}
        settings = {"n_head": self.sizes["n_head"], "num_classes": self.sizes.get("num_classes")}
        config, state = model_state(
            Checkpoint(weights, settings, self.fixture.name),
            self.fixture.meta["kind"],
            grid=self.grid,
            prefix_attention=self.prefix_attention,
        )
        model = Transformer(config)
        model.load_state_dict({name: parts.tensor() for name, parts in state.items()})
        return model.eval()

    def guided_runs(self) -> Iterator[tuple[Tensor, Tensor, float, int | None]]:
        """Recorded guided generations: tokens, logits, scale, interval."""
        io, meta = self.fixture.io, self.fixture.meta
        if meta["kind"] in IMAGES:
            for run, interval in (("cfg", None), ("cfg_interval", "cfg_interval"), ("cfg_interval0", "cfg_interval0")):
                name = f"greedy_{run}"
                tokens, logits = io[f"{name}.tokens"], io[f"{name}.logits"].flatten(1, -2)
                yield tokens, logits, meta["cfg_scale"], meta[interval] if interval else None
        elif meta["kind"] == "nar-c2v":
            for name, scale, interval in (
                ("greedy_cfg1.25", 1.25, None),
                ("greedy_cfg2.5", 2.5, None),
                ("greedy_cfg2.5_interval", 2.5, meta["cfg_interval"]),
            ):
                yield io[name], io[f"{name}_logits"] if f"{name}_logits" in io else torch.empty(0), scale, interval


def cases(*kinds: str) -> list[Case]:
    return [
        Case(fixture, attention)
        for fixture in fixtures(*kinds)
        for attention in (("causal", "full") if fixture.meta["kind"] == "nar-fp" else ("causal",))
    ]


def decoded_logits(model: Transformer, codes: Tensor, condition: Condition) -> Tensor:
    """Logits (B, N, V) in raster order as decoding computes them, front by front, when `codes` are what was drawn."""
    embedded, key_mask = model.embed(condition)
    cache, tokens = model.new_cache(len(embedded)), model.in_order(codes)
    hidden = [model.prefill(embedded, key_mask, cache)]
    schedule = model.layout.schedule
    for front in range(schedule.num_steps - 1):
        hidden.append(model.decode(tokens[:, : schedule.front(front).stop], range(front, front + 1), cache))
    logits = model.logits(torch.cat(hidden, 1))
    raster = torch.empty_like(logits)
    raster[:, schedule.order] = logits
    return raster


def check_training(case: Case, model: Transformer) -> None:
    recorded = case.recorded("train.logits", "logits")
    logits = model(case.codes, case.condition).flatten(1, -2)
    torch.testing.assert_close(logits, recorded, **LOGITS)
    losses = F.cross_entropy(logits.transpose(1, 2), case.codes.flatten(1), reduction="none")  # (B, N)
    torch.testing.assert_close(losses.mean().reshape(1), case.recorded("train.loss", "loss").reshape(1), **LOGITS)
    if case.fixture.meta["kind"] in IMAGES:
        valid, recorded = case.fixture.io["train.valid"], case.fixture.io["train.loss_valid"]
        loss = (losses * valid[:, None]).sum() / max(float(valid.sum()) * losses.shape[1], 1.0)
    else:
        loss, recorded = losses[0].mean(), case.recorded("", "loss_valid_first")
    torch.testing.assert_close(loss.reshape(1), recorded.reshape(1), **LOGITS)


@pytest.mark.parametrize("case", cases(*IMAGES, *VIDEOS), ids=str)
def test_training_logits_and_loss(case: Case) -> None:
    with torch.no_grad():
        check_training(case, case.model())


@pytest.mark.parametrize("case", cases(*IMAGES, "nar-c2v"), ids=str)
def test_training_logits_of_the_null_condition(case: Case) -> None:
    with torch.no_grad():
        logits = case.model()(case.codes, case.null).flatten(1, -2)
    torch.testing.assert_close(logits, case.recorded("train.null_logits", "logits_null"), **LOGITS)


@pytest.mark.parametrize("case", cases(*IMAGES, *VIDEOS), ids=str)
def test_prefill_and_decode_logits(case: Case) -> None:
    model, io = case.model(), case.fixture.io
    with torch.no_grad():
        if "decode_logits_forced" in io:
            logits = decoded_logits(model, case.codes, case.condition)
            torch.testing.assert_close(logits, case.recorded("", "decode_logits_forced"), **LOGITS)
        greedy = case.recorded("greedy.tokens", "greedy").reshape(-1, *case.grid)
        logits = decoded_logits(model, greedy, case.condition)
    torch.testing.assert_close(logits, case.recorded("greedy.logits", "greedy_logits"), **LOGITS)
    torch.testing.assert_close(logits[:, 0], case.recorded("prefill.logits", "prefill_logits").flatten(1), **LOGITS)


@pytest.mark.parametrize("case", cases(*IMAGES, *VIDEOS), ids=str)
def test_greedy_tokens(case: Case) -> None:
    codes = generate(case.model(), case.condition, Sampling(temperature=0))
    assert torch.equal(codes.flatten(1), case.recorded("greedy.tokens", "greedy").long())


@pytest.mark.parametrize("case", cases(*IMAGES, "nar-c2v"), ids=str)
def test_guided_greedy_tokens_and_logits(case: Case) -> None:
    model = case.model()
    order = model.layout.order
    for tokens, recorded, scale, interval in case.guided_runs():
        sampling = Sampling(temperature=0, guidance_scale=scale, guidance_interval=interval)
        codes = generate(model, case.condition, sampling)
        assert torch.equal(codes.flatten(1), tokens.long()), f"scale {scale}, interval {interval}"
        if not recorded.numel():
            continue
        with torch.no_grad():
            with_condition = decoded_logits(model, codes, case.condition)
            without = decoded_logits(model, codes, case.null)
        generated = torch.empty(math.prod(case.grid), dtype=torch.long)  # when each position's front begins
        start = 0
        for count in model.layout.schedule.fronts:
            generated[order[start : start + count]] = start
            start += count
        guided = torch.ones_like(generated, dtype=torch.bool) if interval is None else generated <= interval
        logits = torch.where(guided[:, None], without + (with_condition - without) * scale, with_condition)
        torch.testing.assert_close(logits, recorded, atol=2e-4 * max(1.0, scale), rtol=0)


@pytest.mark.parametrize("case", cases(*IMAGES, *VIDEOS), ids=str)
def test_weights_changed_by_one_percent_are_noticed(case: Case) -> None:
    with torch.no_grad(), pytest.raises(AssertionError):
        check_training(case, case.model(change=1.01))
