"""Clips from files: mp4, avi, webm and others through PyAV; gif, animated webp and png, and stills through Pillow.

Reads only the frames that are asked for: it looks at packets, not pictures, to know when frames are shown, and seeks to
the last key frame before each window, so memory and work depend on the window and not on the length of the file. Knows
files and frames; does not know data sets or labels. Legend: `T` frames, `H W` pixels, `n` frames of the whole clip.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nar.media.crops import resized_square
from nar.media.pictures import most_pixels, num_frames, opened, read_picture, upright_rgb

# What PyAV's wheels decode; gif, webp, apng and png may be animations too.
_VIDEO_ENDINGS = ".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv"
VIDEO_ENDINGS = frozenset(_VIDEO_ENDINGS.split())
ENDINGS = VIDEO_ENDINGS | {".apng", ".gif", ".png", ".webp"}
KINDS = ("start", "centre", "random", "all")
# A clip: a file, its bytes, its frames as files in order, or as an array (n, H, W, 3) uint8.
File = str | Path | io.BytesIO | Sequence[Path] | np.ndarray
MOST_FRAMES = 2**20  # that a window may have: twelve hours of frames
MOST_RATE = 10_000.0  # frames a second
_PIXELS_OF_CLIP = 12  # times `most_pixels`: what an animation may have in all its frames, which are decoded one by one
_PIXELS_OF_WINDOW = 6  # times `most_pixels`: what may be held at once, 1.6 GB
_UNSTEADY = 0.1  # of its time: how much a frame may be late or early in a clip that counts as steady
_UNTIMED_SECONDS = 0.1  # how long programs show a frame of a gif or webp that says 0


@dataclass(frozen=True)
class Windows:
    """Which frames of a clip are taken: `num_frames` of them, every `stride`-th; 0 takes all.

    `frame_rate` is in frames a second, and 0 the file's own: each of its frames once; so are frames without times, of
    strips, arrays and folders, at any rate. A window lies at the "start", in the "centre", or at a "random" place; with
    "all", windows follow each other from the start, and what is left at the end makes no further one. A clip that is
    too short has its last frame repeated, unless `whole`: then it has no window.
    """

    num_frames: int = 0
    stride: int = 1
    frame_rate: float = 0.0
    kind: str = "centre"
    whole: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.num_frames, Integral) and isinstance(self.stride, Integral)
        if not (
            whole
            and isinstance(self.frame_rate, Real)
            and 0 <= self.num_frames <= MOST_FRAMES
            and 0 <= self.frame_rate <= MOST_RATE
            and self.stride >= 1
        ):
            raise ValueError(
                f"num_frames {self.num_frames} must be in 0..{MOST_FRAMES:,}, frame_rate {self.frame_rate} in "
                f"0..{MOST_RATE:,.0f}, and stride {self.stride} at least 1"
            )
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"windows must be one of {', '.join(KINDS)}, not {self.kind!r}")

    def starts(self, count: int) -> list[int]:
        """Where the windows of a clip of `count` frames begin: one place, or with "all" as many as fit."""
        spare = max(0, count - self._span(count))
        if self.whole and self.is_short(count):
            return []
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

    def is_short(self, count: int) -> bool:
        """Whether a clip of `count` frames has fewer than a window takes."""
        return self._span(count) > count

    def _span(self, count: int) -> int:
        """Frames from a window's first to its last."""
        return (self.num_frames - 1) * self.stride + 1 if self.num_frames else max(1, count)


@dataclass(frozen=True)
class Timeline:
    """When the frames of a clip are shown: `times` (n,) in seconds from the first on, `seconds` in all.

    Without times (`seconds` 0) each frame is shown once, at any rate.
    """

    times: np.ndarray
    seconds: float

    def rows(self, frame_rate: float) -> np.ndarray:
        """The frame on screen at every 1 / `frame_rate` seconds; at 0, each frame once."""
        if not (frame_rate and self.seconds):
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
        if frame_rate and self.seconds and (np.abs(counts - whole) <= _UNSTEADY * whole + 1e-6).all():
            return np.repeat(np.arange(len(self.times)), whole.astype(np.int64))
        return self.rows(frame_rate)


def read_clip(file: File, windows: Windows | None = None, *, start: int = 0, size: int = 0) -> np.ndarray:
    """Decode the frames of a window to (T, H, W, 3) uint8, without transparency (on white) and upright.

    Args:
        file: a path, the bytes of a file, frames as files in order, or an array (n, H, W, 3).
        windows: how many frames, every which, at which rate; None takes all, each once.
        start: the first frame, counted at the rate of `windows`.
        size: H and W: the shorter side is resized to it and the middle is cut out; 0 leaves the frames' own size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, ends early, has no frames or no decoder, ends before `start`, has frames of several
            sizes, or too many pixels.
        ModuleNotFoundError: PyAV is missing.
    """
    windows = windows or Windows()
    shown = timeline(file).rows(windows.frame_rate)
    if not 0 <= start < len(shown):
        raise ValueError(f"{_name(file)} has {len(shown)} frames, so no window can start at frame {start}")
    rows = shown[windows.rows(len(shown), start)]
    made: list[np.ndarray] = []
    several = isinstance(file, Sequence) and not isinstance(file, str)  # files, which may be pictures of anything
    first: tuple[int, ...] = ()
    for frame in frames(file, rows.tolist()):
        made.append(squared(frame, size) if size else frame)
        own = frame.shape if several else made[-1].shape
        if (first := first or own) != own:
            sizes = " and ".join(f"{width}x{height}" for height, width, _ in sorted({first, own}))
            raise ValueError(f"{_name(file)} has frames of {sizes} pixels; a clip has one size")
        if len(rows) * made[0].size > 3 * _PIXELS_OF_WINDOW * most_pixels():
            raise ValueError(
                f"{_name(file)}: {len(rows):,} frames of {made[0].shape[1]}x{made[0].shape[0]} pixels are more than "
                f"{_PIXELS_OF_WINDOW * most_pixels():,} pixels; take fewer frames or a smaller size, or set "
                "NAR_MAX_PIXELS to a larger number"
            )
    return np.stack(made)


def squared(frame: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side of a frame (H, W, 3) to `size` (bilinear, antialiased) and cut the middle square."""
    height, width = frame.shape[:2]
    if (height, width) == (size, size):
        return frame
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    corner = (round((wide - size) / 2), round((tall - size) / 2))
    picture = Image.fromarray(frame)
    return np.asarray(resized_square(picture, (wide, tall), corner, size, Image.Resampling.BILINEAR))


def timeline(file: File) -> Timeline:
    """When the frames of a clip are shown; raises as `read_clip` does."""
    if isinstance(file, np.ndarray | Sequence) and not isinstance(file, str):
        if not len(file):
            raise ValueError(f"{_name(file)} has no frames")
        return Timeline(np.arange(len(file)), 0.0)
    return _pillow_timeline(file) if _is_picture(file) else _index(file).timeline


def frames(file: File, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode the frames (H, W, 3) uint8 numbered `rows`, which must not fall; repeated numbers repeat a frame."""
    if isinstance(file, np.ndarray):
        return (file[row] for row in rows)
    if isinstance(file, Sequence) and not isinstance(file, str):
        return (np.asarray(read_picture(file[row])) for row in rows)
    return _pillow_frames(file, rows) if _is_picture(file) else _decoded(file, rows)


@dataclass(frozen=True)
class _Index:
    """What the packets of a file say. `stamps` (n,) are in the stream's unit, and counted from 0 if it states none."""

    timeline: Timeline
    stamps: list[int]
    keys: list[int]  # stamps of key frames
    places: list[int]  # where to seek for each of them; empty when the file can only be read from its start


def _index(file: str | Path | io.BytesIO) -> _Index:
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


def _read_index(file: str | Path | io.BytesIO) -> _Index:
    with _opened(file) as (container, stream):
        packets, found, corrupt = [], 0, False
        for packet in container.demux(stream):
            found += packet.size > 0 or packet.dts is not None  # an empty packet repeats a frame, the last one is none
            corrupt = corrupt or packet.is_corrupt
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.is_keyframe, packet.duration))
        unit = float(stream.time_base)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        stated = stream.frames
        alone = len(container.streams) == 1 and not stream.duration
        seconds = (container.duration or 0) / 1_000_000 if alone else 0.0
        corrupt = corrupt or _is_cut(container, file)
    if not packets:
        raise ValueError(f"{_name(file)} has no frames; is the file complete?")
    if corrupt or stated - found > max(1, stated // 50):
        raise ValueError(f"{_name(file)} ends early: {found} of {stated or 'its'} frames are there; copy it again")
    if any(pts is None for pts, *_ in packets):
        stamps = list(range(len(packets)))
        return _Index(Timeline(np.array(stamps) / rate, len(stamps) / rate), stamps, [], [])
    packets.sort(key=lambda packet: packet[0])
    stamps = [pts for pts, *_ in packets]
    last = packets[-1][3] or (stamps[-1] - stamps[0]) // max(1, len(stamps) - 1)
    times = (np.array(stamps) - stamps[0]) * unit
    if seconds - (stamps[-1] + last) * unit > max(2.5 / rate, 0.05 * seconds):
        raise ValueError(
            f"{_name(file)} ends early: {(stamps[-1] + last) * unit:.3g} of {seconds:.3g} seconds are there; copy it "
            "again"
        )
    keyed = [(pts, pts if dts is None else min(pts, dts)) for pts, dts, is_key, _ in packets if is_key]
    keys, places = [stamp for stamp, _ in keyed], [place for _, place in keyed]
    return _Index(Timeline(times, float(times[-1]) + last * unit), stamps, keys, places)


def _is_cut(container: Any, file: str | Path | io.BytesIO) -> bool:
    """Whether a file of a format that states its length elsewhere than in frames is not whole."""
    if container.format.name == "asf":
        return container.duration is None  # its size is not the one in its header
    if container.format.name != "ogg":
        return False
    _, last = _ends(file, 2**16)
    page = last[last.rfind(b"OggS") :]  # the last one has the flag 4, and as many bytes as its table of lengths says
    lengths = page[27 : 27 + int.from_bytes(page[26:27])]
    return page[5:6] <= b"\3" or len(page) < 27 + len(lengths) + sum(lengths)


def _decoded(file: str | Path | io.BytesIO, rows: Sequence[int]) -> Iterator[np.ndarray]:
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
    for number, frame in enumerate(decoded_frames(container, stream)):
        yield (frame.pts if index.places and frame.pts is not None else number), frame


def decoded_frames(container: Any, stream: Any) -> Iterator[Any]:
    yield from container.decode(stream)


@contextmanager
def _opened(file: str | Path | io.BytesIO) -> Iterator[tuple[Any, Any]]:
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


def _pillow_timeline(file: str | Path | io.BytesIO) -> Timeline:
    with opened(file, _name(file)) as picture:
        count = num_frames(picture)
        if count * picture.width * picture.height > _PIXELS_OF_CLIP * most_pixels():
            raise ValueError(
                f"{_name(file)} has {count:,} frames of {picture.width}x{picture.height} pixels, more than "
                f"{_PIXELS_OF_CLIP * most_pixels():,} pixels in all; make it smaller, or set NAR_MAX_PIXELS to a "
                "larger number"
            )
        lengths = []
        for number in range(count):
            picture.seek(number)
            picture.load()  # a webp knows its frame's time only then
            lengths.append(picture.info.get("duration", 0) / 1000 or _UNTIMED_SECONDS)
        if picture.format == "GIF" and b"\0;" not in _ends(file)[1]:
            raise ValueError(f"{_name(file)} ends early: {count} frames are there, and no end; copy it again")
    ends = np.cumsum(lengths)
    return Timeline(np.concatenate([[0.0], ends[:-1]]), float(ends[-1]))


def _ends(file: str | Path | io.BytesIO, most: int = 64) -> tuple[bytes, bytes]:
    """The first and the last `most` bytes of a file, where formats say what they are, and a gif that it is whole."""
    with nullcontext(file) if isinstance(file, io.BytesIO) else Path(file).open("rb") as data:
        data.seek(0)
        head = data.read(most)
        data.seek(max(0, data.seek(0, io.SEEK_END) - most))
        return head, data.read()


def _pillow_frames(file: str | Path | io.BytesIO, rows: Sequence[int]) -> Iterator[np.ndarray]:
    with opened(file, _name(file)) as picture:
        for row in rows:
            picture.seek(row)
            yield np.asarray(upright_rgb(picture))


def _is_picture(file: str | Path | io.BytesIO) -> bool:
    """Whether Pillow is to read it: PyAV decodes no animated webp, and loses the transparency of gifs."""
    if not isinstance(file, io.BytesIO) and not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist")
    head, _ = _ends(file)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    return head.startswith((b"GIF8", b"\x89PNG", b"\xff\xd8", b"II*\0", b"MM\0*", b"BM")) or head[4:11] == b"ftypavi"


def _name(file: File) -> str:
    if isinstance(file, str | Path):
        return str(file)
    if isinstance(file, np.ndarray | io.BytesIO):
        return "a clip in memory"
    return str(file[0].parent) if len(file) else "a folder of frames"
