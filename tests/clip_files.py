"""Clips that tests write: frames whose brightness tells their number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


def level(number: int) -> int:
    """The brightness of frame `number`."""
    return 30 + 8 * (number % 25)


def write(
    path: Path,
    count: int,
    codec: str = "libx264",
    size: tuple[int, int] = (32, 48),
    rate: int = 10,
    times: list[int] | None = None,
    **options: object,
) -> Path:
    """A clip of `count` grey frames of height and width `size`; `times` are theirs in units of 1 / `rate` seconds."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width = size
        stream.bit_rate = 4_000_000
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        container.start_encoding()
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level(number), np.uint8), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip: np.ndarray) -> list[int]:
    """Which frames these are, by their brightness."""
    found = (clip.reshape(len(clip), -1).mean(1) - 30) / 8
    assert np.abs(found - found.round()).max() < 0.4
    return [int(number) for number in found.round()]
