"""Clips as people have them and as they want them: files, folders of frames, Pillow pictures, arrays.

Knows pixels and file formats; does not know models. A clip is uint8 (T, H, W, 3) here. Legend: `B` batch, `T H W`
frames and pixels.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".mp4", ".gif", ".webp")
Frames = Any  # a path, Pillow pictures, or uint8 (T, H, W, 3); several: a list of these, or (B, T, H, W, 3)


def several(frames: Frames) -> list[Frames]:
    """One clip or several, as a list of clips."""
    if isinstance(frames, str | Path):
        return [frames]
    if isinstance(frames, np.ndarray):
        return list(frames) if frames.ndim == 5 else [frames]
    first = frames[0] if len(frames) else None
    single = isinstance(first, Image.Image) or (isinstance(first, np.ndarray) and first.ndim == 3)
    return [frames] if single or first is None else list(frames)


def as_array(frames: Frames) -> np.ndarray:
    """Any way to give a clip as uint8 (T, H, W, 3); Pillow's transparent pixels become white."""
    if isinstance(frames, str | Path):
        return _read_file(Path(frames))
    if isinstance(frames, np.ndarray):
        clip = frames
    else:
        listed = [_opaque(frame) if isinstance(frame, Image.Image) else np.asarray(frame) for frame in frames]
        if len({frame.shape for frame in listed}) != 1:
            raise ValueError(f"the {len(listed)} frames of a clip must be at least one, and of one size")
        clip = np.stack(listed)
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {clip.dtype} {clip.shape}")
    return clip


def _opaque(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _read_file(path: Path) -> np.ndarray:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".png", ".jpg", ".jpeg", ".webp"))
        if not files:
            raise ValueError(f"{path} holds no frames: .png, .jpg or .webp files, in order of their names")
        return as_array([Image.open(file) for file in files])
    try:
        with Image.open(path) as file:
            return np.stack([_opaque(frame) for frame in ImageSequence.Iterator(file)])
    except UnidentifiedImageError:
        import av

        try:
            with av.open(str(path)) as container:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        except (av.FFmpegError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is damaged or no video ({error})") from error


def fitted(clip: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """uint8 (T, H, W, 3) to float -1..1 (3, T, *size): the middle, resized where it has another size."""
    height, width = size
    if clip.shape[1:3] != (height, width):
        factor = min(clip.shape[1] / height, clip.shape[2] / width)
        box_height, box_width = height * factor, width * factor
        top, left = (clip.shape[1] - box_height) / 2, (clip.shape[2] - box_width) / 2
        box = (left, top, left + box_width, top + box_height)
        resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box) for frame in clip]
        clip = np.stack([np.asarray(frame) for frame in resized])
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))).float() / 127.5 - 1


def save_clip(frames: Frames, path: Path, *, frame_rate: float) -> None:
    """Write a clip as .mp4 (h264), .gif or .webp (in an endless loop), or as a folder of PNGs.

    .webp and the folder lose nothing; .gif has 256 colours a frame, and .mp4 half the resolution in colour.

    Raises:
        ModuleNotFoundError: .mp4 without PyAV.
        ValueError: another suffix.
    """
    if path.suffix not in (*SUFFIXES, ""):
        raise ValueError(f"clips are written as {', '.join(SUFFIXES)}, or frames into a folder, not {path.suffix!r}")
    clip = as_array(frames)
    if path.suffix == ".mp4":
        _save_mp4(clip, path, frame_rate)
        return
    pictures = [Image.fromarray(frame) for frame in clip]
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(path / f"{index:06d}.png")
        return
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    milliseconds = round(1000 / frame_rate)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, **options)


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
