"""Models that begin from others: raster models with the order of NAR, and how their parts learn."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import make_condition, make_model
from golden_fixtures import Fixture, fixtures
from nar import ClassCondition, Transformer, generate
from nar.convert import convert, to_diagonal
from nar.convert.initial import trunk, with_gate, with_larger_patches, with_lora
from nar.data.builtin import draw_toy
from nar.media.pixels import as_pixels
from nar.storage.folder import find_model, read_config
from nar.tokenizer import load_tokenizer, new_tokenizer
from nar.tokenizer.image import ImageTokenizerConfig
from nar.training.loop import Task
from nar.training.optim import OptimConfig, build_optimizers
from nar.training.tasks import run_recipe
from training_runs import equal, recipe, tokenizer_recipe, weights

GATE = ("0.weight", "0.bias", "2.weight", "2.bias")


def raster(**changes: object) -> Transformer:
    return make_model("raster", **changes)


@pytest.mark.parametrize("grid", [(1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("rotation", ["zero", "identity"])
def test_in_a_single_row_or_column_each_head_is_the_raster_model(grid: tuple[int, int], rotation: str) -> None:
    """The head along the width is the model; the other one is it with its last block run twice."""
    model = raster(grid=grid, condition_rotation=rotation)
    made = to_diagonal(model)
    codes = torch.randint(24, (3, *grid), generator=torch.Generator().manual_seed(0))
    labels = make_condition(model, 3)
    torch.testing.assert_close(made.decided_by(0)(codes, labels)[:, 0], model(codes, labels)[:, 0])
    deeper = Transformer(dataclasses.replace(model.config, num_layers=model.config.num_layers + 1)).eval()
    last = f"blocks.{model.config.num_layers - 1}."
    state = model.state_dict()
    again = {f"blocks.{model.config.num_layers}.{name.removeprefix(last)}": value for name, value in state.items()}
    deeper.load_state_dict(state | {name: again[name] for name in deeper.state_dict() if name not in state})
    torch.testing.assert_close(made.decided_by(1)(codes, labels)[:, :, 0], deeper(codes, labels)[:, :, 0])
    if grid != (1, 1):  # beside the first token one head predicts: what is sampled is what that model samples
        along = model if grid[0] == 1 else deeper
        same = generate(made.decided_by(0 if grid[0] == 1 else 1), labels, seed=3)
        assert torch.equal(same, generate(along, labels, seed=3))


@pytest.mark.parametrize("layout", ["raster", "par"])
def test_the_first_head_begins_as_the_model_where_both_see_the_same(layout: str) -> None:
    model = make_model(layout)
    made = to_diagonal(model)
    codes = torch.randint(24, (2, *model.config.grid), generator=torch.Generator().manual_seed(0))
    condition = make_condition(model, 2)
    torch.testing.assert_close(made.decided_by(0)(codes, condition)[:, 0, 0], model(codes, condition)[:, 0, 0])
    with pytest.raises(ValueError, match=r"raster and par models with one head.*schedule is manhattan"):
        to_diagonal(made)


def test_video_models_get_two_further_heads() -> None:
    made = to_diagonal(make_model("raster", grid=(2, 3, 2)))
    assert made.config.head_depths == (0, 1, 1)
    assert torch.equal(*(made.blocks[index].attention.qkv.weight for index in (-1, -3)))
    shared = trunk(made)
    assert {name for name in made.state_dict() if name not in shared and "blocks" not in name} == {
        "output.weight",
        "head_norms.1.weight",
        "head_norms.2.weight",
    }
    assert {name.split(".")[1] for name in made.state_dict() if name not in shared and "blocks" in name} == {"2", "3"}


@pytest.mark.parametrize("fixture", fixtures("nar-c2i"), ids=str)
def test_published_raster_weights_become_the_published_layout(fixture: Fixture, tmp_path: Path) -> None:
    """LlamaGen's checkpoint is NAR's without the further head and its block: what is left out comes back as a copy."""
    published = {name: tensor for name, tensor in (fixture.weights or {}).items() if "medusa" not in name}
    count = 1 + max(int(name.split(".")[1]) for name in published if name.startswith("layers."))
    llamagen = {name: tensor for name, tensor in published.items() if not name.startswith(f"layers.{count - 1}.")}
    torch.save({"model": llamagen}, tmp_path / "llamagen.pt")
    torch.save({"model": fixture.weights}, tmp_path / "nar.pt")
    sizes = {"num_heads": fixture.meta["config"]["n_head"], "grid": [fixture.meta["grid"]] * 2}
    convert("llamagen-gpt", tmp_path / "llamagen.pt", tmp_path / "raster", **sizes)
    convert("nar-c2i", tmp_path / "nar.pt", tmp_path / "nar", **sizes)
    made, theirs = to_diagonal(Transformer.from_pretrained(tmp_path / "raster")), tmp_path / "nar"
    expected = Transformer.from_pretrained(theirs)
    assert made.config == expected.config
    shared = trunk(made)
    assert all(torch.equal(made.state_dict()[name], expected.state_dict()[name]) for name in shared)
    dim = made.config.dim
    assert torch.equal(made.output.weight[:, :dim], expected.output.weight[:, :dim])
    made.save_pretrained(tmp_path / "diagonal")
    before = weights_of(made)
    codes = torch.randint(made.config.vocab_size, (2, *made.config.grid))
    optimizer = torch.optim.AdamW(made.train().requires_grad_(True).parameters(), 1e-3)
    made(codes, ClassCondition(torch.tensor([0, 1]))).logsumexp(-1).mean().backward()
    optimizer.step()
    assert not equal(before, weights_of(made))
    assert equal(before, weights_of(Transformer.from_pretrained(tmp_path / "diagonal")))


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_the_trunk_waits_and_then_learns_slower(tmp_path: Path) -> None:
    path = recipe(tmp_path, ema_decay=0)
    first = run_recipe(str(path), [f"run={tmp_path / 'first'}", "model.schedule=raster", "num_images=64"])
    assert first is not None
    begun = [f"init={first}", "to_diagonal=true", "optim.warmup_images=0", "preview_every=3"]
    start = to_diagonal(Transformer.from_pretrained(first)).state_dict()
    shared = trunk(to_diagonal(Transformer.from_pretrained(first)))

    def changed(name: str, *overrides: str) -> dict[str, float]:
        assert run_recipe(str(path), [f"run={tmp_path / name}", *begun, *overrides])
        return {key: float((value - start[key]).abs().max()) for key, value in weights(tmp_path / name).items()}

    waiting = changed("waiting", "optim.trunk_frozen=1")
    assert {name for name, most in waiting.items() if most == 0} == shared
    slower = changed("slower", "optim.trunk_factor=0.1", "optim.trunk_frozen=0.5")
    rate = 3e-3  # of the recipe; a step of Adam is about as long
    assert 0 < slower["blocks.0.attention.qkv.weight"] < 0.3 * rate < slower["blocks.2.attention.qkv.weight"]
    assert read_config(tmp_path / "slower/model")["model"]["schedule"] == "manhattan"

    def crash(_: nn.Module, __: Task) -> dict[str, float]:
        raise RuntimeError("power cut")

    broken = [f"run={tmp_path / 'broken'}", *begun, "optim.trunk_factor=0.1", "optim.trunk_frozen=0.5"]
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(str(path), broken, metrics=crash)
    assert run_recipe(str(path), broken)
    assert equal(weights(tmp_path / "broken"), weights(tmp_path / "slower"))
    for overrides, said in (
        ([*begun[2:], "to_diagonal=true"], "to_diagonal needs init=FOLDER"),
        ([f"init={first}", "model.schedule=par", "model.regions=[2,2]"], "to_diagonal=true, which makes a raster"),
    ):
        with pytest.raises(ValueError, match=said):
            run_recipe(str(path), [f"run={tmp_path / 'no'}", *overrides])
    with pytest.raises(ValueError, match="are of models, not of tokenizers"):
        run_recipe(str(tokenizer_recipe(tmp_path)), [f"run={tmp_path / 'no'}", "optim.trunk_factor=0.5"])


@pytest.mark.parametrize("layout", ["nar", "nar-shared-head", "video", "edits"])
def test_a_gate_begins_with_equal_shares(layout: str) -> None:
    model = make_model(layout)
    gated = with_gate(model).eval()
    condition = make_condition(model, 3)
    codes = torch.randint(24, (3, *model.config.grid))
    torch.testing.assert_close(gated(codes, condition), model(codes, condition))
    with torch.no_grad():
        gated.gate[2].bias[0] = 20.0  # the head along the width decides, where it predicts
    first = model.decided_by(0)
    torch.testing.assert_close(gated(codes, condition)[..., 1:, :], first(codes, condition)[..., 1:, :])


def test_a_gate_learns_with_the_heads_of_a_converted_model(tmp_path: Path) -> None:
    path = recipe(tmp_path, ema_decay=0)
    first = run_recipe(str(path), [f"run={tmp_path / 'first'}", "model.schedule=raster", "num_images=64"])
    begun = [f"init={first}", "to_diagonal=true", "model.gate=true", "optim.warmup_images=0", "optim.trunk_frozen=1"]
    run_recipe(str(path), [f"run={tmp_path / 'run'}", *begun, "optim.muon_learning_rate=1e-3"])
    learned = weights(tmp_path / "run")
    assert read_config(tmp_path / "run/model")["model"]["gate"] is True
    assert all(float(learned[f"gate.{name}"].abs().max()) > 0 for name in GATE)
    begun = Transformer.from_pretrained(str(first)).state_dict()["blocks.0.attention.qkv.weight"]
    assert torch.equal(learned["blocks.0.attention.qkv.weight"], begun)
    with pytest.raises(ValueError, match="gate weighs rows of predictions, and raster has one"):
        run_recipe(str(path), [f"run={tmp_path / 'no'}", "model.schedule=raster", "model.gate=true"])


def test_a_gate_learns_beside_low_rank_additions_and_without_muon() -> None:
    """It begins as zeros, whose directions Muon would make up."""
    pytest.importorskip("peft")
    model = make_model("gated")
    *_, muon = build_optimizers(model, OptimConfig(muon_learning_rate=1e-3))
    own = {id(parameter) for parameter in model.gate.parameters()}
    taken = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    assert taken
    assert not own & taken
    with_lora(model.requires_grad_(False), 2, heads=False)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if name.startswith("gate")} == {f"gate.{part}" for part in GATE}
    assert "blocks.0.attention.qkv.base_layer.weight" not in learning


@pytest.mark.slow
def test_low_rank_additions_with_heads_that_learn_whole(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = recipe(tmp_path, ema_decay=0)
    first = run_recipe(str(path), [f"run={tmp_path / 'first'}", "model.schedule=raster", "num_images=64"])
    begun = [f"init={first}", "to_diagonal=true", "lora_rank=2", "optim.warmup_images=0"]
    assert run_recipe(str(path), [f"run={tmp_path / 'run'}", *begun])
    start = to_diagonal(Transformer.from_pretrained(str(first))).state_dict()
    delta = {name: value - start[name] for name, value in weights(tmp_path / "run").items()}
    ranks = [int(torch.linalg.matrix_rank(delta[f"blocks.{k}.attention.proj.weight"], rtol=1e-3)) for k in range(3)]
    assert max(ranks[:2]) <= 2 < ranks[2]
    assert float(delta["output.weight"].abs().max()) > 0
    assert float(delta["tokens.weight"].abs().max()) == 0


@pytest.mark.parametrize("times", [2, 3])
def test_a_tokenizer_with_larger_patches_begins_as_it_was(times: int) -> None:
    """Codes of a picture are those of its means over squares, and what is decoded is enlarged by squares."""
    sizes = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    config = ImageTokenizerConfig(vocab_size=32, code_dim=4, pixel_shuffle=2, **sizes)
    torch.manual_seed(0)
    old = new_tokenizer(config).eval()
    new = new_tokenizer(dataclasses.replace(config, pixel_shuffle=2 * times)).eval()
    new.load_state_dict(with_larger_patches(old.state_dict(), 2, 2 * times))
    pixels = torch.rand(3, 3, 8 * times, 8 * times) * 2 - 1
    codes = old.encode(F.avg_pool2d(pixels, times))
    assert torch.equal(new.encode(pixels), codes)
    torch.testing.assert_close(new.decode(codes), F.interpolate(old.decode(codes), scale_factor=times))


def test_own_pictures_may_begin_with_the_bundled_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["channels=40", "channel_multipliers=[1,2]", "pixel_shuffle=4", "vocab_size=2048"]
    short = ["data=toy", "data.size=64", "steps=1", "batch_size=4", "init=emoji/tokenizer"]
    short += [f"tokenizer.{size}" for size in sizes]
    folder = run_recipe("my-pictures-tokenizer", [*short, f"run={tmp_path / 'run'}"])
    assert "held out, begun with emoji/tokenizer" in capfd.readouterr().err
    old, new = (load_tokenizer(path).state_dict() for path in ("emoji/tokenizer", folder))
    name = "encoder.conv_in.weight"
    assert new[name].shape[1] == 4 * old[name].shape[1]
    torch.testing.assert_close(new["decoder.conv_in.weight"], old["decoder.conv_in.weight"], rtol=0, atol=1e-2)
    with pytest.raises(
        ValueError, match=r"init=emoji/tokenizer has tokenizer.channels=40, and this recipe 8; give tha"
    ):
        run_recipe("my-pictures-tokenizer", [*short, f"run={tmp_path / 'other'}", "tokenizer.channels=8"])


@pytest.mark.parametrize("stated", ["2", 0, -2, None, [2], 3])
def test_patches_of_a_start_that_do_not_fit_are_named(tmp_path: Path, stated: object) -> None:
    start = shutil.copytree(find_model("emoji/tokenizer"), tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    config["tokenizer"]["pixel_shuffle"] = stated
    (start / "config.json").write_text(json.dumps(config))
    given = ["data=toy", "data.size=64", f"init={start}", f"run={tmp_path / 'run'}"]
    with pytest.raises(
        ValueError, match=r"has tokenizer.pixel_shuffle=.*, and this recipe 4; give that, or begin from"
    ):
        run_recipe("my-pictures-tokenizer", given)


def test_a_start_with_another_number_of_codes_sets_them_by_k_means(tmp_path: Path) -> None:
    sizes = ["channels=40", "channel_multipliers=[1,2]", "pixel_shuffle=4", "vocab_size=64"]
    short = ["data=toy", "data.size=64", "steps=10", "batch_size=16", "init=emoji/tokenizer"]
    short += [f"tokenizer.{size}" for size in sizes]
    new = load_tokenizer(run_recipe("my-pictures-tokenizer", [*short, f"run={tmp_path / 'run'}"]))
    old, own = load_tokenizer("emoji/tokenizer").state_dict(), new.state_dict()
    torch.testing.assert_close(own["decoder.conv_in.weight"], old["decoder.conv_in.weight"], rtol=0, atol=2e-2)
    pixels = as_pixels(draw_toy(64, "test").images[:64])
    points = new.quantizer.points(new.to_code(new.encoder(pixels)))
    likeness = (points * new.quantizer.entries(new.encode(pixels))).sum(-1)
    assert likeness.mean() > 0.9  # of random entries 0.7
    for unset in ("tokenizer_loss.kmeans_steps=0", "train_encoder=false"):
        with pytest.raises(ValueError, match=r"vocab_size=2048, and this recipe 64; give that, set tokenizer_loss"):
            run_recipe("my-pictures-tokenizer", [*short, f"run={tmp_path / unset}", unset])
