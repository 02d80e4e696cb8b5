"""Pictures and labels from what people have: Fashion-MNIST's idx files, folders, parquet; all of it held in memory.

Knows file formats and how a picture becomes a uint8 square; does not know models, codes or training.
Dimensions: N pictures, size x size pixels, 3 channels.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FASHION_MNIST = "fashion-mnist"
FASHION_MNIST_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
TOY = "toy"
TOY_CLASSES = ("circle", "square", "triangle", "cross")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
BROKEN_SHARE = 0.01  # more broken pictures than this share are an error, fewer a warning
_IDX_PREFIX = {"train": "train", "t10k": "t10k", "test": "t10k"}
_FOLDERS = {"train": ("train",), "t10k": ("t10k", "test"), "test": ("test", "t10k")}

# A picture's name for messages, its label, and what Pillow opens.
Item = tuple[str, int, Callable[[], Any]]


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, size, size, 3) uint8 with their labels (N,) int64, which index `class_names`."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_pictures(source: str | Path, *, size: int, split: str = "train") -> Pictures:
    """Read all pictures of one split as `size` x `size` RGB.

    `source` is the word "toy" (2,048 drawn shapes, and 256 held out), the word "fashion-mnist", a folder with its idx
    files (plain or .gz), a folder with one folder of pictures per class, a flat folder of pictures (one class,
    "picture"), or a parquet file with the columns `image` and, where there are classes, `label` and `label_name`.
    `split` is "train", "test" or "t10k" (the same as "test"); folders may hold `train/` and `test/`, or `train.parquet`
    and `test.parquet`; a source without splits is "train".

    Pictures are centre-cropped and resized as in ADM, transparency becomes white; 28x28 idx pictures are padded with
    zeros instead when `size` is larger. A few broken pictures are skipped with a warning, more than 1 % are an error.

    Raises:
        FileNotFoundError: the source or the split does not exist.
        ValueError: the source holds no pictures or damaged files.
        ModuleNotFoundError: parquet without pyarrow.
    """
    if size < 1:
        raise ValueError(f"size {size} must be at least 1 pixel")
    if split not in _IDX_PREFIX:
        raise ValueError(f"split {split!r} is not one of {', '.join(_IDX_PREFIX)}")
    path = Path(source).expanduser()
    if str(source) == TOY and not path.exists():
        return _draw_toy(size, split)
    if str(source) == FASHION_MNIST and not path.exists():
        path = _find_fashion_mnist()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is a file; allowed are a .parquet file or a folder with pictures")
        _only_train(path, split)
        return _read_parquet(path, size)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder, a .parquet file or the word {FASHION_MNIST!r}")
    if any(_idx_file(path, f"{prefix}-images-idx3-ubyte") for prefix in ("train", "t10k")):
        return _read_idx(path, _IDX_PREFIX[split], size)
    for name in _FOLDERS[split]:
        if (path / f"{name}.parquet").is_file():
            return _read_parquet(path / f"{name}.parquet", size)
        if (path / name).is_dir():
            return _read_folder(path / name, size)
    if (path / "train").is_dir() or (path / "train.parquet").is_file():
        raise FileNotFoundError(f"{path} has a train split but no {split!r}; add {path / 'test'}")
    _only_train(path, split)
    return _read_folder(path, size)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the middle, as ADM does (halving with a box filter, then bicubic)."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode to RGB with transparency on white."""
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _only_train(path: Path, split: str) -> None:
    if split != "train":
        raise FileNotFoundError(f"{path} has no split {split!r}, only 'train'; a folder may hold train/ and test/")


def _draw_toy(size: int, split: str) -> Pictures:
    """Coloured shapes of four classes at random places and sizes: always the same ones."""
    count = 2048 if split == "train" else 256
    rng = np.random.default_rng((size, count))
    labels = rng.integers(0, len(TOY_CLASSES), count)
    centres, radii = rng.uniform(0.35, 0.65, (2, count, 1, 1)), rng.uniform(0.2, 0.35, (count, 1, 1))
    ground, colour = rng.uniform(160, 255, (count, 1, 1, 3)), rng.uniform(0, 130, (count, 1, 1, 3))
    places = (np.arange(size) + 0.5) / size
    x, y = (places[None, None, :] - centres[0]) / radii, (places[None, :, None] - centres[1]) / radii
    shapes = [
        x**2 + y**2 < 1,
        np.maximum(abs(x), abs(y)) < 0.85,
        (y < 0.8) & (abs(x) < (y + 1) / 1.9),
        (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    ]
    inside = np.choose(labels[:, None, None], [np.broadcast_to(shape, (count, size, size)) for shape in shapes])
    images = np.where(inside[..., None], colour, ground).round().astype(np.uint8)
    return Pictures(images, labels.astype(np.int64), TOY_CLASSES)


def _find_fashion_mnist() -> Path:
    places = [DEBIAN_FOLDER]
    if os.environ.get("NAR_DATA"):
        places.insert(0, Path(os.environ["NAR_DATA"]).expanduser() / FASHION_MNIST)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {' or '.join(str(place) for place in places)}; install the Debian package "
        "`dataset-fashion-mnist` (apt-get install dataset-fashion-mnist), or give the folder that holds "
        "train-images-idx3-ubyte.gz and its three companions"
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_idx(folder: Path, prefix: str, size: int) -> Pictures:
    images = _read_idx_array(folder, f"{prefix}-images-idx3-ubyte", axes=3)
    labels = _read_idx_array(folder, f"{prefix}-labels-idx1-ubyte", axes=1).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {prefix} pictures but {len(labels)} labels; copy it again")
    if len(labels) and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise ValueError(f"{folder} has label {labels.max()}; Fashion-MNIST has {len(FASHION_MNIST_CLASSES)} classes")
    height, width = images.shape[1:]
    if size >= max(height, width):
        top, left = (size - height) // 2, (size - width) // 2
        pad = ((0, 0), (top, size - height - top), (left, size - width - left))
        grey = np.pad(images, pad)
    else:
        grey = np.stack([np.asarray(centre_crop(Image.fromarray(image), size)) for image in images])
    return Pictures(np.repeat(grey[..., None], 3, axis=-1), labels, FASHION_MNIST_CLASSES)


def _read_idx_array(folder: Path, name: str, axes: int) -> np.ndarray:
    """Read an idx file: two zero bytes, type 8 (uint8), the number of axes, one big-endian int32 per axis, the data."""
    path = _idx_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} lacks {name}.gz; Fashion-MNIST is four files, copy them all")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"{path} is not an idx file of uint8 with {axes} axes; copy it again")
    shape = tuple(int(length) for length in np.frombuffer(data, ">i4", count=axes, offset=4))
    if len(data) - start != int(np.prod(shape)):
        raise ValueError(f"{path} has {len(data) - start} bytes for shape {shape}; it is truncated, copy it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_folder(folder: Path, size: int) -> Pictures:
    flat = _pictures_in(folder.iterdir())
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if flat and children:
        raise ValueError(
            f"{folder} holds both pictures ({flat[0].name}, ...) and folders ({children[0].name}, ...); "
            "allowed is either one folder per class or only pictures"
        )
    classes = [(child.name, _pictures_in(child.rglob("*"))) for child in children] or [("picture", flat)]
    for name, paths in classes:
        if not paths:
            where = folder / name if children else folder
            raise ValueError(
                f"{where} holds no pictures ({', '.join(sorted(SUFFIXES))}); add some or give another folder"
            )
    items = [
        (str(path.relative_to(folder)), label, _opener(path))
        for label, (_, paths) in enumerate(classes)
        for path in paths
    ]
    return _decode(items, len(items), tuple(name for name, _ in classes), folder, size)


def _pictures_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _opener(path: Path) -> Callable[[], Any]:
    return lambda: path


def _decode(items: Iterable[Item], count: int, class_names: tuple[str, ...], source: Path, size: int) -> Pictures:
    """Decode `count` items into one array; the broken ones are reported and left out."""
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int64)
    broken: list[str] = []
    num_good = 0
    for name, label, open_item in items:
        try:
            with Image.open(open_item()) as picture:
                images[num_good] = np.asarray(centre_crop(to_rgb(picture), size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            broken.append(f"{name} ({error})")
            continue
        labels[num_good] = label
        num_good += 1
    if broken:
        shown = f"{'; '.join(broken[:3])}{f'; and {len(broken) - 3} more' if len(broken) > 3 else ''}"
        message = f"{len(broken)} of {count} pictures in {source} cannot be read: {shown}"
        if len(broken) > BROKEN_SHARE * count:
            raise ValueError(f"{message}; at most {BROKEN_SHARE:.0%} may be broken, remove or repair them")
        warnings.warn(f"{message}; they are skipped", stacklevel=2)
    return Pictures(images[:num_good], labels[:num_good], class_names)


def _read_parquet(path: Path, size: int) -> Pictures:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {path} needs pyarrow: pip install nar-gen[train]") from error
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        if "image" not in columns:
            raise ValueError(f"{path} has the columns {', '.join(columns)}; needed is `image`, and `label` for classes")
        table = file.read([name for name in ("label", "label_name") if name in columns])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not a parquet file ({error}); copy it again") from error
    count = int(file.metadata.num_rows)
    if count == 0:
        raise ValueError(f"{path} holds no pictures")
    read_column = {name: table.column(name).to_pylist() for name in table.column_names}
    labels, class_names = _parquet_classes(read_column, count, file.schema_arrow.metadata or {}, path)
    return _decode(_parquet_items(file, labels, path.parent), count, class_names, path, size)


def _parquet_items(file: Any, labels: list[int], folder: Path) -> Iterator[Item]:
    index = 0
    for batch in file.iter_batches(batch_size=256, columns=["image"]):
        for cell in batch.column(0).to_pylist():
            yield f"row {index}", labels[index], _cell_opener(cell, folder)
            index += 1


def _cell_opener(cell: Any, folder: Path) -> Callable[[], Any]:
    def open_cell() -> Any:
        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, bytes):
            return io.BytesIO(data)
        if isinstance(name, str):
            return folder / name
        raise ValueError("neither bytes nor a path")

    return open_cell


def _parquet_classes(
    columns: dict[str, list[Any]], count: int, metadata: dict[bytes, bytes], path: Path
) -> tuple[list[int], tuple[str, ...]]:
    """Return labels 0..K-1 and K names: from `label_name`, else the Hugging Face schema, else the numbers."""
    values = columns.get("label")
    if values is None:
        return [0] * count, ("picture",)
    if any(value is None for value in values):
        raise ValueError(f"{path}: row {values.index(None)} has no label; every row needs one")
    if all(isinstance(value, str) for value in values):
        texts = sorted(set(values))
        index = {name: label for label, name in enumerate(texts)}
        return [index[value] for value in values], tuple(texts)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"{path}: labels must be integers from 0 or strings, not {values[0]!r}, ...")
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, json.JSONDecodeError):
        names = []
    class_names = [str(name) for name in names]
    class_names += [str(label) for label in range(len(class_names), max(values) + 1)]
    for label, name in zip(values, columns.get("label_name", []), strict=False):
        class_names[label] = str(name)
    return list(values), tuple(class_names)
