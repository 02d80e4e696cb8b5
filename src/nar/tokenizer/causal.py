"""The causal tokenizer of clips: the first frame has codes of its own, every group of frames after it one more grid.

A closed loop: the encoder of a group knows the memory that the decoder will have of all codes before it, so that a
grid of codes adds what the earlier ones left out instead of telling it again. Codes of frames do not depend on later
frames; the frames made of a grid depend on all grids, since later codes also refine what has been seen before. Knows
pixels and codes; does not know how codes are generated. Legend: `B` batch, `T H W` frames and pixels, `t h w` the code
grid, `D` code_dim, `C` channels, `g` frames_per_code, `p` pixels folded a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.attention import Block, RMSNorm, rotations
from nar.storage.fields import Length, Range, Size, check, checked
from nar.tokenizer.base import Reconstruction, Tokenizer, check_patches
from nar.tokenizer.quantize import Quantized, build_quantizer, check_quantizer

NORM_EPS = 1e-6
ROTATION_BASE = 100.0  # code grids are small: 10,000, as for text, would leave most pairs without a turn


@dataclass(frozen=True)
class CausalTokenizerConfig:
    """Sizes of a causal tokenizer; the defaults, 2.8 M parameters, make 4x8x8 codes of 16 frames of 64x64.

    `frames_per_code` frames share a grid of codes, after the first frame, which has one alone. `fold` pixels a side
    become channels before the first convolution: `num_blocks` convolutional blocks of `channels` work at that
    resolution on either side. All others have `dim` channels at the resolution of the codes, `patch_size` pixels a
    side: those of the encoder, of the memory and of the decoder, which also has `num_decoder_layers` transformer
    layers.

    Attributes:
        vocab_size, code_dim: codes, and numbers in each.
        num_encoder_blocks, num_memory_blocks, num_decoder_blocks: blocks of the encoder, memory and decoder.
        num_heads, hidden_dim: of the decoder's transformer layers.
        l2_norm, quantizer, levels: as in `ImageTokenizerConfig`.
    """

    vocab_size: Annotated[int, Range(1, 2**31)] = 4096
    code_dim: Size = 8
    frames_per_code: Size = 5
    patch_size: Size = 8
    fold: Size = 4
    channels: Size = 96
    num_blocks: Length = 2
    dim: Size = 192
    num_encoder_blocks: Size = 2
    num_memory_blocks: Size = 1
    num_decoder_blocks: Size = 2
    num_decoder_layers: Size = 1
    num_heads: Size = 4
    hidden_dim: Size = 192
    l2_norm: bool = True
    quantizer: str = "vq"
    levels: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        check_quantizer(self.quantizer, self.vocab_size, self.code_dim, self.levels)
        if self.patch_size % self.fold:
            raise ValueError(f"patch_size {self.patch_size} is not a multiple of fold {self.fold}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} is not a multiple of twice num_heads {self.num_heads}")


class CausalTokenizer(Tokenizer):
    """Clips in -1..1 to codes and back: 1 + (t - 1) * g frames, of any size that is a multiple of the patch.

    The first grids of a clip's codes give its first frames, which all of them give in more detail.
    """

    kind = "causal-tokenizer"
    config_class = CausalTokenizerConfig
    pixel_axes = ("frames", "height", "width")
    code_axes = ("time", "height", "width")
    config: CausalTokenizerConfig

    def __init__(self, config: CausalTokenizerConfig) -> None:
        super().__init__(config)
        merge = (config.patch_size // config.fold) ** 2
        folded = 3 * config.fold**2
        self.first_in = nn.Linear(folded, config.channels)
        self.group_in = nn.Linear(folded * config.frames_per_code, config.channels)
        self.pixel_blocks = _convolutions(config.channels, config.num_blocks)
        self.down = nn.Linear(merge * config.channels, config.dim)
        self.known = nn.Linear(config.dim, config.dim)
        self.encoder_blocks = _convolutions(config.dim, config.num_encoder_blocks)
        self.encoder_norm = RMSNorm(config.dim, NORM_EPS)
        self.to_code = nn.Linear(config.dim, config.code_dim)
        self.quantizer = build_quantizer(
            config.quantizer, config.vocab_size, config.code_dim, l2_norm=config.l2_norm, levels=config.levels
        )
        self.nothing = nn.Parameter(torch.zeros(config.dim))  # the memory before the first code
        self.from_code = nn.Linear(config.code_dim, config.dim)
        self.memory_blocks = _convolutions(config.dim, config.num_memory_blocks)
        self.now = nn.Linear(config.dim, config.dim)
        self.later = nn.Linear(config.dim, config.dim)
        self.decoder_layers = nn.ModuleList(
            Block(config.dim, config.num_heads, config.hidden_dim, NORM_EPS) for _ in range(config.num_decoder_layers)
        )
        self.decoder_blocks = _convolutions(config.dim, config.num_decoder_blocks)
        self.decoder_norm = RMSNorm(config.dim, NORM_EPS)
        self.up = nn.Linear(config.dim, merge * config.channels)
        self.picture_blocks = _convolutions(config.channels, config.num_blocks)
        self.first_out = nn.Linear(config.channels, folded)
        self.group_out = nn.Linear(config.channels, folded * config.frames_per_code)
        self.init_weights()

    def init_weights(self) -> None:
        """The last layers: N(0, 0.02), biases 0, so that training starts from grey; all others as PyTorch does."""
        for layer in (self.first_out, self.group_out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, clips: Tensor) -> Reconstruction:
        latents, quantized, memories = self._encode(clips)
        losses = (torch.stack(parts).mean() for parts in list(zip(*quantized, strict=True))[2:])
        codes = torch.stack([grid.codes for grid in quantized], 1)
        return Reconstruction(self._decode(memories), latents, codes, *losses)

    @property
    def last_layer(self) -> Tensor:
        return self.group_out.weight  # it makes most of the pixels

    def encoder_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        seeing = (self.first_in, self.group_in, self.pixel_blocks, self.down, self.known, self.encoder_blocks)
        coding = (self.encoder_norm, self.to_code, self.quantizer)
        return *seeing, *coding, self.nothing, self.from_code, self.memory_blocks  # the decoder's memory, too

    def latents(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) to latents (B, D, t, h, w); those of a group depend on the codes of earlier ones."""
        return self._encode(clips)[0]

    def encode(self, clips: Tensor) -> Tensor:
        return torch.stack([grid.codes for grid in self._encode(clips)[1]], 1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        memories: list[Tensor] = [self.nothing]
        for grid in latents.unbind(2):
            memories.append(self._remember(memories[-1], grid))
        return self._decode(memories[1:])

    @checked
    def pixel_shape(self, grid: tuple[Size, ...]) -> tuple[int, ...]:
        if len(grid) != 3:
            raise ValueError(f"the grid of clips has three axes, such as (3, 8, 8), not {grid}")
        time, height, width = grid
        patch = self.config.patch_size
        return 1 + (time - 1) * self.config.frames_per_code, height * patch, width * patch

    def _encode(self, clips: Tensor) -> tuple[Tensor, list[Quantized], list[Tensor]]:
        """Latents (B, D, t, h, w); and for every grid of codes the quantiser's result, and the memory after it."""
        self.check_pixels(clips)
        config = self.config
        first = self.first_in(_fold(clips[:, :, :1], 1, config.fold))
        groups = self.group_in(_fold(clips[:, :, 1:], config.frames_per_code, config.fold))
        x = self.pixel_blocks(torch.cat((first, groups), dim=1).to(self.nothing.dtype))  # (B, t, H/p, W/p, C)
        seen = self.down(_fold_channels(x, config.patch_size // config.fold))
        memory: Tensor = self.nothing
        latents, quantized, memories = [], [], []
        for grid in seen.unbind(1):  # (B, h, w, dim)
            x = self.encoder_norm(self.encoder_blocks(grid + self.known(memory)))
            latents.append(self.to_code(x).movedim(-1, 1))
            quantized.append(self.quantizer(latents[-1]))
            memory = self._remember(memory, quantized[-1].latents)
            memories.append(memory)
        return torch.stack(latents, 2), quantized, memories

    def _remember(self, memory: Tensor, latents: Tensor) -> Tensor:
        """The memory (B, h, w, dim) after one more grid of quantised latents (B, D, h, w)."""
        return cast(Tensor, self.memory_blocks(memory + self.from_code(latents.movedim(1, -1).to(memory.dtype))))

    def _decode(self, memories: list[Tensor]) -> Tensor:
        """The memories after each grid, t of (B, h, w, dim), to clips (B, 3, T, H, W)."""
        config = self.config
        x = self.now(torch.stack(memories, 1)) + self.later(memories[-1])[:, None]  # (B, t, h, w, dim)
        axes = (torch.arange(size, device=x.device) for size in x.shape[1:4])
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # (t*h*w, 3)
        phases = rotations(places, config.dim // config.num_heads, ROTATION_BASE).to(x.device)
        y = x.flatten(1, 3).to(self.nothing.dtype)
        for layer in self.decoder_layers:
            y = layer(y, phases, None)
        y = self.up(self.decoder_norm(self.decoder_blocks(y.view(x.shape))))
        y = _unfold_channels(y, config.patch_size // config.fold).to(self.nothing.dtype)
        y = self.picture_blocks(y)  # (B, t, H/p, W/p, C)
        first = _unfold(self.first_out(y[:, :1]), 1, config.fold)
        groups = _unfold(self.group_out(y[:, 1:]), config.frames_per_code, config.fold)
        return torch.cat((first, groups), dim=2).float()

    def _check_size(self, *size: int) -> None:
        frames, step = size[0], self.config.frames_per_code
        check_patches(self.config.patch_size, size[1:], "clips")
        if frames < 1 or (frames - 1) % step:
            readable = f"1 + {step}k: {1 + step}, {1 + 2 * step}, ...; cut them, or repeat the last frame"
            raise ValueError(f"clips have {frames} frames, this tokenizer reads {readable}")


class _Convolution(nn.Module):
    """x + linear(gelu(conv3x3(norm(x)))) over (B, ..., h, w, C), each grid for itself.

    Channels stay last: a 3x3 convolution of them in bfloat16 took 11 ms forward and backward on one core, 20 in
    float32, and 35 as a matrix product of shifted copies (8 x 4 x 16 x 16 x 96 channels). At 8x8 places of 192 channels
    a block took 8 ms, a transformer block of the same width 12.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, NORM_EPS)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x).flatten(0, -4).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + cast(Tensor, self.out(F.gelu(y))).to(x.dtype).view(x.shape)


def _convolutions(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Convolution(channels) for _ in range(count)))


def _fold(clips: Tensor, frames: int, side: int) -> Tensor:
    """Pixels (B, 3, t*frames, h*side, w*side) to channels (B, t, h, w, frames*3*side*side)."""
    x = clips.unflatten(4, (-1, side)).unflatten(3, (-1, side))
    x = x.unflatten(2, (clips.shape[2] // frames, frames))  # (B, 3, t, g, h, p, w, p); t may be 0
    return cast(Tensor, x.permute(0, 2, 4, 6, 3, 1, 5, 7).flatten(4))


def _unfold(x: Tensor, frames: int, side: int) -> Tensor:
    """The inverse of `_fold`."""
    x = x.unflatten(4, (frames, 3, side, side))  # (B, t, h, w, g, 3, p, p)
    return x.permute(0, 5, 1, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _fold_channels(x: Tensor, side: int) -> Tensor:
    """Positions (B, t, h*side, w*side, C) to channels (B, t, h, w, side*side*C)."""
    return cast(Tensor, x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4).flatten(4))


def _unfold_channels(x: Tensor, side: int) -> Tensor:
    """The inverse of `_fold_channels`."""
    return cast(Tensor, x.unflatten(4, (side, side, -1)).transpose(3, 4).flatten(4, 5).flatten(2, 3))
