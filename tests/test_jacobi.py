"""Jacobi decoding of raster models: equal to sampling one token after the other, in fewer passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import make_condition, make_model
from nar import ClassCondition, Sampling, generate
from nar.bench import Setup, bench_folder, bench_preset
from nar.bench.jacobi import jacobi
from nar.sampling import probabilities

SETTINGS = (
    Sampling(),
    Sampling(guidance_scale=2.0, guidance_curve="linear", top_k=9),
    Sampling(guidance_scale=1.5, temperature=0.7, top_p=0.9),
    Sampling(temperature=0),
)


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda settings: f"{settings.guidance_scale}-{settings.top_k}")
def test_codes_are_those_of_generate(sampling: Sampling, window: int | None) -> None:
    model = make_model("raster")
    condition = make_condition(model, 3)
    expected = generate(model, condition, sampling, seed=4)
    found = jacobi(model, condition, sampling, window=window, seed=4)
    assert torch.equal(found.codes, expected)
    assert found.passes <= model.layout.schedule.num_positions
    assert (found.passes == model.layout.schedule.num_positions) or window != 1
    alone = jacobi(model, condition.rows(slice(1, 2)), sampling, window=window, seed=4, indices=[1])
    assert torch.equal(alone.codes, expected[1:2])
    assert alone.passes <= found.passes


def test_gumbel_numbers_give_the_same_codes_in_any_window_and_fewer_passes() -> None:
    """A model whose tokens hardly depend on those before: drafts are right at once."""
    model = make_model("raster", grid=(6, 6))
    with torch.no_grad():
        model.tokens.weight.mul_(0.1)
    condition = make_condition(model, 4)
    one_by_one = jacobi(model, condition, noise="gumbel", window=1, seed=1)
    for window in (5, None):
        found = jacobi(model, condition, noise="gumbel", window=window, seed=1)
        assert torch.equal(found.codes, one_by_one.codes)
        assert found.passes < one_by_one.passes == 36


def test_gumbel_numbers_give_the_distribution_of_the_model() -> None:
    model = make_model("raster", grid=(1, 2), vocab_size=6)
    sampling, count = Sampling(temperature=0.8), 20_000
    labels = torch.ones(count, dtype=torch.long)
    codes = jacobi(model, ClassCondition(labels), sampling, noise="gumbel", seed=2).codes.flatten(1)
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        logits = model(pairs.view(-1, 1, 2), ClassCondition(torch.ones(36, dtype=torch.long))).flatten(1, 2)
    shares = probabilities(logits, sampling.temperature)
    expected = count * shares[:, 0].gather(1, pairs[:, :1])[:, 0] * shares[:, 1].gather(1, pairs[:, 1:])[:, 0]
    seen = torch.bincount(codes[:, 0] * 6 + codes[:, 1], minlength=36)
    likely = expected > 5
    statistic = float(((seen - expected).square() / expected)[likely].sum())
    assert statistic < 35 + 5 * 70**0.5  # 35 degrees of freedom, five standard deviations


def test_the_bench_has_a_row_of_it(tmp_path: Path) -> None:
    model = make_model("raster", grid=(4, 4))
    model.save_pretrained(tmp_path / "raster")
    rows = bench_folder(tmp_path / "raster", Setup(repetitions=1, pixels=False), ("raster", "jacobi"))
    assert [row.schedule for row in rows] == ["raster", "jacobi"]
    assert rows[0].steps == 16
    assert rows[1].steps == jacobi(model, make_condition(model, 1), noise="gumbel").passes
    make_model("nar").save_pretrained(tmp_path / "nar")
    with pytest.raises(ValueError, match=r"jacobi is of raster models; the schedule of .* is manhattan"):
        bench_folder(tmp_path / "nar", Setup(repetitions=1, pixels=False), ("jacobi",))
    with pytest.raises(ValueError, match="give a folder of weights"):
        bench_preset("NAR-B", Setup(), ("jacobi",))


def test_what_is_no_raster_model_is_refused() -> None:
    with pytest.raises(ValueError, match="of raster models; this one's schedule is manhattan"):
        jacobi(model := make_model("nar"), make_condition(model, 1))
    model = make_model("raster")
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        jacobi(model, make_condition(model, 1), window=0)
    with pytest.raises(ValueError, match="leave guidance_interval out"):
        jacobi(model, make_condition(model, 1), Sampling(guidance_scale=2.0, guidance_interval=3))
