"""The convolutional VQ tokenizer of the VQGAN / LlamaGen family: pictures to grids of codes and back.

Knows pixels and codes; does not know how codes are generated. Legend: `B` batch, `H W` pixels, `h w` the code grid,
`C` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.storage.fields import Range, Size, check, checked
from nar.tokenizer.base import Tokenizer, check_patches
from nar.tokenizer.quantize import build_quantizer, check_quantizer


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Sizes of an image tokenizer; the defaults are LlamaGen's VQ-16 (71.9 M parameters).

    `channel_multipliers` has one entry a resolution, finest first; each step down halves height and width, so the
    patch size is `pixel_shuffle` * 2 ** (len - 1). `norm_groups` must divide every channel count.

    `quantizer` is "vq", a codebook of vocab_size x code_dim (compared by direction with `l2_norm`); "fsq" with
    `levels`, one a dimension; or "lfq" or "bsq", one bit a dimension. See docs/howto/tokenizers.md.

    `pixel_shuffle` folds that many pixels a side into channels before the first convolution and unfolds them after the
    last one; 1, as published, does not. With 2 the finest, slowest resolution is left out.

    Attributes:
        vocab_size, code_dim: codes, and numbers in each.
        channels: of the finest resolution; `channel_multipliers` times that of the others.
        num_blocks: residual blocks of each resolution.
        latent_channels: between encoder and codes, and codes and decoder.
    """

    vocab_size: Annotated[int, Range(1, 2**31)] = 16384
    code_dim: Size = 8
    channels: Size = 128
    channel_multipliers: tuple[Annotated[int, Range(1, 2**10)], ...] = (1, 1, 2, 2, 4)
    num_blocks: Size = 2
    latent_channels: Size = 256
    l2_norm: bool = True
    norm_groups: Size = 32
    pixel_shuffle: Size = 1
    quantizer: str = "vq"
    levels: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers must name at least one resolution, such as [1, 2, 4]")
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.norm_groups:
                width = f"channels {self.channels} x {multiplier}"
                raise ValueError(f"{width} is not a multiple of norm_groups {self.norm_groups}")
        check_quantizer(self.quantizer, self.vocab_size, self.code_dim, self.levels)

    @property
    def patch_size(self) -> int:
        """Pixels a side that one code stands for."""
        return self.pixel_shuffle * int(2 ** (len(self.channel_multipliers) - 1))


class ImageTokenizer(Tokenizer):
    """Pictures in -1..1 to codes and back; any size that is a multiple of the patch works."""

    kind = "image-tokenizer"
    config_class = ImageTokenizerConfig
    pixel_axes = code_axes = ("height", "width")
    config: ImageTokenizerConfig

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = build_quantizer(
            config.quantizer, config.vocab_size, config.code_dim, l2_norm=config.l2_norm, levels=config.levels
        )
        self.to_code = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.from_code = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def encoder_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.encoder, self.to_code, self.quantizer

    def latents(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        return cast(Tensor, self.to_code(self.encoder(pixels)))

    @checked
    def decode(self, codes: Tensor, *, tile: int | None = None, overlap: int = 8) -> Tensor:
        """Codes (B, h, w) to pictures (B, 3, H, W), about -1..1 and not clamped.

        With `tile`, squares of that many codes a side are decoded one by one, each `overlap` codes into the next, and
        blended there: memory is then that of a tile. The decoder's norms and attention see a tile only, so that the
        picture is not quite that of decoding the whole; docs/howto/tokenizers.md has measured differences.
        """
        self.check_codes(codes)
        if tile is not None and not 0 <= overlap < tile:
            raise ValueError(f"overlap must be from 0 to less than the tile of {tile} codes, not {overlap}")
        if tile is None or tile >= max(codes.shape[1:]):
            return self.decode_latents(self.quantizer.decode(codes))
        height, width = codes.shape[1:]
        patch = self.config.patch_size
        total = torch.zeros(len(codes), 3, height * patch, width * patch, device=codes.device)
        weights = torch.zeros_like(total[0, 0])
        for top, left in product(_starts(height, tile, overlap), _starts(width, tile, overlap)):
            decoded = self.decode(codes[:, top : top + tile, left : left + tile])
            rows, columns = (_ramp(size // patch, overlap, patch, decoded) for size in decoded.shape[-2:])
            area = (slice(top * patch, top * patch + len(rows)), slice(left * patch, left * patch + len(columns)))
            total[..., *area] += decoded * (weight := rows[:, None] * columns)
            weights[area] += weight
        return (total / weights).to(decoded.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.from_code(latents.to(self.from_code.weight.dtype))))

    @checked
    def pixel_shape(self, grid: tuple[Size, ...]) -> tuple[int, ...]:
        return tuple(size * self.config.patch_size for size in grid)

    def _check_size(self, *size: int) -> None:
        check_patches(self.config.patch_size, size, "pictures")


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `length` codes and overlap by at least `overlap`."""
    return sorted({max(0, min(start, length - tile)) for start in range(0, length, tile - overlap)})


def _ramp(size: int, overlap: int, patch: int, like: Tensor) -> Tensor:
    """Weights (size * patch,) of a tile's pixels: 1 in its middle, falling towards both ends within the overlap."""
    places = torch.arange(size * patch, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(places, size * patch - places) / max(overlap * patch, 1)).clamp(max=1.0)


class Encoder(nn.Module):
    """Pixels to latents before the convolution that makes them code_dim wide."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.pixel_shuffle, groups = config.pixel_shuffle, config.norm_groups
        widths = [config.channels, *(config.channels * multiplier for multiplier in config.channel_multipliers)]
        self.conv_in = nn.Conv2d(3 * config.pixel_shuffle**2, config.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            _Level(*pair, config.num_blocks, groups, attention=index == len(widths) - 2)
            for index, pair in enumerate(pairwise(widths))
        )
        self.downsamples = nn.ModuleList(_Downsample(width) for width in widths[1:-1])
        self.mid = _middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.pixel_shuffle))
        for level, downsample in zip(self.levels, [*self.downsamples, nn.Identity()], strict=True):
            x = downsample(level(x))
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """Latents to pixels: the encoder's levels in reverse, with one more block each."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.pixel_shuffle, groups = config.pixel_shuffle, config.norm_groups
        widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups)
        self.levels = nn.ModuleList(
            _Level(*pair, config.num_blocks + 1, groups, attention=index == 0)
            for index, pair in enumerate(pairwise([widths[0], *widths]))
        )
        self.upsamples = nn.ModuleList(_Upsample(width) for width in widths[:-1])
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.pixel_shuffle**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level, upsample in zip(self.levels, [*self.upsamples, nn.Identity()], strict=True):
            x = upsample(level(x))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.pixel_shuffle)


class _Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention at the coarsest one."""

    def __init__(self, width: int, target: int, num_blocks: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        inputs = [width] + [target] * (num_blocks - 1)
        self.blocks = nn.ModuleList(_ResidualBlock(channels, target, groups) for channels in inputs)
        self.attentions = nn.ModuleList(_Attention(target, groups) for _ in inputs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[index](x)
        return x


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, target: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, target, 3, padding=1)
        self.norm2 = _norm(target, groups)
        self.conv2 = nn.Conv2d(target, target, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, target, 1) if channels != target else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return cast(Tensor, self.shortcut(x) + y)


class _Attention(nn.Module):
    """Single-head attention over all positions of the latent grid."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.query, self.key, self.value, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            layer(y).flatten(2).mT.contiguous().unsqueeze(1) for layer in (self.query, self.key, self.value)
        )  # (B, 1, h*w, C); contiguous, or a CPU takes the slow path
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return cast(Tensor, x + self.proj(y))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))  # zeros right and below only, as published


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        _ResidualBlock(channels, channels, groups),
        _Attention(channels, groups),
        _ResidualBlock(channels, channels, groups),
    )
