"""The captions of a set of codes as conditions, sample by sample.

Knows codes, captions and where features come from; does not know models or steps. Which of a sample's captions is taken
is decided by a number that comes with the sample, so that it depends on the seed and the step only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar.condition import Condition, TextCondition
from nar.text import Features, TextEncoder, TextEncoderConfig, cached, found
from nar.training.distributed import Workers


class Words:
    """Samples by caption: `wordings` are the ways to say what each shows. An empty one is the null condition."""

    def __init__(self, text: Text, wordings: Sequence[Sequence[str]]) -> None:
        self._text = text
        counts = np.array([len(forms) for forms in wordings], np.int64)
        self._starts, self._counts = counts.cumsum() - counts, counts
        self._places = text.places([form for forms in wordings for form in forms])

    def read(self, rows: np.ndarray, draws: np.ndarray | None = None) -> Condition:
        """The condition of some samples, on the CPU or the encoder's device; `draws` (b,) in [0, 1) pick a wording of
        each, None the first."""
        picked = 0 if draws is None else (np.asarray(draws) * self._counts[rows]).astype(np.int64)
        return self._text.condition(self._places[self._starts[rows] + picked])


def dropped(condition: Condition, uniforms: Tensor, rate: float) -> Condition:
    """Drop class and words of the samples with `uniforms` (b,) in [0, 1) below `rate`.

    Of the others, where there are both, half keep the words alone, an eighth the class alone, and the rest both: a
    model is asked in all of these ways, mostly by words, which are harder to learn.
    """
    null = uniforms < rate
    if condition.labels is None or condition.text is None:
        return condition.drop(null)
    rest = (uniforms - rate) / max(1 - rate, 1e-6)
    return condition.drop(null | (rest < 1 / 2), text=null | ((rest >= 1 / 2) & (rest < 5 / 8)))


class Text:
    """The encoder of a training and what it made of all captions, which are numbered, on disk or in each step anew."""

    def __init__(
        self,
        config: TextEncoderConfig,
        captions: Sequence[str],
        *,
        kind: str,
        folders: Sequence[Path],
        workers: Workers,
    ) -> None:
        """Where `kind` is "cached", encode those of `captions` that none of `folders` has, into the last of them."""
        self._numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        self._captions = list(self._numbers)
        self._encoder: TextEncoder | None = None
        there = [features for folder in folders for features in found(config, folder)] if kind == "cached" else []
        workers.wait()  # so that all have seen the same before one writes
        by_config = [[part for part in there if part.config == one] for one in {part.config: 0 for part in there}]
        self._features = next((parts for parts in by_config if not self._missing(parts)), [])
        if not self._features:
            fast = kind == "on-the-fly" and workers.device.type == "cuda"
            dtype = torch.bfloat16 if fast else None
            self._encoder = encoder = TextEncoder(config, device=workers.device, dtype=dtype)
            if kind == "cached":
                of_one = [features for features in there if features.config == encoder.config]
                missing = self._missing(of_one)
                cached(encoder, workers.share_of(missing), folders[-1], quiet=not workers.first)
                encoder.close()
                workers.wait()
                self._features, self._encoder = [*of_one, cached(encoder, missing, folders[-1])], None
        opened = self._features[0] if self._features else self._encoder
        assert opened is not None
        self.config, self.dim = opened.config, opened.dim
        self._blank = torch.tensor([not self.config.prepare(caption) for caption in self._captions])
        self._owners = np.zeros(len(self._captions), np.int64)  # which of the features has a caption
        for number, caption in enumerate(self._captions if self._features else ()):
            self._owners[number] = next(index for index, part in enumerate(self._features) if caption in part)

    def _missing(self, features: Sequence[Features]) -> list[str]:
        return [caption for caption in self._captions if not any(caption in part for part in features)]

    def places(self, captions: Sequence[str]) -> np.ndarray:
        """The numbers of captions."""
        return np.array([self._numbers[caption] for caption in captions], np.int64)

    def condition(self, places: np.ndarray) -> Condition:
        """The captions of these numbers as a condition."""
        if self._encoder is not None:
            features, mask = self._encoder.encode([self._captions[place] for place in places])
        else:
            features = torch.zeros(len(places), self.config.max_length, self.dim)
            mask = torch.zeros(features.shape[:2], dtype=torch.bool)
            for owner in np.unique(self._owners[places]):
                rows = np.flatnonzero(self._owners[places] == owner)
                captions = [self._captions[place] for place in places[rows]]
                features[rows], mask[rows] = self._features[owner].read(captions)
        null: Tensor = self._blank[torch.from_numpy(places)]
        return TextCondition(features, mask, null.to(features.device))
