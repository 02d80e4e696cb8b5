"""The one door: every path that holds pictures or clips is opened here, whichever verb asks.

Knows how a source is named and which of its splits is wanted; does not know models, codes or training.
Dimensions: N pictures, size x size pixels, 3 channels.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np

from nar.data.builtin import FASHION_MNIST, TOY, draw_toy, find_fashion_mnist, idx_file, of_arrays, read_idx
from nar.data.clips import ClipSource
from nar.data.folders import allowed_files, open_files, open_split, splits_of
from nar.data.source import BROKEN_POLICIES, Pictures, Source, Wanted
from nar.data.tables import as_clips, open_hub
from nar.media.video import Windows
from nar.storage.fields import OneOf, Range, checked

MOST_PIXELS = 2**14  # a side
PictureSize = Annotated[int, Range(1, MOST_PIXELS)]
NAMED_SIZE = 32  # of what has no files, where none is asked for
# What is taken for a split, the first of these that is there.
_WANTED = {"train": ("train",), "test": ("test", "val"), "t10k": ("test", "val"), "val": ("val", "test")}
_HUB = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}  # what data sets there call them


@checked
def open_source(
    source: str | Path,
    *,
    size: PictureSize | None = None,
    split: Annotated[str, OneOf(*_WANTED)] = "train",
    whole: bool = False,
    label: str = "label",
    group: str = "",
    windows: Windows | None = None,
    broken: Annotated[str, OneOf(*BROKEN_POLICIES)] = "skip",
) -> Source:
    """Find the pictures of one split, without decoding them; with `windows`, which say what is taken of each, clips.

    `source` is one of
    - the word "toy" (2,048 drawn shapes, and 256 held out) or "fashion-mnist", or a folder with idx files (.gz or not);
    - a folder with one folder of pictures per class, or a flat folder (one class, "picture"). Captions are in a `.txt`,
      `.caption` or `.json` beside each picture, in a `metadata.jsonl`, `.csv` or `.json` (`file_name` and `caption`,
      `text` or `prompt`, maybe `label`), or in the `samples.json` of `nar sample`. Clips are video files, animations,
      and folders of stills, their frames in order;
    - a parquet file, or a folder of them, with the columns `image` and maybe `label`, `label_name`, `caption`, `tags`
      and `style` (which metadata may have too); clips are in the column `strip`, their square frames stacked in one
      picture, or in `video`. A caption may be a list of several wordings;
    - an `.npz` file with `arr_0` uint8 (N, H, W, 3), of clips (N, T, H, W, 3), and maybe `labels` or `arr_1`, and
      `names`, which are captions;
    - a webdataset `.tar`, or a folder of them (members `x.jpg` with `x.txt`, `x.json` or `x.cls`);
    - with `windows`, a list of clips as UCF-101 and Kinetics-600 come with: a .csv, several with "+" between, or a
      folder with `*train.csv` and `*test.csv` or `*val.csv` (see `nar.data.clips.open_list`);
    - a data set on the hub, such as `someone/pictures`.

    Pictures are what a viewer shows (see `nar.media.pictures.read_picture`), files are in natural order, hidden ones
    are no data, and what else is not read is said in one warning and kept in the source's `left_out`.

    Args:
        size: of idx pictures, which are padded with zeros to it, and of toy ones, by default 32.
        split: "train", "val" or "test" (also "t10k"); of "val" and "test" either stands for the other where one is
            missing. Folders may hold a folder, parquet files or tars a split; a source without splits is "train".
        whole: a source without splits is taken whole, whichever is asked for.
        label, group: name columns of tables, of which tars have those that are in each `x.json`.
        broken: what is done with pictures that can't be decoded: "skip" up to 1 %, or "refuse".

    Raises:
        FileNotFoundError: the source or the split does not exist.
        ValueError: the source holds no pictures or damaged files, or lacks the column that `label` or `group` names.
        ModuleNotFoundError: parquet without pyarrow, or the hub without datasets.
    """
    found = _open(source, size or NAMED_SIZE, split, Wanted(label, group, windows is not None), whole=whole)
    found = dataclasses.replace(found, broken=broken, origin=str(source))
    if windows is not None:
        clips = found if isinstance(found, ClipSource) else as_clips(found)
        found = dataclasses.replace(clips, windows=windows).unrolled()
        if not len(found):
            raise ValueError(f"{source} holds no clips of {windows.num_frames} frames; {found.left_out_text()}")
    found.warn_left_out()
    return found


@checked
def load_pictures(
    source: str | Path | Source, *, size: PictureSize, split: str = "train", whole: bool = False
) -> Pictures:
    """Decode all pictures of a source into memory, as `size` x `size` RGB; see `open_source` for what it may be.

    Pictures are centre-cropped and resized as in ADM, transparency becomes white. A few broken pictures are skipped
    with a warning, more than 1 % are an error.
    """
    if not isinstance(source, Source):
        source = open_source(source, size=size, split=split, whole=whole)
    images, good = np.empty((len(source), 0), np.uint8), list[int]()
    for row, made in source.decoded(size):
        if not good:
            images = np.empty((len(source), *made.shape), np.uint8)
        images[len(good)] = made
        good.append(row)
    if isinstance(source, ClipSource) and source.short_clips():
        warnings.warn(source.short_clips(), stacklevel=3)
    return Pictures(images[: len(good)], source.labels[good], source.class_names)


def _open(source: str | Path, size: int, split: str, wanted: Wanted, *, whole: bool) -> Source:
    path = Path(source).expanduser()
    own = (path / "run.lock").is_file()  # of the run that asks, as in `nar train toy run=toy`: no data
    if str(source) in (TOY, FASHION_MNIST) and (own or not path.exists()):
        wanted.check_columns(source)
        if str(source) == TOY:
            return of_arrays(draw_toy(size, split))
        path = find_fashion_mnist()
    if files := (_lists(source) if wanted.clips else []) or ([path] if path.is_file() else []):
        _check_unsplit(files[0], split, whole=whole)
        return open_files(files, wanted)
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.is_dir():
            return open_hub(str(source), [name for part in _WANTED[split] for name in _HUB[part]], wanted)
        raise FileNotFoundError(
            f"{path} does not exist; give a folder, {allowed_files(wanted)}, a hub id, or the word {FASHION_MNIST!r}"
        )
    if any(idx_file(path, f"{prefix}-images-idx3-ubyte") for prefix in ("train", "t10k")):
        wanted.check_columns(path)
        return of_arrays(read_idx(path, split, size))
    splits = splits_of(path, clips=wanted.clips)
    if not splits:
        _check_unsplit(path, split, whole=whole)
        return open_files([path], wanted)
    chosen = next((name for name in _WANTED[split] if name in splits), None)
    if chosen is None:
        has = " and ".join(splits)
        alone = next(iter(splits.values()))[0]
        fix = f"add {path / split}, ask for one it has, or give one alone, such as {alone}"
        raise FileNotFoundError(f"{path} has a {has} split but no {split!r}; {fix}")
    return open_split(path, splits, chosen, wanted)


def _lists(source: str | Path) -> list[Path]:
    """The lists of clips that a source names with "+" between; none where it is something else."""
    paths = [Path(part).expanduser() for part in str(source).split("+")]
    return paths if all(path.suffix == ".csv" and path.is_file() for path in paths) else []


def _check_unsplit(path: Path, split: str, *, whole: bool) -> None:
    if split != "train" and not whole:
        raise FileNotFoundError(f"{path} has no split {split!r}, only 'train'; a folder may hold train/ and test/")
