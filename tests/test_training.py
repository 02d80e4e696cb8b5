"""What the trainer computes: its loss, its settings that must not change it, and models that start from others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nar.condition import ClassCondition, TextCondition
from nar.data.open import load_pictures
from nar.evaluation.likelihood import judge_likelihood
from nar.likelihood import token_losses
from nar.model import ModelConfig, Transformer
from nar.pipeline import Pipeline
from nar.training.checkpoint import Checkpoints
from nar.training.distributed import Workers
from nar.training.loop import Plan, Task
from nar.training.models import ModelTask, mixed
from nar.training.optim import OptimConfig
from nar.training.tasks import run_recipe
from test_golden_models import Case, fixtures
from training_runs import equal, losses, recipe, weights

ALONE = Workers(0, 1, torch.device("cpu"))


def trained(folder: Path, *overrides: str) -> Path:
    """The run of the tiny recipe with these settings, two steps."""
    run = folder / "-".join(["run", *overrides]).replace("/", "_")[-100:]
    assert run_recipe(str(recipe(folder)), [f"run={run}", "num_images=64", *overrides])
    return run


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("nar-c2i", "nar-t2i"), ids=str)
@pytest.mark.parametrize("chunk", [7, 16384])
def test_the_loss_is_the_recorded_one_in_chunks_too(fixture: object, chunk: int) -> None:
    case = Case(fixture)
    with torch.enable_grad():  # chunks are computed again in the backward pass
        made = token_losses(case.model(), case.codes, case.condition, chunk=chunk).mean()
    torch.testing.assert_close(made, case.recorded("train.loss", "train.loss").reshape(()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_attention_written_out(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """PyTorch's attention against softmax(q k / sqrt(d)) over the masked scores, in 2-D and 3-D."""

    def written_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(-1) @ v

    for grid in ((4, 5), (2, 3, 4)):
        torch.manual_seed(0)
        kind = {"text_dim": 6, "text_length": 3} if padded else {"num_classes": 3}
        model = Transformer(
            ModelConfig(grid=grid, vocab_size=11, dim=24, num_layers=2, num_heads=2, hidden_dim=32, **kind)
        )
        nn.init.normal_(model.output.weight, std=0.5)
        codes = torch.randint(11, (2, *grid))
        mask = torch.tensor([[True, True, True], [False, False, True]])
        words = TextCondition(torch.randn(2, 3, 6), mask)
        condition = words if padded else ClassCondition(torch.tensor([1, -1]))
        gradients = []
        for reference in (False, True):
            with monkeypatch.context() as patch:
                if reference:
                    patch.setattr("torch.nn.functional.scaled_dot_product_attention", written_out)
                model.zero_grad()
                token_losses(model, codes, condition).mean().backward()
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
        assert gradients[0]["blocks.0.attention.qkv.weight"].abs().max() > 1e-5


def test_a_mixed_context_has_codes_of_two_samples_each_in_its_place() -> None:
    codes = torch.arange(1000).view(1000, 1, 1).expand(1000, 16, 16)
    torch.manual_seed(0)
    seen = mixed(codes, 0.6)
    foreign = (seen != codes).float().mean((1, 2))
    assert torch.equal(seen[seen != codes], codes.roll(1, 0)[seen != codes])
    assert 0.58 < foreign.max() < 0.75, "the share is up to `most`, but for the luck of 256 draws"
    assert foreign.min() == 0
    assert foreign.mean() == pytest.approx(0.3, abs=0.02)
    assert foreign.quantile(0.25) == pytest.approx(0.15, abs=0.02), "shares are spread evenly"
    assert torch.equal(mixed(codes, 0.0), codes)


def test_what_is_seen_is_mixed_and_what_is_learned_is_not() -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(grid=(4, 5), vocab_size=11, num_classes=3, dim=24, num_layers=2, num_heads=2, hidden_dim=32)
    )
    nn.init.normal_(model.output.weight, std=0.5)
    codes, seen = torch.randint(11, (2, 2, 4, 5))
    condition = ClassCondition(torch.tensor([1, -1]))
    logits = model(seen, condition).flatten(1, 2)
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none")
    found = model.in_raster(token_losses(model, codes, condition, seen=seen))
    torch.testing.assert_close(found.flatten(1), expected)
    assert not torch.allclose(found, model.in_raster(token_losses(model, codes, condition)))


def test_a_mixed_context_is_trained_with_and_measured_without(tmp_path: Path) -> None:
    plain, mixing = trained(tmp_path), trained(tmp_path, "mixed_context=1.0")
    assert losses(plain)[0] == losses(mixing)[0], "of zero output weights every context has the loss ln V"
    assert not equal(weights(plain), weights(mixing))
    for run in (plain, mixing):
        assert losses(run, "heldout_loss")
    with pytest.raises(ValueError, match=r"mixed_context mixes the samples that are computed together, .* is 1"):
        trained(tmp_path, "mixed_context=0.5", "batch_size=4", "engine.accumulate=4")
    with pytest.raises(ValueError, match=r"mixed_context must be at least 0 and at most 1, not 2.0"):
        trained(tmp_path, "mixed_context=2.0")


def test_settings_of_the_engine_do_not_change_what_is_learned(tmp_path: Path) -> None:
    plain = trained(tmp_path)
    recomputed = trained(tmp_path, "engine.activation_checkpointing=true")
    assert losses(plain) == losses(recomputed)
    assert equal(weights(plain), weights(recomputed))
    pieces = trained(tmp_path, "engine.accumulate=4")
    np.testing.assert_allclose(losses(pieces), losses(plain), rtol=1e-5)
    half = trained(tmp_path, "engine.precision=bfloat16")
    np.testing.assert_allclose(losses(half), losses(plain), rtol=1e-2)
    assert losses(half) != losses(plain)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(tmp_path: Path) -> None:
    plain, compiled = trained(tmp_path), trained(tmp_path, "engine.compile=true")
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-4)


def test_gradients_are_clipped_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run = trained(tmp_path, "optim.clip_norm=0.01")
    assert min(losses(run, "gradient_norm")) > 0.1
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    norms.clear()
    run = trained(tmp_path, "optim.clip_norm=0")
    assert norms == pytest.approx(losses(run, "gradient_norm"), rel=1e-4)


def test_dropout_masks_differ_between_steps(tmp_path: Path) -> None:
    """One picture again and again, and weights that stay: losses differ by the masks alone."""
    (tmp_path / "red").mkdir()
    for index in range(40):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "red" / f"{index:02d}.png")
    first = trained(tmp_path)  # at random weights the output is zero
    still = [
        f"init={first / 'model'}",
        f"data.source={tmp_path / 'red'}",
        "optim.learning_rate=1e-30",
        "optim.warmup_images=0",
        "condition_dropout=0",
    ]
    run = trained(tmp_path, *still, "num_images=128", "dropout.residual=0.3")
    assert len(set(losses(run))) == 4
    run = trained(tmp_path, *still, "num_images=128")
    assert len(set(losses(run))) == 1


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_the_exported_weights_are_averages_that_forget_the_start(tmp_path: Path, decay: float) -> None:
    """After step n with decay min(decay, (1 + n) / (10 + n)); the first step is copied."""
    run = trained(tmp_path, "num_images=160", f"ema_decay={decay}", "checkpoint_every=1", "keep_last=9")
    exported = weights(run)
    checkpoints = Checkpoints(run, 9, ALONE)
    expected: dict[str, Tensor] = {}
    for path, by_count in zip(checkpoints.all(), (0.0, 2 / 11, 3 / 12, 4 / 13, 5 / 14), strict=True):
        state = {"module": {name: torch.zeros_like(tensor) for name, tensor in exported.items()}}
        checkpoints.load(path, lambda fill, state=state: fill(state))
        share = 1 - min(decay, by_count)
        expected = {
            name: tensor if not expected else (1 - share) * expected[name] + share * tensor
            for name, tensor in state["module"].items()
        }
    assert not equal(exported, state["module"])
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_plans_end_after_images_or_epochs() -> None:
    assert Plan(batch_size=10, num_images=95).num_steps(7) == 10
    assert Plan(batch_size=10, epochs=3).num_steps(100) == 30
    assert Plan(batch_size=10, epochs=3, images_between=(500, 900)).num_steps(100) == 50
    assert Plan(batch_size=10, epochs=3, images_between=(500, 900)).num_steps(1000) == 90
    with pytest.raises(
        ValueError, match="one of num_images, epochs, steps, minutes says how long the run is; found none"
    ):
        Plan()
    with pytest.raises(ValueError, match=r"how long the run is; found num_images=5 and epochs=5"):
        Plan(num_images=5, epochs=5)
    assert Plan(steps=8).num_steps(100) == 8
    assert Plan(minutes=3, steps=8).num_steps(100) == 8
    slow = OptimConfig(warmup_images=300)
    assert Plan(steps=8, optim=slow).optim_for(1000) is slow
    assert Plan(minutes=3, steps=8, optim=slow).optim_for(1000).warmup_images == 200
    assert Plan(minutes=3, steps=8, optim=slow).optim_for(9000) == slow


def test_metrics_from_outside_and_what_is_logged(tmp_path: Path) -> None:
    def colourful(module: nn.Module, task: Task) -> dict[str, float]:
        assert isinstance(module, Transformer)
        assert isinstance(task, ModelTask)
        return {"answer": 42.0}

    path = recipe(tmp_path, num_images=64)
    run_recipe(str(path), [f"run={tmp_path / 'run'}"], metrics=colourful)
    assert losses(tmp_path / "run", "metric_answer") == [42.0]
    assert min(losses(tmp_path / "run", "memory_bytes")) > 1e7
    assert min(losses(tmp_path / "run", "images_per_second")) > 0
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"loss", "learning_rate", "gradient_norm", "memory_bytes", "heldout_loss"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["preview"]
    assert [event.step for event in board.Scalars("loss")] == [32, 64]  # images seen


def test_a_model_starts_from_another_one_at_a_larger_grid_and_with_other_classes(tmp_path: Path) -> None:
    first = trained(tmp_path)
    start = f"init={first / 'model'}"
    same = trained(tmp_path, start, "optim.learning_rate=1e-12", "optim.weight_decay=0", "tokenizer_path=")
    for name, tensor in weights(same).items():
        torch.testing.assert_close(tensor, weights(first)[name], atol=1e-6, rtol=0)
    larger = trained(tmp_path, start, "data.size=24")
    assert json.loads((larger / "model" / "config.json").read_text())["model"]["grid"] == [6, 6]
    pictures = load_pictures("toy", size=16)
    for index in range(8):
        folder = tmp_path / "pictures" / ("left" if index % 2 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        Image.fromarray(pictures.images[index]).save(folder / f"{index}.png")
    own = trained(tmp_path, start, f"data={tmp_path / 'pictures'}", "optim.learning_rate=1e-12")
    assert weights(own)["classes.weight"].shape[0] == 3
    torch.testing.assert_close(weights(own)["output.weight"], weights(first)["output.weight"], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="has the schedule manhattan and keeps it"):
        trained(tmp_path, start, "model.schedule=raster")
    with pytest.raises(ValueError, match="lora_rank needs init=FOLDER"):
        trained(tmp_path, "lora_rank=4")


def test_low_rank_additions_are_merged_into_a_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first = trained(tmp_path)
    adapted = trained(tmp_path, f"init={first / 'model'}", "lora_rank=4", "optim.warmup_images=0")
    before, after = weights(first), weights(adapted)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.0.attention.qkv.weight" in changed
    assert not changed & {"tokens.weight", "output.weight", "head_norms.0.weight"}
    delta = after["blocks.0.attention.qkv.weight"] - before["blocks.0.attention.qkv.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 4
    assert len(Pipeline.from_pretrained(adapted / "model")(["circle"], seed=0).images) == 1


@pytest.mark.slow
def test_the_loop_is_as_fast_as_a_bare_one(tmp_path: Path) -> None:
    """Within 5 % of forward, backward and step of the same model, on CPU."""
    from nar.training.optim import build_optimizers

    options = ["model.dim=256", "model.num_heads=4", "model.num_layers=6", "model.hidden_dim=704", "batch_size=32"]
    task = None

    def keep(_: nn.Module, it: Task) -> dict[str, float]:
        nonlocal task
        task = it
        return {}

    torch.set_num_threads(1)
    path = recipe(tmp_path, num_images=60 * 32, checkpoint_every=1000, log_every=10, preview_every=1000)
    run_recipe(str(path), [f"run={tmp_path / 'run'}", *options], metrics=keep)
    assert isinstance(task, ModelTask)
    looped = float(np.median(losses(tmp_path / "run", "images_per_second")[1:]))
    (optimizer,) = build_optimizers(task.module, task.recipe.optim)
    codes = torch.from_numpy(task.train.codes.read(np.arange(32)))
    condition = ClassCondition(torch.from_numpy(task.train.codes.labels[:32]))
    rates = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10):
            loss = token_losses(task.module, codes, condition).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
            optimizer.step()
        rates.append(320 / (time.perf_counter() - began))
    bare = float(np.median(rates))
    print(f"loop {looped:.1f} images/s, bare {bare:.1f} images/s")
    assert looped > 0.95 * bare


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_refused_part_of_the_pictures_leaves_no_codes(tmp_path: Path, part: str) -> None:
    """Codes of the other part would refuse the same command once the pictures are repaired."""
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(40):
            Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "data" / split / f"{index:02d}.png")
    broken = tmp_path / "data" / part / "07.png"
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(ValueError, match="1 of 40 pictures cannot be read"):
        trained(tmp_path, f"data.source={tmp_path / 'data'}")
    assert not [*tmp_path.rglob("*.arrow"), *tmp_path.rglob("extraction.json")]
    broken.unlink()
    trained(tmp_path, f"data.source={tmp_path / 'data'}")


def test_seeds_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed must be at least 0 and at most 18446744073709551615, not -1"):
        trained(tmp_path, "seed=-1")
    assert not [*tmp_path.rglob("codes")]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        judge_likelihood("toy", "toy", seed=-1)


def test_batches_are_pinned_for_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = list[int]()
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: (pinned.append(len(tensor)), tensor)[1])
    batch = torch.zeros(2, 4), ClassCondition(torch.zeros(3, dtype=torch.int64)), None
    assert ALONE.pinned(batch) is batch
    assert not pinned
    codes, condition, weight = Workers(0, 1, torch.device("cuda")).pinned(batch)
    assert pinned == [2, 3]
    assert (codes.shape, len(condition), weight) == ((2, 4), 3, None)
