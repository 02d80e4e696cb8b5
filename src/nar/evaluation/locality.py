"""What codes tell of each other by their offset: near ones most, if tokens are to be predicted from neighbours.

Knows the tokenizer of a model and real samples; does not know the model's predictions. Dimensions: M samples.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar import __version__
from nar.data.codes import MANIFEST, Codes
from nar.evaluation.likelihood import held_out
from nar.evaluation.sets import trained_on
from nar.pipeline import Pipeline
from nar.precision import usable_device
from nar.progress import steps
from nar.storage.fields import Seed, Size, checked
from nar.storage.folder import find_model, model_digest


@checked
def judge_locality(
    model: str,
    real: str | None = None,
    *,
    split: str = "test",
    number: Size = 10_000,
    distance: Size = 4,
    seed: Seed = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Mutual information in bits between two codes of a sample, for every offset up to a Manhattan `distance`.

    The codes are those of `real` by the tokenizer of a model, or extracted ones, whose folder takes its place.
    At the report's top is what it exceeds the floor by, in "baselines" both: the floor, "shuffled", is measured in the
    same way with the second code taken from another sample at the same place. That has the estimator's bias, which is
    large where there are few pairs for the square of the vocabulary, and what places alone tell. Independent pairs fill
    more cells than dependent ones, so a little too much is subtracted, more so where dependence is strong.

    Raises:
        ValueError: real samples that are not of the model's kind, or fewer than two.
    """
    extracted = (Path(model) / MANIFEST).is_file()
    if extracted == (real is not None):
        raise ValueError("give MODEL with --real R, or a folder of extracted codes without it")
    if real is None:
        known = Codes.open(model)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(known))[:number])
        codes, digest = torch.from_numpy(known.read(chosen)), known.manifest["tokenizer"]
    else:
        folder = find_model(model)
        pipe = Pipeline.from_pretrained(folder, device=usable_device(device))
        codes = held_out([pipe], [trained_on(folder)], real, split, number, seed).codes
        digest = model_digest(folder / "tokenizer")
    if len(codes) < 2:
        raise ValueError(f"{real or model} has {len(codes)} samples; at least 2 are needed, for a floor of other ones")
    circle = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(codes)
    others[circle] = codes[circle.roll(1)]
    measured, shuffled = dict[str, float](), dict[str, float]()
    by_distance: dict[int, list[str]] = {}
    for offset in steps(offsets(tuple(codes.shape[1:]), distance), "locality", "offsets"):
        name = str(offset)
        measured[name], shuffled[name] = (mutual_information(codes, second, offset) for second in (codes, others))
        by_distance.setdefault(sum(map(abs, offset)), []).append(name)
    for far, names in sorted(by_distance.items()):
        for found in (measured, shuffled):
            found[f"mean at distance {far}"] = float(np.mean([found[name] for name in names]))
    _, counts = np.unique(codes.numpy(), return_counts=True)
    settings = {"model": model, "real": real, "split": split, "num_real": len(codes), "grid": list(codes.shape[1:])}
    return {
        **{name: measured[name] - shuffled[name] for name in measured},
        "entropy of a code": _entropy(counts),
        "baselines": {"measured": measured, "shuffled": shuffled},
        "settings": settings | {"tokenizer_sha256": digest, "seed": seed, "version": __version__},
    }


def offsets(grid: tuple[int, ...], distance: int) -> list[tuple[int, ...]]:
    """Offsets within a grid up to a Manhattan distance, one of each pair of opposite ones, near ones first."""
    ranges = [range(-min(side - 1, distance), min(side - 1, distance) + 1) for side in grid]
    zero = (0,) * len(grid)
    found = [offset for offset in itertools.product(*ranges) if zero < offset and sum(map(abs, offset)) <= distance]
    return sorted(found, key=lambda offset: (sum(map(abs, offset)), offset))


def mutual_information(first: Tensor, second: Tensor, offset: tuple[int, ...]) -> float:
    """Bits that codes of `first` (M, *grid) tell of those of `second` that stand at an offset: of the counts of pairs,
    without a correction of their bias."""
    here = tuple(slice(max(0, -step), side - max(0, step)) for step, side in zip(offset, first.shape[1:], strict=True))
    there = tuple(slice(max(0, step), side - max(0, -step)) for step, side in zip(offset, first.shape[1:], strict=True))
    left, right = first[:, *here].flatten().long().numpy(), second[:, *there].flatten().long().numpy()
    _, pairs = np.unique(left * (int(right.max()) + 1) + right, return_counts=True)
    (_, lefts), (_, rights) = (np.unique(side, return_counts=True) for side in (left, right))
    return _entropy(lefts) + _entropy(rights) - _entropy(pairs)


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
