"""Contact sheets: labelled pictures side by side, clips as strips or moving side by side, and pictures growing.

Knows only Pillow pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN = 4


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str] = (), *, columns: int | None = None, cell: int | None = None
) -> Image.Image:
    """Pictures in a grid on white, each with its label below.

    `cell` is the side of a picture on the sheet in pixels; small pictures are enlarged by a whole factor to at least
    96 pixels by default, so that pixels stay crisp.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    width, height = pictures[0].size
    factor = max(1, round(cell / width)) if cell else max(1, math.ceil(96 / max(width, height)))
    width, height = width * factor, height * factor
    columns = columns or min(len(pictures), max(1, math.ceil(math.sqrt(len(pictures) * 1.6))))
    rows = math.ceil(len(pictures) / columns)
    font = ImageFont.load_default(11)
    caption = 15 if labels else 0
    extent = (columns * (width + MARGIN) + MARGIN, rows * (height + caption + MARGIN) + MARGIN)
    sheet = Image.new("RGB", extent, "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left = MARGIN + index % columns * (width + MARGIN)
        top = MARGIN + index // columns * (height + caption + MARGIN)
        sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        if labels:
            draw.text((left + 1, top + height + 1), _fit(labels[index], font, width), fill="black", font=font)
    return sheet


def film_strips(clips: Sequence[Sequence[Image.Image]], labels: Sequence[str] = ()) -> Image.Image:
    """One row a clip, its frames from left to right, with its label below."""
    length = max(map(len, clips), default=0)
    strips = []
    for clip in clips:
        width, height = clip[0].size
        strip = Image.new("RGB", (length * width, height), "white")
        for index, frame in enumerate(clip):
            strip.paste(frame, (index * width, 0))
        strips.append(strip)
    factor = math.ceil(64 / strips[0].height) if strips else 1
    return contact_sheet(strips, labels, columns=1, cell=factor * strips[0].width if strips else None)


def moving_sheet(
    clips: Sequence[Sequence[Image.Image]], labels: Sequence[str] = (), *, columns: int | None = None
) -> list[Image.Image]:
    """Clips playing side by side, frame by frame; shorter ones stay at their last frame."""
    length = max(map(len, clips), default=0)
    frames = [[clip[min(index, len(clip) - 1)] for clip in clips] for index in range(length)]
    return [contact_sheet(frame, labels, columns=columns) for frame in frames]


def save_animation(frames: Sequence[Image.Image], path: Path, *, milliseconds: int = 160, hold: int = 8) -> None:
    """Write frames as an endlessly looping GIF; the last one stays for `hold` more frame times."""
    durations = [milliseconds] * (len(frames) - 1) + [milliseconds * (1 + hold)]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """One line of printable text, cut to `width` pixels; a prompt may be anything, of any length."""
    # Two spaces, as one of this font is 2 pixels wide: "cat face" reads as one word.
    text = "  ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
