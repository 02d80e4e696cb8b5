"""Clips from files: mp4, avi, webm, mov, mkv through PyAV; gif, animated webp and png through Pillow.

Reads only the frames that are asked for: it looks at packets, not pictures, to know when frames are shown, and seeks to
the last key frame before each window, so memory and work depend on the window and not on the length of the file. Knows
files and frames; does not know data sets or labels. Legend: `T` frames, `H W` pixels, `n` frames of the whole file.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nar.media.crops import to_rgb

SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".webp"})
KINDS = ("start", "centre", "random", "all")
File = str | Path | io.BytesIO
_UNSTEADY = 0.1  # of its time: how much a frame may be late or early in a clip that counts as steady
_UNTIMED_SECONDS = 0.1  # how long programs show a frame of a gif or webp that says 0


@dataclass(frozen=True)
class Windows:
    """Which frames of a clip are taken: `num_frames` of them, every `stride`-th; 0 takes all.

    `frame_rate` is in frames a second, and 0 the file's own: each of its frames once. A window lies at the "start", in
    the "centre", or at a "random" place; with "all", windows follow each other from the start, and what is left at the
    end makes no further one. A clip that is too short has its last frame repeated.
    """

    num_frames: int = 0
    stride: int = 1
    frame_rate: float = 0.0
    kind: str = "centre"

    def __post_init__(self) -> None:
        if self.num_frames < 0 or self.stride < 1 or self.frame_rate < 0:
            raise ValueError(
                f"num_frames {self.num_frames} and frame_rate {self.frame_rate} must be at least 0, "
                f"and stride {self.stride} at least 1"
            )
        if self.kind not in KINDS:
            raise ValueError(f"windows must be one of {', '.join(KINDS)}, not {self.kind!r}")

    def starts(self, count: int) -> list[int]:
        """Where the windows of a clip of `count` frames begin: one place, or with "all" as many as fit."""
        spare = max(0, count - self._span(count))
        if self.kind == "all":
            return list(range(0, spare + 1, self._span(count) + self.stride - 1))
        return [spare // 2 if self.kind == "centre" else 0]

    def rows(self, count: int, start: int) -> np.ndarray:
        """The frames (T,) of the window at `start` of a clip of `count` frames."""
        length = self.num_frames or len(range(start, count, self.stride))
        return np.minimum(start + self.stride * np.arange(length), count - 1)

    def drawn(self, count: int, uniform: float) -> int:
        """Where a window begins: with "random" at the place that `uniform` in [0, 1) picks, else where it does."""
        if self.kind != "random":
            return self.starts(count)[0]
        return int(uniform * (max(0, count - self._span(count)) + 1))

    def _span(self, count: int) -> int:
        """Frames from a window's first to its last."""
        return (self.num_frames - 1) * self.stride + 1 if self.num_frames else max(1, count)


@dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown: `times` (n,) in seconds from the first on, `seconds` in all."""

    times: np.ndarray
    seconds: float

    def rows(self, frame_rate: float) -> np.ndarray:
        """The frame on screen at every 1 / `frame_rate` seconds; at 0, each frame once."""
        if not frame_rate:
            return np.arange(len(self.times))
        moments = np.arange(max(1, round(self.seconds * frame_rate))) / frame_rate
        return np.searchsorted(self.times, moments + 1e-6, side="right") - 1

    def steady_rows(self, frame_rate: float) -> np.ndarray:
        """The same, but where each frame is shown for about a whole number of times 1 / `frame_rate`, just so often.

        Formats round: 16 frames at 5.3 a second are 180 ms each in a gif, and 15 by the clock. Frames that are like
        the one before are left out of gif and webp, and their time is added to it.
        """
        counts = np.diff([*self.times, self.seconds]) * frame_rate
        whole = np.round(counts)
        if frame_rate and (np.abs(counts - whole) <= _UNSTEADY * whole).all():
            return np.repeat(np.arange(len(self.times)), whole.astype(np.int64))
        return self.rows(frame_rate)


def read_clip(
    file: File, *, num_frames: int = 0, start: int = 0, stride: int = 1, frame_rate: float = 0.0, size: int = 0
) -> np.ndarray:
    """Decode frames of a clip to (T, H, W, 3) uint8, without transparency (on white) and upright.

    Args:
        file: a path, or the bytes of a file.
        num_frames: T; 0 goes on to the end. Where the clip ends before, its last frame is repeated.
        start: the first frame, counted at `frame_rate`.
        stride: take every `stride`-th frame.
        frame_rate: frames a second to count at, by their times, so that a variable rate becomes a constant one; 0
            counts the frames as they are.
        size: H and W: the shorter side is resized to it and the middle is cut out; 0 leaves the frames' own size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, has no frames or no decoder, or ends before `start`.
        ModuleNotFoundError: PyAV is missing.
    """
    shown = timeline(file).rows(frame_rate)
    if not 0 <= start < len(shown):
        raise ValueError(f"{_name(file)} has {len(shown)} frames, so no window can start at frame {start}")
    windows = Windows(num_frames, stride, frame_rate)
    rows = shown[windows.rows(len(shown), start)]
    return np.stack([squared(frame, size) if size else frame for frame in frames(file, rows.tolist())])


def squared(frame: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side of a frame (H, W, 3) to `size` (bilinear, antialiased) and cut the middle square."""
    height, width = frame.shape[:2]
    if (height, width) == (size, size):
        return frame
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    picture = Image.fromarray(frame).resize((wide, tall), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def timeline(file: File) -> Timeline:
    """When the frames of a clip are shown; raises as `read_clip` does."""
    return _pillow_timeline(file) if _is_picture(file) else _index(file).timeline


def frames(file: File, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode the frames (H, W, 3) uint8 numbered `rows`, which must not fall; repeated numbers repeat a frame."""
    return _pillow_frames(file, rows) if _is_picture(file) else _decoded(file, rows)


@dataclass(frozen=True)
class _Index:
    """What the packets of a file say. `stamps` (n,) are in the stream's unit, and counted from 0 if it states none."""

    timeline: Timeline
    stamps: list[int]
    keys: list[int]  # stamps of key frames
    places: list[int]  # where to seek for each of them; empty when the file can only be read from its start


def _index(file: File) -> _Index:
    if isinstance(file, io.BytesIO):
        return _read_index(file)
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    stat = path.stat()
    return _cached_index(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _cached_index(path: Path, changed: int, size: int) -> _Index:  # noqa: ARG001
    return _read_index(path)


def _read_index(file: File) -> _Index:
    with _opened(file) as (container, stream):
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe, packet.duration)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        unit = float(stream.time_base)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    if not packets:
        raise ValueError(f"{_name(file)} has no frames; is the file complete?")
    if any(pts is None for pts, *_ in packets):
        stamps = list(range(len(packets)))
        return _Index(Timeline(np.array(stamps) / rate, len(stamps) / rate), stamps, [], [])
    packets.sort(key=lambda packet: packet[0])
    stamps = [pts for pts, *_ in packets]
    last = packets[-1][3] or (stamps[-1] - stamps[0]) // max(1, len(stamps) - 1)
    times = (np.array(stamps) - stamps[0]) * unit
    keyed = [(pts, pts if dts is None else min(pts, dts)) for pts, dts, is_key, _ in packets if is_key]
    return _Index(
        Timeline(times, float(times[-1]) + last * unit),
        stamps,
        [stamp for stamp, _ in keyed],
        [place for _, place in keyed],
    )


def _decoded(file: File, rows: Sequence[int]) -> Iterator[np.ndarray]:
    index = _index(file)
    with _opened(file) as (container, stream):
        upcoming: Iterator[tuple[int, Any]] | None = None
        stamp, frame, pixels, shown = 0, None, None, -1
        for row in rows:
            target = index.stamps[row]
            if pixels is not None and row == shown:
                yield pixels
                continue
            before = bisect.bisect_right(index.keys, target) - 1
            if upcoming is None or (before >= 0 and index.places and index.keys[before] > stamp):
                upcoming = _from(container, stream, index, before)
                stamp, frame = next(upcoming, (target, None))
                if stamp > target:  # some containers seek too far
                    upcoming = _from(container, stream, index, 0)
                    stamp, frame = next(upcoming, (target, None))
            while frame is not None and stamp < target:
                stamp, frame = next(upcoming, (target, None))
            if frame is None:
                raise ValueError(
                    f"{_name(file)} is damaged: frame {row} of {len(index.stamps)} can't be decoded; copy or "
                    "encode it again"
                )
            pixels, shown = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)), row
            yield pixels


def _from(container: Any, stream: Any, index: _Index, key: int) -> Iterator[tuple[int, Any]]:
    """Frames and their stamps from key frame number `key` on."""
    if index.places:
        container.seek(index.places[max(0, key)], stream=stream, backward=True)
    for number, frame in enumerate(_pictures(container, stream)):
        yield (frame.pts if index.places and frame.pts is not None else number), frame


def _pictures(container: Any, stream: Any) -> Iterator[Any]:
    yield from container.decode(stream)


@contextmanager
def _opened(file: File) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream; what FFmpeg finds wrong is a ValueError."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {_name(file)} needs PyAV: pip install nar-gen[video]") from error
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with av.open(file if isinstance(file, io.BytesIO) else str(file)) as container:
            if not container.streams.video:
                raise ValueError(f"{_name(file)} has no video in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(
                    f"{_name(file)} has a codec for which this PyAV has no decoder; encode it again, with "
                    "`ffmpeg -i FILE -c:v libx264 OUT.mp4` say"
                )
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{_name(file)} is damaged or not a clip ({error}); copy or encode it again") from error


def _pillow_timeline(file: File) -> Timeline:
    with _picture(file) as picture:
        lengths = []
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            picture.load()  # a webp knows its frame's time only then
            lengths.append(picture.info.get("duration", 0) / 1000 or _UNTIMED_SECONDS)
    ends = np.cumsum(lengths)
    return Timeline(np.concatenate([[0.0], ends[:-1]]), float(ends[-1]))


def _pillow_frames(file: File, rows: Sequence[int]) -> Iterator[np.ndarray]:
    with _picture(file) as picture:
        for row in rows:
            picture.seek(row)
            yield np.asarray(to_rgb(picture))


@contextmanager
def _picture(file: File) -> Iterator[Image.Image]:
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with Image.open(file) as picture:
            yield picture
    except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{_name(file)} is damaged ({error}); copy or encode it again") from error


def _is_picture(file: File) -> bool:
    """Whether Pillow is to read it: PyAV decodes no animated webp, and loses the transparency of gifs."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:12]
    else:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} does not exist")
        with Path(file).open("rb") as opened:
            head = opened.read(12)
    return head[:4] == b"GIF8" or head[:4] == b"\x89PNG" or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _name(file: File) -> str:
    return "a clip in memory" if isinstance(file, io.BytesIO) else str(file)
