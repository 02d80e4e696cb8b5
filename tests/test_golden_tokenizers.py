"""Tokenizers and the discriminator give the numbers that the published code gives with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden_fixtures import Fixture, fixtures
from nar.convert import Checkpoint, convert
from nar.convert.tokenizers import image_tokenizer_state, video_tokenizer_state
from nar.tokenizer.image import ImageTokenizer
from nar.tokenizer.larp import VideoTokenizer
from nar.training.adversary import PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss

pytestmark = pytest.mark.golden
PIXELS = {"atol": 1e-4, "rtol": 0.0}


def image_tokenizer(fixture: Fixture, weights: dict[str, Tensor]) -> ImageTokenizer:
    l2_norm = fixture.meta["config"]["codebook_l2_norm"]
    config, state = image_tokenizer_state(Checkpoint(weights, {}, fixture.name), l2_norm=l2_norm)
    tokenizer = ImageTokenizer(config)
    tokenizer.load_state_dict({name: parts.tensor().float() for name, parts in state.items()})
    return tokenizer.eval()


def video_tokenizer(fixture: Fixture, weights: dict[str, Tensor]) -> VideoTokenizer:
    config, state = video_tokenizer_state(Checkpoint(weights, fixture.meta["args"], fixture.name))
    tokenizer = VideoTokenizer(config)
    tokenizer.load_state_dict({name: parts.tensor() for name, parts in state.items()})
    return tokenizer.eval()


def check_image_tokenizer(fixture: Fixture, weights: dict[str, Tensor]) -> None:
    io = fixture.io
    tokenizer = image_tokenizer(fixture, weights)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.latents(io["image"]), io["prequant"], atol=1e-4, rtol=0)
        codes = tokenizer.encode(io["image"])
        assert torch.equal(codes.flatten(1), io["indices"])
        torch.testing.assert_close(tokenizer.decode(codes), io["decoded"], **PIXELS)
        random = io["codes_random"].reshape(codes.shape)
        torch.testing.assert_close(tokenizer.decode(random), io["decoded_random"], **PIXELS)
    trained = tokenizer(io["image"])
    torch.testing.assert_close(trained.pixels, io["recon_forward"], **PIXELS)
    torch.testing.assert_close(trained.codebook_loss.reshape(1), io["train.vq_loss"], atol=1e-5, rtol=1e-4)
    beta = fixture.meta["config"]["commit_loss_beta"]
    torch.testing.assert_close(beta * trained.commitment_loss.reshape(1), io["train.commit_loss"], atol=1e-5, rtol=1e-4)


def check_video_tokenizer(fixture: Fixture, weights: dict[str, Tensor]) -> None:
    io = fixture.io
    tokenizer = video_tokenizer(fixture, weights)
    grid = tokenizer.config.grid
    clips = io["clip"] * 2.0 - 1.0
    with torch.no_grad():
        latents = tokenizer.latents(clips).flatten(2).transpose(1, 2)
        torch.testing.assert_close(latents, io["projected_z"], atol=1e-4, rtol=0)
        codes = tokenizer.encode(clips)
        assert torch.equal(codes.flatten(1), io["indices"])
        # Pixels are compared as they were recorded, in 0..1.
        for name, output in (("indices", "recon_from_indices"), ("random_indices", "recon_random_indices")):
            decoded = tokenizer.decode(io[name].reshape(-1, *grid))
            torch.testing.assert_close(decoded * 0.5 + 0.5, io[output], **PIXELS)
        trained = tokenizer(clips)
        torch.testing.assert_close(trained.pixels * 0.5 + 0.5, io["recon_from_indices"], **PIXELS)
        torch.testing.assert_close(trained.codebook_loss.reshape(1), io["loss_codebook"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(trained.commitment_loss.reshape(1), io["loss_commit"], atol=1e-5, rtol=1e-4)
        if "indices_fewer" in io:
            num_frames = io["recon_fewer"].shape[2]
            fewer = tokenizer.encode(clips[:, :, :num_frames])
            assert torch.equal(fewer.flatten(1), io["indices_fewer"])
            decoded = tokenizer.decode(fewer, num_frames=num_frames)
            torch.testing.assert_close(decoded * 0.5 + 0.5, io["recon_fewer"], **PIXELS)


def check_discriminator(fixture: Fixture, weights: dict[str, Tensor]) -> None:
    io, sizes = fixture.io, fixture.meta["config"]
    discriminator = PatchDiscriminator(sizes["ndf"], sizes["n_layers"], sizes["input_nc"])
    discriminator.load_state_dict({name.removeprefix("main."): tensor for name, tensor in weights.items()})
    discriminator.eval()
    with torch.no_grad():
        for name in ("real", "fake"):
            torch.testing.assert_close(discriminator(io[name]), io[f"eval.logits_{name}"], atol=1e-4, rtol=0)
        discriminator.train()
        real = discriminator(io["real"])
        statistics = {f"after_real.main.{name}": tensor for name, tensor in discriminator.state_dict().items()}
        recorded = [name for name in io if name.startswith("after_real.")]
        assert recorded
        for name in recorded:
            torch.testing.assert_close(statistics[name], io[name], atol=1e-5, rtol=1e-4)
        fake = discriminator(io["fake"])
    torch.testing.assert_close(real, io["train.logits_real"], atol=1e-4, rtol=0)
    torch.testing.assert_close(fake, io["train.logits_fake"], atol=1e-4, rtol=0)
    torch.testing.assert_close(discriminator_hinge_loss(real, fake).reshape(1), io["train.hinge_d"], atol=1e-5, rtol=0)
    torch.testing.assert_close(generator_hinge_loss(fake).reshape(1), io["train.hinge_g"], atol=1e-5, rtol=0)


CHECKS = {
    "llamagen-vq": check_image_tokenizer,
    "larp-tokenizer": check_video_tokenizer,
    "patchgan": check_discriminator,
}


@pytest.mark.parametrize("fixture", fixtures(*CHECKS), ids=str)
def test_published_numbers(fixture: Fixture) -> None:
    assert fixture.weights is not None
    CHECKS[fixture.meta["kind"]](fixture, fixture.weights)


@pytest.mark.parametrize("fixture", fixtures(*CHECKS), ids=str)
def test_weights_changed_by_one_percent_are_noticed(fixture: Fixture) -> None:
    assert fixture.weights is not None
    changed = {
        name: (tensor * 1.01).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in fixture.weights.items()
    }
    with pytest.raises(AssertionError):
        CHECKS[fixture.meta["kind"]](fixture, changed)


@pytest.mark.parametrize("layout", ["hub", "raw", "trainer"])
@pytest.mark.parametrize("fixture", fixtures("larp-tokenizer"), ids=str)
def test_video_tokenizer_from_every_layout(tmp_path: Path, fixture: Fixture, layout: str) -> None:
    weights, settings, source = fixture.weights, fixture.meta["args"], tmp_path / "source"
    assert weights is not None
    source.mkdir()
    if layout == "hub":
        save_file(weights, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(settings))
    elif layout == "raw":
        torch.save(weights, source / "weights.pth")
        (source / "settings.json").write_text(json.dumps(settings))
    else:
        torch.save({"model": {"name": "larp_tokenizer", "args": settings, "sd": weights}}, source / "epoch-1.pth")
    convert("larp-tokenizer", source, tmp_path / "out")
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        codes = tokenizer.encode(fixture.io["clip"] * 2.0 - 1.0)
    assert torch.equal(codes.flatten(1), fixture.io["indices"])
