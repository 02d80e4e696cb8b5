"""What is to be new in a picture or clip: masks in any form, windows brought to a model's size, and results put back.

Knows pixels; does not know models, codes or conditions. Legend: `T H W` frames and pixels of what is edited, `h w`
pixels of the model; stills have no `T`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nar.media.pictures import most_pixels, num_frames, opened, read_picture, upright_rgb
from nar.media.pixels import as_images, as_pixels

WHITE = 128  # from which a pixel of a mask is to be new
AROUND = 2.0  # sides of a region, of those of what the mask covers: what is new is a quarter of it
OVERLAP = 0.5  # of a window's side, with what is there already, when a picture is extended
MOST_TIMES = 64  # a side of an extended picture, of the given one's or the model's
Picture = Any  # a path, a Pillow picture, or uint8 (H, W, 3)
Mask = Any  # a path or a Pillow picture, white where something new goes; or an array ([T,] H, W)


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture or clip to edit: `picture` ([T,] H, W, 3) uint8 and its `mask` ([T,] H, W), and of its `region` the
    `pixels` (1, 3, [T,] h, w) in -1..1 and which are `hidden`, (1, [T,] h, w)."""

    picture: np.ndarray
    mask: np.ndarray
    region: Box
    pixels: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, picture: np.ndarray, mask: np.ndarray, region: Box, size: tuple[int, int]) -> Canvas:
        """The region of a picture or clip at a model's `size` (h, w)."""
        place, shape = (..., *region.slices), (size[1], size[0])
        part, covered = picture[(*place, slice(None))], mask[place]
        if covered.shape[-2:] != size:
            how = Image.Resampling.BICUBIC if region.width < size[1] else Image.Resampling.BOX
            part = _frames(part, 3, lambda frame: Image.fromarray(frame).resize(shape, how))
            # All that is touched counts: enlarged by nearest, made smaller by the mean, which is above 0 then.
            grey = np.where(covered, np.uint8(255), np.uint8(0))
            covered = _frames(grey, 2, lambda frame: Image.fromarray(frame).resize(shape, Image.Resampling.BOX)) > 0
        return cls(picture, mask, region, as_pixels(part[None].copy()), torch.from_numpy(covered.copy())[None])

    def pasted(self, made: Tensor, *, blend: bool = True) -> np.ndarray:
        """The picture ([T,] H, W, 3) uint8 with what is `made` (3, [T,] h, w) of the region, in the mask; the rest as
        it was.

        `blend` adds the difference at the edge of the mask, fading within it, so that the seam shows less. What the
        mask hides of the picture has no part in it.
        """
        made = made[None].float().cpu()
        made = blended(made, self.pixels, self.hidden) if blend else made
        new, (height, width) = as_images(made)[0], (self.region.height, self.region.width)
        if new.shape[-3:-1] != (height, width):
            new = _frames(
                new, 3, lambda frame: Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
            )
        edited, place = self.picture.copy(), (..., *self.region.slices)
        pixels = (*place, slice(None))
        edited[pixels] = np.where(self.mask[place][..., None], new, edited[pixels])
        return edited


def masked(picture: np.ndarray, mask: Mask | None, box: Sequence[int] | None) -> np.ndarray:
    """What is to be new of a picture or clip ([T,] H, W, 3), ([T,] H, W) bool; one mask goes with all frames.

    Raises:
        ValueError: neither or both of mask and box, a mask of another size or with transparency, or one that covers
            nothing or all.
    """
    if (mask is None) == (box is None):
        raise ValueError("say what is to be new: mask=PICTURE, white there, or box=(left, top, width, height)")
    shape = picture.shape[:-1]
    hidden = _mask(mask) if box is None else _of_box(box, shape[-2:])
    if hidden.ndim > len(shape):
        raise ValueError(f"the mask of a picture must be a picture, or an array (H, W), not {hidden.shape}")
    if hidden.shape[-2:] != shape[-2:]:
        sizes = f"{hidden.shape[-1]}x{hidden.shape[-2]}", f"{shape[-1]}x{shape[-2]}"
        raise ValueError(f"the mask is {sizes[0]} and the picture {sizes[1]}: they must have one size")
    if hidden.ndim > 2 and hidden.shape != shape:
        raise ValueError(f"the mask has {len(hidden)} frames, the clip {shape[0]}: give as many, or one mask for all")
    hidden = np.broadcast_to(hidden, shape).copy()
    if not hidden.any():
        raise ValueError("the mask covers nothing: make white what is to be new")
    if hidden.all():
        raise ValueError("the mask covers the whole picture: there is nothing to edit, sample a new one instead")
    return hidden


def before(picture: np.ndarray, hidden: np.ndarray) -> list[Any]:
    """A picture ([T,] H, W, 3) as it is, and with what is `hidden` of it in grey, as Pillow pictures or lists of them,
    to be shown beside the results."""
    shown = (picture, np.where(hidden[..., None], np.uint8(128), picture))
    return [Image.fromarray(one) if one.ndim == 3 else [*map(Image.fromarray, one)] for one in shown]


def extended(
    picture: np.ndarray | None, size: Sequence[int], position: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, Box | None]:
    """A picture of `size` (H, W) with the given one at `position` (left, top), by default in the middle: the picture,
    what of it is new, and where the given one lies.

    Raises:
        ValueError: a size or position that is no two whole numbers, or in which the picture does not fit.
    """
    wanted = _whole(size, "size", "(height, width)", 1)
    if math.prod(wanted) > (most := most_pixels()):
        raise ValueError(f"size {wanted[0]}x{wanted[1]} is too large: at most {most:,} pixels, or set NAR_MAX_PIXELS")
    whole, hidden = np.zeros((*wanted, 3), np.uint8), np.ones(wanted, bool)
    if picture is None:
        if position is not None:
            raise ValueError("position is that of a given picture: leave it out, or give one")
        return whole, hidden, None
    height, width = picture.shape[:2]
    if height > wanted[0] or width > wanted[1] or (height, width) == wanted:
        sizes = f"{height}x{width}, it can't be extended to {wanted[0]}x{wanted[1]}"
        raise ValueError(f"the picture is {sizes} (height x width): give a size with a longer side, and none shorter")
    middle = (wanted[1] - width) // 2, (wanted[0] - height) // 2
    left, top = middle if position is None else _whole(position, "position", "(left, top)", 0)
    if left + width > wanted[1] or top + height > wanted[0]:
        sizes = f"a picture of {height}x{width} at {(left, top)} does not fit in {wanted[0]}x{wanted[1]}"
        raise ValueError(f"{sizes} (height x width): left is at most {wanted[1] - width}, top {wanted[0] - height}")
    given = Box(left, top, width, height)
    whole[given.slices], hidden[given.slices] = picture, False
    return whole, hidden, given


def windows(given: Box | None, shape: tuple[int, int], size: tuple[int, int]) -> list[Box]:
    """Windows that cover a picture of `shape` (H, W), each half over what lies nearer to the `given` part, nearest
    first; without a given part nearest to the middle.

    They have a model's shape, and the sides of its `size` (h, w), or more where the shorter side of what is given has;
    no more than the picture.
    """
    sides = size if given is None else (given.height, given.width)
    scale = max(1.0, min(side / own for side, own in zip(sides, size, strict=True)))
    scale = min(scale, *(full / own for full, own in zip(shape, size, strict=True)))
    tall, wide = (min(full, max(1, round(scale * own))) for full, own in zip(shape, size, strict=True))
    if max(shape[0] / tall, shape[1] / wide) > MOST_TIMES:
        raise ValueError(f"{shape[0]}x{shape[1]} is more than {MOST_TIMES} times the {tall}x{wide} worked on at once")
    middle = Box((shape[1] - wide) // 2, (shape[0] - tall) // 2, wide, tall) if given is None else given
    rows = _starts(middle.top, middle.height, tall, shape[0])
    columns = _starts(middle.left, middle.width, wide, shape[1])
    places = sorted(itertools.product(rows, columns), key=lambda place: (place[0][1] + place[1][1], *place))
    return [Box(left, top, wide, tall) for (top, _), (left, _) in places]


def around(mask: np.ndarray, size: tuple[int, int]) -> Box:
    """Where a picture is worked on: all of it where it has the model's size; else around the mask, twice as large as
    what it covers, no smaller than the model's size, of its shape as far as the picture allows."""
    height, width = mask.shape[-2:]
    if (height, width) == tuple(size):
        return Box(0, 0, width, height)
    flat: np.ndarray = np.any(mask.reshape(-1, height, width), axis=0)
    rows, columns = np.flatnonzero(flat.any(1)), np.flatnonzero(flat.any(0))
    covered = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    scale = max(1.0, *(AROUND * own / wanted for own, wanted in zip(covered, size, strict=True)))
    tall, wide = (min(full, round(scale * side)) for full, side in zip((height, width), size, strict=True))
    top = int(np.clip((rows[0] + rows[-1] + 1 - tall) // 2, 0, height - tall))
    left = int(np.clip((columns[0] + columns[-1] + 1 - wide) // 2, 0, width - wide))
    return Box(left, top, wide, tall)


def blended(made: Tensor, pixels: Tensor, hidden: Tensor, *, width: int = 3) -> Tensor:
    """What is made (B, 3, [T,] h, w), in `hidden` (B, [T,] h, w) moved by its difference from the visible `pixels` at
    the edge, in its frame.

    The difference goes over to the next hidden pixels whole, and fades over `width` of them. A mean over 5x5 pixels in
    its place left the step across the right half's edge at 1.37 times ordinary ones, beside 0.80 (true pictures 0.90).
    """
    shape = made.movedim(1, -3).shape
    made, pixels = (each.movedim(1, -3).flatten(0, -4) for each in (made, pixels.expand_as(made)))
    known = (~hidden).flatten(0, -3)[:, None].float()
    difference, moved = (pixels - made) * known, made
    for ring in range(width):
        share = _neighbours(known)
        new = (share > 0) & (known == 0)
        difference = torch.where(new, _neighbours(difference) / share.clamp_min(1.0), difference)
        moved = torch.where(new, made + (1 - ring / width) * difference, moved)
        known = known.masked_fill(new, 1.0)
    return moved.clamp(-1, 1).view(shape).movedim(-3, 1)


def _neighbours(values: Tensor) -> Tensor:
    """The sum of the four values beside each of (B, C, h, w)."""
    padded = F.pad(values, (1, 1, 1, 1))
    rows, columns = padded[..., 1:-1], padded[..., 1:-1, :]
    return rows[..., 2:, :] + rows[..., :-2, :] + columns[..., 2:] + columns[..., :-2]


def read(image: Picture) -> np.ndarray:
    """A picture in any form as (H, W, 3) uint8."""
    if isinstance(image, str | Path):
        return np.array(read_picture(image))
    if isinstance(image, Image.Image):
        return np.array(upright_rgb(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        found = f"{array.dtype} {array.shape}" if array.ndim else type(image).__name__
        raise ValueError(f"image must be a file, a Pillow picture or uint8 (H, W, 3), not {found}")
    return array.copy()


def _mask(mask: Mask) -> np.ndarray:
    """A mask in any form as ([T,] H, W) bool."""
    if isinstance(mask, str | Path):
        with opened(mask) as picture:
            return _white(picture, str(mask))
    if isinstance(mask, Image.Image):
        return _white(mask, "the mask")
    array = np.asarray(mask)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        found = f"{array.dtype} {array.shape}"
        raise ValueError(f"mask must be a picture, or an array (H, W), of clips maybe (T, H, W), not {found}")
    most = array.max(initial=0)  # of 1, 8 or 16 bits
    return array >= (0.5 if most <= 1 else WHITE if most <= 255 else 2**15)


def _white(picture: Image.Image, name: str) -> np.ndarray:
    """Where a picture, read as others are, is white: (H, W) bool."""
    if (count := num_frames(picture)) > 1:
        raise ValueError(f"{name} has {count} frames: give a still, which goes with all frames, or an array (T, H, W)")
    clear = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # which Pillow makes opaque
        transparent = clear is not None and (np.asarray(picture) == clear).any()
    else:
        transparent = picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255
    if transparent:
        raise ValueError(f"{name} has transparency: give it black and white, white where something new goes")
    return np.asarray(upright_rgb(picture).convert("L")) >= WHITE


def _of_box(box: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The mask of a box, of which a part lies in the picture."""
    values = _numbers(box)
    if len(values) != 4 or min(values[2:]) < 1:
        raise ValueError(f"box must be four whole numbers, (left, top, width, height), not {box!r}")
    left, top, width, height = values
    mask = np.zeros(shape, bool)
    mask[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = True
    return mask


def _whole(values: Any, name: str, what: str, least: int) -> tuple[int, int]:
    """Two whole numbers."""
    listed = _numbers(values)
    if len(listed) != 2 or min(listed) < least:
        raise ValueError(f"{name} must be two whole numbers of at least {least}, {what}, not {values!r}")
    return listed[0], listed[1]


def _numbers(values: Any) -> list[int]:
    """A list or array of whole numbers as a list, anything else as an empty one: bytes and truth values too."""
    listed = list(values) if isinstance(values, list | tuple | range | np.ndarray) else []
    whole = all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in listed)
    return [int(value) for value in listed] if whole else []


def _starts(first: int, length: int, side: int, full: int) -> list[tuple[int, int]]:
    """Where windows of `side` begin along an axis of `full` pixels, with their distances in windows from those over
    the part of `length` from `first` on."""
    step = max(1, round(side * (1 - OVERLAP)))
    inner = range(first, max(first + 1, first + length - side + 1), step)
    if length < side:  # what is given lies in the middle of the first window, as far as the edges allow
        inner = range(min(max(0, first - (side - length) // 2), full - side), full)[:1]
    last = max(inner[-1], min(first + length, full) - side)
    found = dict.fromkeys((*inner, last), 0)
    for sign, start, end in ((-1, inner[0], 0), (1, last, full - side)):
        distance = 0
        while start != end:
            start, distance = min(max(start + sign * step, 0), full - side), distance + 1
            found.setdefault(start, distance)
    return sorted(found.items())


def _frames(array: np.ndarray, axes: int, function: Any) -> np.ndarray:
    """Apply a function to each frame, of a still to its one: arrays whose last `axes` are a frame's."""
    frames = array.reshape(-1, *array.shape[array.ndim - axes :])
    made = np.stack([np.asarray(function(np.ascontiguousarray(frame))) for frame in frames])
    return made.reshape(*array.shape[: array.ndim - axes], *made.shape[1:])
