"""Pictures and clips with holes as a condition: blanked before they are encoded, and the codes that a mask touches.

The codes around a hole know what was in it: of `fashion`, whose encoder sees far, 91 % of those one ring outside change
when the hole is blanked. So the pixels of a hole never reach the encoder. Knows masks and
codes; does not know models, files, or how masks come about. Legend: `B` batch, `T H W` frames and pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nar.condition import Condition, PrefixCondition


def blanked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, 3, [T,] H, W) with what `mask` (B, [T,] H, W) marks replaced by the mean colour of the rest of each,
    mid-grey where there is no rest."""
    hidden, axes = mask[:, None], tuple(range(2, pixels.ndim))
    rest = (~hidden).sum(axes, keepdim=True).clamp_min(1)
    mean = pixels.masked_fill(hidden, 0.0).sum(axes, keepdim=True) / rest
    return torch.where(hidden, mean, pixels)


def touched(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The codes (B, *grid) bool of which `mask` (B, [T,] H, W) marks a pixel.

    Where frames are one more than steps in time divide, the first of them has codes of its own (causal tokenizers).
    """
    shape = list(mask.shape[1:])
    if len(grid) != len(shape):
        raise ValueError(f"codes of {grid} have no places in pictures of {tuple(shape)}: this tokenizer can't edit")
    if shape[0] % grid[0] and grid[0] > 1:
        each = (shape[0] - 1) // (grid[0] - 1)
        mask = torch.cat([mask[:, :1].expand(-1, each - 1, *mask.shape[2:]), mask], 1)
    sizes = [part for total, count in zip(mask.shape[1:], grid, strict=True) for part in (count, total // count)]
    return mask.reshape(len(mask), *sizes).any(dim=tuple(range(2, 2 * len(grid) + 1, 2)))


def holes_condition(codes: Tensor, holes: Tensor) -> Condition:
    """Condition on the codes (B, *grid) that are no `holes`; the values of the others are never seen."""
    return PrefixCondition(codes.masked_fill(holes, 0), ~holes)
