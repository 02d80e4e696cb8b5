"""Squares of pictures: the middle, random crops, the views that codes are made of; pictures and clips that are moved.

Knows pictures as Pillow and numpy have them; does not know files, models or what the squares are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

MOST_ENLARGED = 16  # times the pixels of a square: up to this a picture is resized whole before it is cut
# How many views of a picture there are of each kind; a "loop" is of clips.
VIEWS = {"centre": 1, "flip": 2, "shift": 9, "ten-crop": 10, "loop": 16}


def views(picture: Image.Image, size: int, kind: str) -> list[Image.Image]:
    """The crops of a picture that codes are made of: "centre", "flip" (and mirrored), "shift", or "ten-crop".

    Shift moves the picture by 1/32 of its size in eight directions, and repeats its edge where it was; the first view
    is the picture itself.
    Ten-crop cuts the four corners and the middle out of a centre crop 1.1 times as large, of the picture and of its
    mirror image, as the published trainers do.
    """
    if kind == "loop":
        raise ValueError(f"pictures have the views centre, flip, shift and ten-crop, not {kind!r}")
    if kind == "shift":
        step = max(1, size // 32)
        wide = np.pad(np.asarray(centre_crop(picture, size)), ((step, step), (step, step), (0, 0)), mode="edge")
        moves = [(0, 0), *((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right)]
        corners = [(step - step * down, step - step * right) for down, right in moves]
        return [Image.fromarray(wide[top : top + size, left : left + size]) for top, left in corners]
    if kind == "ten-crop":
        large = int(size * 1.1)
        square = centre_crop(picture, large)
        middle = round((large - size) / 2)
        corners = [(0, 0), (large - size, 0), (0, large - size), (large - size, large - size), (middle, middle)]
        return [
            side.crop((left, top, left + size, top + size))
            for side in (square, ImageOps.mirror(square))
            for left, top in corners
        ]
    centre = centre_crop(picture, size)
    return [centre, ImageOps.mirror(centre)] if kind == "flip" else [centre]


def random_crop(picture: Image.Image, size: int, draws: Mapping[str, float], *, smallest: float = 0.8) -> Image.Image:
    """A random square of a picture, whose shorter side is first brought to a random length in [size, size / smallest].

    The numbers `crop_side`, `crop_left`, `crop_top` and `mirror` of `draws`, in [0, 1), pick that length, the place and
    whether the square is mirrored.
    """
    side = size + int(draws["crop_side"] * (math.ceil(size / smallest) - size + 1))
    picture, (width, height) = _halved(picture, side)
    left, top = int(draws["crop_left"] * (width - size + 1)), int(draws["crop_top"] * (height - size + 1))
    square = resized_square(picture, (width, height), (left, top), size, Image.Resampling.BICUBIC)
    return ImageOps.mirror(square) if draws["mirror"] < 0.5 else square


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the middle, as ADM does (halving with a box filter, then bicubic)."""
    picture, (width, height) = _halved(picture, size)
    corner = ((width - size) // 2, (height - size) // 2)
    return resized_square(picture, (width, height), corner, size, Image.Resampling.BICUBIC)


def _halved(picture: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, halved while its shorter side is at least twice `side`, and its size where that side is `side`."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    return picture, (round(picture.width * scale), round(picture.height * scale))


def resized_square(
    picture: Image.Image, full: tuple[int, int], corner: tuple[int, int], size: int, kernel: Image.Resampling
) -> Image.Image:
    """The square of `size` pixels whose left and upper `corner` lie there once the picture is resized to `full`.

    Of a long thin picture only what the square shows is resized, so that the cost is bounded by the result: of 2 x
    30,000 pixels the whole took 4.0 GB at size 256. Others are resized whole, which keeps their bits.
    """
    (width, height), (left, top) = full, corner
    if width * height <= MOST_ENLARGED * size * size:
        return picture.resize(full, kernel).crop((left, top, left + size, top + size))
    across, down = picture.width / width, picture.height / height
    right, bottom = min(picture.width, (left + size) * across), min(picture.height, (top + size) * down)
    return picture.resize((size, size), kernel, (left * across, top * down, right, bottom))


def restarted(clip: np.ndarray, start: float, direction: float) -> np.ndarray:
    """A clip (T, H, W, 3) that is a loop, started elsewhere and backwards when `direction` is under 0.5."""
    turned = np.roll(clip, int(start * len(clip)), axis=0)
    return turned[::-1] if direction < 0.5 else turned


def shifted(pixels: np.ndarray, most: int, down: float, right: float) -> np.ndarray:
    """A picture or clip (..., H, W, 3), moved by up to `most` pixels either way; its edges are repeated."""
    height, width = pixels.shape[-3:-1]
    rows = np.arange(height) + int(down * (2 * most + 1)) - most
    columns = np.arange(width) + int(right * (2 * most + 1)) - most
    return pixels[..., rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1), :]
