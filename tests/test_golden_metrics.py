"""Metrics and caption cleaning against numbers recorded from published code, then against known answers."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_fixtures import Fixture, fixtures
from nar.metrics import frechet
from nar.metrics.frechet import (
    Statistics,
    density_coverage,
    feature_statistics,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbour_radii,
    precision_recall,
    score_of_splits,
    split_score,
)
from nar.metrics.networks.inception import POOLED_DIMS, Inception, load_inception, resize_tensorflow1
from nar.text import clean_caption, prepare_caption


def inception_score(probabilities: Tensor, split_size: int = 5000) -> float:
    return score_of_splits([split_score(part) for part in probabilities.split(split_size)])[0]


def means(pair: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float(pair[0].double().mean()), float(pair[1].double().mean())


def check_image_metrics(fixture: Fixture) -> None:
    real, fake = fixture.io["ref_acts"], fixture.io["sample_acts"]
    distance = frechet_distance(feature_statistics([real]), feature_statistics(fake.split(50)))
    assert distance == pytest.approx(fixture.meta["fid"], rel=1e-6)
    scores = {key: value for key, value in fixture.meta.items() if key.startswith("inception_score_split")}
    assert scores
    for key, score in scores.items():
        split_size = int(key.removeprefix("inception_score_split"))
        assert inception_score(fixture.io["probs"], split_size=split_size) == pytest.approx(score, rel=1e-5)
    k = fixture.meta["k"]
    for name, features in (("ref", real), ("sample", fake)):
        radii = neighbour_radii(features, k, name)
        np.testing.assert_allclose(radii, fixture.io[f"radii_{name}"].flatten(), rtol=1e-4)
    precision, recall = means(precision_recall(real, fake, k=k))
    assert precision == pytest.approx(fixture.meta["precision"], abs=1e-9)
    assert recall == pytest.approx(fixture.meta["recall"], abs=1e-9)


def check_video_distance(fixture: Fixture) -> None:
    names = sorted({key.split(".")[0] for key in fixture.io})
    assert names
    for name in names:
        sets = {}
        for part in ("gen", "real"):
            sets[part] = feature_statistics(fixture.io[f"{name}.{part}"].split(4), ddof=0)
            np.testing.assert_allclose(sets[part].mean, fixture.io[f"{name}.{part}_mean"], atol=1e-7)
            np.testing.assert_allclose(sets[part].covariance, fixture.io[f"{name}.{part}_cov"], atol=1e-6)
        expected = fixture.meta[name]["fvd"]
        assert float(fixture.io[f"{name}.fvd"]) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(sets["gen"], sets["real"]) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(sets["gen"], sets["gen"]) == 0


def check_captions(fixture: Fixture) -> None:
    cases = fixture.meta["cases"]
    assert cases
    assert {case["in"]: prepare_caption(case["in"]) for case in cases} == {case["in"]: case["out"] for case in cases}


def check_inception(fixture: Fixture, outputs: dict[str, Tensor]) -> None:
    for key, value in outputs.items():
        torch.testing.assert_close(value, fixture.io[key], atol=2e-4, rtol=1e-3, msg=lambda text, k=key: f"{k}: {text}")


def inception_outputs(fixture: Fixture, change: float = 1.0) -> dict[str, Tensor]:
    """What the network with the fixture's weights, times `change`, makes of its pictures, by the recorded names."""
    network = Inception()
    state = generated_weights({key: tuple(shape) for key, shape in fixture.meta["keys"]}, fixture.meta["seed"])
    assert sum(parameter.numel() for parameter in network.parameters()) == fixture.meta["num_parameters"]
    own = {key: tuple(value.shape) for key, value in network.state_dict().items() if "num_batches" not in key}
    assert own == {key: tuple(value.shape) for key, value in state.items()}
    for key, head in fixture.io.items():
        if key.startswith("weight."):
            torch.testing.assert_close(state[key.removeprefix("weight.")].flatten()[: len(head)], head, atol=0, rtol=0)
    network.load_state_dict({key: value * change for key, value in state.items()}, strict=False)

    generator = torch.Generator().manual_seed(fixture.meta["seed"] + 1)
    sets = {"a": torch.randint(0, 256, (2, 3, 299, 299), generator=generator, dtype=torch.uint8)}
    sets |= {key[0]: value for key, value in fixture.io.items() if key.endswith(".images")}
    outputs = {}
    for name, images in sets.items():
        with torch.no_grad():
            output = network(images)
        produced = {str(dim): output.pooled[dim] for dim in POOLED_DIMS}
        produced |= {"spatial": output.spatial, "logits": output.logits, "logits_unbiased": output.logits_unbiased}
        outputs |= {f"{name}.{key}": value for key, value in produced.items()}
    return outputs


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("eval-metrics"), ids=str)
def test_image_metrics(fixture: Fixture) -> None:
    check_image_metrics(fixture)


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("fvd"), ids=str)
def test_video_distance(fixture: Fixture) -> None:
    check_video_distance(fixture)


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("caption-clean"), ids=str)
def test_cleaned_captions(fixture: Fixture) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    check_captions(fixture)


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("inception"), ids=str)
def test_inception_network(fixture: Fixture) -> None:
    outputs = inception_outputs(fixture)
    check_inception(fixture, outputs)
    for name in outputs:  # every recorded output, changed by one percent
        with pytest.raises(AssertionError, match=name):
            check_inception(fixture.changed(io={**fixture.io, name: fixture.io[name] * 1.01}), outputs)
    with pytest.raises(AssertionError):
        check_inception(fixture, inception_outputs(fixture, change=1.01))


def changed_by_one_percent(numbers: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A copy for each number but 0 or tensor of numbers (also in nested dicts), with that one changed."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", {**numbers, name: inner}) for key, inner in changed_by_one_percent(value))
        elif (isinstance(value, float) and value) or (isinstance(value, Tensor) and value.is_floating_point()):
            yield name, {**numbers, name: value * 1.01}


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("eval-metrics", "fvd"), ids=str)
def test_metrics_notice_one_percent(fixture: Fixture) -> None:
    check = check_image_metrics if fixture.meta["kind"] == "eval-metrics" else check_video_distance
    parts = [(name, {"meta": meta}) for name, meta in changed_by_one_percent(fixture.meta)]
    parts += [(name, {"io": io}) for name, io in changed_by_one_percent(fixture.io)]
    assert parts
    unnoticed = []
    for name, part in parts:
        if name.endswith("fvd_self"):  # zero up to rounding, whatever it is multiplied with
            continue
        try:
            check(fixture.changed(**part))
        except AssertionError:
            continue
        unnoticed.append(name)
    assert not unnoticed


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("caption-clean"), ids=str)
def test_one_changed_letter_is_noticed(fixture: Fixture) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    cases = [dict(case) for case in fixture.meta["cases"]]
    longest = max(cases, key=lambda case: len(case["out"]))
    longest["out"] = longest["out"][:-1] + "#"
    with pytest.raises(AssertionError):
        check_captions(fixture.changed(meta={"cases": cases}))


def generated_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """The recipe of the fixture's json: one generator over the sorted keys."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith("running_var"):
            state[key] = torch.rand(shape, generator=generator) * 0.5 + 0.75
            continue
        noise = torch.randn(shape, generator=generator)
        if key.endswith("running_mean"):
            state[key] = noise * 0.1
        elif len(shape) == 4:
            state[key] = noise * math.sqrt(2 / math.prod(shape[1:]))
        elif len(shape) == 2:
            state[key] = noise * 0.01
        elif key.endswith("weight"):
            state[key] = 1 + 0.1 * noise
        else:
            state[key] = 0.05 * noise
    return state


def rows(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_frechet_distance_of_known_gaussians() -> None:
    scales = np.array([1.0, 4.0, 0.0])
    first = Statistics(np.zeros(3), np.diag(scales), 100)
    second = Statistics(np.array([1.0, 2.0, 3.0]), np.diag(scales * 4), 100)
    # the mean's 14 and, on every axis, (2 sqrt(s) - sqrt(s))^2 = s
    assert frechet_distance(first, second) == pytest.approx(14 + 5)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="3 features cannot be compared with 2"):
        frechet_distance(first, Statistics(np.zeros(2), np.eye(2), 9))


@pytest.mark.parametrize("ddof", [0, 1])
def test_statistics_do_not_depend_on_the_batches_or_a_large_mean(ddof: int) -> None:
    data = rows(101, 7, 0).double().numpy() + 1e6
    expected = np.cov(data, rowvar=False, ddof=ddof)
    for size in (1, 10, 101):
        batches = (data[start : start + size] for start in range(0, 101, size))
        found = feature_statistics(batches, ddof=ddof)
        assert found.num_samples == 101
        np.testing.assert_allclose(found.mean, data.mean(0))
        np.testing.assert_allclose(found.covariance, expected, atol=1e-8)


def test_statistics_refuse_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="1 rows give no covariance"):
        feature_statistics([torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="NaN"):
        feature_statistics([torch.zeros(2, 3), torch.full((2, 3), math.nan)])
    with pytest.raises(ValueError, match="2 features a row, the ones before it 3"):
        feature_statistics([torch.zeros(2, 3), torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="must be rows"):
        feature_statistics([torch.zeros(2, 3, 4)])


def test_kernel_distance_equals_the_sum_over_pairs_and_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(left: Tensor, right: Tensor) -> float:
        return float((left.double() @ right.double() / len(left) + 1) ** 3)

    real, fake = rows(9, 4, 0), rows(7, 4, 1, shift=0.5)
    within = [sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) for x in (real, fake)]
    cross = sum(kernel(a, b) for a in real for b in fake)
    expected = within[0] / 72 + within[1] / 42 - 2 * cross / 63
    assert kernel_distance(real, fake) == pytest.approx(expected)
    monkeypatch.setattr(frechet, "BLOCK_NUMBERS", 10)
    assert kernel_distance(real.numpy(), fake.numpy()) == pytest.approx(expected)
    repeated = [kernel_distance(rows(20, 4, 2 * seed), rows(20, 4, 2 * seed + 1)) for seed in range(200)]
    assert abs(np.mean(repeated)) < 4 * np.std(repeated) / math.sqrt(200)
    assert min(repeated) < 0


def test_inception_score_of_known_predictions() -> None:
    assert inception_score(torch.eye(4).repeat(3, 1)) == pytest.approx(4)
    assert inception_score(torch.full((6, 4), 0.25)) == pytest.approx(1)
    assert inception_score(torch.eye(4), split_size=1) == pytest.approx(1)


def test_neighbour_metrics_equal_their_definitions_in_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = rows(40, 3, 0), rows(30, 3, 1, shift=0.7)
    between = torch.cdist(fake.double(), real.double())  # (fake, real)
    radii = {
        name: torch.cdist(x.double(), x.double()).sort(1).values[:, 3] for name, x in (("real", real), ("fake", fake))
    }
    precision = (between <= radii["real"]).any(1).double().mean()
    recall = (between <= radii["fake"][:, None]).any(0).double().mean()
    density = (between < radii["real"]).double().sum() / (3 * 30)
    coverage = (between.amin(0) < radii["real"]).double().mean()
    for block in (frechet.BLOCK_NUMBERS, 100):
        monkeypatch.setattr(frechet, "BLOCK_NUMBERS", block)
        assert means(precision_recall(real, fake, k=3)) == pytest.approx((float(precision), float(recall)))
        assert means(density_coverage(real, fake, k=3)) == pytest.approx((float(density), float(coverage)))
        torch.testing.assert_close(nearest(fake, real)[0], between.amin(1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="k = 40 with 40 real rows"):
        density_coverage(real, fake, k=40)
    with pytest.raises(ValueError, match="made by one network"):
        precision_recall(real, fake[:, :2])


def test_coverage_of_equal_distributions_follows_the_number_of_rows() -> None:
    for num_real, expected in ((1000, 1 - 0.5**5), (2000, 1 - (2 / 3) ** 5)):
        _, coverage = means(density_coverage(rows(num_real, 2, 0), rows(1000, 2, 1)))
        assert coverage == pytest.approx(expected, abs=0.02)


def test_tensorflow_resize_starts_at_the_first_pixel() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    doubled = resize_tensorflow1(ramp, 8)
    assert doubled[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resize_tensorflow1(ramp, 2)[0, 0, 0].tolist() == [0, 2]
    assert resize_tensorflow1(ramp, 4) is ramp


def test_inception_weights_load_with_or_without_counters_and_strictly(tmp_path: Path) -> None:
    state = Inception().state_dict()
    path = tmp_path / "inception.pth"
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, path)
    loaded = load_inception(path)
    assert not loaded.training
    torch.testing.assert_close(loaded.fc.weight, state["fc.weight"])
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not the 2015 Inception network"):
        load_inception(path)
    for damaged in (b"not weights", b"\x80", b"(" * 1000, pickle.dumps([print], 2), pickle.dumps({"a": 1}, 2)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"inception\.pth") as refused:
            load_inception(path)
        assert "\n" not in str(refused.value)
        assert "weights_only" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="pytorch-fid"):
        load_inception(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        loaded(torch.zeros(1, 1, 8, 8))


def test_cleaning_without_its_libraries_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs ftfy: pip install nar-gen\[text\]"):
        clean_caption("a cat")
