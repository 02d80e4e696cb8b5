"""The sampling filter and the video trainer's recipe give the recorded numbers, and no recorded kind goes untested."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from golden_fixtures import Fixture, asked_kinds, fixtures, folder
from nar.condition import ClassCondition
from nar.convert import Checkpoint, convert, read_checkpoint
from nar.convert.models import model_state
from nar.model import Transformer
from nar.sampling import probabilities
from nar.storage.folder import read_weights
from nar.training.optim import OptimConfig, build_optimizers, learning_rate_factor

pytestmark = pytest.mark.golden


def check_sampling_filter(fixture: Fixture, change: float = 1.0) -> None:
    logits = fixture.io["logits"] * change
    assert fixture.meta["cases"]
    for case in fixture.meta["cases"]:
        found = probabilities(logits, case["temperature"], case["top_k"], case["top_p"])
        recorded = fixture.io[f"probs.{case['i']}"]
        assert torch.equal(found > 0, recorded > 0), case  # which tokens are kept, ties included
        torch.testing.assert_close(found, recorded, atol=1e-6, rtol=1e-5, msg=lambda text, c=case: f"{c}: {text}")


@pytest.mark.parametrize("fixture", fixtures("sampling-filter"), ids=str)
def test_sampling_filter(fixture: Fixture) -> None:
    check_sampling_filter(fixture)


@pytest.mark.parametrize("fixture", fixtures("sampling-filter"), ids=str)
def test_logits_changed_by_one_percent_are_noticed(fixture: Fixture) -> None:
    with pytest.raises(AssertionError):
        check_sampling_filter(fixture, change=1.01)


@pytest.mark.parametrize("fixture", fixtures("sampling-filter"), ids=str)
def test_the_fixture_has_ties(fixture: Fixture) -> None:
    ordered = fixture.io["logits"].sort(-1).values
    assert (ordered.diff() == 0).any()


def checkpoint(fixture: Fixture) -> Checkpoint:
    return read_checkpoint(fixture.path("_final.pth"))


@pytest.mark.parametrize("fixture", fixtures("video-trainer"), ids=str)
def test_optimizer_groups(fixture: Fixture) -> None:
    """Every published tensor is filled with its number, so that ours, some of them joined, tell where they are from."""
    published = checkpoint(fixture)
    names = dict(enumerate(published.tensors))
    numbered = {name: torch.full_like(published.tensors[name], number) for number, name in names.items()}
    config, state = model_state(
        Checkpoint(numbered, published.settings, fixture.name),
        "nar-c2v",
        num_heads=fixture.meta["model_args"]["n_head"],
        grid=fixture.meta["model_args"]["latent_shape"],
    )
    model = Transformer(config)
    model.load_state_dict({name: parts.tensor() for name, parts in state.items()})
    recorded = fixture.meta["param_groups"]
    optim = OptimConfig(
        learning_rate=recorded[0]["lr"],
        betas=tuple(recorded[0]["betas"]),
        weight_decay=recorded[0]["weight_decay"],
        decay="linear",
    )
    (adamw,) = build_optimizers(model, optim)
    groups = adamw.param_groups
    assert len(groups) == len(recorded)
    for group, expected in zip(groups, recorded, strict=True):
        origins = sorted(names[int(number)] for parameter in group["params"] for number in parameter.detach().unique())
        assert origins == expected["names"]
        for key in ("weight_decay", "lr", "eps", "betas"):
            assert group[key] == (tuple(expected[key]) if key == "betas" else expected[key])


def check_learning_rates(fixture: Fixture, batch_size: int, change: float = 1.0) -> None:
    assert fixture.meta["lr"]
    for run in fixture.meta["lr"]:
        epoch = run["steps_per_epoch"] * batch_size
        config = OptimConfig(
            learning_rate=run["base_lr"] * change,
            curve="cosine",
            warmup_images=run["warmup_epoch"] * epoch,
            final_factor=run["min_lr_mult"],
        )
        for step, factor, rate in run["points"]:
            found = learning_rate_factor(config, step * batch_size, run["max_epoch"] * epoch)
            assert found == pytest.approx(factor, rel=1e-9), (run["max_epoch"], step)
            assert found * config.learning_rate == pytest.approx(rate, rel=1e-9), (run["max_epoch"], step)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("fixture", fixtures("video-trainer"), ids=str)
def test_learning_rates(fixture: Fixture, batch_size: int) -> None:
    check_learning_rates(fixture, batch_size)


@pytest.mark.parametrize("fixture", fixtures("video-trainer"), ids=str)
def test_learning_rates_changed_by_one_percent_are_noticed(fixture: Fixture) -> None:
    with pytest.raises(AssertionError):
        check_learning_rates(fixture, batch_size=32, change=1.01)


@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize("fixture", fixtures("video-trainer"), ids=str)
def test_trained_and_averaged_weights_are_told_apart(tmp_path: Path, fixture: Fixture, weights: str) -> None:
    source = fixture.path("_final.pth")
    convert("nar-c2v", source, tmp_path / "out", weights=weights)
    found = read_weights(tmp_path / "out")
    ours = {
        "abs_pe": "positions",
        "tok_embeddings.weight": "tokens.weight",
        "cls_embedding.embedding_table.weight": "classes.weight",
    }
    prefix = "sd_check." if weights == "model" else "ema_check."
    recorded = {name.removeprefix(prefix): tensor for name, tensor in fixture.io.items() if name.startswith(prefix)}
    assert recorded.keys() == ours.keys()
    for name, tensor in recorded.items():
        torch.testing.assert_close(found[ours[name]].reshape(tensor.shape), tensor, atol=0, rtol=0)
    model = Transformer.from_pretrained(tmp_path / "out")
    codes = torch.zeros(1, *model.config.grid, dtype=torch.long)
    assert model(codes, ClassCondition(torch.tensor([0]))).isfinite().all()


def test_every_recorded_kind_is_tested() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        if "golden_fixtures" in path.read_text(encoding="utf-8"):
            importlib.import_module(path.stem)
    found = {path.name: Fixture(path.stem, path.parent).meta.get("kind") for path in folder().glob("*.json")}
    assert found, f"{folder()} holds no fixtures"
    untested = {name: kind for name, kind in found.items() if kind not in asked_kinds}
    assert not untested, f"no test reads these fixtures: {untested}"
