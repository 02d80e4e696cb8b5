"""Files that clients send: a picture and its mask as codes to keep and to sample, and the clip to continue.

Knows pixels and the tokenizer; does not know HTTP, nor how codes are sampled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nar.media.pictures import num_frames, opened, to_rgb, upright_rgb
from nar.media.pixels import as_pixels
from nar.pipeline import Pipeline
from nar.pipeline.canvas import Box, Canvas
from nar.pipeline.edit import codes_given
from nar.pipeline.requests import Given
from nar.serving.protocol import Refusal

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 2**24  # of a picture that is sent: 4096 x 4096, decoded to 50 MB
OPAQUE = 128  # alpha from which a pixel of a mask stays

# Formats of clips by how their files begin. Others are not tried: some of FFmpeg's, of playlists say, read other files.
CLIPS: dict[str, Callable[[bytes], bool]] = {
    ".mp4": lambda file: file[4:8] == b"ftyp",
    ".mkv": lambda file: file.startswith(b"\x1a\x45\xdf\xa3"),
    ".avi": lambda file: file[:4] + file[8:12] == b"RIFFAVI ",
    ".webp": lambda file: file[:4] + file[8:12] == b"RIFFWEBP",
    ".gif": lambda file: file.startswith(b"GIF8"),
    ".png": lambda file: file.startswith(b"\x89PNG"),
    ".jpg": lambda file: file.startswith(b"\xff\xd8\xff"),
}


@dataclass(frozen=True, eq=False)
class Edit:
    """The `codes` that a model is given of a picture, and the `canvas` of its pixels at the model's size, on which what
    is new is pasted."""

    codes: Given
    canvas: Canvas

    def paste(self, made: Image.Image, *, blend: bool = True) -> Image.Image:
        """The new pixels inside of the mask, moved towards the given ones at its edge, which stay as sent."""
        return Image.fromarray(self.canvas.pasted(as_pixels(np.array(made)[None])[0], blend=blend))


def prepare(pipeline: Pipeline, image: bytes, mask: bytes | None) -> Edit:
    """Encode a picture whose masked pixels are blanked, for a model of any size: it is resized to the model's.

    What a mask (a picture with alpha, of the size of `image`) has transparent is new. Without one it is the
    transparency of `image`. A code is free where any pixel of its patch is.

    Raises:
        Refusal: no pictures that are taken, of two sizes, or a mask that frees nothing.
    """
    picture = read(image, "image")
    drawn = picture if mask is None else read(mask, "mask")
    if drawn.size != picture.size:
        sizes = "x".join(map(str, drawn.size)), "x".join(map(str, picture.size))
        raise Refusal(400, f"mask is {sizes[0]}, the image {sizes[1]}: they must have one size", param="mask")
    if "A" not in drawn.getbands() and "transparency" not in drawn.info:
        said = "what is to be redrawn is transparent in the mask (alpha 0), but there is no alpha"
        raise Refusal(400, said if mask is not None else f"give a mask; {said}", param="mask")
    height, width = pipeline.pixel_shape
    rows, columns = pipeline.model.config.grid
    alpha = drawn.convert("RGBA").getchannel("A")
    # Every pixel that is touched counts: the least alpha under it, not the mean.
    kept = np.asarray(
        alpha.point(lambda value: 255 if value >= OPAQUE else 0).resize((width, height), Image.Resampling.BOX)
    )
    new = kept < 255
    free = new.reshape(rows, height // rows, columns, width // columns).any((1, 3))
    if not free.any():
        raise Refusal(400, "the mask frees nothing: make transparent (alpha 0) what is to be redrawn", param="mask")
    opaque = picture.convert("RGB") if mask is None else to_rgb(picture)
    given = opaque.resize((width, height), Image.Resampling.LANCZOS) if opaque.size != (width, height) else opaque
    pixels, hidden = as_pixels(np.array(given)[None]), torch.from_numpy(new)[None]
    codes = codes_given(pipeline.tokenizer, pixels, hidden, pipeline.config.grid, holes=pipeline.continuation.has_holes)
    return Edit(codes, Canvas(np.array(given), new, Box(0, 0, width, height), pixels, hidden))


def read_frames(pipeline: Pipeline, file: bytes) -> Tensor:
    """A clip or a picture to continue, as float -1..1 (3, T, H, W) of the model's size.

    Raises:
        Refusal: nothing that can be read, or too short for the model.
    """
    name = "input_reference"
    ending = next((ending for ending, is_one in CLIPS.items() if is_one(file)), None)
    if ending is None:
        raise Refusal(400, f"{name} must be mp4, webm, mkv, avi, gif, webp, png or jpeg", param=name)
    try:
        if ending in (".png", ".jpg", ".webp") and _is_still(file):
            frames = pipeline.requests(frames=[read(file, name)])[0].frames
        else:
            with TemporaryDirectory(prefix="nar-") as folder:
                path = Path(folder) / f"{name}{ending}"
                path.write_bytes(file)
                frames = pipeline.requests(frames=str(path))[0].frames
    except Refusal:
        raise
    except (ValueError, OSError, ImportError) as error:
        said = re.sub(rf"\S*{name}\S*", name, str(error))
        raise Refusal(400, said, param=name) from error
    assert frames is not None
    return frames


def _is_still(file: bytes) -> bool:
    with opened(BytesIO(file), "input_reference") as picture:
        return num_frames(picture) == 1


def read(file: bytes, name: str) -> Image.Image:
    """Decode a PNG, JPEG or WebP file, whatever its name and type say, once its size is known to be taken.

    Raises:
        Refusal: another format, an animation, too many pixels, or a damaged file.
    """
    try:
        with opened(BytesIO(file), name) as picture:
            if picture.format not in FORMATS:
                raise Refusal(400, f"{name} is {picture.format}: send PNG, JPEG or WebP", param=name)
            if picture.width * picture.height > MOST_PIXELS:
                size = f"{picture.width}x{picture.height}"
                raise Refusal(400, f"{name} has {size} pixels: at most {MOST_PIXELS:,} in all", param=name)
            if num_frames(picture) > 1:
                raise Refusal(400, f"{name} is an animation: send a still", param=name)
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                return upright_rgb(picture)
            with suppress(SyntaxError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
                return ImageOps.exif_transpose(picture).convert("RGBA")
            return picture.convert("RGBA")  # it states its orientation in a way that no viewer reads
    except Refusal:
        raise
    except (ValueError, OSError) as error:
        if isinstance(error.__cause__, Refusal):
            raise error.__cause__ from None
        raise Refusal(400, str(error), param=name) from error
