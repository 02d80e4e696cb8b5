"""What a detector makes of one set of pictures, in one pass, kept on disk by everything that changes it.

Pictures stream through in batches; what is kept is a Gaussian and a bounded number of feature rows. It does not know
other sets, nor what numbers are made of two. Dimensions: N pictures, n kept rows, D features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar.metrics.defects import Defect
from nar.metrics.detectors import Detector
from nar.metrics.frechet import RunningStatistics, Statistics, feature_statistics, score_of_splits, split_score
from nar.metrics.pictures import Opened, batches, count, fingerprint
from nar.progress import Progress
from nar.storage.arrays import read_arrays
from nar.storage.files import atomically

SPLIT = 5000  # of the Inception Score
SPATIAL_ROWS = 10_000  # rows of spatial features that are kept: 80 MB, for the interval and the floor of sFID
_CACHE_FORMAT = 7
_GROUP, _CLIP_GROUP = 64, 8  # pictures, clips that a defect changes together


@dataclass(frozen=True)
class FeatureSet:
    """All that is known of one set of pictures.

    `rows` (n, D) float32 are the features of at most `keep` pictures, drawn at random, `indices` (n,) their places in
    the source; `spatial_rows` and `spatial_indices` the same of at most SPATIAL_ROWS. `score` is the Inception Score,
    `score_influence` (N,) how each picture moves it, see `score_of_splits`. `motion` (n,) is, of clips, the mean
    absolute difference of neighbouring frames, in levels of 0..255. `broken` could not be
    decoded, and are in no number.
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
    broken: tuple[str, ...] = ()
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


@dataclass(frozen=True)
class Reading:
    """How pictures are read (see `nar.metrics.pictures.batches`), and how many rows of features are kept of them."""

    size: int | None
    num_frames: int | None
    keep: int
    seed: int
    batch_size: int
    progress: bool = True
    cache: Path | None = None


def gather(
    source: Opened,
    detector: Detector,
    reading: Reading,
    *,
    name: str,
    only: np.ndarray | None = None,
    defect: Defect | None = None,
) -> FeatureSet:
    """Send a source's pictures, or `only` those at some places, through the detector, or take it from the cache."""
    path = None
    if reading.cache is not None and (key := fingerprint(source)) is not None:
        some = "" if only is None else hashlib.sha256(only.tobytes()).hexdigest()
        parts = [_CACHE_FORMAT, key, detector.label, detector.digest, *astuple(reading)[:5], some]
        text = json.dumps([*parts, "" if defect is None else defect.digest])
        path = reading.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
        if path.is_file():
            return _read_features(path)
    broken, rows = list[str](), list[int]()
    stream = batches(
        source, reading.batch_size, size=reading.size, num_frames=reading.num_frames, broken=broken, rows=rows
    )
    if only is not None:
        stream = batches(_at(stream, rows, only), reading.batch_size)
    if defect is not None:
        group = _CLIP_GROUP if getattr(detector, "clips", False) else _GROUP
        stream = _changed(stream, defect, group, reading.batch_size)
    total = count(source, reading.num_frames) if only is None else len(only)
    found = _Found(detector, reading)
    with Progress(name, total, "pictures", quiet=not reading.progress) as bar:
        for images in stream:
            found.add(images)
            bar.update(len(images))
    number = found.pooled.count
    if number < 2:
        cut = "" if reading.num_frames is None else f" of {reading.num_frames} frames"
        raise ValueError(f"the {name} source has {number} pictures{cut}; at least 2 are needed for a covariance")
    if only is not None and only[-1] >= len(rows) + len(broken):
        raise ValueError(f"place {only[-1]} was asked for, but the {name} source has fewer pictures")
    result = found.result(np.array(rows) if only is None else np.intersect1d(rows, only), tuple(broken))
    if path is not None:
        _write_features(path, result)
    return result


def _at(stream: Iterable[np.ndarray], rows: list[int], places: np.ndarray) -> Iterator[np.ndarray]:
    """Of a stream of batches the pictures at these places; `rows` are those of what was read so far."""
    for images in stream:
        yield images[np.isin(rows[-len(images) :], places)]


def _changed(stream: Iterable[np.ndarray], defect: Defect, group: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches with a defect, which is put into `group` pictures at a time: what they exchange must not depend on how
    many are judged at once, and one alone has nobody to exchange with."""
    pictures, first = itertools.chain.from_iterable(stream), 0
    some = list(itertools.islice(pictures, group))
    while some:
        following = list(itertools.islice(pictures, group))
        if len(following) == 1:
            some, following = some + following, []
        images = defect.change(np.stack(some), first)
        yield from (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        some, first = following, first + len(some)


class _Found:
    """What was found in a stream of pictures so far."""

    def __init__(self, detector: Detector, reading: Reading) -> None:
        self.detector = detector
        self.pooled, self.spatial = RunningStatistics(), RunningStatistics()
        self.rows = Reservoir(reading.keep, reading.seed)
        self.spatial_rows = Reservoir(min(reading.keep, SPATIAL_ROWS), reading.seed)
        self.probabilities: list[Tensor] = []  # of the pictures after the last whole split
        self.splits: list[tuple[float, np.ndarray]] = []
        self.motion: list[np.ndarray] = []
        self.pixels = hashlib.sha256()
        self.size: tuple[int, ...] | None = None

    def add(self, images: np.ndarray) -> None:
        """Judge a batch of uint8 pictures (B, H, W, 3) or clips (B, T, H, W, 3)."""
        images, self.size = np.ascontiguousarray(images), images.shape[1:-1]
        self.pixels.update(images.data)
        with torch.inference_mode():
            found = self.detector(torch.from_numpy(images).movedim(-1, 1))
        made, wanted = tuple(found.pooled.shape), (len(images), self.detector.num_features)
        if made != wanted:
            raise ValueError(f"the detector made {made} features of {len(images)} pictures; {wanted} were expected")
        self.pooled.add(found.pooled)
        self.rows.add(found.pooled.float().cpu().numpy())
        if images.ndim == 5:
            self.motion.append(np.abs(np.diff(images.astype(np.int16), axis=1)).mean((1, 2, 3, 4)))
        if found.spatial is not None:
            self.spatial.add(found.spatial)
            self.spatial_rows.add(found.spatial.float().cpu().numpy())
        if found.probabilities is not None:
            self.probabilities.extend(found.probabilities.cpu().split(1))
            while len(self.probabilities) >= SPLIT:
                self._finish_split()

    def _finish_split(self) -> None:
        self.splits.append(split_score(torch.cat(self.probabilities[:SPLIT])))
        del self.probabilities[:SPLIT]

    def result(self, places: np.ndarray, broken: tuple[str, ...]) -> FeatureSet:
        """All of it; `places` are those of the pictures in the source."""
        if self.probabilities:
            self._finish_split()
        score, influence = score_of_splits(self.splits) if self.splits else (None, None)
        has_spatial = self.spatial.count > 0
        return FeatureSet(
            num_images=self.pooled.count,
            size=self.size,
            pooled=self.pooled.result(ddof=self.detector.ddof),
            rows=torch.from_numpy(np.stack(self.rows.items)),
            indices=places[self.rows.indices],
            pixels_sha256=self.pixels.hexdigest(),
            spatial=self.spatial.result() if has_spatial else None,
            spatial_rows=torch.from_numpy(np.stack(self.spatial_rows.items)) if has_spatial else None,
            spatial_indices=places[self.spatial_rows.indices] if has_spatial else None,
            score=score,
            score_influence=influence,
            motion=np.concatenate(self.motion)[self.rows.indices] if self.motion else None,
            ddof=self.detector.ddof,
            broken=broken,
        )


class Reservoir:
    """At most `capacity` items of a stream, every one with the same chance; all of them, in order, while they fit."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.items: list[np.ndarray] = []
        self.indices: list[int] = []
        self._seen = 0
        self._generator = np.random.default_rng(seed)

    def add(self, items: np.ndarray) -> None:
        for item in items:
            full = len(self.items) == self.capacity
            place = int(self._generator.integers(self._seen + 1)) if full else len(self.items)
            if place < self.capacity:
                self.items[place : place + 1] = [item.copy()]  # a view would keep the whole batch alive
                self.indices[place : place + 1] = [self._seen]
            self._seen += 1


def save(path: Path, values: dict[str, Any]) -> None:
    """Write an npz file whole or not at all; what is None is left out."""
    arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}

    def write(staged: Path) -> None:
        with staged.open("wb") as file:  # a name without .npz stays as it is
            np.savez(file, allow_pickle=False, **arrays)

    atomically(path, write)


def gaussians(found: FeatureSet) -> dict[str, np.ndarray]:
    """The statistics of a set under the names that ADM's files have for them."""
    arrays = {"mu": found.pooled.mean, "sigma": found.pooled.covariance}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    return arrays


def _write_features(path: Path, found: FeatureSet) -> None:
    names = {part.name for part in fields(found)} - {"pooled", "spatial", "cached"}
    save(path, {name: getattr(found, name) for name in sorted(names)} | gaussians(found))


def _read_features(path: Path) -> FeatureSet:
    values: dict[str, Any] = {name: array if array.ndim else array.item() for name, array in read_arrays(path).items()}
    for name in ("size", "broken"):
        values[name] = tuple(values[name].tolist())
    for name in {"rows", "spatial_rows"} & values.keys():
        values[name] = torch.from_numpy(values[name])
    for name, mark in (("pooled", ""), ("spatial", "_s")):
        if f"mu{mark}" in values:
            values[name] = Statistics(values.pop(f"mu{mark}"), values.pop(f"sigma{mark}"), values["num_images"])
    return FeatureSet(**values, cached=True)
