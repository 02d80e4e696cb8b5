"""Sources of clips: which frames of each are taken, and the lists of UCF-101 and Kinetics-600.

Knows windows and lists; does not know how a file is decoded. Legend: `T` frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from nar.data.source import BROKEN, Source, some
from nar.media.crops import VIEWS, random_crop
from nar.media.video import Windows, read_clip, squared, timeline
from nar.storage.text import read_csv


@dataclass(frozen=True)
class ClipSource(Source):
    """Clips that are decoded when asked for: `open(i)` gives a file, its bytes, files of frames, an array, or a strip.

    A strip is a picture: square frames below or beside one another.

    Attributes:
        windows: what is taken of each clip.
        starts: where each row's window begins, for rows that are windows; None leaves that to `windows`.
        given: all frames after so many first ones are the last of these: what a tokenizer that needs whole clips reads
            of context frames; 0 is off.
        short: names of the clips that were found to have fewer frames than a window takes; reading fills it.
    """

    windows: Windows = field(default_factory=Windows)
    starts: Sequence[int] | None = None
    given: int = 0
    short: set[str] = field(default_factory=set, compare=False)

    noun = "clip"

    def array(
        self, index: int, size: int | None, draws: Mapping[str, float] | None = None, *, crop: bool = False
    ) -> np.ndarray:
        """Decode a window of clip `index` to (T, size, size, 3) uint8; None leaves its own size (T, H, W, 3).

        Of `draws`, numbers in [0, 1) by name, `window_start` picks the place of a "random" window; with `crop` others
        pick one square for all frames (see `random_crop`).
        """
        return self._still(self._window(index, size, draws, crop=crop))

    def _still(self, clips: np.ndarray) -> np.ndarray:
        """Clips ([v,] T, size, size, 3) that stop after the `given` frames."""
        return clips.take(np.arange(clips.shape[-4]).clip(max=self.given - 1), -4) if self.given else clips

    def _file(self, index: int) -> Any:
        opened = self.open(index)
        return unstacked(opened) if isinstance(opened, Image.Image) else opened

    def _window(
        self, index: int, size: int | None, draws: Mapping[str, float] | None = None, *, crop: bool
    ) -> np.ndarray:
        file, windows = self._file(index), self.windows
        count = len(timeline(file).rows(windows.frame_rate))
        if windows.is_short(count):
            self.short.add(self.names[index])
        place = 0.5 if draws is None else draws["window_start"]
        start = windows.drawn(count, place) if self.starts is None else self.starts[index]
        clip = read_clip(file, windows, start=start, size=0 if crop else size or 0)
        if crop and draws is not None and size is not None:
            clip = np.stack([np.asarray(random_crop(Image.fromarray(frame), size, draws)) for frame in clip])
        return clip if size is None else np.stack([squared(frame, size) for frame in clip])

    def views(self, index: int, size: int, kind: str) -> np.ndarray:
        """What codes are made of, (v, T, size, size, 3): the window, with "flip" and mirrored.

        With "loop" eight of these begin at eight places of the clip, which then must be a loop, as far apart as can be.
        """
        if kind not in ("centre", "flip", "loop"):
            raise ValueError(f"clips have the views centre, flip and loop, not {kind!r}")
        clip = self._window(index, size, crop=False)
        places = range(VIEWS["loop"] // 2) if kind == "loop" else range(1)
        starts = [np.roll(clip, -(place * len(clip) // len(places)), axis=0) for place in places]
        sides = [(start, start[:, :, ::-1]) if kind != "centre" else (start,) for start in starts]
        return self._still(np.stack([side for both in sides for side in both]))

    def unrolled(self) -> Self:
        """One row a window, when `windows` asks for all; windows of one clip are held out together.

        Looks into every file for its number of frames. Clips without a window are left out; those that can't be read
        keep a row, which is then found broken.
        """
        if self.windows.kind != "all":
            return self
        starts, rows, short = list[int](), list[int](), list[str]()
        for row, name in enumerate(self.names):
            try:
                count = len(timeline(self._file(row)).rows(self.windows.frame_rate))
            except BROKEN:
                found = [0]
            else:
                found = self.windows.starts(count)
                if self.windows.is_short(count):
                    short.append(name)
            starts += found
            rows += [row] * len(found)
        whole, length = self.windows.whole, self.windows.num_frames
        many = self.take(np.array(rows, np.int64))
        names = [f"{name} from frame {start}" for name, start in zip(many.names, starts, strict=True)]
        left_out = {**many.left_out} | ({f"of fewer than {length} frames": short} if whole and short else {})
        many = dataclasses.replace(
            many, names=names, groups=many.groups or many.names, starts=starts, left_out=left_out, short=set()
        )
        many.short.update([] if whole else short)
        return many

    def take(self, rows: np.ndarray) -> Self:
        """The source with only these rows, in this order."""
        starts = None if self.starts is None else [self.starts[int(row)] for row in rows]
        return dataclasses.replace(super().take(rows), starts=starts)

    def counts(self) -> dict[str, Any]:
        """What a report says of the source."""
        return super().counts() | ({"num_short": len(self.short)} if self.short else {})

    def short_clips(self) -> str:
        """Say in one line how many clips were found too short, if any were."""
        if not self.short:
            return ""
        asked = f"{len(self.short)} clips have fewer frames than the {self.windows.num_frames} asked for"
        return f"{asked}, and their last one is repeated: {some(sorted(self.short))}"


def unstacked(strip: Image.Image) -> np.ndarray:
    """The frames (T, side, side, 3) of a strip, which lie below or beside one another.

    Raises:
        ValueError: they are not whole squares.
    """
    side = min(strip.size)
    if max(strip.size) % side:
        raise ValueError(f"a strip of {strip.width}x{strip.height} pixels is not a whole number of square frames")
    pixels = np.asarray(strip.convert("RGB"))
    if strip.height >= strip.width:
        return pixels.reshape(-1, side, side, 3)
    return pixels.reshape(side, -1, side, 3).swapaxes(0, 1)


def open_list(paths: Sequence[Path]) -> ClipSource:
    """Clips named by csv files with the columns `path`, and maybe `label`, `action` and `caption`.

    This is the protocol of UCF-101 and Kinetics-600 as LARP's and NAR's trainers have it. Paths are relative to the
    list, to a folder above it, or else to the working directory; clips are named as the list writes them, so that the
    same are held out wherever it lies. In a list whose name begins with "ucf" the class is that of the file's name
    (v_<Action>_g01_c01.avi), and classes are numbered in the order of ASCII; in others by the column `label`, named by
    `action`. Without labels there is one class.

    Raises:
        ValueError: a list has no column `path`, no rows, or names classes in some rows only.
        FileNotFoundError: a clip is nowhere that its list may mean.
    """
    written, files, actions, numbers, captions = list[str](), list[Path](), list[str](), list[str](), list[str]()
    for path in paths:
        rows = read_csv(path)
        if not rows or "path" not in rows[0]:
            raise ValueError(f"{path} must be a csv file with a header that names `path`, and at least one row")
        for row in rows:
            written.append(row.get("path") or "")
            files.append(_found(path, written[-1]))
            of_name = files[-1].stem.split("_")[1:2] if path.stem.lower().startswith("ucf") else []
            actions.append(of_name[0] if of_name else (row.get("action") or ""))
            numbers.append("" if of_name else (row.get("label") or ""))
            captions.append(row.get("caption") or "")
    named = any(actions) or any(numbers)
    keys = [number or action for number, action in zip(numbers, actions, strict=True)]
    if named and not all(keys):
        raise ValueError(f"{paths[0]}: row {keys.index('') + 1} has no class, but others have; every row needs one")
    ordered = sorted(set(keys), key=lambda key: (0, int(key), key) if key.isdecimal() else (1, 0, key))
    names = dict(zip(keys, actions, strict=True))
    return ClipSource(
        written,
        np.array([ordered.index(key) for key in keys]),
        tuple(names[key] or key for key in ordered) if named else ("clip",),
        lambda index: files[index],
        captions if any(captions) else None,
    )


def _found(listing: Path, name: str) -> Path:
    for parent in (*listing.resolve().parents, Path()):
        if (parent / name).is_file():
            return parent / name
    raise FileNotFoundError(
        f"{listing} names the clip {name}, which is neither beside the list nor below a folder above it; "
        "write its path from the list's folder"
    )
