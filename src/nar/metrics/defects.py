"""Known defects, put into real pictures or clips to show what they cost in a metric.

They change arrays of pixels; they do not know networks, metrics, or where pictures come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PATCHES = 8  # along a side: what `swap_patches` exchanges


@dataclass(frozen=True)
class Defect:
    """A known defect put into real pictures, for a row of the report that shows what it costs.

    `change` takes uint8 pictures (B, H, W, 3) or clips and the place of the first one, and returns as many. `digest`
    tells defects apart in the cache: it names everything that `change` depends on.
    """

    name: str
    digest: str
    change: Callable[[np.ndarray, int], np.ndarray]


def swapped_patches(share: float, seed: int) -> Defect:
    """The defect of `swap_patches`."""
    name = f"{100 * share:.3g} % of patches exchanged"
    return Defect(name, f"swapped {share} {seed}", lambda images, first: swap_patches(images, share, seed + first))


def swap_patches(images: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Exchange `share` of each picture's 8x8 patches with those of other pictures of the batch at the same place.

    Every picture chooses its own places; at each place the pictures that chose it pass their patch on in a circle. So
    all patches stay real and in place, and only their combination is wrong: what resampling single tokens does.
    """
    generator = np.random.default_rng(seed)
    num_images, (height, width) = len(images), images.shape[-3:-1]
    wanted = share * PATCHES * PATCHES
    num_swapped = np.floor(wanted + generator.random((num_images, 1)))  # right on average, whatever the share
    chosen = generator.random((num_images, PATCHES * PATCHES)).argsort(1).argsort(1) < num_swapped
    rows, columns = (np.linspace(0, length, PATCHES + 1).round().astype(int) for length in (height, width))
    swapped = images.copy()
    for place in range(PATCHES * PATCHES):
        takers = generator.permutation(np.flatnonzero(chosen[:, place]))
        # Where nobody else chose this place, any neighbour lends its patch.
        givers = (takers + 1) % num_images if len(takers) == 1 else np.roll(takers, 1)
        row, column = divmod(place, PATCHES)
        area = (..., slice(rows[row], rows[row + 1]), slice(columns[column], columns[column + 1]), slice(None))
        swapped[(takers, *area)] = images[(givers, *area)]
    return swapped


def motion_defects(seed: int) -> list[Defect]:
    """What is wrong with the motion of real clips whose frames come in random order, or whose first frame stays."""

    def shuffle(clips: np.ndarray, first: int) -> np.ndarray:
        return np.stack([np.random.default_rng((seed, first + i)).permutation(clip) for i, clip in enumerate(clips)])

    return [
        Defect("frames shuffled", f"shuffled {seed}", shuffle),
        Defect("first frame frozen", "frozen", lambda clips, _: np.repeat(clips[:, :1], clips.shape[1], axis=1)),
    ]
