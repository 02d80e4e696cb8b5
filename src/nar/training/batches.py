"""Batches: which samples make the batch of a step, and the random numbers of each, by name.

All of it is a function of (seed, step, position in the batch), the same for any number of processes and pieces. Knows
rows and numbers; does not know what a number picks. Legend: `b` samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# The column of each number that is drawn for a sample. Two names share one only where no sample needs both: a model's
# and a tokenizer's, and a crop's and a loop's (see `data.augment`). Give a new name a column of its own at the end:
# columns from 6 on are streams of their own, so that those before them stay what they are.
_MODEL = {"condition_dropout": 0, "view": 1, "wording": 2, "given_frames": 3, "frame_dropout": 4, "scene": 5}
_TOKENIZER = {"crop_side": 0, "crop_left": 1, "crop_top": 2, "mirror": 3, "loop_start": 0, "loop_direction": 1}
DRAWS = _MODEL | _TOKENIZER | {"shift_down": 2, "shift_right": 4, "codes": 5, "window_start": 6, "hole": 7}
_TOGETHER = 6  # columns that one stream draws


@dataclass(frozen=True)
class Draws:
    """Uniform numbers in [0, 1) of samples, by the names in `DRAWS`: `draws[name]` is (b,) float32."""

    values: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        column: np.ndarray = self.values[:, DRAWS[name]]
        return column

    def samples(self) -> Iterator[dict[str, float]]:
        """The numbers of each sample by name."""
        return ({name: float(row[column]) for name, column in DRAWS.items()} for row in self.values)


@dataclass(frozen=True)
class Batch:
    """Samples of one piece of `step`: rows of the training set (b,), and what is drawn for each.

    Row i of `draws` belongs to sample i wherever it is computed: whatever a task picks for a sample, it picks by these.
    """

    indices: np.ndarray
    draws: Draws
    step: int


def batch_of(seed: int, step: int, *, num_samples: int, batch_size: int) -> Batch:
    """The whole batch of `step`: a new order of the data each epoch, the incomplete last batch dropped.

    A set smaller than a batch is repeated in it.
    """
    per_epoch = max(1, num_samples // batch_size)
    order = _permutation(num_samples, seed, step // per_epoch)
    start = step % per_epoch * batch_size
    rows = np.resize(order, max(batch_size, num_samples))[start : start + batch_size]
    together = np.random.default_rng((seed, step, 2)).random((batch_size, _TOGETHER), dtype=np.float32)
    streams = (np.random.default_rng((seed, step, 3, column)) for column in range(_TOGETHER, max(DRAWS.values()) + 1))
    alone = [stream.random((batch_size, 1), dtype=np.float32) for stream in streams]
    return Batch(rows, Draws(np.concatenate((together, *alone), axis=1)), step)


def pieces(batch: Batch, *, rank: int, count: int, accumulate: int) -> list[Batch]:
    """Process `rank`'s share of a batch that `count` processes compute, in `accumulate` pieces."""
    size = len(batch.indices) // (count * accumulate)
    parts = [slice(start, start + size) for start in range(rank * size, len(batch.indices), count * size)]
    return [Batch(batch.indices[part], Draws(batch.draws.values[part]), batch.step) for part in parts]


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_samples)
