"""What a detector makes of one set of pictures, in one pass, kept on disk by everything that changes it.

Pictures stream through in batches; what is kept is a Gaussian and a bounded number of feature rows. It does not know
other sets, nor what numbers are made of two. Dimensions: N pictures, n kept rows, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
from nar.storage.files import atomically

SPLIT = 5000  # of the Inception Score
SPATIAL_ROWS = 10_000  # rows of spatial features that are kept: 80 MB, for the interval and the floor of sFID
_CACHE_FORMAT = 5


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


def gather(
    source: Opened,
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
    rows, spatial_rows = Reservoir(keep, seed), Reservoir(min(keep, SPATIAL_ROWS), seed)
    probabilities: list[Tensor] = []
    splits: list[tuple[float, np.ndarray]] = []
    motion: list[np.ndarray] = []
    pixels = hashlib.sha256()
    shape: tuple[int, ...] | None = None

    def finish_split() -> None:
        splits.append(split_score(torch.cat(probabilities[:SPLIT])))
        del probabilities[:SPLIT]

    broken: list[str] = []
    stream = batches(source, batch_size, size=size, num_frames=num_frames, broken=broken)
    if only is not None:
        stream = batches(_at(stream, only), batch_size)
    total = count(source, num_frames) if only is None else len(only)
    with Progress(name, total, "pictures", quiet=not progress) as bar:
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
                    finish_split()
            bar.update(len(images))
    if pooled.count < 2:
        cut = "" if num_frames is None else f" of {num_frames} frames"
        raise ValueError(f"the {name} source has {pooled.count} pictures{cut}; at least 2 are needed for a covariance")
    if probabilities:
        finish_split()
    score, influence = score_of_splits(splits) if splits else (None, None)
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
        score=score,
        score_influence=influence,
        motion=np.concatenate(motion)[rows.indices] if motion else None,
        ddof=detector.ddof,
        broken=tuple(broken),
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
            if len(self.items) < self.capacity:
                self.items.append(item.copy())  # a view would keep the whole batch alive
                self.indices.append(self._seen)
            else:
                place = int(self._generator.integers(self._seen + 1))
                if place < self.capacity:
                    self.items[place] = item.copy()
                    self.indices[place] = self._seen
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
    names = ("num_images", "ddof", "broken", "size", "rows", "indices", "spatial_rows", "spatial_indices", "score")
    values = {name: getattr(found, name) for name in (*names, "score_influence", "motion")}
    save(path, {**values, **gaussians(found), "pixels": found.pixels_sha256})


def _read_features(path: Path) -> FeatureSet:
    with np.load(path) as file:
        arrays = dict(file)
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
        broken=tuple(arrays["broken"].tolist()),
        cached=True,
    )
