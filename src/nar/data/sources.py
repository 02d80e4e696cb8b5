"""Pictures, labels and captions from what people have: folders, parquet, webdataset tars, the hub, Fashion-MNIST.

Knows file formats and how a picture becomes a uint8 square; does not know models, codes or training. A `Source` is
random access to encoded pictures; `load_pictures` decodes one into memory.
Dimensions: N pictures, size x size pixels, 3 channels.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from nar.data.clips import ClipSource
    from nar.data.video import Windows

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

_CAPTIONS = ("caption", "text", "prompt")
_WORDS = (*_CAPTIONS, "tags", "style")
# What decoding a broken picture raises.
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, size, size, 3) uint8, or clips (N, T, size, size, 3), with their labels (N,) int64.

    The labels index `class_names`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Source:
    """Pictures that are decoded when asked for: `open(i)` gives what Pillow opens, or a picture.

    `names` are for messages. `groups` are what belongs together when a part is held out (the drawings of one thing,
    say), by default each picture for itself. `captions` is None where there are none, and so are the further words on
    each picture, `tags` and `styles`.
    """

    names: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    open: Callable[[int], Any]
    captions: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    tags: Sequence[Sequence[str]] | None = None
    styles: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, index: int) -> Image.Image:
        """Decode picture `index` to RGB; raises one of `BROKEN` when it can't be."""
        opened = self.open(index)
        if isinstance(opened, Image.Image):
            return opened
        with Image.open(opened) as picture:
            return to_rgb(picture)

    def array(
        self, index: int, size: int, uniforms: Sequence[float] | None = None, *, crop: bool = False
    ) -> np.ndarray:
        """Decode picture `index` to its centre (size, size, 3) uint8; raises one of `BROKEN` when it can't be.

        With `crop`, to the square that `uniforms`, numbers in [0, 1), pick instead (see `random_crop`).
        """
        picture = self.picture(index)
        return np.asarray(random_crop(picture, size, uniforms) if crop and uniforms else centre_crop(picture, size))

    def views(self, index: int, size: int, kind: str) -> np.ndarray:
        """The views (v, size, size, 3) uint8 of picture `index`, see `nar.data.sources.views`."""
        return np.stack([np.asarray(view) for view in views(self.picture(index), size, kind)])

    def take(self, rows: np.ndarray) -> Self:
        """The source with only these rows, in this order."""
        picked = [int(row) for row in rows]
        return dataclasses.replace(
            self,
            names=[self.names[row] for row in picked],
            labels=self.labels[rows],
            open=lambda index: self.open(picked[index]),
            captions=None if self.captions is None else [self.captions[row] for row in picked],
            groups=None if self.groups is None else [self.groups[row] for row in picked],
            tags=None if self.tags is None else [self.tags[row] for row in picked],
            styles=None if self.styles is None else [self.styles[row] for row in picked],
        )


def open_source(
    source: str | Path,
    *,
    size: int,
    split: str = "train",
    label: str = "label",
    group: str = "",
    windows: Windows | None = None,
) -> Source:
    """Find the pictures of one split, without decoding them; with `windows`, which say what is taken of each, clips.

    `source` is one of
    - the word "toy" (2,048 drawn shapes, and 256 held out) or "fashion-mnist", or a folder with idx files (.gz or not);
    - a folder with one folder of pictures per class, or a flat folder (one class, "picture"); captions are in a `.txt`
      beside each picture, or in a `metadata.jsonl` (`file_name` and `caption`, `text` or `prompt`, maybe `label`);
    - a parquet file, or a folder of them, with the columns `image` and maybe `label`, `label_name`, `caption`, `tags`
      and `style` (which jsonl and json may have too); clips are in the column `strip`, their square frames stacked in
      one picture, or in `video`;
    - a webdataset `.tar`, or a folder of them (members `x.jpg` with `x.txt`, `x.json` or `x.cls`);
    - with `windows`, a list of clips as UCF-101 and Kinetics-600 come with: a .csv, several with "+" between, or a
      folder with `*train.csv` and `*test.csv` or `*val.csv` (see `nar.data.clips.open_list`);
    - a data set on the hub, such as `someone/pictures`.

    `split` is "train", "test" or "t10k" (the same as "test"); folders may hold `train/` and `test/`, or `train.parquet`
    and `test.parquet`; a source without splits is "train". `label` and `group` name columns of tables, of which tars
    have those that are in each `x.json`. 28x28 idx pictures are padded with zeros to `size`.

    Raises:
        FileNotFoundError: the source or the split does not exist.
        ValueError: the source holds no pictures or damaged files, or lacks the column that `label` or `group` names.
        ModuleNotFoundError: parquet without pyarrow, or the hub without datasets.
    """
    if size < 1:
        raise ValueError(f"size {size} must be at least 1 pixel")
    if split not in _IDX_PREFIX:
        raise ValueError(f"split {split!r} is not one of {', '.join(_IDX_PREFIX)}")
    if windows is not None:
        from nar.data.clips import ClipSource

        found = _open_clips(source, split, label, group, windows)
        clips = found if isinstance(found, ClipSource) else _as_clips(found)
        return dataclasses.replace(clips, windows=windows).unrolled()
    path = Path(source).expanduser()
    if str(source) == TOY and not path.exists():
        _check_columns(source, label, group)
        return _of_arrays(_draw_toy(size, split))
    if str(source) == FASHION_MNIST and not path.exists():
        path = _find_fashion_mnist()
    if path.is_file():
        if path.suffix not in (".parquet", ".tar"):
            raise ValueError(f"{path} is a file; allowed are a .parquet file, a .tar file or a folder with pictures")
        _only_train(path, split)
        return (_open_parquet if path.suffix == ".parquet" else _open_tars)([path], label, group)
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.is_dir():
            return _open_hub(str(source), split, label, group)
        raise FileNotFoundError(
            f"{path} does not exist; give a folder, a .parquet or .tar file, a hub id, or the word {FASHION_MNIST!r}"
        )
    if any(_idx_file(path, f"{prefix}-images-idx3-ubyte") for prefix in ("train", "t10k")):
        _check_columns(path, label, group)
        return _of_arrays(_read_idx(path, _IDX_PREFIX[split], size))
    for name in _FOLDERS[split]:
        if tables := sorted([*path.glob(f"{name}.parquet"), *path.glob(f"{name}-*.parquet")]):
            return _open_parquet(tables, label, group)
        if (path / name).is_dir():
            return _open_folder(path / name, label, group)
    _only_split(path, split)
    return _open_folder(path, label, group)


def _open_clips(source: str | Path, split: str, label: str, group: str, windows: Windows) -> Source:
    from nar.data.clips import open_list

    lists = [Path(part).expanduser() for part in str(source).split("+")]
    if all(path.suffix == ".csv" and path.is_file() for path in lists):
        _only_train(lists[0], split)
        _check_columns(source, label, group)
        return open_list(lists, windows)
    path = Path(source).expanduser()
    if path.is_file():
        _only_train(path, split)
        if path.suffix not in (".parquet", ".tar"):
            raise ValueError(f"{path} is a file; allowed are a .parquet, .tar or .csv file or a folder with clips")
        if path.suffix == ".parquet":
            return _open_parquet([path], label, group)
        return _open_tars([path], label, group, clips=True)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder, or a .parquet, .tar or .csv file of clips")
    for name in (*_FOLDERS[split], "val") if split != "train" else _FOLDERS[split]:
        if tables := sorted([*path.glob(f"{name}.parquet"), *path.glob(f"{name}-*.parquet")]):
            return _open_parquet(tables, label, group)
        if lists := sorted(path.glob(f"*{name}.csv")):
            _check_columns(path, label, group)
            return open_list(lists, windows)
        if (path / name).is_dir():
            return _open_folder(path / name, label, group, clips=True)
    _only_split(path, split)
    return _open_folder(path, label, group, clips=True)


def _check_columns(source: Path | str, label: str, group: str, known: Iterable[str] = ()) -> None:
    """Refuse a `label` or `group` that is none of the `known` columns; the default label may be missing."""
    for key, column, default in (("group", group, ""), ("label", label, "label")):
        if column not in ("", default, *known):
            has = ", ".join(sorted(known))
            fix = "name one of these" if has else "give a table with it (.parquet, .tar, metadata.jsonl)"
            raise ValueError(
                f"{source} has no column {column!r} for {key}, it has {has or 'none'}; {fix}, or leave {key} out"
            )


def _only_split(path: Path, split: str) -> None:
    """Refuse a folder whose split is missing, or that has none and is asked for another than "train"."""
    if (path / "train").is_dir() or (path / "train.parquet").is_file() or any(path.glob("*train.csv")):
        raise FileNotFoundError(f"{path} has a train split but no {split!r}; add {path / 'test'}")
    _only_train(path, split)


def load_pictures(source: str | Path | Source, *, size: int, split: str = "train") -> Pictures:
    """Decode all pictures of a source into memory, as `size` x `size` RGB; see `open_source` for what it may be.

    Pictures are centre-cropped and resized as in ADM, transparency becomes white. A few broken pictures are skipped
    with a warning, more than 1 % are an error.
    """
    if not isinstance(source, Source):
        source = open_source(source, size=size, split=split)
    images = np.empty((len(source), 0), np.uint8)
    good: list[int] = []
    broken: list[str] = []
    for index in range(len(source)):
        try:
            made = source.array(index, size)
        except BROKEN as error:
            broken.append(f"{source.names[index]} ({error})")
            continue
        if not good:
            images = np.empty((len(source), *made.shape), np.uint8)
        images[len(good)] = made
        good.append(index)
    check_broken(broken, len(source))
    return Pictures(images[: len(good)], source.labels[good], source.class_names)


def check_broken(broken: Sequence[str], count: int) -> None:
    """Warn of `broken` pictures among `count`; raises ValueError when they are more than BROKEN_SHARE."""
    if not broken:
        return
    shown = f"{'; '.join(broken[:3])}{f'; and {len(broken) - 3} more' if len(broken) > 3 else ''}"
    message = f"{len(broken)} of {count} pictures cannot be read: {shown}"
    if len(broken) > BROKEN_SHARE * count:
        raise ValueError(f"{message}; at most {BROKEN_SHARE:.0%} may be broken, remove or repair them")
    warnings.warn(f"{message}; they are skipped", stacklevel=2)


def held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Which samples (N,) bool are held out, about `share` of them, decided by a hash of their keys.

    Samples with one key stay together, and a sample stays where it is when others come or go. At least one is held out
    and at least one is not, where there are two keys.
    """
    digests = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in set(keys)}
    ranked = sorted(digests, key=lambda key: digests[key])
    chosen = {key for key in ranked[1:-1] if digests[key] < share} | set(ranked[:1] if len(ranked) > 1 else ())
    return np.array([key in chosen for key in keys], dtype=bool)


def held_out_pairs(groups: Sequence[str], styles: Sequence[str], count: int) -> np.ndarray:
    """Which samples (N,) bool are held out as pairs of group and style: one style of each of `count` groups.

    What is asked of a model then is a thing that it knows in a style that it knows, but not together. Groups with one
    style only have no such pair. The choice is by hash, as in `held_out`.
    """

    def rank(key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"pair {key}".encode()).digest()[:8], "big")

    drawn: dict[str, set[str]] = {}
    for group, style in zip(groups, styles, strict=True):
        drawn.setdefault(group, set()).add(style)
    several = sorted((group for group, found in drawn.items() if len(found) > 1), key=rank)
    if len(several) < count:
        raise ValueError(f"{count} pairs of group and style can't be held out: {len(several)} groups have two styles")
    pairs = {(group, min(drawn[group], key=lambda style: rank(f"{group} {style}"))) for group in several[:count]}
    return np.array([pair in pairs for pair in zip(groups, styles, strict=True)], dtype=bool)


def views(picture: Image.Image, size: int, kind: str) -> list[Image.Image]:
    """The crops of a picture that codes are made of: "centre", "flip" (and mirrored), or "ten-crop".

    Ten-crop cuts the four corners and the middle out of a centre crop 1.1 times as large, of the picture and of its
    mirror image, as the published trainers do.
    """
    if kind == "loop":
        raise ValueError(f"pictures have the views centre, flip and ten-crop, not {kind!r}")
    if kind == "ten-crop":
        large = round(size * 1.1 - 0.5)
        square = centre_crop(picture, large)
        middle = round((large - size) / 2)
        corners = [(0, 0), (large - size, 0), (0, large - size), (large - size, large - size), (middle, middle)]
        return [
            side.crop((left, top, left + size, top + size))
            for side in (square, ImageOps.mirror(square))
            for left, top in corners
        ]
    centre = centre_crop(picture, size)
    return [centre, ImageOps.mirror(centre)] if kind == "flip" else [centre]


VIEWS = {"centre": 1, "flip": 2, "ten-crop": 10, "loop": 16}


def random_crop(picture: Image.Image, size: int, uniforms: Sequence[float], *, smallest: float = 0.8) -> Image.Image:
    """A random square of a picture, whose shorter side is first brought to a random length in [size, size / smallest].

    Draws that length, the place and whether the square is mirrored from four numbers in [0, 1).
    """
    side = size + int(uniforms[0] * (math.ceil(size / smallest) - size + 1))
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (int(u * (length - size + 1)) for u, length in zip(uniforms[1:3], picture.size, strict=True))
    square = picture.crop((left, top, left + size, top + size))
    return ImageOps.mirror(square) if uniforms[3] < 0.5 else square


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


def _of_arrays(pictures: Pictures) -> Source:
    return Source(
        [f"picture {index}" for index in range(len(pictures))],
        pictures.labels,
        pictures.class_names,
        lambda index: Image.fromarray(pictures.images[index]),
    )


def _open_folder(folder: Path, label: str, group: str, *, clips: bool = False) -> Source:
    word, suffixes = ("clip", _clip_suffixes()) if clips else ("picture", SUFFIXES)
    if found := sorted(folder.glob("*.tar")):
        return _open_tars(found, label, group, clips=clips)
    if found := sorted(folder.glob("*.parquet")):
        return _open_parquet(found, label, group)
    if (folder / "metadata.jsonl").is_file():
        return _open_listed(folder, label, group)
    _check_columns(folder, label, group)
    flat = _files_in(folder.iterdir(), suffixes)
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if flat and children:
        raise ValueError(
            f"{folder} holds both {word}s ({flat[0].name}, ...) and folders ({children[0].name}, ...); "
            f"allowed is either one folder per class or only {word}s"
        )
    classes = [(child.name, _files_in(child.rglob("*"), suffixes)) for child in children] or [(word, flat)]
    for name, paths in classes:
        if not paths:
            where = folder / name if children else folder
            raise ValueError(
                f"{where} holds no {word}s ({', '.join(sorted(suffixes))}); add some or give another folder"
                + ("" if clips else ", and for clips say how many frames (data.num_frames)")
            )
    paths = [path for _, found in classes for path in found]
    labels = [index for index, (_, found) in enumerate(classes) for _ in found]
    texts = [path.with_suffix(".txt") for path in paths]
    has_captions = any(text.is_file() for text in texts)
    return Source(
        [str(path.relative_to(folder)) for path in paths],
        np.array(labels),
        tuple(name for name, _ in classes),
        lambda index: paths[index],
        [text.read_text(encoding="utf-8").strip() if text.is_file() else "" for text in texts]
        if has_captions
        else None,
    )


def _open_listed(folder: Path, label: str, group: str) -> Source:
    """A folder whose `metadata.jsonl` lists its pictures."""
    path = folder / "metadata.jsonl"
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append({**record, "file_name": str(record["file_name"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needed is a JSON object with file_name ({error!r})") from error
    if not records:
        raise ValueError(f"{path} lists no pictures")
    columns = {key: [record.get(key) for record in records] for key in {key for record in records for key in record}}
    _check_columns(path, label, group, columns)
    labels, class_names = _classes(columns, len(records), [], path, label)
    names = [str(name) for name in columns["file_name"]]
    return Source(
        names,
        np.array(labels),
        class_names,
        lambda index: folder / names[index],
        groups=_groups(columns, group),
        **_words(columns),
    )


def _open_tars(paths: Sequence[Path], label: str, group: str, *, clips: bool = False) -> Source:
    """Webdataset shards: uncompressed tars, indexed once by their headers and then read where a picture lies."""
    word, suffixes = ("clip", _clip_suffixes()) if clips else ("picture", SUFFIXES)
    places: list[tuple[Path, int, int]] = []
    names: list[str] = []
    records: list[dict[str, Any]] = []
    for path in paths:
        samples: dict[str, dict[str, Any]] = {}
        found: dict[str, tuple[Path, int, int]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                    name = f"{member.name.rpartition('/')[0]}/{stem}"
                    sample = samples.setdefault(name, {})
                    if f".{suffix.lower()}" in suffixes:
                        found[name] = (path, member.offset_data, member.size)
                    elif suffix in ("txt", "cls", "json") and (file := tar.extractfile(member)):
                        _add_text(sample, suffix, file.read().decode())
        except (tarfile.TarError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"shard {path} can't be read ({error}); copy it again") from error
        for name, sample in samples.items():
            if name in found:
                names.append(f"{path.name}:{name.lstrip('/')}")
                places.append(found[name])
                records.append(sample)
    if not records:
        raise ValueError(f"{paths[0]} holds no {word}s ({', '.join(sorted(suffixes))})")

    def read(index: int) -> io.BytesIO:
        path, offset, length = places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))

    columns = {key: [record.get(key) for record in records] for key in {key for record in records for key in record}}
    _check_columns(paths[0], label, group, columns)
    labels, class_names = _classes(columns, len(records), [], paths[0], label)
    groups = _groups(columns, group)
    return Source(names, np.array(labels), class_names, read, groups=groups, **_words(columns))


def _add_text(sample: dict[str, Any], suffix: str, text: str) -> None:
    if suffix == "json":
        sample.update(json.loads(text))
    else:
        sample["caption" if suffix == "txt" else "label"] = text.strip() if suffix == "txt" else int(text)


def _open_hub(name: str, split: str, label: str, group: str) -> Source:
    """A data set that `datasets` reads, memory-mapped; pictures are decoded here, so that a broken one is only one."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no folder {name!r} here, and reading a hub id needs datasets: pip install nar-gen[train]"
        ) from error
    try:
        table = datasets.load_dataset(name, split="test" if split == "t10k" else split)
    except (ValueError, OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no folder {name!r} here, and no split {split!r} of it on the hub: {reason}"
        ) from error
    images = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise ValueError(f"{name} has the columns {', '.join(table.column_names)}, but none of pictures")
    table = table.cast_column(images[0], datasets.Image(decode=False))
    texts = table.remove_columns([key for key in table.column_names if key == images[0]])
    _check_columns(name, label, group, texts.column_names)
    columns = {key: list(texts[key]) for key in texts.column_names if key in (label, group, "label_name", *_WORDS)}
    schema_names = getattr(table.features.get(label), "names", None) or []
    labels, class_names = _classes(columns, len(table), schema_names, name, label)
    return Source(
        [f"row {index}" for index in range(len(table))],
        np.array(labels),
        class_names,
        lambda index: _opened(table[index][images[0]], Path()),
        groups=_groups(columns, group),
        **_words(columns),
    )


def _clip_suffixes() -> frozenset[str]:
    from nar.data.video import SUFFIXES as CLIP_SUFFIXES

    return CLIP_SUFFIXES


def _files_in(paths: Iterable[Path], suffixes: frozenset[str]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _open_parquet(paths: Sequence[Path], label: str, group: str) -> Source:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {paths[0]} needs pyarrow: pip install nar-gen[train]") from error
    columns: dict[str, list[Any]] = {}
    places: list[tuple[int, int, int]] = []  # file, row group, row in it
    schema_names: list[str] = []
    every: set[str] = set()
    pictures = ""
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            known = file.schema_arrow.names
            pictures = pictures or next((key for key in ("image", "strip", "video") if key in known), "")
            if pictures not in known:
                raise ValueError(
                    f"{path} has the columns {', '.join(known)}; needed is `image` (or `strip` or `video`, of clips), "
                    "in all files the same, and `label` for classes"
                )
            every.update(known)
            wanted = [key for key in dict.fromkeys((label, "label_name", group, *_WORDS)) if key in known]
            table = file.read(wanted)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged or not a parquet file ({error}); copy it again") from error
        for key in wanted:
            columns.setdefault(key, [None] * len(places)).extend(table.column(key).to_pylist())
        for row_group in range(file.num_row_groups):
            places += [(number, row_group, row) for row in range(file.metadata.row_group(row_group).num_rows)]
        for column in columns.values():  # what this file lacks and an earlier one has
            column.extend([None] * (len(places) - len(column)))
        schema_names = schema_names or _schema_names(file.schema_arrow.metadata or {}, label)
    if not places:
        raise ValueError(f"{paths[0]} holds no pictures")
    _check_columns(paths[0], label, group, every)
    labels, class_names = _classes(columns, len(places), schema_names, paths[0], label)

    @lru_cache(maxsize=8)
    def cells(number: int, row_group: int) -> Any:
        return pq.ParquetFile(paths[number]).read_row_group(row_group, columns=[pictures]).column(0)

    def read(index: int) -> Any:
        number, row_group, row = places[index]
        return _opened(cells(number, row_group)[row].as_py(), paths[number].parent)

    names, words = [f"row {index}" for index in range(len(places))], _words(columns)
    groups = _groups(columns, group)
    found = Source(names, np.array(labels), class_names, read, groups=groups, **words)
    return found if pictures == "image" else _as_clips(found, strips=pictures == "strip")


def _as_clips(source: Source, *, strips: bool = False) -> ClipSource:
    """The same rows as clips: their files, or `strips`, which are pictures of stacked frames."""
    from nar.data.clips import ClipSource

    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(Source)}
    return ClipSource(**fields | {"open": source.picture if strips else source.open})


def _opened(cell: Any, folder: Path) -> Any:
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if isinstance(name, str):
        return folder / name
    raise ValueError("neither bytes nor a path")


def _words(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """The fields of a Source that describe its pictures; tags are lists, or words with commas between them."""
    found: dict[str, Any] = {}
    for key in _CAPTIONS:
        if key in columns:
            found["captions"] = [str(value or "") for value in columns[key]]
            break
    if "style" in columns:
        found["styles"] = [str(value or "") for value in columns["style"]]
    if "tags" in columns:
        lists = [value.split(",") if isinstance(value, str) else value or () for value in columns["tags"]]
        found["tags"] = [tuple(str(tag).strip() for tag in tags) for tags in lists]
    return found


def _groups(columns: dict[str, list[Any]], group: str) -> list[str] | None:
    """What each row belongs to; a row without a value belongs to itself.

    In a column named `hexcode`, which holds code points of emoji, and in no other, those of skin tones don't count:
    drawings that differ in nothing else are held out together.
    """
    if not group:
        return None
    keys = [f"row {row}" if value is None else str(value) for row, value in enumerate(columns[group])]
    return [_family(key) for key in keys] if group == "hexcode" else keys


def _family(key: str) -> str:
    """An emoji's code points without those of skin tones."""
    return re.sub(r"-1F3F[B-F]\b", "", key, flags=re.IGNORECASE)


def _schema_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """Names of classes in the Hugging Face schema of a parquet file."""
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]["names"]
    except (KeyError, TypeError, json.JSONDecodeError):
        return []
    return [str(name) for name in names]


def _classes(
    columns: dict[str, list[Any]], count: int, schema_names: Sequence[str], path: Path | str, label: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return labels 0..K-1 and K names: from `label_name`, else the schema, else the numbers."""
    values = columns.get(label)
    if values is None:
        return [0] * count, ("picture",)
    if any(value is None for value in values):
        raise ValueError(f"{path}: row {values.index(None)} has no label; every row needs one")
    if all(isinstance(value, str) for value in values):
        texts = sorted(set(values))
        index = {name: number for number, name in enumerate(texts)}
        return [index[value] for value in values], tuple(texts)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"{path}: labels must be integers from 0 or strings, not {values[0]!r}, ...")
    class_names = [*schema_names]
    class_names += [str(number) for number in range(len(class_names), max(values) + 1)]
    for number, name in zip(values, columns.get("label_name", []), strict=False):
        if name is not None:
            class_names[number] = str(name)
    return list(values), tuple(class_names)
