"""Numbers of two sets: what is 0 is 0, what few pictures do not allow is left out, intervals are as wide as true."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from nar.metrics import evaluate
from nar.metrics.detectors import Detected
from nar.metrics.features import SPLIT, FeatureSet, Reservoir
from nar.metrics.frechet import (
    Statistics,
    density_coverage,
    feature_statistics,
    frechet_distance,
    frechet_influence,
    kernel_distance,
    nearest,
    precision_recall,
    resampled_kernel_distance,
    score_of_splits,
    split_score,
)
from nar.metrics.reconstruction import frechet_distances
from nar.metrics.scores import mean_interval, scores


class Projections:
    """Features, spatial ones and probabilities that are linear in the pixels."""

    label, digest, num_features, ddof = "Projections", "projections", 6, 1

    def name(self, metric: str) -> str:
        return metric

    def __call__(self, images: Tensor) -> Detected:
        pixels = images.float().flatten(1) / 255
        weight = torch.randn(pixels.shape[1], 20, generator=torch.Generator().manual_seed(0))
        rows = pixels @ weight
        return Detected(rows[:, :6], rows[:, 6:10], rows[:, 10:].softmax(1))


def features(rows: Tensor, **more: object) -> FeatureSet:
    return FeatureSet(len(rows), (8, 8), feature_statistics([rows]), rows, np.arange(len(rows)), **more)


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def numbers(report: dict[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in report.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", number) for inner, number in numbers(value))
        elif isinstance(value, list):
            yield from ((name, number) for number in value if isinstance(number, float))
        elif isinstance(value, float):
            yield name, value


@pytest.mark.parametrize(("count", "width"), [(2, 320), (50, 320), (600, 320), (40, 3)])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_a_set_is_at_no_distance_from_itself(count: int, width: int, shift: float) -> None:
    """In any order and cut into any batches, whatever the rank; and another set is, the same from either side."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(count, width, generator=generator) * 0.3 + shift).relu()
    first, shuffled = feature_statistics(rows.split(64)), feature_statistics(rows.flip(0).split(7))
    assert frechet_distance(first, first) == frechet_distance(first, shuffled) == frechet_distance(shuffled, first) == 0
    other = feature_statistics([rows + 1e-3])
    assert frechet_distance(first, other) == pytest.approx(1e-6 * width, rel=1e-3)
    assert frechet_distance(other, first) == pytest.approx(frechet_distance(first, other), rel=1e-9)
    _, intervals = scores(features(rows), features(rows.flip(0)), Projections(), resamplings=50)
    assert intervals["FD"][0] == 0
    assert 0 <= intervals["FD"][1] < 1e-6


def test_what_comes_back_unchanged_is_at_no_distance() -> None:
    found = frechet_distances(pictures(30, 1), pictures(30, 1), lambda images: Projections()(images).pooled)
    assert found["all"] == (0, 30, 30)
    assert found["reconstructed"] == found["real"]
    assert found["real"][0] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("other", [2, 3, 5])
def test_few_pictures_give_no_nan(count: int, other: int) -> None:
    report = evaluate([pictures(count, 1)], [pictures(other, 2)], detector=Projections(), progress=False)
    assert all(math.isfinite(number) for _, number in numbers(report))
    assert {"FD", "sFD", "IS", "KID"} <= report.keys()
    assert ("KID" in report["interval"]) == (min(count, other) > 2)


def test_every_split_of_the_inception_score_counts_the_same() -> None:
    """The interval against the spread over repeated sets: 20 and 400 pictures, of which the few decide half."""
    generator = torch.Generator().manual_seed(0)
    found, widths = [], []
    for _ in range(200):
        rows = (2 * torch.randn(420, 10, generator=generator)).softmax(1)
        score, influence = score_of_splits([split_score(rows[:400]), split_score(rows[400:])])
        assert score == pytest.approx(np.mean([split_score(part)[0] for part in rows.split(400)]))
        assert influence.mean() == pytest.approx(0, abs=1e-12)
        found.append(score)
        widths.append(influence.std() / len(influence) ** 0.5)
    assert np.mean(widths) == pytest.approx(np.std(found), rel=0.2)


@pytest.mark.filterwarnings("ignore:FD")
def test_a_short_last_split_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nar.metrics.features.SPLIT", 20)
    monkeypatch.setattr(sys.modules["nar.metrics.evaluate"], "SPLIT", 20)  # whose name the function has
    real, reports = pictures(30, 1), {}
    with pytest.warns(
        UserWarning, match="IS is the mean of splits of 20 pictures, as ADM's is, and the last one has 1"
    ):
        reports[41] = evaluate([real], [pictures(41, 2)], detector=Projections(), progress=False, calibration=0)
    for count in (15, 40):
        reports[count] = evaluate([real], [pictures(count, 2)], detector=Projections(), progress=False, calibration=0)
        assert not [text for text in reports[count]["warnings"] if "IS is the mean" in text]
    assert reports[41]["IS"] == pytest.approx((2 * reports[40]["IS"] + 1) / 3)  # one picture's own score is 1
    low, high = np.array(reports[41]["interval"]["IS"]) - reports[41]["IS"]
    assert [low, high] == pytest.approx(np.array(reports[40]["interval"]["IS"]) - reports[40]["IS"], rel=0.6)
    assert SPLIT == 5000


def test_neighbours_of_known_rows() -> None:
    """Rows on a line: 0, 1, 3, 7, 15 and what lies between. Balls reach to the k-th nearest other row."""
    real = torch.tensor([0.0, 1.0, 3.0, 7.0, 15.0])[:, None]
    fake = torch.tensor([0.5, 10.0, 30.0, 31.0, 33.0])[:, None]
    # k = 2: radii 3, 2, 3, 6, 12 of the real rows, 29.5, 20, 3, 2, 3 of the fake ones.
    inside, covered = precision_recall(real, fake, k=2)
    assert inside.tolist() == [True, True, False, False, False]
    assert covered.all()
    density, covered = density_coverage(real, fake, k=2)
    # 0.5 lies in 0..3, -1..3, 0..6; 10 in 1..13, 3..27.
    assert float(density.mean()) == pytest.approx((3 + 2 + 0 + 0 + 0) / 2 / 5)
    assert covered.all()
    distances, places = nearest(fake, real)
    assert places.tolist() == [0, 3, 4, 4, 4]
    assert distances.tolist() == [0.5, 3, 15, 16, 18]


@pytest.mark.parametrize("width", [6, 1280])
def test_balls_of_no_radius_hold_equal_rows(width: int) -> None:
    """Five copies of each row, in any order: float32 puts equal rows up to 5e-7 of their lengths apart."""
    rows = torch.randn(12, width, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    for seed in range(4):
        shuffled = rows[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
        assert all(found.all() for found in precision_recall(rows, shuffled))
        assert not any(found.any() for found in precision_recall(rows, shuffled + 1e-2))


def test_the_divisor_of_a_covariance_is_the_count_less_ddof() -> None:
    rows = torch.tensor([[0.0], [2.0], [4.0]])
    assert [float(feature_statistics([rows], ddof=ddof).covariance[0, 0]) for ddof in (0, 1)] == pytest.approx(
        [8 / 3, 4]
    )
    assert frechet_distance(Statistics(np.zeros(1), np.eye(1), 9), Statistics(np.ones(1), 4 * np.eye(1), 9)) == 2


def test_intervals_of_means_hold_19_of_20() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = mean_interval(generator.normal(size=80), resamplings=200, seed=seed)
        held += low < 0 < high
    assert 180 <= held <= 198


def test_the_kernel_distance_by_hand() -> None:
    """Kernel (x y + 1)^3 of 0 and 1 with 2 and 4: 1 + 729 - 2 (1 + 1 + 27 + 125) / 4; and with the 0 drawn twice."""
    real, fake, ones = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]]), torch.ones(2, 1)
    assert kernel_distance(real, fake) == 653
    counts = torch.cat([ones, torch.tensor([[2.0], [1.0]])], 1)
    assert resampled_kernel_distance(real, fake, (counts, ones.expand(-1, 2))).tolist() == [653, 1 + 729 - 2 * 26]


def test_the_influence_of_a_row_is_the_derivative_by_its_weight() -> None:
    generator = np.random.default_rng(0)
    real, rows = generator.normal(size=(60, 3)), generator.normal(size=(40, 3)) * [1, 2, 0.5] + [0.5, 0, 1]

    def weighted(weights: np.ndarray) -> Statistics:
        mean = weights @ rows
        return Statistics(mean, (rows - mean).T * weights @ (rows - mean), len(rows))

    first, even = feature_statistics([real]), np.full(40, 1 / 40)
    influence = frechet_influence(first, weighted(even), rows)
    for row in (0, 7, 39):
        step = 1e-5 * (np.eye(40)[row] - even)
        slope = (frechet_distance(first, weighted(even + step)) - frechet_distance(first, weighted(even - step))) / 2e-5
        assert influence[row] == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_an_interval_leaves_a_fortieth_out_on_either_side() -> None:
    """Of 1,000 normal contributions: 1.96 of their spread over the root of their number."""
    rows, influence = torch.randn(30, 6), np.random.default_rng(1).normal(size=1000)
    fake = features(rows, score=5.0, score_influence=influence - influence.mean())
    _, intervals = scores(features(rows), fake, Projections(), resamplings=4000)
    half = 1.96 * influence.std() / 1000**0.5
    assert intervals["IS"] == pytest.approx([5 - half, 5 + half], abs=0.06 * half)


def test_intervals_of_neighbours_are_as_wide_as_both_sides_spread() -> None:
    """Over sets anew; by resampling one side they were 0.6 (density) to 0.8 times as wide."""
    generator = torch.Generator().manual_seed(0)
    names = ("precision", "recall", "density")
    found, widths = [], []
    for seed in range(50):
        real, fake = (features(torch.randn(120, 8, generator=generator) + shift) for shift in (0.0, 0.2))
        values, ends = scores(real, fake, Projections(), resamplings=200, seed=seed)
        found.append([values[name] for name in names])
        widths.append([ends[name][1] - ends[name][0] for name in names])
        assert 0 <= ends["coverage"][0] <= values["coverage"] <= ends["coverage"][1] <= 1
    assert np.mean(widths, 0) == pytest.approx(3.92 * np.std(found, 0), rel=0.25)
    few = scores(features(real.rows[:11]), features(fake.rows[:11]), Projections(), resamplings=2)
    assert "precision" in few[0]
    assert "precision" not in few[1]


def test_every_item_of_a_stream_is_kept_as_often() -> None:
    times = np.zeros(40)
    for seed in range(1500):
        kept = Reservoir(10, seed)
        for start in range(0, 40, 8):
            kept.add(np.arange(start, start + 8)[:, None])
        assert [int(item[0]) for item in kept.items] == kept.indices
        times[kept.indices] += 1
    assert times.sum() == 15_000
    assert abs(times / 1500 - 0.25).max() < 0.05  # four and a half times the spread
