"""Sources of clips: folders of files, strips in tables, and the lists of UCF-101 and Kinetics-600.

Knows where clips lie and which window of each is taken; does not know how a file is decoded. Legend: `T` frames.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from nar.data.source import Source
from nar.media.crops import VIEWS, random_crop
from nar.media.video import Windows, read_clip, squared, timeline


@dataclass(frozen=True)
class ClipSource(Source):
    """Clips that are decoded when asked for: `open(i)` gives a file, its bytes, or a picture.

    A picture is a strip: square frames stacked top to bottom. `starts` says where each row's window begins, for rows
    that are windows; None leaves that to `windows`. With `given`, all frames after so many first ones are the last of
    these: what a tokenizer that needs whole clips reads of given frames.
    """

    windows: Windows = field(default_factory=Windows)
    starts: Sequence[int] | None = None
    given: int = 0

    def array(
        self, index: int, size: int, draws: Mapping[str, float] | None = None, *, crop: bool = False
    ) -> np.ndarray:
        """Decode a window of clip `index` to (T, size, size, 3) uint8.

        Of `draws`, numbers in [0, 1) by name, `window_start` picks the place of a "random" window; with `crop` others
        pick one square for all frames (see `random_crop`).
        """
        return self._still(self._window(index, size, draws, crop=crop))

    def _still(self, clips: np.ndarray) -> np.ndarray:
        """Clips ([v,] T, size, size, 3) that stop after the `given` frames."""
        return clips.take(np.arange(clips.shape[-4]).clip(max=self.given - 1), -4) if self.given else clips

    def _window(self, index: int, size: int, draws: Mapping[str, float] | None = None, *, crop: bool) -> np.ndarray:
        opened, windows = self.open(index), self.windows
        strip = _strip(opened)
        shown = np.arange(len(strip)) if strip is not None else timeline(opened).rows(windows.frame_rate)
        if self.starts is not None:
            start = self.starts[index]
        else:
            start = windows.drawn(len(shown), 0.5 if draws is None else draws["window_start"])
        if strip is not None:
            clip = strip[windows.rows(len(strip), start)]
        else:
            clip = read_clip(
                opened, num_frames=windows.num_frames, start=start, stride=windows.stride,
                frame_rate=windows.frame_rate, size=0 if crop else size,
            )  # fmt: skip
        if crop and draws is not None:
            return np.stack([np.asarray(random_crop(Image.fromarray(frame), size, draws)) for frame in clip])
        return np.stack([squared(frame, size) for frame in clip])

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

        Looks into every file for its number of frames.
        """
        if self.windows.kind != "all":
            return self
        starts, rows = list[int](), list[int]()
        for row in range(len(self)):
            opened = self.open(row)
            strip = _strip(opened)
            count = len(strip) if strip is not None else len(timeline(opened).rows(self.windows.frame_rate))
            found = self.windows.starts(count)
            starts += found
            rows += [row] * len(found)
        many = self.take(np.array(rows))
        names = [f"{name} from frame {start}" for name, start in zip(many.names, starts, strict=True)]
        return dataclasses.replace(many, names=names, groups=many.groups or many.names, starts=starts)

    def take(self, rows: np.ndarray) -> Self:
        """The source with only these rows, in this order."""
        starts = None if self.starts is None else [self.starts[int(row)] for row in rows]
        return dataclasses.replace(super().take(rows), starts=starts)


def open_list(paths: Sequence[Path], windows: Windows) -> ClipSource:
    """Clips named by csv files with the columns `path`, and maybe `label`, `action` and `caption`.

    This is the protocol of UCF-101 and Kinetics-600 as LARP's and NAR's trainers have it. Paths are relative to the
    list, or to a folder above it. In a list whose name begins with "ucf" the class is that of the file's name
    (v_<Action>_g01_c01.avi), and classes are numbered in the order of ASCII; in others by the column `label`, named by
    `action`. Without labels there is one class.

    Raises:
        ValueError: a list has no column `path`, no rows, or names classes in some rows only.
        FileNotFoundError: a clip is nowhere that its list may mean.
    """
    files, actions, numbers, captions = list[Path](), list[str](), list[str](), list[str]()
    for path in paths:
        with path.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        if not rows or "path" not in rows[0]:
            raise ValueError(f"{path} must be a csv file with a header that names `path`, and at least one row")
        for row in rows:
            files.append(_found(path, row["path"]))
            of_name = files[-1].stem.split("_")[1:2] if path.stem.lower().startswith("ucf") else []
            actions.append(of_name[0] if of_name else (row.get("action") or ""))
            numbers.append("" if of_name else (row.get("label") or ""))
            captions.append(row.get("caption") or "")
    named = any(actions) or any(numbers)
    keys = [number or action for number, action in zip(numbers, actions, strict=True)]
    if named and not all(keys):
        raise ValueError(f"{paths[0]}: row {keys.index('') + 1} has no class, but others have; every row needs one")
    ordered = sorted(set(keys), key=lambda key: (0, int(key), "") if key.isdigit() else (1, 0, key))
    names = dict(zip(keys, actions, strict=True))
    return ClipSource(
        [str(file) for file in files],
        np.array([ordered.index(key) for key in keys]),
        tuple(names[key] or key for key in ordered) if named else ("clip",),
        lambda index: files[index],
        captions if any(captions) else None,
        windows=windows,
    )


def _found(listing: Path, name: str) -> Path:
    for parent in (Path(), *listing.resolve().parents):
        if (parent / name).is_file():
            return parent / name
    raise FileNotFoundError(
        f"{listing} names the clip {name}, which is neither beside the list nor below a folder above it"
    )


def _strip(opened: Any) -> np.ndarray | None:
    """The frames (T, side, side, 3) of a strip; None for a file."""
    if not isinstance(opened, Image.Image):
        return None
    side = opened.width
    if opened.height % side:
        raise ValueError(f"a strip of {opened.height}x{side} pixels is not a whole number of square frames")
    return np.asarray(opened.convert("RGB")).reshape(-1, side, side, 3)
