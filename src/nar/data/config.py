"""What a recipe says of its data, and the two parts that a training needs: to learn from, and held out.

Knows keys and what they ask for; does not know how a source is read.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from nar.data.open import open_source
from nar.data.source import BROKEN_POLICIES, Source
from nar.data.split import families, held_out
from nar.data.wording import WORDINGS
from nar.media.crops import VIEWS
from nar.media.video import Windows
from nar.storage.fields import Length, OneOf, Range, Size, check

TEXT_FEATURES = ("cached", "on-the-fly")
SKIN_TONES = r"(?i)-1F3F[B-F]\b"  # in code points such as 1F44B-1F3FB


@dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    Attributes:
        source: pictures, see `nar.data.open.open_source`.
        size: pixels a side.
        validation: the split that is held out: "val" or "test", either of which stands for the other where one is
            missing. "auto" takes the source's own test or val split, or else holds out `heldout_share` of the pictures.
        heldout_share: of pictures, or groups, that are held out where there is no split for it, by a hash of their
            names: files, or numbers of rows, which are others when rows are added before them.
        label, group: columns of tables; samples of one group are held out together.
        group_without: a regular expression; what it finds in a group does not count. For emoji, of which drawings that
            differ in skin tone are one thing: SKIN_TONES.
        views: of each picture that a model learns codes of: "centre", "flip", "shift" (moved a little in eight
            directions) or "ten-crop"; of clips that are loops also "loop", eight starts and their mirror images.
        broken: what is done with pictures that can't be decoded: "skip" them, up to 1 %, or "refuse".
        augment: what a tokenizer sees of a picture: its centre ("none"), mirrored half of the time ("flip"), or a
            random crop, mirrored half of the time ("crop"). "loop" is for clips that are loops: mirrored, started
            anywhere and played backwards half of the time.
        shift: pixels by which "flip" and "loop" also move a picture or clip at most, its edges repeated.
        num_frames: of a clip; 0 for pictures, or all frames of clips in tables.
        stride, frame_rate, windows: which frames of a clip are taken, see `nar.media.video.Windows`; "random" places
            are new in each step. Strips in tables are taken whole; of them the rate says how the model's clips play.
        wording: what a model with a text encoder reads: the captions ("plain"), or several forms of each, made of
            caption, tags and style ("varied", see `nar.data.wording`).
        heldout_pairs: groups of which one style each is held out, besides the groups that are held out as a whole.
        heldout_styles: styles that are held out whole, for measuring what a model makes of drawings like none it saw.
        text_features: "cached" on disk once, or made "on-the-fly" in each step, where they would be too large.
        composed, num_composed: share of the samples that are composed scenes ("three cats", "a red car left of a
            house") of the drawings that are learned from, see `nar.metrics.geneval.scenes`, and how many there are.
        codes, heldout_codes: folders that `nar extract` has made, in place of `source`; without the second, part of
            the first is held out.
    """

    source: str = ""
    size: Size = 256
    validation: str = "auto"
    heldout_share: Annotated[float, Range(above=0, below=1)] = 0.05
    label: str = "label"
    group: str = ""
    group_without: str = ""
    broken: Annotated[str, OneOf(*BROKEN_POLICIES)] = "skip"
    views: Annotated[str, OneOf(*VIEWS)] = "centre"
    augment: Annotated[str, OneOf("none", "flip", "crop", "loop")] = "none"
    shift: Length = 0
    num_frames: int = 0
    stride: int = 1
    frame_rate: float = 0.0
    windows: str = "centre"
    wording: Annotated[str, OneOf(*WORDINGS)] = "plain"
    heldout_pairs: Length = 0
    heldout_styles: tuple[str, ...] = ()
    text_features: Annotated[str, OneOf(*TEXT_FEATURES)] = "cached"
    composed: Annotated[float, Range(0, below=1)] = 0.0
    num_composed: Size = 4000
    codes: str = ""
    heldout_codes: str = ""

    def __post_init__(self) -> None:
        check(self, "data.")
        if self.shift and (self.augment not in ("flip", "loop") or self.shift >= self.size):
            raise ValueError(
                f"data.shift {self.shift} must be from 0 to {self.size - 1} (data.size), and 0 unless data.augment is "
                "flip or loop"
            )
        try:
            re.compile(self.group_without)
        except re.error as error:
            raise ValueError(f"data.group_without {self.group_without!r} is no regular expression: {error}") from error
        _ = self.clip_windows  # for its checks

    @property
    def clip_windows(self) -> Windows | None:
        """Which frames of clips are taken; None for pictures, and for clips in tables that are taken whole."""
        windows = Windows(self.num_frames, self.stride, self.frame_rate, self.windows)
        return windows if self.num_frames else None

    def open(self) -> tuple[Source, Source]:
        """The pictures to learn from, and those held out."""
        if not self.source:
            raise ValueError("this recipe needs pictures: data.source=FOLDER (or a .parquet or .tar file, or a hub id)")
        train, split = self.part(), "test" if self.validation == "auto" else self.validation
        try:
            heldout = self.part(split)
            used = ("train", split if split in heldout.splits else next(iter({*heldout.splits} - {"train"}), ""))
            if unused := [name for name in heldout.splits if name not in used]:
                warnings.warn(
                    f"the split {unused[0]} is not used: {used[1]} is held out; data.validation={unused[0]} takes it",
                    stacklevel=2,
                )
            return train, heldout
        except FileNotFoundError:
            if self.validation != "auto":
                raise
        if len(train) < 2:
            raise ValueError(f"{self.source} has {len(train)} pictures; at least two are needed, one to be held out")
        out = held_out(train.groups or train.names, self.heldout_share)
        return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))

    def part(self, split: str = "train") -> Source:
        """The pictures of one split, with their groups as they count."""
        asked = {name: getattr(self, name) for name in ("size", "label", "group", "broken")}
        source = open_source(self.source, split=split, windows=self.clip_windows, **asked)
        if not self.group_without:
            return source
        return dataclasses.replace(source, groups=families(source.groups, self.group_without))


def recorded(data: dict[str, Any]) -> dict[str, Any]:
    """The settings `data` of a run or model as they would be recorded now.

    Before there was `group_without`, skin tones did not count in a column named `hexcode`.
    """
    return {"group_without": SKIN_TONES if data.get("group") == "hexcode" else ""} | data
