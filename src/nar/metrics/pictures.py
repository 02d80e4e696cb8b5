"""Pictures or clips as a stream of uint8 arrays, from what people have: folders, npz, parquet, iterables.

Knows file formats and refuses what would spoil a number: corrupt files, mixed sizes, values that are not 0..255. It
holds one batch at a time (an npz file is one array and is held whole); it does not know networks or statistics.
Dimensions: B pictures or clips of a batch, T frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import zipfile
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from nar.media.crops import centre_crop, to_rgb

VIDEO_SUFFIXES = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})
SUFFIXES = VIDEO_SUFFIXES | {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_HASH_BLOCK = 1 << 20

Source = str | Path | Iterable[Any]


def batches(
    source: Source, batch_size: int, *, size: int | None = None, num_frames: int | None = None
) -> Iterator[np.ndarray]:
    """Yield uint8 arrays (B, H, W, 3) of pictures or (B, T, H, W, 3) of clips, all of one size.

    `source` is a folder (searched through), an .npz file with `arr_0` (N, H, W, 3), a .parquet file with the column
    `image`, or an iterable of Pillow pictures, arrays or tensors: a picture (H, W, 3) each, or batches (B, H, W, 3) or
    (B, 3, H, W). Clips are animated pictures and video files in a folder, `arr_0` or arrays with one axis more, or a
    parquet column `strip` of frames below one another.

    `num_frames` cuts clips into all whole pieces of that length, one after another, and drops the rest; a folder of
    still pictures is then one clip, its frames in the order of their names (2 before 10). `size` crops the middle and
    resizes to `size` x `size` with a box and a bicubic filter, as ADM does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a corrupt picture, pictures of different sizes, another dtype than uint8; named.
        ModuleNotFoundError: parquet without pyarrow.
    """
    found: list[np.ndarray] = []
    first: tuple[str, tuple[int, ...]] | None = None
    named = ((name, [item]) for name, item in _named(source)) if num_frames is None else _cut(source, num_frames)
    for name, pieces in named:
        for piece in pieces:
            piece = piece if size is None else _at_size(piece, size)
            first = first or (name, piece.shape)
            if piece.shape != first[1]:
                raise ValueError(
                    f"{name} has {extent(piece.shape[:-1])} but {first[0]} has {extent(first[1][:-1])}; all must have "
                    "one size: give a size to crop and resize them to (and a number of frames to cut clips to)"
                )
            found.append(piece)
            if len(found) == batch_size:
                yield np.stack(found)
                found = []
    if found:
        yield np.stack(found)


def extent(shape: tuple[int, ...]) -> str:
    """Sizes (H, W) or (T, H, W) in words."""
    frames = "".join(f"{length} frames of " for length in shape[:-2])
    return f"{frames}{shape[-1]}x{shape[-2]} pixels"


def count(source: Source, num_frames: int | None = None) -> int | None:
    """How many pictures a source has, or None where only reading it tells.

    The length of an iterable is taken for the number of its pictures, but a list may hold batches.
    """
    if isinstance(source, list | tuple):
        batched = [isinstance(item, np.ndarray | Tensor) and item.ndim > 3 for item in source]
        return sum(len(item) if many else 1 for item, many in zip(source, batched, strict=True))
    if not isinstance(source, str | Path):
        return len(source) if isinstance(source, Sized) else None
    path = Path(source).expanduser()
    if num_frames is not None:
        return None
    if path.is_dir():
        return len(_files(path))
    if path.suffix == ".parquet" and path.is_file():
        return int(_parquet(path).metadata.num_rows)
    return None


def classes(source: str | Path, num_frames: int | None = None) -> list[str]:
    """The class of every picture that `batches` yields, in its order: what paired labels are taken from.

    In a folder it is the name of the outermost folder inside it, in a .parquet file the column `label_name` or `label`,
    in an .npz file `labels` or `arr_1`. Video files are read through where `num_frames` cuts them.

    Raises:
        ValueError: the source names no classes.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; classes are read from a folder, an .npz or a .parquet file")
    if path.is_dir():
        files = _files(path)
        if any(file.parent == path for file in files):
            raise ValueError(f"{path} names no classes: its pictures must lie in one folder a class")
        names = [file.relative_to(path).parts[0] for file in files]
        if num_frames is None:
            return names
        clips = [(clip_name, sum(1 for _ in frames) // num_frames) for clip_name, frames in _clips(path)]
        return [Path(name).relative_to(path).parts[0] for name, number in clips for _ in range(number)]
    if path.suffix == ".parquet":
        table = _parquet(path)
        column = next((name for name in ("label_name", "label") if name in table.schema_arrow.names), None)
        if column is None:
            raise ValueError(f"{path} names no classes: it needs a column `label` or `label_name`")
        labels = [str(label) for label in table.read([column]).column(0).to_pylist()]
    else:
        try:
            with np.load(path) as file:
                array = next((file[name] for name in ("labels", "arr_1") if name in file.files), None)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} is damaged or not an .npz file ({error}); copy it again") from error
        if array is None or array.ndim != 1:
            raise ValueError(f"{path} names no classes: it needs an array `labels` or `arr_1` (N,)")
        labels = [str(label) for label in array]
    if num_frames is None:
        return labels
    lengths = (len(item) // num_frames for _, item in _named(path))
    return [label for label, number in zip(labels, lengths, strict=True) for _ in range(number)]


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's pictures."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = _files(path)
        listing = "".join(f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            state.update(block)
    return state.hexdigest()


def fingerprint(source: Source) -> str | None:
    """What names a source's contents: `digest` of a file, the SHA-256 of arrays in a list; None of anything else."""
    if isinstance(source, str | Path):
        return digest(source)
    if not isinstance(source, list | tuple) or not all(isinstance(item, np.ndarray) for item in source):
        return None
    state = hashlib.sha256()
    for array in source:
        state.update(f"{array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def _named(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture (H, W, 3) with its name for messages."""
    if not isinstance(source, str | Path):
        yield from _items(source)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        for file in _files(path):
            yield str(file), _decode(str(file), file)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder of pictures, an .npz or a .parquet file")
    elif path.suffix == ".npz":
        yield from _items([_array(path)], f"{path}: ")
    elif path.suffix == ".parquet":
        index = 0
        file = _parquet(path)
        column = "image" if "image" in file.schema_arrow.names else "strip"
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for cell in batch.column(0).to_pylist():
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                name = f"{path}: row {index}"
                if not isinstance(data, bytes):
                    raise ValueError(f"{name} holds no encoded picture in its column `{column}`")
                picture = _decode(name, io.BytesIO(data))
                yield name, picture if column == "image" else _unstacked(name, picture)
                index += 1
    else:
        raise ValueError(f"{path} is none of: a folder of pictures, an .npz file, a .parquet file")


def _cut(source: Source, num_frames: int) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    """Every clip's name and its whole pieces (num_frames, H, W, 3); frames are read as they are needed."""
    is_folder = isinstance(source, str | Path) and Path(source).expanduser().is_dir()
    for name, frames in _clips(Path(str(source)).expanduser()) if is_folder else _named(source):
        if isinstance(frames, np.ndarray) and frames.ndim != 4:
            raise ValueError(f"{name} is a picture, not a clip: it can't be cut into pieces of {num_frames} frames")
        yield name, _pieces(name, iter(frames), num_frames)


def _pieces(name: str, frames: Iterator[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
    while len(piece := list(itertools.islice(frames, num_frames))) == num_frames:
        yield _stack(name, piece)


def _stack(name: str, frames: list[np.ndarray]) -> np.ndarray:
    sizes = {frame.shape[:2] for frame in frames}
    if not frames:
        raise ValueError(f"{name} has no frames; remove it or make it again")
    if len(sizes) > 1:
        raise ValueError(f"{name} has frames of {' and '.join(sorted(map(extent, sizes)))}; a clip has one size")
    return np.stack(frames)


def _clips(folder: Path) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """Every clip of a folder with the path that names it: a video, an animation, or a folder of still pictures."""
    for parent, group in itertools.groupby(_files(folder), key=lambda file: file.parent):
        files = list(group)
        if any(file.suffix.lower() in VIDEO_SUFFIXES or _is_animated(file) for file in files):
            yield from ((str(file), _frames(file)) for file in files)
        else:
            yield str(parent), itertools.chain.from_iterable(_frames(file) for file in files)


def _is_animated(file: Path) -> bool:
    try:
        with Image.open(file) as picture:
            return bool(getattr(picture, "is_animated", False))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # named when its frames are read


def _frames(file: Path) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) of a file, one of them for a still picture."""
    if file.suffix.lower() in VIDEO_SUFFIXES:
        return _video_frames(file)
    array = _decode(str(file), file)
    return iter(array if array.ndim == 4 else array[None])


def _natural(file: Path) -> list[list[str | int]]:
    """What sorts frame 2 before frame 10, and keeps the files of one folder together."""
    texts = (file.parent.as_posix(), file.name)
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)] for text in texts]


def _files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    files = sorted(filter(Path.is_file, found), key=_natural)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return files


def _decode(name: str, data: Any) -> np.ndarray:
    if isinstance(data, Path) and data.suffix.lower() in VIDEO_SUFFIXES:
        return _stack(name, list(_video_frames(data)))
    try:
        with Image.open(data) as picture:
            frames = [np.asarray(to_rgb(frame)) for frame in ImageSequence.Iterator(picture)]
            return frames[0] if len(frames) == 1 else np.stack(frames)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} can't be read as a picture ({error}); remove it or make it again") from error


def _video_frames(path: Path) -> Iterator[np.ndarray]:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {path} needs PyAV: pip install nar-gen[video]") from error
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (OSError, ValueError, IndexError) as error:  # av's own errors derive from these
        raise ValueError(f"{path} can't be read as a video ({error}); remove it or make it again") from error


def _unstacked(name: str, strip: np.ndarray) -> np.ndarray:
    """A strip of square frames, below or beside one another, to a clip (T, H, W, 3)."""
    height, width = strip.shape[:2]
    side = min(height, width)
    if max(height, width) % side:
        raise ValueError(f"{name} is a strip of {width}x{height} pixels, which are not whole square frames")
    if height >= width:
        return strip.reshape(height // side, side, side, 3)
    return strip.reshape(side, width // side, side, 3).swapaxes(0, 1)


def _array(path: Path) -> np.ndarray:
    try:
        with np.load(path) as file:
            names = file.files
            array: np.ndarray | None = file["arr_0"] if "arr_0" in names else None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or not an .npz file ({error}); copy it again") from error
    if array is None:
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; pictures are expected as `arr_0` (N, H, W, 3)")
    return array


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {path} needs pyarrow: pip install nar-gen[eval]") from error
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not a parquet file ({error}); copy it again") from error
    if not {"image", "strip"} & set(file.schema_arrow.names):
        names = ", ".join(file.schema_arrow.names)
        raise ValueError(f"{path} has the columns {names}; needed is `image`, or `strip` for clips")
    return file


def _items(items: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    index = 0
    for item in items:
        if isinstance(item, Image.Image):
            yield f"{prefix}picture {index}", np.asarray(to_rgb(item))
            index += 1
            continue
        if not isinstance(item, np.ndarray | Tensor):
            raise ValueError(
                f"{prefix}picture {index} is a {type(item).__name__}; allowed are Pillow pictures, arrays and tensors"
            )
        if item.dtype not in (np.uint8, torch.uint8):
            raise ValueError(
                f"{prefix}picture {index} has dtype {str(item.dtype).removeprefix('torch.')}; pictures must be uint8 "
                "0..255 (of floats in 0..1: (255 * x).round(), in -1..1: (127.5 * (x + 1)).round())"
            )
        array = item.cpu().numpy() if isinstance(item, Tensor) else item
        pictures = array[None] if array.ndim == 3 else array
        if pictures.ndim in (4, 5) and pictures.shape[-1] != 3 and pictures.shape[1] == 3:
            pictures = np.moveaxis(pictures, 1, -1)
        if pictures.ndim not in (4, 5) or pictures.shape[-1] != 3:
            raise ValueError(
                f"{prefix}picture {index} has shape {tuple(array.shape)}; allowed are (H, W, 3), (B, H, W, 3) and "
                "(B, 3, H, W), for clips (B, T, H, W, 3) and (B, 3, T, H, W)"
            )
        for picture in pictures:
            yield f"{prefix}picture {index}", picture
            index += 1


def _at_size(picture: np.ndarray, size: int) -> np.ndarray:
    if picture.shape[-3:-1] == (size, size):
        return picture
    if picture.ndim == 4:
        return np.stack([_at_size(frame, size) for frame in picture])
    return np.asarray(centre_crop(Image.fromarray(picture), size))
