"""Pictures, labels and captions from what people have: folders, parquet, webdataset tars, the hub, Fashion-MNIST.

Knows how a source is named and which of its splits is wanted; does not know models, codes or training.
Dimensions: N pictures, size x size pixels, 3 channels.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nar.data.builtin import FASHION_MNIST, TOY, draw_toy, find_fashion_mnist, idx_file, of_arrays, read_idx
from nar.data.clips import ClipSource, open_list
from nar.data.source import BROKEN, SUFFIXES, Pictures, Source, check_broken
from nar.data.tables import as_clips, check_columns, open_array, open_hub, open_listed, open_parquet, open_tars
from nar.media.video import SUFFIXES as CLIP_SUFFIXES
from nar.media.video import Windows

SAMPLES = "samples.json"  # of `nar sample`: which file shows what
_FOLDERS = {"train": ("train",), "t10k": ("t10k", "test"), "test": ("test", "t10k")}


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
      beside each picture, in a `metadata.jsonl` (`file_name` and `caption`, `text` or `prompt`, maybe `label`), or in
      the `samples.json` of `nar sample`;
    - a parquet file, or a folder of them, with the columns `image` and maybe `label`, `label_name`, `caption`, `tags`
      and `style` (which jsonl and json may have too); clips are in the column `strip`, their square frames stacked in
      one picture, or in `video`;
    - an `.npz` file with `arr_0` (N, H, W, 3) uint8 and maybe `labels` or `arr_1`, and `names`, which are captions;
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
    if split not in _FOLDERS:
        raise ValueError(f"split {split!r} is not one of {', '.join(_FOLDERS)}")
    if windows is not None:
        found = _open_clips(source, split, label, group, windows)
        clips = found if isinstance(found, ClipSource) else as_clips(found)
        return dataclasses.replace(clips, windows=windows).unrolled()
    path = Path(source).expanduser()
    if str(source) == TOY and not path.exists():
        check_columns(source, label, group)
        return of_arrays(draw_toy(size, split))
    if str(source) == FASHION_MNIST and not path.exists():
        path = find_fashion_mnist()
    if path.is_file():
        if path.suffix not in (".parquet", ".tar", ".npz"):
            raise ValueError(f"{path} is a file; allowed are a .parquet, .tar or .npz file or a folder with pictures")
        _only_train(path, split)
        if path.suffix == ".npz":
            return open_array(path, label, group)
        return (open_parquet if path.suffix == ".parquet" else open_tars)([path], label, group)
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.is_dir():
            return open_hub(str(source), split, label, group)
        raise FileNotFoundError(
            f"{path} does not exist; give a folder, a .parquet or .tar file, a hub id, or the word {FASHION_MNIST!r}"
        )
    if any(idx_file(path, f"{prefix}-images-idx3-ubyte") for prefix in ("train", "t10k")):
        check_columns(path, label, group)
        return of_arrays(read_idx(path, split, size))
    for name in _FOLDERS[split]:
        if tables := sorted([*path.glob(f"{name}.parquet"), *path.glob(f"{name}-*.parquet")]):
            return open_parquet(tables, label, group)
        if (path / name).is_dir():
            return _open_folder(path / name, label, group)
    _only_split(path, split)
    return _open_folder(path, label, group)


def _open_clips(source: str | Path, split: str, label: str, group: str, windows: Windows) -> Source:
    lists = [Path(part).expanduser() for part in str(source).split("+")]
    if all(path.suffix == ".csv" and path.is_file() for path in lists):
        _only_train(lists[0], split)
        check_columns(source, label, group)
        return open_list(lists, windows)
    path = Path(source).expanduser()
    if path.is_file():
        _only_train(path, split)
        if path.suffix not in (".parquet", ".tar"):
            raise ValueError(f"{path} is a file; allowed are a .parquet, .tar or .csv file or a folder with clips")
        if path.suffix == ".parquet":
            return open_parquet([path], label, group)
        return open_tars([path], label, group, clips=True)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder, or a .parquet, .tar or .csv file of clips")
    for name in (*_FOLDERS[split], "val") if split != "train" else _FOLDERS[split]:
        if tables := sorted([*path.glob(f"{name}.parquet"), *path.glob(f"{name}-*.parquet")]):
            return open_parquet(tables, label, group)
        if lists := sorted(path.glob(f"*{name}.csv")):
            check_columns(path, label, group)
            return open_list(lists, windows)
        if (path / name).is_dir():
            return _open_folder(path / name, label, group, clips=True)
    _only_split(path, split)
    return _open_folder(path, label, group, clips=True)


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


def _open_folder(folder: Path, label: str, group: str, *, clips: bool = False) -> Source:
    word, suffixes = ("clip", CLIP_SUFFIXES) if clips else ("picture", SUFFIXES)
    if found := sorted(folder.glob("*.tar")):
        return open_tars(found, label, group, clips=clips)
    if found := sorted(folder.glob("*.parquet")):
        return open_parquet(found, label, group)
    if (folder / "metadata.jsonl").is_file():
        return open_listed(folder, label, group)
    check_columns(folder, label, group)
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
    captions = [text.read_text(encoding="utf-8").strip() if text.is_file() else "" for text in texts]
    if not any(captions) and (folder / SAMPLES).is_file():
        records = json.loads((folder / SAMPLES).read_text(encoding="utf-8"))
        prompts = {record["file"]: record.get("prompt", "") for record in records}
        captions = [prompts.get(path.name, "") for path in paths]
    return Source(
        [str(path.relative_to(folder)) for path in paths],
        np.array(labels),
        tuple(name for name, _ in classes),
        lambda index: paths[index],
        captions if any(captions) or any(text.is_file() for text in texts) else None,
    )


def _files_in(paths: Iterable[Path], suffixes: frozenset[str]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _only_split(path: Path, split: str) -> None:
    """Refuse a folder whose split is missing, or that has none and is asked for another than "train"."""
    if (path / "train").is_dir() or (path / "train.parquet").is_file() or any(path.glob("*train.csv")):
        raise FileNotFoundError(f"{path} has a train split but no {split!r}; add {path / 'test'}")
    _only_train(path, split)


def _only_train(path: Path, split: str) -> None:
    if split != "train":
        raise FileNotFoundError(f"{path} has no split {split!r}, only 'train'; a folder may hold train/ and test/")
