"""The statistics of studies on simulated arms: intervals cover what they say, and corrected tests keep their level."""

from __future__ import annotations

import numpy as np
import pytest

from nar.study.statistics import difference, estimate, holm, quantile, two_sided


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (1000, 1.9623)])
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert quantile(degrees) == pytest.approx(expected, abs=1e-4)
    assert two_sided(-expected, degrees) == pytest.approx(0.05, abs=1e-5)
    assert two_sided(0.0, degrees) == 1.0


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def simulated(seeds: int, effects: list[float], studies: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Bits (studies, A, S, M) of arms whose means lie `effects` apart, and the true means (studies, A) on the pictures.

    Pictures differ far more than arms, arms differ in which pictures they find hard, and a seed moves all pictures.
    """
    generator = np.random.default_rng(seeds)
    arms, pictures = len(effects), 24
    of_picture = generator.normal(4.5, 0.8, (studies, 1, 1, pictures))
    of_arm = generator.normal(0, 0.05, (studies, arms, 1, pictures)) + np.array(effects)[:, None, None]
    of_seed = generator.normal(0, 0.03, (studies, arms, seeds, 1)) + generator.normal(0, 0.05, (studies, 1, seeds, 1))
    noise = generator.normal(0, 0.05, (studies, arms, seeds, pictures))
    return of_picture + of_arm + of_seed + noise, (of_picture + of_arm).mean(-1)[..., 0]


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_what_they_say(seeds: int) -> None:
    bits, truth = simulated(seeds, [0.0, 0.1])
    covered = {"arm": 0, "difference": 0}
    for study, true in zip(bits, truth, strict=True):
        means = study.mean(-1)
        low, high = estimate(means[1], study[1]).seeds or (0, 0)
        covered["arm"] += low <= true[1] <= high
        low, high = difference(means[1], means[0], (study[1], study[0])).seeds or (0, 0)
        covered["difference"] += low <= true[1] - true[0] <= high
    assert all(0.93 <= count / len(bits) <= 0.97 for count in covered.values()), covered


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_pictures_cover_other_pictures(seeds: int) -> None:
    """What pictures alone move: with seeds that do not differ, the interval covers the mean over all pictures."""
    generator = np.random.default_rng(7)
    values = generator.normal(0.1, 0.5, (1500, seeds, 200))
    covered = 0
    for pictures in values:
        none = np.zeros_like(pictures)
        low, high = difference(pictures.mean(1), none.mean(1), (pictures, none)).pictures or (0, 0)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / len(values) <= 0.97


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_positives_stay_rare_after_correction(seeds: int) -> None:
    """Six arms against a baseline: without any difference, and with a large one of a single arm, which is found."""
    generator = np.random.default_rng(seeds)
    for effect in (0.0, 2.0):
        means = generator.normal(0, 0.03, (4000, 7, seeds)) + generator.normal(0, 0.05, (4000, 1, seeds))
        means[:, 1] += effect
        wrong = found = 0
        for baseline, *arms in means:
            positive = [p < 0.05 for p in holm([difference(arm, baseline).p or 0.0 for arm in arms])]
            found += positive[0]
            wrong += any(positive[1:] if effect else positive)
        assert wrong / len(means) <= 0.05
        assert found / len(means) > 0.9 if effect else found / len(means) < 0.02


def test_a_single_seed_has_pictures_only() -> None:
    pictures = np.array([[1.0, 2.0, 3.0, 4.0]])
    one = estimate([2.5], pictures)
    assert (one.seeds, one.p) == (None, None)
    assert one.interval == one.pictures == pytest.approx((2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)
    assert estimate([2.5]).interval is None


def test_ties_of_a_coarse_metric_show_nothing() -> None:
    """Two seeds whose precision differs by one picture of 128 in both are no proof; none that differs is as it was."""
    tied = difference([0.7 - 1 / 128, 0.1 - 1 / 128], [0.7, 0.1])
    assert (tied.seeds, tied.p, tied.interval) == (None, None, None)
    assert difference([0.5, 0.3], [0.5, 0.3]).p == 1.0
    assert estimate([1.0, 1.001]).p is not None
