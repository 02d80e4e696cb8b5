"""Intervals and tests for arms that were trained with a few seeds each and measured on the same pictures.

Two things vary: the seed of a training, of which there are few, and the picture, of which there are thousands. An
interval over seed means uses Student's t, as a bootstrap over 3 seeds covers 78 % where it says 95; it holds for the
pictures at hand. The spread over pictures stands beside it, and says what other pictures would change. Knows numbers;
does not know models or tables. Dimensions: S seeds, M pictures, A arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.95
TIED = 1e-9  # of a mean: seeds that differ by less are one number, and say nothing of how far others would lie


@dataclass(frozen=True)
class Estimate:
    """A mean, with what is known of how far it may be off.

    Attributes:
        mean: over seeds and pictures.
        seeds: the 95 % interval by Student's t over seed means; None of a single seed, and where they tie.
        pictures: the 95 % interval over pictures, of means over seeds; None where there are no numbers by picture.
        p: two-sided, of a mean of 0, by Student's t over seed means; None as `seeds` is.
        num_seeds: of the mean; of a difference those that both arms have.
    """

    mean: float
    seeds: tuple[float, float] | None = None
    pictures: tuple[float, float] | None = None
    p: float | None = None
    num_seeds: int = 1

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval to judge by: over seeds, or over pictures where one seed is all there is."""
        return self.seeds or self.pictures


def estimate(values: Sequence[float] | np.ndarray, pictures: np.ndarray | None = None) -> Estimate:
    """The mean of `values` (S,), one a seed; `pictures` (S, M) are what they are means of, if known."""
    values = np.asarray(values, np.float64)
    mean, seeds, p = float(values.mean()), None, None
    if len(values) > 1 and (mean == 0 or np.ptp(values) > TIED * abs(mean)):
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
        seeds = _around(mean, error, len(values) - 1)
        p = two_sided(mean / error, len(values) - 1) if error else 1.0
    return Estimate(mean, seeds, None if pictures is None else over_pictures(pictures.mean(0)), p, len(values))


def difference(
    values: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    pictures: tuple[np.ndarray, np.ndarray] | None = None,
) -> Estimate:
    """How an arm differs from the baseline, (S,) each, paired by seed; `pictures`, twice (S, M), paired by picture."""
    paired = None if pictures is None else np.subtract(*(part.astype(np.float64) for part in pictures))
    return estimate(np.subtract(values, baseline), paired)


def over_pictures(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (M,), which are independent of each other."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return _around(float(values.mean()), error, max(1, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values so that the chance of any false positive among them is at most the level (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def two_sided(t: float, degrees: int) -> float:
    """The probability that Student's t with so many degrees of freedom is as far from 0 as `t`.

    The finite series for whole degrees, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    factors = [(k - 1) / k * cosine**2 for k in range(2 + odd, degrees - 1, 2)]
    series = float(np.cumprod([1.0, *factors]).sum()) if degrees > 1 else 0.0
    within = 2 / math.pi * (angle + sine * cosine * series) if odd else sine * series
    return min(1.0, max(0.0, 1 - within))


@cache
def quantile(degrees: int, level: float = LEVEL) -> float:
    """The t within which Student's t with so many degrees of freedom lies with probability `level`."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 - two_sided(middle, degrees) > level else (middle, high)
    return high


def _around(mean: float, error: float, degrees: int) -> tuple[float, float]:
    return mean - quantile(degrees) * error, mean + quantile(degrees) * error
