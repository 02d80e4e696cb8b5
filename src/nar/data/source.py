"""What a source is: pictures in memory, and random access to encoded ones with their labels, words and groups.

Knows how a picture is decoded and cropped; does not know where it lies. Dimensions: N pictures, size x size pixels.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

from nar.media.crops import centre_crop, random_crop, to_rgb, views

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
BROKEN_SHARE = 0.01  # more broken pictures than this share are an error, fewer a warning
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
        self, index: int, size: int, draws: Mapping[str, float] | None = None, *, crop: bool = False
    ) -> np.ndarray:
        """Decode picture `index` to its centre (size, size, 3) uint8; raises one of `BROKEN` when it can't be.

        With `crop`, to the square that `draws`, numbers in [0, 1) by name, pick instead (see `random_crop`).
        """
        picture = self.picture(index)
        return np.asarray(random_crop(picture, size, draws) if crop and draws else centre_crop(picture, size))

    def views(self, index: int, size: int, kind: str) -> np.ndarray:
        """The views (v, size, size, 3) uint8 of picture `index`, see `nar.media.crops.views`."""
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


def check_broken(broken: Sequence[str], count: int) -> None:
    """Warn of `broken` pictures among `count`; raises ValueError when they are more than BROKEN_SHARE."""
    if not broken:
        return
    shown = f"{'; '.join(broken[:3])}{f'; and {len(broken) - 3} more' if len(broken) > 3 else ''}"
    message = f"{len(broken)} of {count} pictures cannot be read: {shown}"
    if len(broken) > BROKEN_SHARE * count:
        raise ValueError(f"{message}; at most {BROKEN_SHARE:.0%} may be broken, remove or repair them")
    warnings.warn(f"{message}; they are skipped", stacklevel=2)
