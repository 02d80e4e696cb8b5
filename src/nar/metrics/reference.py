"""Statistics of real pictures as ADM's npz files hold them: written, recognised and read.

It knows that format and which network made a file; it does not know what is compared with it.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nar.metrics.defects import Defect
from nar.metrics.detectors import Detector, default_detector
from nar.metrics.features import FeatureSet, Reading, Reservoir, gather, gaussians, save
from nar.metrics.frechet import Statistics
from nar.metrics.pictures import Opened, Source, opened
from nar.storage.arrays import array_names, read_arrays
from nar.storage.fields import Seed, Size, checked

ENOUGH = 10_000  # pictures from which on a Frechet distance is worth reading


@checked
def write_reference(
    path: str | Path,
    pictures: Source,
    *,
    inception: str | Path | None = None,
    detector: Detector | None = None,
    size: Size | None = None,
    num_pictures: Size = 10_000,
    seed: Seed = 0,
    batch_size: Size = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Write the statistics of all pictures, and `num_pictures` of them at random, in the npz format of ADM.

    Beside ADM's `mu`, `sigma`, `mu_s`, `sigma_s` and `arr_0` the file says which network made it and of how many
    pictures, so that reading it with another network is refused.
    """
    detector = default_detector(inception, device) if detector is None else detector
    kept = Reservoir(num_pictures, seed)

    def watch(images: np.ndarray, _: int) -> np.ndarray:
        kept.add(images)
        return images

    reading = Reading(size, None, 2, seed, batch_size, progress)
    watching = Defect("none", "", watch)
    found = gather(opened(pictures, size=size), detector, reading, name="reference", defect=watching)
    _check_determined(found.num_images, detector, "these pictures")
    made_by = {"network": detector.digest, "num_images": found.num_images}
    save(Path(path).expanduser(), {**gaussians(found), "arr_0": np.stack(kept.items), **made_by})


def is_reference(source: Source) -> bool:
    """Whether a source is a file of statistics."""
    if not isinstance(source, str | Path) or not (path := Path(source).expanduser()).is_file() or path.suffix != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return "mu.npy" in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def reference_pictures(path: str | Path) -> Opened:
    """The pictures that came with statistics as `arr_0`, maybe none."""
    return opened(path) if "arr_0" in array_names(Path(path).expanduser()) else []


def read_reference(path: str | Path, detector: Detector, gather: Callable[[Opened, str], FeatureSet]) -> FeatureSet:
    """Statistics as ADM stores them; the rest is what `gather` makes of `arr_0`, where that is in the file."""
    path = Path(path).expanduser()
    arrays = read_arrays(path, ("mu", "sigma", "mu_s", "sigma_s", "network", "num_images"))
    for name in {"mu", "sigma", "mu_s", "sigma_s"} & arrays.keys():
        if arrays[name].dtype.kind not in "fiu" or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} must be finite numbers; copy it again")
    if (counted := arrays.get("num_images", np.array(0))).dtype.kind not in "iu" or counted.ndim:
        raise ValueError(f"{path}: num_images must be a whole number, not {str(counted)[:80]}")
    made_by = str(arrays.get("network", ""))
    if made_by and made_by != detector.digest:
        raise ValueError(
            f"{path} was made with another network (weights {made_by[:12]}..., here {detector.digest[:12]}...); "
            "give the same weights, or the reference's pictures in place of its statistics"
        )
    num_features = arrays["mu"].size
    shapes = arrays["mu"].shape, arrays.get("sigma", np.zeros(0)).shape
    if num_features != detector.num_features or shapes != ((num_features,), (num_features,) * 2):
        hint = "; give --inception FILE" if num_features == 2048 else ""
        makes = f"but {detector.label} makes {detector.num_features}: another network made it"
        raise ValueError(f"{path} has statistics of {num_features} features, {makes}{hint}")
    number = int(arrays.get("num_images", 0))
    _check_determined(number, detector, f"the pictures that {path} was made of")
    pooled = Statistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64), number)
    spatial = Statistics(arrays["mu_s"], arrays["sigma_s"], number) if "mu_s" in arrays else None
    if source := reference_pictures(path):
        return dataclasses.replace(gather(source, "reference"), num_images=number, pooled=pooled, spatial=spatial)
    return FeatureSet(number, None, pooled, torch.zeros(0, num_features), np.zeros(0, np.int64), spatial=spatial)


def _check_determined(num_images: int, detector: Detector, what: str) -> None:
    if 0 < num_images <= (features := detector.num_features):
        needed = f"statistics of {features} features need at least {features + 1}, {ENOUGH:,} are recommended"
        raise ValueError(f"{what} are {num_images}: {needed}; judge against the pictures themselves")
