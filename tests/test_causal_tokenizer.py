"""The causal tokenizer: what a code may see, what it may not, and what it reads and refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nar.tokenizer import load_tokenizer
from nar.tokenizer.causal import (
    CausalTokenizer,
    CausalTokenizerConfig,
    _fold,
    _fold_channels,
    _unfold,
    _unfold_channels,
)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "code_dim": 4,
    "frames_per_code": 3,
    "channels": 8,
    "num_blocks": 1,
    "dim": 16,
    "num_heads": 2,
    "hidden_dim": 16,
    "num_encoder_blocks": 1,
    "num_decoder_blocks": 1,
}


def make(**changes: Any) -> CausalTokenizer:
    torch.manual_seed(0)
    tokenizer = CausalTokenizer(CausalTokenizerConfig(**SIZES | changes)).eval()
    for layer in (tokenizer.first_out, tokenizer.group_out):
        torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
    return tokenizer


def clips(frames: int = 7, height: int = 16, width: int = 24, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_pixels_fold_into_channels_and_back() -> None:
    x = clips(6)
    assert _fold(x, 3, 4).shape == (2, 2, 4, 6, 3 * 3 * 16)
    assert torch.equal(_unfold(_fold(x, 3, 4), 3, 4), x)
    y = torch.rand(2, 3, 8, 12, 5)
    assert _fold_channels(y, 2).shape == (2, 3, 4, 6, 20)
    assert torch.equal(_unfold_channels(_fold_channels(y, 2), 2), y)
    # One folded place holds one square of one group, and nothing else.
    z = torch.zeros(1, 3, 6, 16, 24)
    z[:, :, 3:, 4:8, 8:12] = 1
    assert _fold(z, 3, 4)[0].sum(-1).nonzero().tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("frames", [1, 4, 10])
@pytest.mark.parametrize("size", [(8, 8), (16, 40)])
def test_any_number_of_groups_and_any_size(frames: int, size: tuple[int, int]) -> None:
    tokenizer, x = make(), clips(frames, *size)
    codes = tokenizer.encode(x)
    assert codes.shape == (2, 1 + (frames - 1) // 3, size[0] // 8, size[1] // 8)
    assert tokenizer.pixel_shape(codes.shape[1:]) == (frames, *size)
    made = tokenizer(x)
    assert torch.equal(made.codes, codes)
    assert torch.allclose(made.pixels, tokenizer.decode(codes), atol=1e-5)
    assert made.pixels.shape == x.shape


def test_codes_see_their_own_and_earlier_frames_and_no_later_ones() -> None:
    tokenizer, x = make(), clips().requires_grad_()
    latents = tokenizer.latents(x)  # (B, D, 3, 2, 3) of frames 0, 1-3 and 4-6
    for grid, end in ((0, 1), (1, 4), (2, 7)):
        (gradient,) = torch.autograd.grad(latents[0, :, grid].square().sum(), x, retain_graph=True)
        seen = gradient.abs().amax((1, 3, 4))  # (B, T)
        assert (seen[0, :end] > 0).all()
        assert (seen[0, end:] == 0).all()
        assert (seen[1] == 0).all()  # the other clip of the batch
    changed = x.detach().clone()
    changed[:, :, 4:] *= -1
    before, after = tokenizer.encode(x.detach()), tokenizer.encode(changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_frames_follow_from_all_codes_and_a_prefix_of_codes_makes_the_first_frames() -> None:
    tokenizer = make()
    codes = tokenizer.encode(clips())
    whole = tokenizer.decode(codes)
    assert tokenizer.decode(codes[:, :2]).shape == whole[:, :, :4].shape
    for grid in range(3):
        other = codes.clone()
        other[:, grid] = (other[:, grid] + 1) % 64
        changed = (tokenizer.decode(other) - whole).abs().amax((0, 1, 3, 4))
        assert (changed > 1e-4).all()


def test_a_group_is_encoded_with_the_memory_of_the_codes_before_it() -> None:
    tokenizer, still = make(), clips(1).expand(-1, -1, 7, -1, -1)
    second, third = tokenizer.latents(still)[:, :, 1:].unbind(2)
    assert (second - third).abs().max() > 1e-3  # the same frames, but one grid of codes more is known


def test_the_bundled_size_fits_six_megabytes_and_makes_4x8x8_codes() -> None:
    tokenizer = CausalTokenizer(CausalTokenizerConfig())
    assert 2 * sum(parameter.numel() for parameter in tokenizer.parameters()) < 6e6
    assert tokenizer.pixel_shape((4, 8, 8)) == (16, 64, 64)


def test_save_and_load_also_in_half_precision(tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert isinstance(loaded, CausalTokenizer)
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.encode(clips()), tokenizer.encode(clips()))
    tokenizer.save_pretrained(tmp_path / "b", dtype=torch.bfloat16, note="small")
    assert (tmp_path / "b" / "model.safetensors").stat().st_size < 0.6 * (
        tmp_path / "a" / "model.safetensors"
    ).stat().st_size
    half = load_tokenizer(tmp_path / "b")
    assert next(half.parameters()).dtype == torch.float32
    assert (half.encode(clips()) == tokenizer.encode(clips())).float().mean() > 0.9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (clips(6), r"clips have 6 frames, this tokenizer reads 1 \+ 3k: 4, 7"),
        (clips(4, 12), "clips of 12x24 pixels are not a multiple of the patch size 8"),
        (clips()[:, :2], "clips must be"),
        (clips()[:, :, 0], "clips must be"),
        (clips() * 100, "clips have values from -100 to 100, not -1..1"),
        (clips() * math.nan, "clips have values from nan"),
        ((clips() * 127).to(torch.uint8), "clips must be float in -1..1, not torch.uint8"),
    ],
)
def test_what_is_no_clip_is_refused(wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode(wrong)


def test_codes_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes run from 64 to 64, this tokenizer has 0..63"):
        make().decode(torch.full((1, 2, 2, 2), 64))
    with pytest.raises(ValueError, match="codes must be"):
        make().decode(torch.zeros(1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 6}, "patch_size 6 is not a multiple of fold 4"),
        ({"dim": 18}, "dim 18 is not a multiple of twice num_heads 2"),
        ({"frames_per_code": 0}, "frames_per_code must be at least 1 .*, not 0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalTokenizerConfig(**SIZES | changes)
