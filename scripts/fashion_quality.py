"""Measure a class-conditional model of Fashion-MNIST: a Markdown table on the screen, all numbers as JSON.

    python scripts/fashion_quality.py --model fashion --data FOLDER

Draws 500 pictures of each of the ten classes, and reconstructs the 10,000 test pictures with the model's tokenizer. The
judge is a small classifier that the script trains itself on the 60,000 real training pictures.

What the rows mean, and why each has a companion made of real pictures:

- *Assigned to its class*: the share of pictures that the classifier puts into the class they were asked for. The
  classifier errs on real pictures too, so the same share of real and of reconstructed test pictures stands beside it.
- *Frechet distance*: between Gaussians fitted to the classifier's penultimate features, against all test pictures.
  The floor is real: as many training pictures as were generated (balanced over the classes; the mean of disjoint sets,
  with their range). The calibration is real too: of the first of these sets, 10 % or 20 % of the 64 patches of 4x4
  pixels of every picture are exchanged with the patches of randomly chosen other pictures at the same place.
  Reconstructions are paired with test pictures, so they may lie below the floor.
- *Coverage* (k = 5): the share of real balls that hold a generated picture. Its value for equal distributions depends
  on the numbers, 1 - (N / (N + M))^5 for N real and M generated pictures, so the real side is a random part of the test
  set as large as the generated one (0.97 at best); the value against the whole test set (0.87 at best for 5,000
  generated pictures) is in the JSON.
- *Near-copies*: the share of pictures that are closer to a training picture (Euclidean distance of the inner 28x28
  pixels) than 99 % of real test pictures are. It is 1 % for real test pictures by construction. Smooth pictures are
  closer to everything, so the share of reconstructed test pictures, which copy nothing, stands beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar import ClassCondition, Pipeline
from nar.data.open import load_pictures
from nar.data.source import Pictures
from nar.likelihood import token_losses
from nar.metrics.frechet import (
    Statistics,
    density_coverage,
    feature_statistics,
    frechet_distance,
    nearest,
)

SIZE = 32
PATCH = 4
NUM_CLASSES = 10
NUM_FEATURES = 128
NUM_FLOORS = 4
EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 256, 6e-3
REQUIRED_ACCURACY = 0.90
COPY_QUANTILE = 0.01
EVAL_BATCH = 500


class Classifier(nn.Module):
    """Grey pictures (B, 1, 32, 32) in 0..1 to logits (B, 10); `features` gives what the last layer reads (B, 128)."""

    def __init__(self) -> None:
        super().__init__()

        def stage(in_channels: int, out_channels: int) -> list[nn.Module]:
            convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)]

        self.body = nn.Sequential(
            *stage(1, 32), *stage(32, 64), *stage(64, 128), nn.Flatten(), nn.Linear(128 * 16, NUM_FEATURES), nn.ReLU()
        )
        self.last = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, grey: Tensor) -> Tensor:
        hidden: Tensor = self.body(grey)
        return hidden

    def forward(self, grey: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(grey))
        return logits


def to_grey(images: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) uint8 to (N, 1, 32, 32) in 0..1: the mean of the channels."""
    return torch.from_numpy(images).float().mean(-1)[:, None] / 255


@torch.no_grad()
def judge(classifier: Classifier, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return features (N, 128) and the most likely class (N,)."""
    features, classes = [], []
    for start in range(0, len(images), EVAL_BATCH):
        part = classifier.features(to_grey(images[start : start + EVAL_BATCH]))
        features.append(part)
        classes.append(classifier.last(part).argmax(1))
    return torch.cat(features), torch.cat(classes)


def train_classifier(train: Pictures, seed: int = 0) -> Classifier:
    """Train with a one-cycle learning rate and no augmentation; about two minutes on two cores."""
    torch.manual_seed(seed)
    classifier = Classifier()
    steps = len(train) // BATCH_SIZE * EPOCHS
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.02)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    labels = torch.from_numpy(train.labels)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(train))
        losses = []
        for index in order[: len(train) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(classifier(to_grey(train.images[index.numpy()])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.step()
            losses.append(loss.item())
        print(f"classifier: epoch {epoch + 1} of {EPOCHS}, loss {np.mean(losses):.3f}", file=sys.stderr, flush=True)
    return classifier.eval()


def cached_classifier(train: Pictures, test: Pictures, cache: Path) -> Classifier:
    """Load the classifier from `cache`, or train it and store it there.

    Raises:
        ValueError: it is right on less than 90 % of the test pictures and so cannot judge anything.
    """
    # A file per recipe and data: pictures of another source must not be judged by an old classifier.
    recipe = f"{EPOCHS} {BATCH_SIZE} {LEARNING_RATE} {NUM_FEATURES}".encode()
    key = hashlib.sha256(recipe + train.labels.tobytes() + train.images[::100].tobytes()).hexdigest()[:12]
    path = cache / f"classifier-{key}.pt"
    if path.is_file():
        classifier = Classifier()
        classifier.load_state_dict(torch.load(path, weights_only=True))
        classifier.eval()
    else:
        classifier = train_classifier(train)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(classifier.state_dict(), path)
    accuracy = share_assigned(judge(classifier, test.images)[1], test.labels)
    if accuracy < REQUIRED_ACCURACY:
        path.unlink()
        raise ValueError(
            f"the classifier is right on {accuracy:.1%} of the test pictures, {REQUIRED_ACCURACY:.0%} are needed; "
            "is the data Fashion-MNIST?"
        )
    return classifier


def share_assigned(classes: Tensor, labels: np.ndarray) -> float:
    return float((classes == torch.from_numpy(labels)).double().mean())


def balanced_indices(labels: np.ndarray, num_images: int, num_sets: int, seed: int) -> list[np.ndarray]:
    """Draw disjoint sets of `num_images` indices with the same number of every class (up to one)."""
    generator = np.random.default_rng(seed)
    pools = [generator.permutation(np.flatnonzero(labels == label)) for label in range(NUM_CLASSES)]
    counts = [(num_images + NUM_CLASSES - 1 - label) // NUM_CLASSES for label in range(NUM_CLASSES)]
    num_sets = min(num_sets, *(len(pool) // max(1, count) for pool, count in zip(pools, counts, strict=True)))
    if num_sets < 1:
        raise ValueError(f"{num_images} pictures are more than the real ones can match; generate fewer")
    return [
        np.concatenate([pool[i * count : (i + 1) * count] for pool, count in zip(pools, counts, strict=True)])
        for i in range(num_sets)
    ]


def swap_patches(images: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Exchange `share` of every picture's 4x4 patches with those of other pictures at the same place.

    Every picture chooses its own places; at each place the pictures that chose it pass their patch on in a random
    circle, so all patches stay real and stay in place, and only their combination is wrong.
    """
    generator = np.random.default_rng(seed)
    side = images.shape[1] // PATCH
    num_swapped = round(share * side * side)
    ranks = generator.random((len(images), side * side)).argsort(1).argsort(1)
    chosen = ranks < num_swapped  # (N, places)
    swapped = images.copy()
    for place in range(side * side):
        circle = generator.permutation(np.flatnonzero(chosen[:, place]))
        top, left = place // side * PATCH, place % side * PATCH
        area = (slice(top, top + PATCH), slice(left, left + PATCH))
        swapped[(circle, *area)] = images[(np.roll(circle, 1), *area)]
    return swapped


def binomial_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    z = 1.959964
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(
    generated: np.ndarray,
    labels: np.ndarray,
    reconstructed: np.ndarray,
    *,
    train: Pictures,
    test: Pictures,
    classifier: Classifier,
    bits_per_token: float | Callable[[], float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all numbers of the table as plain data.

    `generated` (N, 32, 32, 3) uint8 with the requested `labels` (N,); `reconstructed` are the first test pictures after
    the tokenizer, in order. `seed` chooses the real pictures that stand beside.
    """
    _check_pictures("generated", generated)
    _check_pictures("reconstructed", reconstructed)
    if len(labels) != len(generated):
        raise ValueError(f"{len(generated)} generated pictures have {len(labels)} labels; one each is needed")
    if len(reconstructed) > len(test):
        raise ValueError(f"{len(reconstructed)} reconstructions are more than the {len(test)} test pictures")

    count = len(generated)
    floors = balanced_indices(train.labels, count, NUM_FLOORS, seed)
    generated_features, generated_classes = judge(classifier, generated)
    reconstructed_features, reconstructed_classes = judge(classifier, reconstructed)
    test_features, test_classes = judge(classifier, test.images)
    floor_features = [judge(classifier, train.images[index])[0] for index in floors]
    test_statistics = _statistics(test_features)

    def distance(features: Tensor) -> float:
        return frechet_distance(_statistics(features), test_statistics)

    def coverage(real: Tensor, features: Tensor) -> float:
        return float(density_coverage(real, features)[1].double().mean())

    floor_distances = [distance(features) for features in floor_features]
    swapped = {
        percent: distance(judge(classifier, swap_patches(train.images[floors[0]], percent / 100, seed))[0])
        for percent in (10, 20)
    }

    part = np.random.default_rng(seed).permutation(len(test))[: min(count, len(test))]
    part_features = test_features[part]

    test_nearest = _nearest_training(test.images, train.images)
    threshold = float(torch.quantile(test_nearest.double(), COPY_QUANTILE))
    copies = {
        name: int((_nearest_training(images, train.images) < threshold).sum())
        for name, images in (("generated", generated), ("reconstructed", reconstructed))
    }
    return {
        "num_generated": count,
        "num_reconstructed": len(reconstructed),
        "num_test": len(test),
        "assigned": {
            "generated": share_assigned(generated_classes, labels),
            "generated_by_class": {
                test.class_names[label]: share_assigned(generated_classes[labels == label], labels[labels == label])
                for label in np.unique(labels)
            },
            "reconstructed": share_assigned(reconstructed_classes, test.labels[: len(reconstructed)]),
            "real_same_pictures": share_assigned(test_classes[: len(reconstructed)], test.labels[: len(reconstructed)]),
            "real": share_assigned(test_classes, test.labels),
        },
        "frechet": {
            "generated": distance(generated_features),
            "reconstructed": distance(reconstructed_features),
            "floor": float(np.mean(floor_distances)),
            "floor_range": [min(floor_distances), max(floor_distances)],
            "swapped_10_percent": swapped[10],
            "swapped_20_percent": swapped[20],
        },
        "coverage": {
            "generated": coverage(part_features, generated_features),
            "floor": coverage(part_features, floor_features[0]),
            "generated_of_whole_test_set": coverage(test_features, generated_features),
            "floor_of_whole_test_set": coverage(test_features, floor_features[0]),
        },
        "near_copies": {
            "generated": copies["generated"] / count,
            "generated_interval": binomial_interval(copies["generated"], count),
            "reconstructed": copies["reconstructed"] / len(reconstructed),
            "reconstructed_interval": binomial_interval(copies["reconstructed"], len(reconstructed)),
            "real": float((test_nearest < threshold).double().mean()),
            "threshold": threshold,
        },
        "bits_per_token": bits_per_token() if callable(bits_per_token) else bits_per_token,
    }


def _check_pictures(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3) or len(images) < 2:
        raise ValueError(f"{name} pictures must be uint8 (N, {SIZE}, {SIZE}, 3), not {images.dtype} {images.shape}")


def _statistics(features: Tensor) -> Statistics:
    return feature_statistics(features.split(EVAL_BATCH))


def _nearest_training(images: np.ndarray, train: np.ndarray) -> Tensor:
    """Return the distance (N,) of the inner 28x28 pixels, 0..255, to those of the nearest training picture."""
    edge = (SIZE - 28) // 2

    def core(pictures: np.ndarray) -> Tensor:
        inner = pictures[:, edge : SIZE - edge, edge : SIZE - edge]
        return torch.from_numpy(np.ascontiguousarray(inner)).float().mean(-1).flatten(1)

    return nearest(core(images), core(train))[0]


def to_markdown(report: dict[str, Any]) -> str:
    """Return the table for a model card."""
    assigned, frechet = report["assigned"], report["frechet"]
    coverage, copies = report["coverage"], report["near_copies"]
    low, high = copies["generated_interval"]
    bits = report["bits_per_token"]
    rows = [
        ("", "generated", "reconstructed", "real"),
        (
            "assigned to its class",
            f"{assigned['generated']:.1%}",
            f"{assigned['reconstructed']:.1%}",
            f"{assigned['real']:.1%}",
        ),
        (
            "Frechet distance to the test set",
            f"{frechet['generated']:.2f}",
            f"{frechet['reconstructed']:.2f}",
            f"{frechet['floor']:.2f}",
        ),
        (
            "the same of real pictures with patches swapped",
            "",
            "",
            f"10 %: {frechet['swapped_10_percent']:.2f}, 20 %: {frechet['swapped_20_percent']:.2f}",
        ),
        ("coverage (k = 5)", f"{coverage['generated']:.3f}", "", f"{coverage['floor']:.3f}"),
        (
            "near-copies of training pictures",
            f"{copies['generated']:.2%} (95 %: {low:.2%} to {high:.2%})",
            f"{copies['reconstructed']:.2%}",
            f"{copies['real']:.2%}",
        ),
    ]
    if bits is not None:
        rows.append(("held-out bits per token", f"{bits:.3f}", "", ""))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|---|---|---|")
    note = (
        f"{report['num_generated']:,} generated pictures, {report['num_reconstructed']:,} reconstructed test pictures. "
        f"Features and classes of a small classifier that is right on {assigned['real']:.1%} of the "
        f"{report['num_test']:,} test pictures. Real: test pictures; for the Frechet distance and the coverage "
        "training pictures, as many as generated."
    )
    return "\n".join([*lines, "", note])


@torch.inference_mode()
def samples_of(
    pipe: Pipeline, settings: dict[str, Any], test: Pictures
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """500 pictures of every class with their labels, the reconstructed test pictures, and held-out bits per token."""
    drawn = pipe(range(NUM_CLASSES), num_images_per_prompt=500, output_type="np", batch_size=250, **settings)
    reconstructed, losses = [], []
    for start in range(0, len(test), EVAL_BATCH):
        rows = slice(start, start + EVAL_BATCH)
        codes = pipe.tokenizer.encode(torch.from_numpy(test.images[rows]).permute(0, 3, 1, 2) / 127.5 - 1)
        reconstructed.append(pipe.pictures(codes, "np"))
        losses.append(token_losses(pipe.model, codes, ClassCondition(torch.from_numpy(test.labels[rows]))).mean(-1))
    bits = float(torch.cat(losses).mean()) / math.log(2)
    return drawn.images, np.array(drawn.class_labels), np.concatenate(reconstructed), bits


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="fashion", help="a bundled name or a model folder")
    parser.add_argument("--guidance-scale", type=float, help="instead of the model's own")
    parser.add_argument("--temperature", type=float, help="instead of the model's own")
    parser.add_argument("--top-p", type=float, help="instead of the model's own")
    parser.add_argument("--data", default="fashion-mnist", help="folder of Fashion-MNIST's idx files, or the word")
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"), help="where the classifier is kept")
    parser.add_argument("--json", type=Path, help="write the report to this file instead of the screen")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawn pictures, and of the real ones that stand beside"
    )
    arguments = parser.parse_args()
    try:
        report = run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(report, indent=2)
    print(to_markdown(report))
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(f"\n{text}")
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    train = load_pictures(arguments.data, size=SIZE)
    test = load_pictures(arguments.data, size=SIZE, split="t10k")
    classifier = cached_classifier(train, test, arguments.cache)
    settings = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature", "top_p", "seed")}
    generated, labels, reconstructed, bits = samples_of(Pipeline.from_pretrained(arguments.model), settings, test)
    report = measure(
        generated,
        labels,
        reconstructed,
        train=train,
        test=test,
        classifier=classifier,
        bits_per_token=bits,
        seed=arguments.seed,
    )
    return {**report, "seed": arguments.seed, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    sys.exit(main())
