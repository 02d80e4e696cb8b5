"""The running sum that next-scale prediction is about (VAR, arXiv 2404.02905): codes of all scales add up to latents.

Knows maps of code vectors and their sizes; does not know pixels, fronts or who learns the vectors. Legend: `B` batch,
`N` codes of all scales, `p` side of a scale, `P` side of the last, `C` code_dim, `V` vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SMOOTHERS = 4


def check_sides(sides: Sequence[int]) -> None:
    """Raise ValueError unless sides begin with 1 and grow."""
    if not sides or sides[0] != 1 or any(later <= side for side, later in pairwise(sides)):
        raise ValueError(f"scales must begin with 1 and grow, such as [1, 2, 3, 4], not {list(sides)}")


def smoother(scale: int, num_scales: int) -> int:
    """Which of the four convolutions serves a scale: that of the nearest tick, the later one where two are as near.

    Ticks are 1/12, 13/36, 23/36 and 11/12 of the way. Of ten scales two lie between ticks: taken the other way, sums
    are off by 1.6. Whole numbers decide here; the published code's rounding gives the same for 2 to 64 scales.
    """
    last = max(1, num_scales - 1)
    return min(range(NUM_SMOOTHERS)[::-1], key=lambda tick: abs(36 * scale - (3 + 10 * tick) * last))


class ScaleSums(nn.Module):
    """Sums of codes (B, N) of all scales, coarse to fine, each enlarged to the last one's size and smoothed.

    The codebook and the four convolutions are learned with the tokenizer (`learned`); beside a transformer they are a
    frozen copy. All is computed in float32.
    """

    codebook: Tensor  # (V, C)
    kernels: Tensor  # (4, C, C, 3, 3)
    biases: Tensor  # (4, C)

    def __init__(self, sides: Sequence[int], vocab_size: int, code_dim: int, *, learned: bool) -> None:
        super().__init__()
        self.sides = tuple(sides)
        shapes = {"codebook": (vocab_size, code_dim), "kernels": (NUM_SMOOTHERS, code_dim, code_dim, 3, 3)}
        for name, shape in {**shapes, "biases": (NUM_SMOOTHERS, code_dim)}.items():
            bound = 1 / vocab_size if name == "codebook" else (9 * code_dim) ** -0.5  # as embeddings, as convolutions
            values = nn.init.uniform_(torch.empty(shape), -bound, bound)
            if learned:
                setattr(self, name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)

    def starts(self, scale: int) -> int:
        """The number of codes before a scale."""
        return sum(side * side for side in self.sides[:scale])

    def added(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes (B, p * p) of one scale add to the sum, (B, C, P, P)."""
        side, last, index = self.sides[scale], self.sides[-1], smoother(scale, len(self.sides))
        x = F.embedding(codes, self.codebook.float()).mT.unflatten(2, (side, side)).contiguous()
        if side != last:
            x = F.interpolate(x, size=(last, last), mode="bicubic")
        # A CPU's convolution rounds otherwise for another number of pictures: one at a time takes a quarter longer.
        parts = x.split(1 if x.device.type == "cpu" else len(x))
        kernel, bias = self.kernels[index].float(), self.biases[index].float()
        smoothed = torch.cat([F.conv2d(part, kernel, bias, padding=1) for part in parts])
        return cast(Tensor, 0.5 * x + 0.5 * smoothed)

    def totals(self, codes: Tensor, num_scales: int | None = None) -> Iterator[Tensor]:
        """The sum (B, C, P, P) after each of the first scales of codes (B, n); undecided ones, -1, add nothing."""
        total = torch.zeros((), device=codes.device)
        for scale in range(len(self.sides) if num_scales is None else num_scales):
            own = codes[:, self.starts(scale) : self.starts(scale + 1)]
            decided = (own >= 0).all(1)[:, None, None, None]
            total = total + torch.where(decided, self.added(own.clamp_min(0), scale), 0.0)
            yield total

    def forward(self, codes: Tensor, scales: range) -> Tensor:
        """What a transformer is fed after each of `scales`, given all codes (B, n) up to them: the sum at the places of
        the next scale, (B, S, C)."""
        with torch.autocast(codes.device.type, enabled=False):
            fed = [
                shrunk(total, self.sides[scale + 1]).flatten(2).mT
                for scale, total in enumerate(self.totals(codes, scales.stop if scales else 0))
                if scale in scales
            ]
            return torch.cat([self.codebook.new_zeros(len(codes), 0, self.codebook.shape[1]).float(), *fed], 1)


def shrunk(maps: Tensor, side: int) -> Tensor:
    """Means of maps (B, C, P, P) over the cells of a coarser scale, which overlap where its side does not divide P."""
    return maps if maps.shape[-1] == side else F.interpolate(maps, size=(side, side), mode="area")
