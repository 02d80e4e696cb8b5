"""Refined codes: closer to the pixels than the encoder's, for every kind of tokenizer and quantiser, never farther."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nar import load_tokenizer
from nar.data.open import load_pictures
from nar.media.pixels import as_pixels
from nar.metrics.reconstruction import psnr, squared_error
from nar.tokenizer import CausalTokenizer, CausalTokenizerConfig, Tokenizer, VideoTokenizer, VideoTokenizerConfig
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.refine import refine_codes

EMOJI = Path(__file__).parent / "data" / "emoji-mini.parquet"
IMAGE = {
    "vocab_size": 64,
    "code_dim": 6,
    "channels": 8,
    "channel_multipliers": (1, 2),
    "num_blocks": 1,
    "latent_channels": 8,
    "norm_groups": 4,
}
KINDS = {
    "vq": {},
    "vq not normalised": {"l2_norm": False},
    "fsq": {"quantizer": "fsq", "levels": (4, 4, 2, 2, 2, 2), "vocab_size": 256},
    "lfq": {"quantizer": "lfq"},
    "bsq": {"quantizer": "bsq"},
}


def image_tokenizer(**changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**{**IMAGE, **changes})).eval()
    if tokenizer.config.quantizer == "vq":
        torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
    return tokenizer


@torch.no_grad()
def error(tokenizer: Tokenizer, codes: Tensor, pixels: Tensor, **told: int) -> Tensor:
    return squared_error(pixels, tokenizer.decode(codes, **told).clamp(-1, 1))


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("name", "frames", "gain"), [("emoji/tokenizer", 0, 1.0), ("clips/tokenizer", 6, 1.0)])
def test_bundled_tokenizers_tell_more_with_the_same_weights(name: str, frames: int, gain: float) -> None:
    tokenizer = load_tokenizer(name)
    pixels = as_pixels(load_pictures(EMOJI, size=32).images[:4])
    if frames:
        pixels = torch.stack([pixels.roll(2 * frame, -1) for frame in range(frames)], 2)
    before, after = tokenizer.encode(pixels), refine_codes(tokenizer, pixels, steps=20)
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    gained = psnr(error(tokenizer, after, pixels).mean(), 2) - psnr(error(tokenizer, before, pixels).mean(), 2)
    assert gained > gain


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantiser_gets_closer(kind: str) -> None:
    tokenizer, pixels = image_tokenizer(**KINDS[kind]), noise(3, 3, 8, 8)
    codes = refine_codes(tokenizer, pixels, steps=30)
    assert 0 <= codes.min() <= codes.max() < tokenizer.config.vocab_size
    gained = error(tokenizer, tokenizer.encode(pixels), pixels) - error(tokenizer, codes, pixels)
    assert (gained >= 0).all()
    assert (gained > 0).any()


def test_clips_of_either_kind_get_closer() -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "hidden_dim": 16, "channels": 8, "num_blocks": 1, "fold": 2, "patch_size": 4}
    causal = CausalTokenizer(CausalTokenizerConfig(vocab_size=32, frames_per_code=2, **sizes)).eval()
    sizes = {
        "num_frames": 8,
        "image_size": 8,
        "encoder_dim": 16,
        "num_encoder_layers": 1,
        "num_encoder_heads": 2,
        "decoder_dim": 16,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "num_tokens": 8,
        "grid": (8,),
        "vocab_size": 16,
        "code_dim": 4,
        "patch_size": 4,
    }
    larp = VideoTokenizer(VideoTokenizerConfig(**sizes)).eval()
    torch.nn.init.normal_(larp.to_pixels.weight, std=0.2)  # new ones are 0: all codes give one clip
    for tokenizer, told, frames in ((causal, {}, 5), (larp, {"num_frames": 4}, 4)):
        torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
        clips = noise(2, 3, frames, 8, 8)
        before, after = tokenizer.encode(clips), refine_codes(tokenizer, clips, steps=20)
        gained = error(tokenizer, before, clips, **told) - error(tokenizer, after, clips, **told)
        assert (gained >= 0).all()
        assert (gained > 0).any()


def test_where_the_search_finds_nothing_better_the_encoders_codes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = image_tokenizer()
    codes = torch.arange(32).view(2, 4, 4)
    with torch.no_grad():
        pixels = tokenizer.decode(codes).clamp(-1, 1)
        monkeypatch.setattr(tokenizer, "latents", lambda _: tokenizer.quantizer.decode(codes))  # a perfect encoder
    monkeypatch.setattr("nar.tokenizer.refine._RATE", 100.0)  # leads away
    assert torch.equal(refine_codes(tokenizer, pixels, steps=3), codes)


def test_a_sample_does_not_depend_on_its_batch_nor_the_result_on_other_randomness() -> None:
    tokenizer, pixels = image_tokenizer(), noise(3, 3, 8, 8)
    together = refine_codes(tokenizer, pixels, steps=8)
    torch.manual_seed(7)
    alone = torch.cat([refine_codes(tokenizer, row[None], steps=8) for row in pixels])
    assert (together == alone).float().mean() > 0.9  # not all: convolutions of one picture may round otherwise
    assert torch.equal(together, refine_codes(tokenizer, pixels, steps=8))


def test_it_works_in_inference_mode_and_touches_no_weight() -> None:
    tokenizer, pixels = image_tokenizer(), noise(1, 3, 8, 8)
    with torch.inference_mode():
        codes = refine_codes(tokenizer, pixels.clone(), steps=2)
    assert torch.equal(codes, refine_codes(tokenizer, pixels, steps=2))
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_what_cannot_be_refined_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1 and at most 10000, not 0"):
        refine_codes(image_tokenizer(), noise(1, 3, 8, 8), steps=0)
    with pytest.raises(ValueError, match="at most 262144 entries, this tokenizer has 1048576"):
        refine_codes(image_tokenizer(quantizer="lfq", code_dim=20, vocab_size=2**20), noise(1, 3, 8, 8))
    with pytest.raises(ValueError, match="not a multiple of the patch size 2"):
        refine_codes(image_tokenizer(), noise(1, 3, 7, 8))
