"""The video tokenizer: shapes, fewer frames, sampled codes, every norm, saving, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nar.convert import Checkpoint
from nar.convert.renaming import respelled
from nar.convert.tokenizers import VIDEO_SPELLINGS, video_tokenizer_state
from nar.tokenizer.larp import NORMS, VideoTokenizer, VideoTokenizerConfig

SIZES: dict[str, Any] = {
    "num_frames": 4,
    "image_size": 8,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "encoder_dim": 16,
    "num_encoder_layers": 1,
    "num_encoder_heads": 2,
    "decoder_dim": 12,
    "num_decoder_layers": 1,
    "num_decoder_heads": 3,
    "num_tokens": 6,
    "grid": (1, 2, 3),
    "vocab_size": 32,
    "code_dim": 4,
}


def make(**changes: Any) -> VideoTokenizer:
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(VideoTokenizerConfig(**SIZES | changes))
    torch.nn.init.normal_(tokenizer.to_pixels.weight, std=0.1)  # published models start from zero
    torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
    return tokenizer.eval()


def clips(batch: int = 2, frames: int = 4) -> torch.Tensor:
    return torch.rand(batch, 3, frames, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_round_trip_shapes_also_with_fewer_frames() -> None:
    tokenizer = make()
    for frames in (2, 4):
        codes = tokenizer.encode(clips(frames=frames))
        assert codes.shape == (2, 1, 2, 3)
        assert codes.dtype == torch.int64
        decoded = tokenizer.decode(codes, num_frames=frames)
        assert decoded.shape == (2, 3, frames, 8, 8)
        torch.testing.assert_close(tokenizer(clips(frames=frames)).pixels, decoded)


@torch.no_grad()
def test_codes_are_nearest_or_sampled_by_a_generator() -> None:
    tokenizer = make(temperature=0.5)
    nearest = tokenizer.encode(clips())
    assert torch.equal(nearest, tokenizer.encode(clips()))
    first, again, other = (tokenizer.encode(clips(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    cold = make(temperature=1e-4)
    assert torch.equal(cold.encode(clips(), generator=torch.Generator().manual_seed(3)), cold.encode(clips()))
    with pytest.raises(ValueError, match="omit generator"):
        make(stochastic=False).encode(clips(), generator=torch.Generator())


def test_training_reaches_encoder_decoder_and_codebook() -> None:
    tokenizer = make(norm="batch", temperature=None).train()
    out = tokenizer(clips(), uniforms=torch.rand(2, *tokenizer.config.grid))
    (out.pixels.square().mean() + out.codebook_loss + out.commitment_loss).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())  # as DDP wants it
    for parameter in (tokenizer.patch_embed.weight, tokenizer.quantizer.embedding.weight, tokenizer.to_pixels.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@torch.no_grad()
def test_a_stored_temperature_is_the_one_that_samples(tmp_path: Path) -> None:
    tokenizer = make(temperature=None)
    uniforms = torch.rand(2, *tokenizer.config.grid)
    tenth = make(temperature=0.1)(clips(), uniforms=uniforms)
    assert torch.equal(tokenizer(clips(), uniforms=uniforms).codes, tenth.codes)
    tokenizer.inverse_temperature.fill_(1e4)  # of a converted checkpoint, say
    tokenizer.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again(clips(), uniforms=uniforms).codes, again.encode(clips()))


@torch.no_grad()
def test_folders_in_half_precision(tmp_path: Path) -> None:
    tokenizer = make(norm="batch")
    tokenizer.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored, again = load_file(tmp_path / "model.safetensors"), VideoTokenizer.from_pretrained(tmp_path)
    assert stored["to_code.weight"].dtype == torch.bfloat16
    assert stored["code_norm.norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(again.to_code.weight, tokenizer.to_code.weight.bfloat16().float())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("temporal_patch_size", [1, 2])
@torch.no_grad()
def test_every_norm_saves_and_converts(tmp_path: Path, norm: str, temporal_patch_size: int) -> None:
    changes: dict[str, Any] = {"norm": norm, "temporal_patch_size": temporal_patch_size, "temperature": None}
    changes |= dict.fromkeys(("learned_patch_positions", "learned_pixel_queries", "code_type"), norm != "none")
    tokenizer = make(**changes)
    codes = tokenizer.encode(clips())
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(VideoTokenizer.from_pretrained(tmp_path / "saved").encode(clips()), codes)
    weights, settings = published(tokenizer)
    config, state = video_tokenizer_state(Checkpoint(weights, settings, "published"), grid=(1, 2, 3))
    assert config == tokenizer.config
    assert all(torch.equal(parts.tensor(), tokenizer.state_dict()[name]) for name, parts in state.items())


def published(tokenizer: VideoTokenizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and settings that the published code would have for `tokenizer`."""
    config, state = tokenizer.config, tokenizer.state_dict()
    names = {name: respelled(name, VIDEO_SPELLINGS) for name in state}
    weights = {names[name]: tensor for name, tensor in state.items()}
    if config.temporal_patch_size == 1:
        weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].squeeze(2)
    norms = {"none": "none", "layer": "ln_d", "layer_all": "ln_nd", "batch": "bn_bn", "batch_all": "bn_b"}
    quantizer = {"codebook_size": 32, "l2_normalized": True, "stochastic": True, "stochastic_temperature": -1.0}
    bottleneck = {"bottleneck_dim": 4, "norm": norms[config.norm], "regularizer": {"name": "vq", "args": quantizer}}
    settings = {
        "bottleneck": {"name": "bottleneck", "args": bottleneck},
        "prior_model": {"name": "none"},
        "frame_num": 4,
        "input_size": 8,
        "patch_size": 4,
        "decoder_patch_size": 4,
        "temporal_patch_size": config.temporal_patch_size,
        "decoder_temporal_patch_size": config.temporal_patch_size,
        "bottleneck_token_num": 6,
        "encoder_hidden_size": 16,
        "encoder_num_heads": 2,
        "encoder_depth": 1,
        "decoder_hidden_size": 12,
        "decoder_num_heads": 3,
        "decoder_depth": 1,
        "learned_encoder_patch_pe": config.learned_patch_positions,
        "learned_decoder_patch_query_embed": config.learned_pixel_queries,
        "use_decoder_latent_token_type_embed": config.code_type,
        "use_decoder_patch_query_token_type_embed": config.pixel_query_type,
    }
    return weights, settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t: t.encode(clips()[:, :, 0]), r"clips must be \(batch, 3, frames, height, width\)"),
        (lambda t: t.encode(clips()[..., :4]), "8x4 pixels, this tokenizer reads 8x8"),
        (lambda t: t.encode(clips()[:, :, :3]), "3 frames, this tokenizer reads up to 4, in multiples of 2"),
        (lambda t: t.encode(clips() * 127.5), "use x / 127.5 - 1"),
        (lambda t: t.encode(clips() * float("nan")), "clips have values from nan"),
        (lambda t: t.encode(clips().to(torch.uint8)), "must be float in -1..1"),
        (lambda t: t.decode(torch.zeros(1, 6, dtype=torch.long)), r"codes must be \(batch, 1, 2, 3\)"),
        (lambda t: t.decode(torch.full((1, 1, 2, 3), 32)), r"this tokenizer has 0\.\.31"),
        (lambda t: t.decode(torch.zeros(1, 1, 2, 3, dtype=torch.long), num_frames=3), "num_frames 3 is impossible"),
    ],
)
def test_errors_say_what_to_do(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(make())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (2, 2, 2)}, "has 8 places for num_tokens 6"),
        ({"norm": "group"}, "norm must be one of none, layer"),
        ({"l2_norm": False}, "set l2_norm to true, or stochastic to false"),
        ({"num_encoder_heads": 3}, "must be a multiple of 4 and of num_encoder_heads 3"),
        ({"patch_size": 3}, "image_size 8 must be a multiple of patch_size 3"),
        ({"num_frames": 3}, "num_frames 3 must be a multiple of temporal_patch_size 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoTokenizerConfig(**SIZES | changes)
