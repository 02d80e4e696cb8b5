"""Training tokenizers of clips: LARP with all its parts, and the causal one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from nar.storage.config import load
from nar.tokenizer import load_tokenizer
from nar.tokenizer.quantize import sample_codes
from nar.training.adversary import ClipDiscriminator, lecam_loss, noisy_labels
from nar.training.distributed import Workers
from nar.training.loop import Task
from nar.training.prior import CodePrior
from nar.training.recipe import Recipe
from nar.training.tasks import run_recipe
from nar.training.tokenizers import TokenizerTask
from training_runs import equal, losses, nar, tokenizer_recipe, weights

ALONE = Workers(0, 1, torch.device("cpu"))
pa = pytest.importorskip("pyarrow")

LARP: dict[str, Any] = {
    "video_tokenizer": {
        "num_frames": 8,
        "image_size": 16,
        "encoder_dim": 32,
        "num_encoder_layers": 1,
        "num_encoder_heads": 2,
        "decoder_dim": 32,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "num_tokens": 8,
        "grid": [2, 2, 2],
        "vocab_size": 64,
        "code_dim": 8,
    },
    "tokenizer_loss": {"l1": 0.5, "l2": 0.0, "codebook": 0.1, "commitment": 0.025},
    "adversary": {
        "network": "transformer",
        "weight": 0.3,
        "adaptive": False,
        "channels": 16,
        "num_layers": 1,
        "num_heads": 2,
        "every": 2,
        "lecam": 0.001,
    },
    "prior": {"weight": 0.06, "dim": 16, "num_layers": 1, "num_heads": 2},
}
CAUSAL: dict[str, Any] = {
    "causal_tokenizer": {
        "vocab_size": 64,
        "code_dim": 4,
        "frames_per_code": 7,
        "channels": 16,
        "num_blocks": 1,
        "dim": 32,
        "num_heads": 2,
        "hidden_dim": 32,
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 1,
    },
    "tokenizer_loss": {"l1": 0.2, "l2": 1.0, "restart_every": 3},
}


def moving_squares(folder: Path, count: int = 40) -> Path:
    """Clips of 8 frames of 16x16 in which a square of some colour moves, as strips in a table."""
    import pyarrow.parquet as pq

    rng, strips = np.random.default_rng(0), []
    for _ in range(count):
        colour, (row, column), step = rng.integers(0, 256, 3), rng.integers(0, 9, 2), rng.integers(-1, 2)
        frames = np.full((8, 16, 16, 3), 255, np.uint8)
        for number, frame in enumerate(frames):
            left = int(np.clip(column + step * number, 0, 8))
            frame[row : row + 8, left : left + 8] = colour
        data = io.BytesIO()
        Image.fromarray(frames.reshape(-1, 16, 3)).save(data, "webp", lossless=True)
        strips.append(data.getvalue())
    pq.write_table(pa.table({"strip": strips}), folder / "train.parquet")
    return folder / "train.parquet"


def recipe(folder: Path, own: dict[str, Any], **values: Any) -> Path:
    common = {
        "task": "tokenizer",
        "data": {"source": str(moving_squares(folder)), "size": 16, "augment": "flip", "heldout_share": 0.2},
        "optim": {"learning_rate": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "warmup_images": 32},
        "batch_size": 8,
        "num_images": 32,
        "log_every": 1,
        "preview_every": 100,
        "checkpoint_every": 2,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**common, **own, **values}))
    return path


@pytest.mark.parametrize("own", [LARP, CAUSAL], ids=["larp", "causal"])
def test_four_steps_are_two_and_a_restart_and_two(tmp_path: Path, own: dict[str, Any]) -> None:
    path = recipe(tmp_path, own)

    def crash(_: nn.Module, __: Task) -> dict[str, float]:
        raise RuntimeError("power cut")

    straight = run_recipe(str(path), [f"run={tmp_path / 'straight'}", "preview_every=3"])
    broken = [f"run={tmp_path / 'broken'}", "preview_every=3"]
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(str(path), broken, metrics=crash)
    run_recipe(str(path), broken)
    assert straight is not None
    assert equal(weights(straight.parent), weights(tmp_path / "broken"))
    assert losses(straight.parent) == losses(tmp_path / "broken")


@pytest.mark.parametrize(("own", "gain"), [(LARP, 3.0), (CAUSAL, 3.0)], ids=["larp", "causal"])
def test_clips_are_learned(tmp_path: Path, own: dict[str, Any], gain: float) -> None:
    run = tmp_path / "run"
    folder = run_recipe(str(recipe(tmp_path, own, num_images=60 * 8, checkpoint_every=1000)), [f"run={run}"])
    assert folder is not None
    quality = losses(run, "psnr")
    assert np.mean(quality[-10:]) > np.mean(quality[:5]) + gain
    total = losses(run)
    assert np.mean(total[-10:]) < np.mean(total[:5])
    if "prior" in own:
        predicted = losses(run, "prior")
        assert predicted[-1] < np.log(64)
    assert (run / "previews").is_dir()
    assert load_tokenizer(folder).config.vocab_size == 64


@pytest.mark.parametrize("kind", ["pictures", "larp", "causal"])
def test_codes_stay_what_they_are_where_only_the_decoder_learns(tmp_path: Path, kind: str) -> None:
    path = tokenizer_recipe(tmp_path) if kind == "pictures" else recipe(tmp_path, LARP if kind == "larp" else CAUSAL)
    norm = ["video_tokenizer.norm=batch"] if kind == "larp" else []
    first = run_recipe(str(path), [f"run={tmp_path / 'first'}", *norm])
    only = [f"init={first}", "train_encoder=false", "num_images=160", "optim.warmup_images=0"]
    other, message = {
        "pictures": ("tokenizer.l2_norm=false", r"has tokenizer\.l2_norm=True, and this recipe False"),
        "larp": ("video_tokenizer.norm=layer", r"has video_tokenizer\.norm=batch, and this recipe layer"),
        "causal": ("causal_tokenizer.l2_norm=false", r"has causal_tokenizer\.l2_norm=True, and this recipe False"),
    }[kind]
    with pytest.raises(ValueError, match=message):
        run_recipe(str(path), [*only, f"run={tmp_path / 'other'}", other])
    second = run_recipe(str(path), [f"run={tmp_path / 'second'}", *norm, *only])
    assert first is not None
    assert second is not None
    before, after = load_tokenizer(first), load_tokenizer(second)
    shape = (2, 3, 16, 16) if kind == "pictures" else (2, 3, 8, 16, 16)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = before.encode(pixels)
    assert torch.equal(after.latents(pixels), before.latents(pixels))
    assert torch.equal(after.encode(pixels), codes)
    assert not torch.equal(after.decode(codes), before.decode(codes))


def test_averages_over_batches_are_those_of_the_steps_however_often_it_is_measured(tmp_path: Path) -> None:
    path, norm = recipe(tmp_path, LARP), "video_tokenizer.norm=batch"
    seldom = run_recipe(str(path), [f"run={tmp_path / 'seldom'}", norm])
    often = run_recipe(str(path), [f"run={tmp_path / 'often'}", norm, "preview_every=1"])
    assert seldom is not None
    assert often is not None
    assert int(weights(seldom.parent)["code_norm.norm.num_batches_tracked"]) == 4  # steps
    assert equal(weights(seldom.parent), weights(often.parent))
    assert losses(tmp_path / "seldom", "heldout_loss")[-1] == losses(tmp_path / "often", "heldout_loss")[-1]


def test_what_the_adversary_can_not_judge_is_refused_before_the_first_step(tmp_path: Path) -> None:
    late = {"adversary": {**LARP["adversary"], "start": 100, "learn_from": 100}}
    with pytest.raises(ValueError, match=r"can't judge samples of 6x16x16 \(.*not a multiple of the .* patch 4x8x8"):
        run_recipe(
            str(recipe(tmp_path, LARP, **late)),
            [
                f"run={tmp_path / 'run'}",
                "data.num_frames=6",
                "video_tokenizer.num_frames=6",
                "video_tokenizer.temporal_patch_size=2",
            ],
        )
    pictures = tokenizer_recipe(tmp_path, adversary={"weight": 0.5, "start": 100, "learn_from": 100})
    with pytest.raises(ValueError, match=r"adversary\.network 'transformer' .* samples of 16x16 \(clips must be"):
        run_recipe(str(pictures), [f"run={tmp_path / 'run'}", "adversary.network=transformer"])
    with pytest.raises(ValueError, match=r"'patch' with num_layers 5 can't judge samples of 16x16 .* fewer layers"):
        run_recipe(str(pictures), [f"run={tmp_path / 'run'}", "adversary.num_layers=5"])


def test_an_adaptive_adversary_is_weighed_over_all_processes(tmp_path: Path) -> None:
    adversary = {**LARP["adversary"], "adaptive": True, "weight": 2.0, "learn_from": 0, "lecam": 0.0}
    path = recipe(tmp_path, CAUSAL, adversary=adversary)
    run_recipe(str(path), [f"run={tmp_path / 'one'}"])
    nar("train", path, f"run={tmp_path / 'two'}", processes=2)
    for name in ("loss", "gradient_norm"):
        two, one = (torch.tensor(losses(tmp_path / run, name)) for run in ("two", "one"))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


def test_losses_of_the_adversary_are_logged(tmp_path: Path) -> None:
    run_recipe(str(recipe(tmp_path, LARP)), [f"run={tmp_path / 'run'}", "adversary.start=2"])
    assert len(losses(tmp_path / "run", "adversarial")) == 2  # of four steps
    assert len(losses(tmp_path / "run", "discriminator")) == 3  # after the first update


def test_a_long_set_of_strips_is_not_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(Recipe, str(recipe(tmp_path, CAUSAL)))
    assert TokenizerTask(loaded, ALONE).source is None
    monkeypatch.setattr("nar.training.tokenizers._IN_MEMORY", 100_000)  # 32 clips of 8 frames of 768 bytes are more
    assert TokenizerTask(loaded, ALONE).source is not None


def test_codes_are_drawn_by_their_distribution_and_each_by_its_own_number() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    drawn = sample_codes(logits.expand(10_000, -1), uniforms)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=1e-3)
    assert torch.equal(drawn[::7], sample_codes(logits.expand(10_000, -1)[::7], uniforms[::7]))
    assert sample_codes(logits, torch.tensor([0.9999999])).item() == 3


def test_the_prior_sees_no_later_code_and_its_gradient_reaches_the_points() -> None:
    torch.manual_seed(0)
    prior = CodePrior(6, 4, dim=16, num_layers=2, num_heads=2)
    points = torch.randn(2, 6, 4, requires_grad=True)
    predicted = prior(points)
    (gradient,) = torch.autograd.grad(predicted[0, 2].square().mul(torch.arange(4)).sum(), points, retain_graph=True)
    assert (gradient[0, :3].abs().sum(-1) > 0).all()
    assert (gradient[0, 3:] == 0).all()
    codebook = nn.functional.normalize(torch.randn(8, 4), dim=-1)
    codes, uniforms = torch.randint(8, (2, 6)), torch.rand(2, 2, 6)
    whole = prior.losses(points, codes, codebook, uniforms, 0.0)
    by_hand = nn.functional.cross_entropy((predicted[:, :-1] @ codebook.T).flatten(0, 1), codes[:, 1:].flatten())
    assert torch.allclose(whole, by_hand, atol=1e-6)  # nothing is replaced: both rounds are the first
    assert not torch.allclose(prior.losses(points, codes, codebook, uniforms, 1.0), by_hand)
    (gradient,) = torch.autograd.grad(whole, points)
    assert gradient[:, :-1].abs().sum() > 0
    assert gradient[:, -1].abs().sum() == 0  # nothing follows the last one


def test_the_discriminator_judges_whole_clips() -> None:
    torch.manual_seed(0)
    judge = ClipDiscriminator(dim=16, num_layers=1, num_heads=2)
    clips = torch.randn(3, 3, 8, 16, 24, requires_grad=True)
    logits = judge(clips)
    assert logits.shape == (3,)
    (gradient,) = torch.autograd.grad(logits[1], clips)
    assert (gradient[1].abs().amax((0, 2, 3)) > 0).all()  # every frame
    assert (gradient[[0, 2]] == 0).all()
    with pytest.raises(ValueError, match=r"6x16x24 .* not a multiple of the discriminator's patch 4x8x8"):
        judge(torch.zeros(1, 3, 6, 16, 24))


def test_noisy_labels_and_lecam_by_hand() -> None:
    real, fake = noisy_labels(torch.tensor([[0.0, -1.0, 9.0], [0.0, 1.0, -9.0]]))
    assert torch.allclose(real, torch.tensor([1.0, 0.85, 0.7]))
    assert torch.allclose(fake, torch.tensor([0.0, 0.15, 0.3]))
    means = torch.tensor(0.5), torch.tensor(-0.5)
    found = lecam_loss(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0]), *means)
    assert found == pytest.approx((1.5**2 + 0) / 2 + (0.5**2 + 0) / 2)


def test_the_published_recipe_has_the_published_size() -> None:
    published = load(Recipe, "c2v-larp-tokenizer")
    assert published.tokenizer_config is published.video_tokenizer
    with torch.device("meta"):
        prior = CodePrior(1024, 16)
        judge = ClipDiscriminator()
    assert sum(p.numel() for p in prior.parameters()) == pytest.approx(21.7e6, rel=0.01)
    assert sum(p.numel() for p in judge.parameters()) == pytest.approx(38.2e6, rel=0.02)
    with pytest.raises(ValueError, match=r"lecam 0.1 is of the network"):
        load(Recipe, "c2v-larp-tokenizer", ["adversary.network=patch", "adversary.lecam=0.1"])
