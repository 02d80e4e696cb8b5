"""Pictures or clips as a stream of uint8 arrays: of paths, which `nar.data` opens, arrays, iterables.

Refuses what would spoil a number: mixed sizes, values that are not 0..255. It holds one batch at a time; it does not
know file formats, networks or statistics. Dimensions: B pictures or clips of a batch, T frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nar.data.open import open_source
from nar.data.source import Source as DataSource
from nar.media.crops import centre_crop
from nar.media.pictures import upright_rgb
from nar.media.video import Windows, squared

Source = str | Path | DataSource | Iterable[Any]
Opened = DataSource | Iterable[Any]


def opened(
    source: Source, *, split: str = "test", size: int | None = None, num_frames: int | None = None, clips: bool = False
) -> Opened:
    """Open a path as `nar.data.open.open_source` does; what is open already, arrays and iterables stay as they are.

    Of a folder with splits it is the one named, others are taken whole. With `num_frames` clips are cut into all whole
    pieces of that length, one after another; with `clips` alone they are taken whole, each of its frames once.
    """
    if not isinstance(source, str | Path):
        return source
    windows = Windows() if clips else None
    if num_frames is not None:
        windows = Windows(num_frames, kind="all", whole=True)
    return open_source(source, size=size, split=split, whole=True, windows=windows)


def batches(
    source: Source,
    batch_size: int,
    *,
    size: int | None = None,
    num_frames: int | None = None,
    broken: list[str] | None = None,
    rows: list[int] | None = None,
) -> Iterator[np.ndarray]:
    """Yield uint8 arrays (B, H, W, 3) of pictures or (B, T, H, W, 3) of clips, all of one size.

    Args:
        source: a path or what was opened of one (see `opened`), or an iterable of Pillow pictures, arrays or tensors: a
            picture (H, W, 3) each, or batches (B, H, W, 3) or (B, 3, H, W); clips have one axis more.
        size: crop the middle and resize to `size` x `size`: pictures as ADM does, frames as `nar.media.video.squared`.
        num_frames: cut clips into pieces of this length, and drop the rest.
        broken: what can't be decoded, and is skipped, is added here, with the reason.
        rows: the place in the source of every picture that is read is added here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: too many corrupt pictures, pictures of different sizes, another dtype than uint8; named.
        ModuleNotFoundError: parquet without pyarrow.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    source = opened(source, size=size, num_frames=num_frames)
    found: list[np.ndarray] = []
    first: tuple[str, tuple[int, ...]] | None = None
    pieces = (
        ((row, *one) for row, one in enumerate(_of_items(source, size, num_frames)))
        if not isinstance(source, DataSource)
        else ((row, source.names[row], piece) for row, piece in source.decoded(size, broken))
    )
    for row, name, piece in pieces:
        first = first or (name, piece.shape)
        if piece.shape != first[1]:
            raise ValueError(
                f"{name} has {extent(piece.shape[:-1])} but {first[0]} has {extent(first[1][:-1])}; all must have "
                "one size: give a size to crop and resize them to (and a number of frames to cut clips to)"
            )
        found.append(piece)
        if rows is not None:
            rows.append(row)
        if len(found) == batch_size:
            yield np.stack(found)
            found = []
    if found:
        yield np.stack(found)


def extent(shape: tuple[int, ...]) -> str:
    """Sizes (H, W) or (T, H, W) in words."""
    frames = "".join(f"{length} frames of " for length in shape[:-2])
    return f"{frames}{shape[-1]}x{shape[-2]} pixels"


def count(source: Opened, num_frames: int | None = None) -> int | None:
    """How many pictures an open source has, or None where only reading it tells.

    The length of an iterable is taken for the number of its pictures, but a list may hold batches.
    """
    if isinstance(source, DataSource):
        return len(source)
    if num_frames is not None:
        return None
    if isinstance(source, list | tuple):
        return sum(len(item) if isinstance(item, np.ndarray | Tensor) and item.ndim > 3 else 1 for item in source)
    return len(source) if isinstance(source, Sized) else None


def fingerprint(source: Opened) -> str | None:
    """Name what an open source holds, by the SHA-256 of its files or of arrays in a list; None of anything else."""
    if isinstance(source, DataSource):
        return f"{source.digest} {getattr(source, 'windows', '')} {getattr(source, 'starts', '')}"
    if not isinstance(source, list | tuple) or not all(isinstance(item, np.ndarray) for item in source):
        return None
    state = hashlib.sha256()
    for array in source:
        state.update(f"{array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def _of_items(items: Iterable[Any], size: int | None, num_frames: int | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, item in _items(items):
        pieces = [item]
        if num_frames is not None:
            if item.ndim != 4:
                raise ValueError(f"{name} is a picture, not a clip: it can't be cut into pieces of {num_frames} frames")
            pieces = [item[start : start + num_frames] for start in range(0, len(item) - num_frames + 1, num_frames)]
        yield from ((name, piece if size is None else _at_size(piece, size)) for piece in pieces)


def _items(items: Iterable[Any]) -> Iterator[tuple[str, np.ndarray]]:
    index = 0
    for item in items:
        if isinstance(item, Image.Image):
            yield f"picture {index}", np.asarray(upright_rgb(item))
            index += 1
            continue
        what = f"picture {index}"
        if not isinstance(item, np.ndarray | Tensor):
            raise ValueError(f"{what} is a {type(item).__name__}; allowed are Pillow pictures, arrays and tensors")
        if item.dtype not in (np.uint8, torch.uint8):
            wanted = "uint8 0..255 (of floats in 0..1: (255 * x).round(), in -1..1: (127.5 * (x + 1)).round())"
            raise ValueError(f"{what} has dtype {str(item.dtype).removeprefix('torch.')}; pictures must be {wanted}")
        array = item.cpu().numpy() if isinstance(item, Tensor) else item
        pictures = array[None] if array.ndim == 3 else array
        if pictures.ndim in (4, 5) and pictures.shape[-1] != 3 and pictures.shape[1] == 3:
            pictures = np.moveaxis(pictures, 1, -1)
        if pictures.ndim not in (4, 5) or pictures.shape[-1] != 3:
            shapes = "(H, W, 3), (B, H, W, 3) and (B, 3, H, W), for clips (B, T, H, W, 3) and (B, 3, T, H, W)"
            raise ValueError(f"{what} has shape {tuple(array.shape)}; allowed are {shapes}")
        for picture in pictures:
            yield f"picture {index}", picture
            index += 1


def _at_size(piece: np.ndarray, size: int) -> np.ndarray:
    if piece.ndim == 4:
        return np.stack([squared(frame, size) for frame in piece])
    return piece if piece.shape[:2] == (size, size) else np.asarray(centre_crop(Image.fromarray(piece), size))
