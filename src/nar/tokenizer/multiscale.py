"""The multi-scale residual tokenizer of VAR (arXiv 2404.02905): pictures to codes of growing scales and back.

Knows pixels and codes of all scales, one after the other; does not know how codes are generated. Legend: `B` batch,
`N` codes of all scales, `C` code_dim, `P` side of the last scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.scales import ScaleSums, check_sides, shrunk
from nar.storage.fields import Range, Size, check
from nar.tokenizer.base import Tokenizer
from nar.tokenizer.image import Decoder, Encoder, ImageTokenizerConfig
from nar.tokenizer.quantize import Quantized, Quantizer, chosen_points, nearest_entries


@dataclass(frozen=True)
class MultiScaleTokenizerConfig:
    """Sizes of a multi-scale tokenizer; the defaults are VAR's for 256 pixels (108.9 M parameters).

    `scales` are the sides of the code grids, coarse to fine: pictures have the last one times the patch size. The
    others are as in `ImageTokenizerConfig`.

    Attributes:
        vocab_size, code_dim: codes, and numbers in each.
        channels, channel_multipliers, num_blocks, norm_groups, pixel_shuffle: as in `ImageTokenizerConfig`.
    """

    scales: tuple[Size, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: Annotated[int, Range(1, 2**31)] = 4096
    code_dim: Size = 32
    channels: Size = 160
    channel_multipliers: tuple[Annotated[int, Range(1, 2**10)], ...] = (1, 1, 2, 2, 4)
    num_blocks: Size = 2
    norm_groups: Size = 32
    pixel_shuffle: Size = 1

    def __post_init__(self) -> None:
        check(self)
        check_sides(self.scales)
        _ = self.networks

    @property
    def networks(self) -> ImageTokenizerConfig:
        """The sizes of encoder and decoder, which are those of image tokenizers."""
        names = ("vocab_size", "code_dim", "channels", "channel_multipliers", "num_blocks", "norm_groups")
        sizes = {name: getattr(self, name) for name in (*names, "pixel_shuffle")}
        return ImageTokenizerConfig(**sizes, latent_channels=self.code_dim)

    @property
    def patch_size(self) -> int:
        """Pixels a side that one code of the last scale stands for."""
        return self.networks.patch_size


class MultiScaleQuantizer(Quantizer):
    """Quantises what the scales before have left of the latents, scale by scale, with one codebook."""

    learned = True

    def __init__(self, scales: tuple[int, ...], vocab_size: int, code_dim: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.sums = ScaleSums(scales, vocab_size, code_dim, learned=True)

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise (B, C, P, P) with a straight-through gradient; the losses are means over the sums of all scales, so
        that each scale learns to do without the ones after it."""
        with torch.autocast(latents.device.type, enabled=False):
            points = latents.float()
            codes = self.encode(points.detach())
            totals = list(self.sums.totals(codes))
            return Quantized(
                (points + (totals[-1] - points).detach()).to(latents.dtype),
                codes,
                torch.stack([F.mse_loss(total, points.detach()) for total in totals]).mean(),
                torch.stack([F.mse_loss(points, total.detach()) for total in totals]).mean(),
            )

    def entries(self, codes: Tensor) -> Tensor:  # noqa: ARG002 refused whatever they are
        raise ValueError("codes of several scales add up: none of them stands for latents alone, and none is refined")

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, P, P) to codes (B, N) of all scales, int64."""
        return torch.cat([codes for _, codes in self.encode_scales(latents)], 1)

    @torch.no_grad()
    def restart(self, latents: Tensor, dead: Tensor, generator: torch.Generator) -> None:
        points = torch.cat([points for points, _ in self.encode_scales(latents)], 1)
        self.sums.codebook[dead] = chosen_points(points, dead, generator)

    def encode_scales(self, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each scale what is left of latents (B, C, P, P) at its places, (B, p * p, C), and its codes."""
        with torch.autocast(latents.device.type, enabled=False):
            rest = latents.float()
            for scale, side in enumerate(self.sums.sides):
                points = shrunk(rest, side).flatten(2).mT
                codes = nearest_entries(points, self.sums.codebook.float())
                yield points, codes
                rest = rest - self.sums.added(codes, scale)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N), -1 for scales that are not there yet, to latents (B, C, P, P)."""
        with torch.autocast(codes.device.type, enabled=False):
            *_, total = self.sums.totals(codes)
        return total


class MultiScaleTokenizer(Tokenizer):
    """Pictures of one size in -1..1 to codes (B, N) of all scales and back."""

    kind = "multiscale-tokenizer"
    config_class = MultiScaleTokenizerConfig
    pixel_axes = ("height", "width")
    shows_undecided = True
    config: MultiScaleTokenizerConfig
    quantizer: MultiScaleQuantizer

    def __init__(self, config: MultiScaleTokenizerConfig) -> None:
        super().__init__(config)
        self.code_axes = (str(sum(side * side for side in config.scales)),)
        self.encoder = Encoder(config.networks)
        self.decoder = Decoder(config.networks)
        self.quantizer = MultiScaleQuantizer(config.scales, config.vocab_size, config.code_dim)
        self.to_code = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.from_code = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def encoder_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.encoder, self.to_code, self.quantizer

    def latents(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        return cast(Tensor, self.to_code(self.encoder(pixels)))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.from_code(latents.to(self.from_code.weight.dtype))))

    def inputs(self, codes: Tensor) -> Tensor:
        """What a transformer of next scales is fed for codes (B, N): sums at the places of all scales but the first,
        (B, N - 1, C)."""
        self.check_codes(codes)
        return cast(Tensor, self.quantizer.sums(codes, range(len(self.config.scales) - 1)))

    def check_codes(self, codes: Tensor) -> None:
        super().check_codes(codes.clamp_min(0) if (codes >= -1).all() else codes)

    def pixel_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002 there is one size
        return (self.config.scales[-1] * self.config.patch_size,) * 2

    def _check_size(self, *size: int) -> None:
        if size != (wanted := self.pixel_shape(())):
            found, needed = "x".join(map(str, size)), "x".join(map(str, wanted))
            raise ValueError(f"pictures of {found} pixels: these scales are of {needed}; resize them first")
