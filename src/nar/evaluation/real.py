"""Real pictures as options name them: which part of a source is meant, and what its pictures and classes are.

Knows names, splits and where a source's test part lies; does not know what the pictures are compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nar.data.source import Pictures

BATCH, CLIP_BATCH = 64, 8  # pictures, clips that are judged at a time


def real_pictures(source: str, split: str, size: int | None) -> Any:
    """What `nar.metrics` reads is passed on as a path; what only `nar.data` knows is read here."""
    return [load_part(source, split, size or 32).images] if _is_named(source) else part_of(source, split)


def load_part(source: str, split: str, size: int) -> Pictures:
    """Pictures of one split in memory, with their labels; of a source without splits, all."""
    from nar.data.open import load_pictures

    try:
        return load_pictures(source, size=size, split=split)
    except FileNotFoundError:
        path = Path(source).expanduser()
        if split != "test" or not path.exists() or any(path.glob("train*")):
            raise
        return load_pictures(source, size=size)  # it has no splits, and "test" is what is asked for by default


def real_classes(source: str, split: str, num_frames: int | None) -> list[str]:
    """The class of every real picture, in the order in which they are read."""
    if _is_named(source):
        from nar.data.open import open_source

        found = open_source(source, size=28, split=split)
        return [found.class_names[label] for label in found.labels]
    from nar.metrics.pictures import classes

    return classes(part_of(source, split), num_frames)


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
