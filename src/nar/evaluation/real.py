"""Real pictures as options name them: which part of a source is meant, and what its pictures and classes are.

Knows names, splits and where a source's test part lies; does not know what the pictures are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nar.data.open import load_pictures, open_source
from nar.data.source import Pictures, Source
from nar.media.video import Windows

BATCH, CLIP_BATCH = 64, 8  # pictures, clips that are judged at a time


def open_part(source: str, split: str, size: int, *, windows: Windows | None = None, label: str = "label") -> Source:
    """Pictures, or with `windows` clips, of one split; of a source without splits, all."""
    opened = partial(open_source, source, size=size, windows=windows, label=label)
    try:
        return opened(split=split)
    except FileNotFoundError:
        path = Path(source).expanduser()
        if split != "test" or not path.exists() or any(path.glob("train*")):
            raise
        return opened()  # "test" is what is asked for by default


def load_part(source: str, split: str, size: int) -> Pictures:
    """The same in memory, with their labels."""
    return load_pictures(open_part(source, split, size), size=size)


def facts(name: str, opened: Source | Pictures) -> dict[str, Any]:
    """What a report says of a source that was read."""
    return {"name": Path(name).name, "num": len(opened), "classes": len(opened.class_names)}


def real_pictures(source: str, split: str, size: int | None) -> Any:
    """What `nar.metrics` reads is passed on as a path; what only `nar.data` knows is read here."""
    return [load_part(source, split, size or 32).images] if _is_named(source) else part_of(source, split)


def real_classes(
    source: str, split: str, num_frames: int | None, class_names: Sequence[str] = ()
) -> list[str] | list[int]:
    """The class of every real picture, in the order in which they are read: its name, or a number in an .npz.

    A set of these very `class_names` has numbers too: two classes of ImageNet may have one name.
    """
    if _is_named(source):
        opened = open_source(source, size=28, split=split)
        return [opened.class_names[label] for label in opened.labels]
    from nar.metrics.pictures import classes

    path = part_of(source, split)
    found = classes(path, num_frames)
    if path.suffix != ".npz" or not all(label.isdecimal() for label in found):
        return found
    with np.load(path) as file:
        names = file["class_names"].tolist() if "class_names" in file.files else []
    return (
        [int(label) for label in found] if names in ([], list(class_names)) else [names[int(label)] for label in found]
    )


def part_of(source: str, split: str) -> Path:
    """Of a folder that holds both a train and a test part, as folders or .parquet files, the one wanted."""
    path = Path(source).expanduser()
    for suffix in ("", ".parquet"):
        both = {name: path / f"{name}{suffix}" for name in ("train", "test")}
        if all(part.exists() for part in both.values()):
            if split not in both:
                raise ValueError(f"split {split!r} must be train or test")
            return both[split]
    return path


def _is_named(source: str) -> bool:
    """Whether `nar.data` makes or finds it: the words toy and fashion-mnist, or a folder with idx files."""
    from nar.data.builtin import FASHION_MNIST, TOY

    path = Path(source).expanduser()
    return (source in (TOY, FASHION_MNIST) and not path.exists()) or (path.is_dir() and any(path.glob("*-idx3-ubyte*")))
