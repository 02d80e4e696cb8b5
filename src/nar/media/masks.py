"""Masks of what is to be made anew in a picture or clip: random ones to learn from, and fixed ones to measure with.

Knows shapes; does not know pixels, codes or models. A mask is bool (H, W) or (T, H, W), True where something new goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FIXED = ("centre", "right", "bottom", "top-left", "strokes")
_KINDS = {"boxes": 0.40, "half": 0.20, "uncrop": 0.13, "strokes": 0.27}  # of random masks, with their shares


def random_mask(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """A mask of `shape`: up to three boxes, one side of a line across an axis, all but a box, or a few strokes.

    Sides of boxes are 1/8 to 5/8 of an axis, what is left by "all but a box" 1/4 to 3/4, the line lies at 1/4 to 3/4;
    strokes are 1/16 to 1/8 of the shorter side wide. Along time, where there is such an axis, half of the boxes and all
    strokes last from the first frame to the last.
    """
    kind = rng.choice([*_KINDS], p=[*_KINDS.values()])
    if kind == "half":
        axis = int(rng.integers(len(shape)))
        line = round(rng.uniform(0.25, 0.75) * shape[axis])
        before = np.arange(shape[axis]) < max(1, min(line, shape[axis] - 1))
        side = before if rng.random() < 0.5 else ~before
        return np.broadcast_to(np.expand_dims(side, [other for other in range(len(shape)) if other != axis]), shape)
    if kind == "uncrop":
        return ~_box(rng, shape, 0.25, 0.75)
    if kind == "strokes":
        return np.broadcast_to(_strokes(rng, shape[-2:]), shape)
    mask = np.zeros(shape, bool)
    for _ in range(int(rng.integers(1, 4))):
        mask |= _box(rng, shape, 0.125, 0.625)
    return mask


def fixed_mask(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """One of the masks `FIXED` of (H, W): the centre of half the sides, a half, a quarter, or strokes by `seed`, which
    cover 25 to 50 %."""
    height, width = shape
    mask = np.zeros((height, width), bool)
    parts = {
        "centre": (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)),
        "right": (slice(None), slice(width // 2, None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "top-left": (slice(height // 2), slice(width // 2)),
    }
    if name in parts:
        mask[parts[name]] = True
        return mask
    if name != "strokes":
        raise ValueError(f"mask must be one of {', '.join(FIXED)}, not {name!r}")
    rng = np.random.default_rng((seed, height, width))
    while not 0.25 <= mask.mean() <= 0.5:
        mask = _strokes(rng, (height, width)) | (mask if mask.mean() < 0.25 else False)
    return mask


def _box(rng: np.random.Generator, shape: Sequence[int], least: float, most: float) -> np.ndarray:
    """A box somewhere, whose sides are `least` to `most` of the axes."""
    mask, slices = np.zeros(shape, bool), list[slice]()
    for axis, size in enumerate(shape):
        side = max(1, round(rng.uniform(least, most) * size))
        start = int(rng.integers(size - side + 1))
        lasting = axis < len(shape) - 2 and rng.random() < 0.5
        slices.append(slice(None) if lasting else slice(start, start + side))
    mask[tuple(slices)] = True
    return mask


def _strokes(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """A walk of 4 to 12 straight strokes, which turn a little at each end."""
    height, width = shape
    side, (y, x) = min(height, width), rng.uniform(0, 1, 2) * shape
    radius, angle = max(1.0, rng.uniform(1 / 32, 1 / 16) * side), rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[:height, :width] + 0.5
    mask = np.zeros((height, width), bool)
    for _ in range(int(rng.integers(4, 13))):
        angle += rng.uniform(-1, 1) * math.pi / 2
        length = rng.uniform(1 / 8, 3 / 8) * side
        for step in np.arange(0, length, radius):
            ahead = y + step * math.sin(angle), x + step * math.cos(angle)
            mask |= (rows - ahead[0]) ** 2 + (columns - ahead[1]) ** 2 <= radius**2
        y, x = np.clip(y + length * math.sin(angle), 0, height), np.clip(x + length * math.cos(angle), 0, width)
    return mask
