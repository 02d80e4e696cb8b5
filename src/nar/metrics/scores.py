"""Every number that two sets of features allow, and how far each could be off.

It knows features only; it does not know pictures, networks or reports. Dimensions: n kept rows, R resamplings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nar.metrics.detectors import Detector
from nar.metrics.features import FeatureSet
from nar.metrics.frechet import (
    Statistics,
    density_coverage,
    frechet_distance,
    frechet_influence,
    precision_recall,
    resampled_kernel_distance,
)

KERNEL_ROWS = 5_000  # rows of each set that the kernel distance compares: all pairs, so the cost is its square
KERNEL_RESAMPLINGS = 100
GROUPS, PARTITIONS = 4, 8  # for the intervals of `_neighbours`: of 500 rows a side they cover 0.94 to 0.96
MOTION = "frame difference"  # of clips, in levels of 0..255


def scores(
    real: FeatureSet, fake: FeatureSet, detector: Detector, *, resamplings: int = 0, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Every number that two sets allow, by its name, and where it is wanted its 95 % interval.

    What can't be computed of so few pictures is left out.
    """
    generator = np.random.default_rng(seed)
    numbers: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}

    def put(name: str, value: float, sides: Iterable[tuple[np.ndarray, int]] = (), least: float = -math.inf) -> None:
        """A number, and how pictures move it: of each side those that were kept, and how many there are."""
        numbers[detector.name(name)] = float(value)
        moves = []
        for values, count in sides if resamplings else ():
            spread = _resampled_means(values, resamplings, generator) - values.mean()
            moves.append(spread * (len(values) / max(count, len(values))) ** 0.5)
        if moves:
            ends = np.quantile(value + sum(moves), (0.025, 0.975))
            intervals[detector.name(name)] = [max(least, float(end)) for end in ends]

    def put_frechet(
        name: str, left: Statistics, right: Statistics, left_rows: Tensor | None, right_rows: Tensor | None
    ) -> None:
        ways = [(left, right, right_rows, fake.num_images), (right, left, left_rows, real.num_images)]
        sides = (
            (frechet_influence(a, b, rows), number) for a, b, rows, number in ways if rows is not None and len(rows)
        )
        put(name, frechet_distance(left, right), sides, least=0.0)

    put_frechet("FD", real.pooled, fake.pooled, real.rows, fake.rows)
    if real.spatial is not None and fake.spatial is not None:
        put_frechet("sFD", real.spatial, fake.spatial, real.spatial_rows, fake.spatial_rows)
    if fake.score is not None:
        put("IS", fake.score, [] if (moves := fake.score_influence) is None else [(moves, len(moves))])
    if fake.motion is not None:
        numbers[MOTION] = float(fake.motion.mean())
        if resamplings:
            intervals[MOTION] = mean_interval(fake.motion, resamplings=resamplings, seed=seed)
    if len(real.rows) < 2 or len(fake.rows) < 2:
        return numbers, intervals
    some = [rows[torch.from_numpy(some_places(len(rows), KERNEL_ROWS, seed))] for rows in (real.rows, fake.rows)]
    weights = [_counts(len(rows), KERNEL_RESAMPLINGS if resamplings else 0, generator) for rows in some]
    distances = resampled_kernel_distance(some[0], some[1], (weights[0], weights[1]))
    put("KID", float(distances[0]))
    if resamplings and min(map(len, some)) > 2:  # of two, half of the resamplings hold one row twice: no pair
        spread = 1.96 * float(distances[1:][distances[1:].isfinite()].std())
        intervals[detector.name("KID")] = [float(distances[0]) - spread, float(distances[0]) + spread]
    spreads = _neighbour_spreads(real.rows, fake.rows, generator) if resamplings else {}
    for name, value in _neighbours(real.rows, fake.rows).items():
        put(name, value)
        if name in spreads:
            low, high = value - 1.96 * spreads[name], value + 1.96 * spreads[name]
            intervals[detector.name(name)] = [max(0.0, low), high if name == "density" else min(1.0, high)]
    return numbers, intervals


def _neighbours(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage, as far as the rows (n, D) allow them."""
    means: dict[str, Tensor] = {}
    if min(len(real), len(fake)) > 3:
        means |= zip(("precision", "recall"), precision_recall(real, fake), strict=True)
    if len(real) > 5:
        means |= zip(("density", "coverage"), density_coverage(real, fake), strict=True)
    return {name: float(rows.double().mean()) for name, rows in means.items()}


def _neighbour_spreads(real: Tensor, fake: Tensor, generator: np.random.Generator) -> dict[str, float]:
    """Standard errors of `_neighbours`, of both sides: the spread over disjoint groups, by the root of their number.

    Resampling one side leaves out what balls add (95 % of density covered 0.74), a jackknife is too wide (0.97 to 1.00
    covered) and ten times as slow. Too narrow in many dimensions. Empty below 12 real or 8 fake rows.
    """
    groups, found = min(GROUPS, len(real) // 6, len(fake) // 4), []
    for _ in range(PARTITIONS if groups > 1 else 0):
        sides = [rows[torch.from_numpy(generator.permutation(len(rows)))].tensor_split(groups) for rows in (real, fake)]
        values = [_neighbours(*pair) for pair in zip(*sides, strict=True)]
        found.append({name: np.var([each[name] for each in values], ddof=1) / groups for name in values[0]})
    return {name: float(np.mean([each[name] for each in found])) ** 0.5 for name in (found[0] if found else ())}


def mean_interval(values: np.ndarray, *, resamplings: int = 1000, seed: int = 0) -> list[float]:
    """The 95 % interval of a mean, by resampling its values."""
    means = _resampled_means(values, resamplings, np.random.default_rng(seed))
    return [float(end) for end in np.quantile(means, (0.025, 0.975))]


def _resampled_means(values: np.ndarray, resamplings: int, generator: np.random.Generator) -> np.ndarray:
    """Means (R,) of R sets drawn from the values with replacement."""
    step = max(1, (1 << 22) // len(values))
    starts = range(0, resamplings, step)
    draws = (generator.integers(0, len(values), (min(step, resamplings - start), len(values))) for start in starts)
    return np.concatenate([values[places].mean(1) for places in draws])


def _counts(num_rows: int, resamplings: int, generator: np.random.Generator) -> Tensor:
    """How often each row is drawn (n, 1 + R): once each in the first column, then in R resamplings."""
    counts = [np.ones(num_rows, np.int64)]
    counts += [np.bincount(generator.integers(0, num_rows, num_rows), minlength=num_rows) for _ in range(resamplings)]
    return torch.from_numpy(np.stack(counts, 1))


def some_places(num_rows: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the rows at random, in order; all where there are no more."""
    if wanted >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:wanted])
