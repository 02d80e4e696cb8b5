"""Judge real, spoilt and one-sided sets of CIFAR-10 pictures: the metrics must order them as they should.

    python scripts/cifar_metrics.py --data FOLDER --json FILE --cache FOLDER

FOLDER holds train.parquet and test.parquet (columns `image`, `label`). The real side is 10,000 training pictures, 1,000
of each class. The other sides, 10,000 pictures each, are made of the test set: unchanged (the floor), with 5 % of the
8x8 patches exchanged between pictures, with Gaussian noise, blurred, without horses (whose places other training
pictures take), and 1,000 pictures ten times over. Features are kept in the cache: a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from nar.metrics import evaluate
from nar.metrics.defects import swap_patches
from nar.metrics.detectors import Detected, EfficientNetDetector
from nar.metrics.tables import metric_names

HORSE = 7
SAVED = 1000  # features written to the cache at once


class Remembering:
    """EfficientNet-Lite0 that looks at every picture once, although the sets share many, and after a restart too."""

    def __init__(self, cache: Path) -> None:
        self.detector = EfficientNetDetector()
        self.label, self.num_features = self.detector.label, self.detector.num_features
        self.digest, self.ddof, self.name = self.detector.digest, self.detector.ddof, self.detector.name
        self.cache = cache
        self.known: dict[bytes, Tensor] = {}
        self.unsaved: list[bytes] = []
        self.num_new, self.seconds = 0, 0.0
        cache.mkdir(parents=True, exist_ok=True)
        for path in cache.glob("*.npz"):
            with np.load(path) as file:
                keys, rows = file["keys"], torch.from_numpy(file["rows"])
            self.known |= {key.tobytes(): row for key, row in zip(keys, rows, strict=True)}

    def __call__(self, images: Tensor) -> Detected:
        keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if new:
            started = time.process_time()
            for index, row in zip(new, self.detector(images[new]).pooled, strict=True):
                self.known[keys[index]] = row.clone()
            self.seconds += time.process_time() - started
            self.num_new += len(new)
            self.unsaved += [keys[index] for index in new]
            if len(self.unsaved) >= SAVED:
                self.save()
        return Detected(torch.stack([self.known[key] for key in keys]))

    def save(self) -> None:
        """Write what was not written yet."""
        if not self.unsaved:
            return
        path = self.cache / f"{self.unsaved[0].hex()[:32]}.npz"
        rows = torch.stack([self.known[key] for key in self.unsaved]).numpy()
        staging = path.with_suffix(".tmp")
        with staging.open("wb") as file:
            np.savez(file, keys=np.frombuffer(b"".join(self.unsaved), np.uint8).reshape(-1, 32), rows=rows)
        staging.replace(path)
        self.unsaved = []


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All pictures (N, 32, 32, 3) and labels (N,)."""
    table = pq.read_table(path, columns=["image", "label"])
    cells = table.column("image").to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]
    return np.stack(images), table.column("label").to_numpy()


def balanced(labels: np.ndarray, per_class: int, start: int = 0, classes: range | list[int] = range(10)) -> np.ndarray:
    """Places of `per_class` pictures of every class, from the `start`-th on."""
    return np.concatenate([np.flatnonzero(labels == label)[start : start + per_class] for label in classes])


def sets(test: np.ndarray, labels: np.ndarray, spare: np.ndarray, scale: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every set by its name; `spare` are training pictures without horses that fill the horses' places."""
    generator = np.random.default_rng(0)
    yield "test set (floor)", test
    yield "5 % of patches exchanged", swap_patches(test, 0.05, 0)
    noise = generator.normal(0, 8, test.shape)
    yield "noised (sd 8 of 255)", (test + noise).round().clip(0, 255).astype(np.uint8)
    blur = ImageFilter.GaussianBlur(0.7)
    yield "blurred (Gaussian, 0.7 pixels)", np.stack([np.asarray(Image.fromarray(one).filter(blur)) for one in test])
    yield "no horses", np.concatenate([test[labels != HORSE], spare])
    yield "1/10 of the test set, ten times", np.repeat(test[balanced(labels, 100 // scale)], 10, axis=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--json", type=Path, required=True, help="the reports are written here")
    parser.add_argument("--scale", type=int, default=1, help="use this fraction of all sets, for a try")
    parser.add_argument("--cache", type=Path, required=True, help="folder where features are kept")
    arguments = parser.parse_args()
    scale = arguments.scale
    train, train_labels = read(arguments.data / "train.parquet")
    test, labels = read(arguments.data / "test.parquet")
    part = balanced(labels, 1000 // scale)
    test, labels = test[part], labels[part]
    real = train[balanced(train_labels, 1000 // scale)]
    others = [label for label in range(10) if label != HORSE]
    spare = train[balanced(train_labels, -(-1000 // scale // 9), 1000, others)][: 1000 // scale]
    detector, reports = Remembering(arguments.cache), {}
    for name, fake in sets(test, labels, spare, scale):
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = evaluate([real], [fake], detector=detector, calibration=0, progress=False)
        detector.save()
        reports[name] = report | {"seconds": time.monotonic() - started}
        if len(reports) == 1:
            print(f"| | {' | '.join(metric_names(report))} |\n|---|{'---|' * len(metric_names(report))}")
        cells = (f"{report[key]:.4g} ({low:.4g}..{high:.4g})" for key, (low, high) in report["interval"].items())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        facts = {
            "pictures": detector.num_new,
            "processor_seconds": detector.seconds,
            "threads": torch.get_num_threads(),
        }
        text = json.dumps({"detector": facts, "reports": reports}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(f"\n{detector.num_new} pictures in {detector.seconds:.0f} s of processor time", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
