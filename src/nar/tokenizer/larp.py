"""The transformer tokenizer of the LARP family: clips to grids of codes and back.

Learned queries read the whole clip, so a code belongs to no place in it: the grid of codes is only the shape that a
model reads them in, row by row. Knows pixels and codes; does not know how codes are generated. Legend: `B` batch,
`T H W` frames and pixels, `P` patches, `Q` codes of a clip, `D` code_dim, `C` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.attention import sinusoids
from nar.storage.fields import OneOf, Positive, Range, Size, check
from nar.tokenizer.base import Reconstruction, Tokenizer
from nar.tokenizer.quantize import VectorQuantizer, sample_codes

NORMS = ("none", "layer", "layer_all", "batch", "batch_all")


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """Sizes of a video tokenizer; the defaults are LARP-L-long (172.2 M parameters).

    `grid` is the shape codes are read in, of `num_tokens` codes. `norm` normalises the latents before quantisation:
    over the code's dimensions (`layer`), over all codes of a clip (`layer_all`), over the batch and the codes
    (`batch`) or the batch alone (`batch_all`). A `stochastic` quantiser samples codes from
    softmax(cosine / temperature) in training; with `temperature` None it is the one stored with the weights, 0.1 in new
    ones: the published code calls it learned, but no gradient reaches it through sampled codes. The `learned_*` tables
    are sines and cosines otherwise, `*_type` adds one learned vector to all rows of a table.

    Attributes:
        num_frames, image_size: of clips.
        patch_size, temporal_patch_size: pixels a side, and frames, of a patch.
        encoder_dim, num_encoder_layers, num_encoder_heads: of the encoder.
        decoder_dim, num_decoder_layers, num_decoder_heads: of the decoder.
        vocab_size, code_dim: codes, and numbers in each.
        l2_norm: compare codes by direction.
        learned_patch_positions, learned_queries, learned_code_positions, learned_pixel_queries: which are learned.
        patch_type, query_type, code_type, pixel_query_type: which tables have a vector for all their rows.
        position_base: of sines and cosines.
    """

    num_frames: Size = 16
    image_size: Size = 128
    patch_size: Size = 8
    temporal_patch_size: Size = 4
    encoder_dim: Size = 768
    num_encoder_layers: Size = 12
    num_encoder_heads: Size = 12
    decoder_dim: Size = 768
    num_decoder_layers: Size = 12
    num_decoder_heads: Size = 12
    num_tokens: Size = 1024
    grid: tuple[Size, ...] = (4, 16, 16)
    vocab_size: Annotated[int, Range(1, 2**31)] = 8192
    code_dim: Size = 16
    norm: Annotated[str, OneOf(*NORMS)] = "none"
    l2_norm: bool = True
    stochastic: bool = True
    temperature: Positive | None = 0.03
    learned_patch_positions: bool = False
    learned_queries: bool = True
    learned_code_positions: bool = False
    learned_pixel_queries: bool = False
    patch_type: bool = False
    query_type: bool = False
    code_type: bool = False
    pixel_query_type: bool = True
    position_base: Positive = 10000.0

    def __post_init__(self) -> None:
        check(self)
        if math.prod(self.grid) != self.num_tokens:
            places = f"{math.prod(self.grid)} places for num_tokens {self.num_tokens}"
            raise ValueError(f"grid {self.grid} has {places}; they must agree")
        for size, name, least in (
            ("image_size", "patch_size", 1),
            ("num_frames", "temporal_patch_size", 1),
            ("encoder_dim", "num_encoder_heads", 4),
            ("decoder_dim", "num_decoder_heads", 4),
        ):
            value, step = getattr(self, size), getattr(self, name)
            if value % step or value % least:
                also = f"{least} and of " if least > 1 else ""
                raise ValueError(f"{size} {value} must be a multiple of {also}{name} {step}")
        if self.stochastic and not self.l2_norm:
            raise ValueError("a stochastic quantiser compares directions: set l2_norm to true, or stochastic to false")

    @property
    def patch_grid(self) -> tuple[int, int, int]:
        """Patches of a clip along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.temporal_patch_size, side, side


class VideoTokenizer(Tokenizer):
    """Clips in -1..1 to codes and back.

    A clip may have fewer frames than the tokenizer was made for, a multiple of the temporal patch: it still takes
    `num_tokens` codes, and `decode` then needs `num_frames`.
    """

    kind = "video-tokenizer"
    config_class = VideoTokenizerConfig
    pixel_axes = ("frames", "height", "width")
    config: VideoTokenizerConfig
    quantizer: VectorQuantizer

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__(config)
        self.code_axes = tuple(map(str, config.grid))
        stride = (config.temporal_patch_size, config.patch_size, config.patch_size)
        wide, narrow = config.encoder_dim, config.decoder_dim
        count, base = config.num_tokens, config.position_base
        self.patch_embed = nn.Conv3d(3, wide, stride, stride=stride)
        self.patch_positions = _GridPositions(
            config.patch_grid, wide, learned=config.learned_patch_positions, shift=config.patch_type
        )
        self.queries = _Positions(count, wide, base, learned=config.learned_queries, shift=config.query_type)
        self.encoder = Bidirectional(wide, config.num_encoder_layers, config.num_encoder_heads)
        self.to_code = nn.Linear(wide, config.code_dim)
        self.code_norm = nn.Identity() if config.norm == "none" else _OverCodes(config.norm, count, config.code_dim)
        self.quantizer = VectorQuantizer(config.vocab_size, config.code_dim, l2_norm=config.l2_norm)
        stored_temperature = config.stochastic and config.temperature is None
        self.inverse_temperature: Tensor  # a parameter in the published code, which starts from 10 as well
        self.register_buffer("inverse_temperature", torch.tensor(10.0) if stored_temperature else None)
        self.from_code = nn.Linear(config.code_dim, narrow)
        self.code_positions = _Positions(
            count, narrow, base, learned=config.learned_code_positions, shift=config.code_type
        )
        self.pixel_queries = _GridPositions(
            config.patch_grid, narrow, learned=config.learned_pixel_queries, shift=config.pixel_query_type
        )
        self.decoder = Bidirectional(narrow, config.num_decoder_layers, config.num_decoder_heads)
        self.norm_out = nn.LayerNorm(narrow, eps=1e-6)
        self.to_pixels = nn.Linear(narrow, 3 * math.prod(stride))
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers and the patch convolution: Xavier uniform, biases 0; the last layer: 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.to_pixels.weight)

    def forward(self, clips: Tensor, *, uniforms: Tensor | None = None) -> Reconstruction:
        """Reconstruct `clips` (B, 3, T, H, W) in -1..1, with the quantiser's losses.

        With `uniforms` (B, *grid) in [0, 1) the codes of a stochastic quantiser are sampled, one number each, as in
        training; else they are the nearest.
        """
        latents = self.latents(clips)
        codes = self.quantizer.encode(latents) if uniforms is None else self._sample(latents, uniforms)
        points, entries = self.quantizer.points(latents).movedim(-1, 1), self.quantizer.decode(codes)
        decoded = self.decode_latents(points + (entries - points).detach(), num_frames=clips.shape[2])
        losses = F.mse_loss(entries, points.detach()), F.mse_loss(points, entries.detach())
        return Reconstruction(decoded, latents, codes, *losses)

    @property
    def last_layer(self) -> Tensor:
        return self.to_pixels.weight

    def encoder_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        reading = (self.patch_embed, self.patch_positions, self.queries, self.encoder)
        return *reading, self.to_code, self.code_norm, self.quantizer

    def latents(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) to continuous latents (B, D, *grid), not yet of unit length."""
        self.check_pixels(clips)
        # The published weights expect 0..1.
        patches = self.patch_embed(clips * 0.5 + 0.5).flatten(2).transpose(1, 2)  # (B, P, C)
        patches = patches + self.patch_positions(patches.shape[1])
        queries = self.queries().to(patches.dtype).expand(len(clips), -1, -1)
        x = self.encoder(torch.cat((patches, queries), dim=1))[:, patches.shape[1] :]  # (B, Q, C)
        x = self.code_norm(self.to_code(x)).transpose(1, 2)
        return cast(Tensor, x.reshape(len(clips), -1, *self.config.grid))

    def encode(self, clips: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Clips (B, 3, T, H, W), float in -1..1, to the nearest codes (B, *grid) int64.

        With `generator` they are sampled; raises ValueError where the quantiser is deterministic.
        """
        latents = self.latents(clips)
        if generator is None:
            return self.quantizer.encode(latents)
        uniforms = torch.rand(len(clips), *self.config.grid, generator=generator, device=generator.device)
        return self._sample(latents, uniforms)

    def decode(self, codes: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Codes (B, *grid) to clips (B, 3, T, H, W), about -1..1 and not clamped; T is `num_frames`, or all."""
        self.check_codes(codes)
        return self.decode_latents(self.quantizer.decode(codes), num_frames=num_frames)

    def decode_latents(self, latents: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Quantised latents (B, D, *grid) to clips (B, 3, T, H, W); with a gradient. T as in `decode`."""
        config = self.config
        num_frames = config.num_frames if num_frames is None else num_frames
        step = config.temporal_patch_size
        if not 0 < num_frames <= config.num_frames or num_frames % step:
            possible = f"up to {config.num_frames} frames, in multiples of {step}"
            raise ValueError(f"num_frames {num_frames} is impossible: this tokenizer gives {possible}")
        grid = (num_frames // step, *config.patch_grid[1:])
        codes = self.from_code(latents.flatten(2).transpose(1, 2).to(self.from_code.weight.dtype))  # (B, Q, C)
        codes = codes + self.code_positions()
        queries = self.pixel_queries(math.prod(grid)).to(codes.dtype).expand(len(codes), -1, -1)
        x = self.decoder(torch.cat((codes, queries), dim=1))[:, codes.shape[1] :]  # (B, P, C)
        patches = self.to_pixels(self.norm_out(x)).unflatten(1, grid)
        patches = patches.unflatten(-1, (step, config.patch_size, config.patch_size, 3))  # (B, t, h, w, dt, dh, dw, 3)
        pixels = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, 3, t, dt, h, dh, w, dw)
        return cast(Tensor, pixels.flatten(6, 7).flatten(4, 5).flatten(2, 3) * 2.0 - 1.0)

    def decode_options(self, pixels: Tensor) -> dict[str, Any]:
        return {"num_frames": pixels.shape[2]}

    def pixel_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002 a code belongs to no place
        return self.config.num_frames, self.config.image_size, self.config.image_size

    def _sample(self, latents: Tensor, uniforms: Tensor) -> Tensor:
        """Codes (B, *grid) of latents (B, D, *grid), one for each of `uniforms`."""
        if not self.config.stochastic:
            raise ValueError("this tokenizer's quantiser is deterministic (stochastic: false); omit generator")
        with torch.autocast(latents.device.type, enabled=False):
            scores = self.quantizer.points(latents.detach()).flatten(0, -2) @ self.quantizer.codebook().float().T
            scale = 1.0 / self.config.temperature if self.config.temperature else self.inverse_temperature
            return sample_codes(scores * scale, uniforms.to(scores.device).flatten()).view(uniforms.shape)

    def _check_size(self, *size: int) -> None:
        config, side = self.config, self.config.image_size
        frames, height, width = size
        if (height, width) != (side, side):
            raise ValueError(f"clips of {height}x{width} pixels, this tokenizer reads {side}x{side}; resize them first")
        if not 0 < frames <= config.num_frames or frames % config.temporal_patch_size:
            readable = f"up to {config.num_frames}, in multiples of {config.temporal_patch_size}"
            raise ValueError(
                f"clips have {frames} frames, this tokenizer reads {readable}; cut them, or repeat the last frame"
            )


class Bidirectional(nn.Sequential):
    """Pre-norm blocks in which every token sees every other."""

    def __init__(self, dim: int, num_layers: int, num_heads: int) -> None:
        super().__init__(*(_Block(dim, num_heads) for _ in range(num_layers)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # 1e-5, the default when the published weights were trained; newer versions of their library use 1e-6.
        self.attention_norm = nn.LayerNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-5)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )  # (B, heads, P + Q, head_dim)
        x = x + self.attention_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))


class _GridPositions(nn.Module):
    """One vector a patch: a sum of learned vectors along each axis, or a fixed table; `shift` is added to all."""

    def __init__(self, grid: tuple[int, int, int], dim: int, *, learned: bool, shift: bool) -> None:
        super().__init__()
        if learned:
            self.time, self.row, self.column = (
                nn.Parameter(sinusoids(torch.arange(size), dim).float()) for size in grid
            )
        else:
            self.register_buffer("table", sinusoid_grid(grid, dim))
        self.learned = learned
        self.shift = nn.Parameter(0.02 * torch.randn(dim)) if shift else None

    def forward(self, num_patches: int) -> Tensor:
        """The first `num_patches` rows, (P, C)."""
        if self.learned:
            rows = (self.time[:, None, None] + self.row[:, None] + self.column).flatten(0, 2)[:num_patches]
        else:
            rows = cast(Tensor, self.table)[:num_patches]
        return rows if self.shift is None else rows + self.shift


class _Positions(nn.Module):
    """One vector a code: learned, or a fixed table; `shift` is added to all."""

    def __init__(self, size: int, dim: int, base: float, *, learned: bool, shift: bool) -> None:
        super().__init__()
        self.table: Tensor
        if learned:
            self.table = nn.Parameter(0.02 * torch.randn(size, dim))
        else:
            self.register_buffer("table", sinusoids(torch.arange(size), dim, base).float())
        self.shift = nn.Parameter(0.02 * torch.randn(dim)) if shift else None

    def forward(self) -> Tensor:
        """All rows, (Q, C)."""
        return self.table if self.shift is None else self.table + self.shift


class _OverCodes(nn.Module):
    """Normalise latents (B, Q, D), in float32."""

    def __init__(self, kind: str, count: int, dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind.startswith("layer"):
            self.norm: nn.Module = nn.LayerNorm(dim if kind == "layer" else (count, dim))
        else:
            self.norm = nn.BatchNorm1d(dim if kind == "batch" else count * dim)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.kind == "batch":
                return cast(Tensor, self.norm(x.transpose(1, 2)).transpose(1, 2))
            return cast(Tensor, self.norm(x.flatten(1) if self.kind == "batch_all" else x)).view(x.shape)


def sinusoid_grid(grid: tuple[int, int, int], dim: int) -> Tensor:
    """One row a patch, (P, dim): the table of its time plus [table of its column | table of its row]."""
    time, row, column = torch.cartesian_prod(*map(torch.arange, grid)).unbind(1)
    return (sinusoids(time, dim) + torch.cat((sinusoids(column, dim // 2), sinusoids(row, dim // 2)), 1)).float()
