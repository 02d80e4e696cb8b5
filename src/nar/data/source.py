"""What a source is: pictures in memory, and random access to encoded ones with their labels, words and groups.

Knows how a picture is decoded and cropped, and what was left out on the way; does not know where it lies. Dimensions:
N pictures, size x size pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from nar.media import pictures, video
from nar.media.crops import centre_crop, random_crop, views
from nar.storage.files import read_bytes

BROKEN_POLICIES = ("skip", "refuse")
BROKEN_SHARE = 0.01  # more broken pictures than this share are an error, fewer a warning
BROKEN = (OSError, ValueError)  # what decoding a broken picture raises
_MOST_CLASSES = 1_000_000  # that a model of an earlier version could have had
_SHOWN = 3  # names in a message
WORDS = ("groups", "captions", "tags", "styles", "rewordings")  # columns of a Source, maybe None


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a place: pictures or `clips`, and the columns of tables that hold their class and group."""

    label: str = "label"
    group: str = ""
    clips: bool = False

    @property
    def noun(self) -> str:
        """What one sample is."""
        return "clip" if self.clips else "picture"

    @property
    def endings(self) -> frozenset[str]:
        """The endings of its file."""
        return video.ENDINGS if self.clips else pictures.ENDINGS

    def check_columns(self, source: Path | str, known: Iterable[str] = ()) -> None:
        """Refuse a `label` or `group` that is none of the `known` columns; the default label may be missing."""
        for key, column, default in (("group", self.group, ""), ("label", self.label, "label")):
            if column not in ("", default, *known):
                has = ", ".join(sorted(known))
                fix = "name one of these" if has else "give a table with it (.parquet, .tar, metadata.jsonl)"
                raise ValueError(
                    f"{source} has no column {column!r} for {key}, it has {has or 'none'}; {fix}, or leave {key} out"
                )


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
    """Pictures that are decoded when asked for: `open(i)` gives a file, its bytes, or a picture.

    Attributes:
        names: of the pictures, for messages.
        labels: (N,) int64, indices of `class_names`.
        captions: None where there are none; "" for a picture without one.
        rewordings: further captions of each picture; one of all its captions is taken each time it is used.
        groups: what belongs together when a part is held out (the drawings of one thing, say), by default each picture
            for itself.
        tags, styles: further words on each picture; None where there are none.
        class_numbers: what the table calls each class, where labels are numbers; else empty.
        numbered: the classes have no names: their numbers are places among a model's classes.
        left_out: what lies in the place and is not read: the names of files by what they are.
        notes: what is odd about it and how it is taken, in sentences.
        splits: the parts that the place has, whichever was opened.
        broken: what is done with pictures that can't be decoded: "skip" them, up to BROKEN_SHARE, or "refuse" them.
        origin: what was opened: a path, a word or a hub id.
    """

    names: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    open: Callable[[int], Any]
    captions: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    tags: Sequence[Sequence[str]] | None = None
    styles: Sequence[str] | None = None
    rewordings: Sequence[Sequence[str]] | None = None
    class_numbers: tuple[int, ...] = ()
    numbered: bool = False
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    broken: str = "skip"
    origin: str = ""

    noun = "picture"  # what one sample is

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_classes(self) -> bool:
        """Whether the source says of what class its samples are."""
        return self.class_names != (self.noun,)

    def classes(self, class_names: Sequence[str] = ()) -> list[str | int]:
        """The class of every sample: its name, or its number where classes have no names.

        Classes that are called as the `class_names` of a model at their numbers are numbers too: two classes of
        ImageNet may have one name.

        Raises:
            ValueError: the source names no classes.
        """
        if not self.has_classes:
            raise ValueError(
                f"{self.origin or 'the source'} names no classes: needed are one folder a class, a column `label` or "
                "`label_name`, or an array `labels` or `arr_1` (N,)"
            )
        places = dict(enumerate(class_names))
        known = [places.get(number) for number in self.class_numbers] == [*self.class_names]
        named: Sequence[str | int] = self.class_numbers if self.numbered or known else self.class_names
        return [named[label] for label in self.labels]

    def picture(self, index: int) -> Image.Image:
        """Decode picture `index` to RGB; raises one of `BROKEN` when it can't be."""
        opened = self.open(index)
        return opened if isinstance(opened, Image.Image) else pictures.read_picture(opened)

    def array(
        self, index: int, size: int | None, draws: Mapping[str, float] | None = None, *, crop: bool = False
    ) -> np.ndarray:
        """Decode picture `index` to its centre (size, size, 3) uint8; raises one of `BROKEN` when it can't be.

        With `crop`, to the square that `draws`, numbers in [0, 1) by name, pick instead (see `random_crop`). None
        leaves its own size (H, W, 3).
        """
        picture = self.picture(index)
        if size is None:
            return np.asarray(picture)
        return np.asarray(random_crop(picture, size, draws) if crop and draws else centre_crop(picture, size))

    def views(self, index: int, size: int, kind: str) -> np.ndarray:
        """The views (v, size, size, 3) uint8 of picture `index`, see `nar.media.crops.views`."""
        return np.stack([np.asarray(view) for view in views(self.picture(index), size, kind)])

    def decoded(self, size: int | None, broken: list[str] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the row and `array` of samples that can be decoded; the others are added to `broken`, with reasons.

        Raises:
            ValueError: too many can't be, see `check_broken`.
        """
        broken = [] if broken is None else broken
        for row, name in enumerate(self.names):
            try:
                made = self.array(row, size)
            except BROKEN as error:
                broken.append(f"{name} ({error})")
                if self.too_many(len(broken)) and len(broken) > _SHOWN:
                    break
            else:
                yield row, made
        self.check_broken(broken)

    def take(self, rows: np.ndarray) -> Self:
        """The source with only these rows, in this order."""
        picked = [int(row) for row in rows]
        columns = {name: getattr(self, name) for name in ("names", *WORDS)}
        taken: dict[str, Any] = {name: [of[row] for row in picked] for name, of in columns.items() if of is not None}
        return dataclasses.replace(self, labels=self.labels[rows], open=lambda index: self.open(picked[index]), **taken)

    def as_before(self) -> list[Self]:
        """Give the same samples as earlier versions had them, for folders of codes that these began.

        Files were in the order of their text, and every number up to the largest made a class.
        """
        rows = sorted(range(len(self)), key=lambda row: (self.labels[row], Path(self.names[row]).parts))
        in_text = self.take(np.array(rows, np.int64)) if rows != list(range(len(self))) else None
        numbers = self.class_numbers
        if not numbers or max(numbers) > _MOST_CLASSES or numbers == tuple(range(len(numbers))):
            return [] if in_text is None else [in_text]
        named = dict(zip(numbers, self.class_names, strict=True))
        class_names = tuple(named.get(number, str(number)) for number in range(max(numbers) + 1))
        return [dataclasses.replace(self, labels=np.array(numbers, np.int64)[self.labels], class_names=class_names)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the contents of all samples, in their order; reads all files once."""
        state = hashlib.sha256()
        for index in range(len(self)):
            state.update(content_of(self.open(index)))
        return state.hexdigest()

    def counts(self) -> dict[str, Any]:
        """What a report says of the source: its name, how many samples and classes were read, and what was left out."""
        return {
            "name": Path(self.origin).name,
            f"num_{self.noun}s": len(self),
            "num_classes": len(self.class_names) if self.has_classes else 0,
            "left_out": {what: len(names) for what, names in self.left_out.items()},
        } | ({"notes": [*self.notes]} if self.notes else {})

    def left_out_text(self) -> str:
        """What was left out in one line; "" where nothing was."""
        return listed(self.left_out)

    def warn_left_out(self) -> None:
        """Warn of what was left out or is odd, if anything is, and of samples without words where there are words."""
        for text in filter(None, (self.left_out_text(), *self.notes)):
            warnings.warn(text, stacklevel=4)
        if blank := [name for name, text in zip(self.names, self.captions or (), strict=False) if not text]:
            warnings.warn(f"{len(blank)} of {len(self)} {self.noun}s have no caption ({some(blank)})", stacklevel=4)

    def too_many(self, broken: int) -> bool:
        """Whether so many broken samples end the work at once."""
        return broken > (BROKEN_SHARE * len(self) if self.broken == "skip" else 0)

    def check_broken(self, broken: Sequence[str]) -> None:
        """Warn of the `broken` samples, names with reasons.

        Raises:
            ValueError: they are more than BROKEN_SHARE, or the source refuses any.
        """
        if not broken:
            return
        message = f"{len(broken)} of {len(self)} {self.noun}s cannot be read: {some(broken, '; ')}"
        if self.broken == "refuse":
            raise ValueError(f"{message}; remove or repair them, or allow a few (broken: skip)")
        if self.too_many(len(broken)):
            raise ValueError(f"{message}; at most {BROKEN_SHARE:.0%} may be broken, remove or repair them")
        warnings.warn(f"{message}; they are skipped", stacklevel=4)


def listed(left_out: Mapping[str, Sequence[str]]) -> str:
    """Name what was left out: "3 files are left out: 2 .heic (a.heic, b.heic), 1 .txt without a picture (c.txt)"."""
    number = sum(map(len, left_out.values()))
    kinds = ", ".join(f"{len(names)} {what} ({some(names)})" for what, names in sorted(left_out.items()) if names)
    return f"{number} {'file is' if number == 1 else 'files are'} left out: {kinds}" if number else ""


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    rest = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + rest


def content_of(opened: Any, most: int = -1) -> bytes:
    """What tells one sample from another: the bytes of a file (the first `most` of them), of an array or a picture."""
    if isinstance(opened, Image.Image):
        return opened.tobytes()
    if isinstance(opened, np.ndarray):
        return np.ascontiguousarray(opened).tobytes()
    if isinstance(opened, io.BytesIO):
        return opened.getvalue()
    if isinstance(opened, Sequence) and not isinstance(opened, str):
        return b"".join(content_of(file, most) for file in opened)
    return read_bytes(Path(opened), most)
