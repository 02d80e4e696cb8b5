"""Still pictures from files, as a viewer shows them: upright, every bit depth at its scale, the first of several.

Knows file formats and pixels; does not know data sets, or what a picture is for. Legend: `H W` pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

# What Pillow reads, from the lowest version that this package allows on.
_ENDINGS = ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
ENDINGS = frozenset(_ENDINGS.split())
MOST_PIXELS = 89_478_485  # of a picture: where Pillow begins to warn; a square of 9,459 pixels
_ANIMATED = frozenset({"GIF", "PNG", "WEBP", "AVIF"})  # formats whose further frames are an animation, not more stills


def most_pixels() -> int:
    """How many pixels a picture may have: MOST_PIXELS, or NAR_MAX_PIXELS in the environment.

    Raises:
        ValueError: NAR_MAX_PIXELS is no whole number above 0.
    """
    stated = os.environ.get("NAR_MAX_PIXELS", "")
    if not stated:
        return MOST_PIXELS
    if not stated.isdecimal() or not int(stated):
        raise ValueError(f"NAR_MAX_PIXELS must be a whole number above 0, not {stated!r}")
    Image.MAX_IMAGE_PIXELS = max(MOST_PIXELS, int(stated))  # Pillow refuses twice its own limit
    return int(stated)


def read_picture(file: str | Path | BytesIO, name: str = "") -> Image.Image:
    """Decode a file, or its bytes, to an RGB picture as a viewer shows it.

    Its orientation is applied, transparency becomes white, 16 bits become 8 (v / 257), and of several stills (a phone's
    MPO, the pages of a TIFF) it is the first.

    Args:
        name: what messages call it; by default the file's path.

    Raises:
        OSError: it can't be opened.
        ValueError: it is damaged or no picture, an animation, too large (see `most_pixels`), or of numbers whose scale
            is not known.
    """
    with opened(file, name) as picture:
        if (frames := num_frames(picture)) > 1:
            raise ValueError(
                f"{_called(file, name)} is an animation of {frames} frames, not a picture; read animations as clips, "
                "by saying how many frames (data.num_frames, --frames, --num-frames) or with the recipe my-clips, or "
                "take a still of it"
            )
        return upright_rgb(picture)


@contextmanager
def opened(file: str | Path | BytesIO, name: str = "") -> Iterator[Image.Image]:
    """Open a picture or an animation for the `with` block, without decoding it.

    Whatever goes wrong with the file inside the block is an OSError or a ValueError that names it: decoders raise
    errors of any kind on damaged files.
    """
    most = most_pixels()
    if isinstance(file, BytesIO):
        file.seek(0)
    try:
        if not isinstance(file, BytesIO) and Path(file).exists() and not Path(file).is_file():
            raise ValueError(f"{_called(file, name)} is no file")  # a pipe would be waited for
        with Image.open(file) as picture:
            picture.filename = ""  # or Pillow maps a TIFF into memory, and mixes up the pixels of one that is turned
            if picture.width * picture.height > most:
                raise ValueError(
                    f"{_called(file, name)} has {picture.width}x{picture.height} pixels, more than {most:,}; make it "
                    "smaller, or set NAR_MAX_PIXELS to a larger number"
                )
            yield picture
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:
        called = _called(file, name)
        if isinstance(error, ValueError) and str(error).startswith(called):
            raise
        raise ValueError(f"{called} can't be read as a picture ({_reason(error)})") from error


def num_frames(picture: Image.Image) -> int:
    """How many frames an open file shows one after another: 1 for a still, also where the file holds several stills."""
    return int(getattr(picture, "n_frames", 1)) if picture.format in _ANIMATED else 1


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Convert an open picture to RGB as `read_picture` does.

    Raises:
        ValueError: its numbers have no known scale.
    """
    try:
        turned = ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        turned = picture  # the file states its orientation in a way that no viewer reads
    signed = 2 in getattr(picture, "tag_v2", {}).get(339, ())
    if picture.mode == "F" or picture.mode.startswith("I") or signed:
        return to_rgb(_scaled(turned, picture))
    return to_rgb(turned)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode of 8 bits to RGB with transparency on white."""
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _scaled(turned: Image.Image, picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8 bits: `turned`, of the file that is open as `picture`."""
    values = np.asarray(turned)
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(258, (16,))[0] if picture.format == "TIFF" else 16
    if not (picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))):
        low, high = values.min(), values.max()
        raise ValueError(
            f"has {'float' if picture.mode == 'F' else f'{bits}-bit'} values from {low:.6g} to {high:.6g}, whose scale "
            "is not stated; save it with 8 or 16 bits a channel"
        )
    full = 2 ** min(16, bits) - 1
    clear = picture.info.get("transparency")
    transparent = values == clear if isinstance(clear, int) else None
    if tags.get(262) == 0:  # white is zero
        values = full - values.astype(np.int64)
    grey = Image.fromarray(((values.astype(np.int64) * 255 + full // 2) // full).clip(0, 255).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    return grey


def natural(path: Path) -> list[list[str | int]]:
    """Key that sorts paths as people count: frame 2 before frame 10."""
    split = (re.split(r"([0-9]+)", name) for name in path.parts)  # text and digits take turns, whatever else is a digit
    return [[int(part) if place % 2 else part for place, part in enumerate(parts)] for parts in split]


def _called(file: Any, name: str) -> str:
    return name or ("a picture in memory" if isinstance(file, BytesIO) else str(file))


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "no known format"
    return " ".join(str(error).split()) or type(error).__name__
