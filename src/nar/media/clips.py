"""Clips as people have them and as they want them: files, folders of frames, Pillow pictures, arrays.

Knows pixels and file formats; does not know models. A clip is uint8 (T, H, W, 3) here. Legend: `B` batch, `T H W`
frames and pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from nar.media.pictures import ENDINGS, natural, upright_rgb
from nar.media.video import File, timeline
from nar.media.video import frames as decoded

SUFFIXES = (".mp4", ".gif", ".webp")
MOST_GIF_RATE = 50  # frames a second: programs show a frame that says less than 20 ms for 100
MOST_FRAMES = 2000  # of a clip to continue and of its continuation, which are held in memory
Frames = Any  # a path, Pillow pictures, or uint8 (T, H, W, 3); several: a list of these, or (B, T, H, W, 3)


def several(frames: Frames) -> list[Frames]:
    """One clip or several, as a list of clips."""
    if isinstance(frames, str | Path):
        return [frames]
    if isinstance(frames, np.ndarray):
        return list(frames) if frames.ndim == 5 else [frames]
    if not isinstance(frames, Sequence):
        raise ValueError(f"frames must be a path, Pillow pictures or uint8 (T, H, W, 3), not {type(frames).__name__}")
    first = frames[0] if len(frames) else None
    single = isinstance(first, Image.Image) or (isinstance(first, np.ndarray) and first.ndim == 3)
    return [frames] if single or first is None else list(frames)


def as_array(frames: Frames, size: tuple[int, int] | None = None, *, frame_rate: float | None = None) -> np.ndarray:
    """Any way to give a clip as uint8 (T, H, W, 3); Pillow's transparent pixels become white.

    With `size` (H, W) it is the middle of each frame, resized where it has another size. With `frame_rate` videos and
    animations, which say when their frames are shown, are read at so many frames a second.
    """
    if isinstance(frames, np.ndarray) and (frames.ndim != 4 or not len(frames)):
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    clip: list[np.ndarray] = []
    shapes = set()
    for frame in _each(frames, frame_rate or 0.0):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 (H, W, 3), not {frame.dtype} {frame.shape}")
        shapes.add(frame.shape)
        if size is not None and frame.shape[:2] != size:
            picture = ImageOps.fit(Image.fromarray(frame), (size[1], size[0]), Image.Resampling.BILINEAR)
            frame = np.asarray(picture)
        clip.append(frame)
        if len(shapes) > 1:
            break
    if len(shapes) != 1:
        raise ValueError(f"the frames of a clip must be at least one, and of one size, not {sorted(shapes)}")
    return np.stack(clip)


def _each(frames: Frames, frame_rate: float) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) one by one, so that no long clip is held at its full size."""
    if not isinstance(frames, str | Path):
        if not isinstance(frames, Iterable):
            raise ValueError(f"a clip is a path, Pillow pictures or uint8 (T, H, W, 3), not {type(frames).__name__}")
        for frame in frames:
            yield np.asarray(upright_rgb(frame)) if isinstance(frame, Image.Image) else np.asarray(frame)
        return
    path = Path(frames)
    file: File = path
    if path.is_dir():
        shown = [still for still in path.iterdir() if still.suffix.lower() in ENDINGS and still.name[0] != "."]
        if not shown:
            raise ValueError(f"{path} holds no frames: pictures, in the order of their numbers")
        file = sorted(shown, key=natural)
    rows = timeline(file).steady_rows(frame_rate)
    if len(rows) > MOST_FRAMES:
        raise ValueError(
            f"{path} has {len(rows)} frames; cut out what is to be continued, at most {MOST_FRAMES} frames"
        )
    yield from decoded(file, rows.tolist())


def save_clip(frames: Frames, path: Path, *, frame_rate: float) -> None:
    """Write a clip as .mp4 (h264), .gif or .webp (in an endless loop), or as a folder of PNGs.

    .webp and the folder lose nothing; .gif has 256 colours a frame and at most 50 frames a second, and .mp4 half the
    resolution in colour.

    Raises:
        ModuleNotFoundError: .mp4 without PyAV.
        ValueError: another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, ""):
        raise ValueError(f"clips are written as {', '.join(SUFFIXES)}, or frames into a folder, not {path.suffix!r}")
    clip = as_array(frames)
    if suffix == ".mp4":
        _save_mp4(clip, path, frame_rate)
        return
    pictures = [Image.fromarray(frame) for frame in clip]
    if not suffix:
        path.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(path / f"{index:06d}.png")
        return
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    unit = 1 if suffix == ".webp" else 10  # milliseconds that a file can say
    if suffix == ".gif" and frame_rate > MOST_GIF_RATE:
        message = f"a gif shows at most {MOST_GIF_RATE} frames a second: {path.name} has that many, not {frame_rate:g}"
        warnings.warn(f"{message}; .mp4 and .webp may have more", stacklevel=2)
        frame_rate = MOST_GIF_RATE
    # Each frame begins at its time rounded down: at that time it is on screen, also where delays differ to keep time.
    begin = np.floor(np.arange(len(clip)) * (1000 / unit / frame_rate) + 1e-6)
    delays = unit * np.diff([*begin, round(len(clip) * 1000 / unit / frame_rate)])
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays.tolist(), loop=0, **options)


def _save_mp4(clip: np.ndarray, path: Path, frame_rate: float) -> None:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("writing .mp4 needs PyAV: pip install nar-gen[video]") from error
    _, height, width, _ = clip.shape
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # h264 takes even sizes only
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(frame_rate).limit_denominator(1000))
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"  # what every player takes
        stream.options = {"crf": "14"}
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
