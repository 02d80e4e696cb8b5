"""Fit the map that the offline retrieval score uses, and measure it on drawings that it was not fitted on.

    python scripts/caption_map.py --data emoji/train.parquet --output captions.safetensors --json report.json

One vendor (`--held-out`) is left out of the fit that is written; R@1, R@5 (among 1,000 captions) and concept accuracy
(the nearest of all mean drawings) are of that vendor's. A second fit also leaves out a part of the concepts, to tell
how the score works for words that it never saw.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from nar.data.split import held_out
from nar.media.pictures import to_rgb
from nar.metrics.networks.efficientnet import load_efficientnet
from nar.metrics.pictures import batches
from nar.metrics.text_image import PICTURE_SIZE, CaptionMap, SentenceEncoder, retrieval
from nar.storage.files import digest


def fit_caption_map(
    features: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    num_epochs: int = 20,
    scale: float = 50.0,
    dropout: float = 0.5,
    weight_decay: float = 0.5,
    seed: int = 0,
) -> CaptionMap:
    """Fit the map of features (N, F) to their captions' embeddings (C, D); `labels` (N,) say which.

    `concepts` of the result is empty: the caller knows the words of the C captions.

    Starts from ridge regression and then learns to tell each picture's caption from all others of the fit (softmax of
    `scale` times the cosine), which retrieves a third more pictures of an unseen vendor. Two minutes on one core.
    """
    torch.manual_seed(seed)
    roots = features.float().clamp(min=0).sqrt()
    mean, spread = roots.mean(0), roots.std(0) + 1e-3
    inputs = (roots - mean) / spread
    centre = embeddings[labels].mean(0)
    used, places = labels.unique(return_inverse=True)
    keys = F.normalize(embeddings[used] - centre, dim=-1)
    damped = inputs.T @ inputs + 0.125 * len(inputs) * torch.eye(inputs.shape[1])
    weight = torch.linalg.solve(damped, inputs.T @ (embeddings[labels] - centre)).requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], weight_decay=weight_decay)
    size = min(256, len(inputs))
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=num_epochs * -(-len(inputs) // size))
    for _ in range(num_epochs):
        for rows in torch.randperm(len(inputs)).split(size):
            seen = F.normalize(F.dropout(inputs[rows], dropout) @ weight, dim=-1)
            loss = F.cross_entropy(scale * seen @ keys.T, places[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.step()
    weight = weight.detach()
    mapped = F.normalize(inputs @ weight, dim=-1)
    sums = torch.zeros_like(embeddings).index_add(0, labels, mapped)
    sums[sums.abs().sum(1) == 0] += (embeddings - centre)[sums.abs().sum(1) == 0]  # no picture: the words must do
    return CaptionMap(mean, spread, weight, centre, F.normalize(sums, dim=-1))


def save(fitted: CaptionMap, path: Path) -> None:
    """Write a map, its two large tables in eight bits: only directions matter, which keep four digits of a cosine."""
    tensors = {name: getattr(fitted, name).half().contiguous() for name in ("mean", "spread", "centre")}
    for name in ("weight", "prototypes"):
        table = getattr(fitted, name)
        tensors[name] = (table / table.std()).to(torch.float8_e4m3fn).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"facts": json.dumps({**fitted.facts, "concepts": fitted.concepts})})


def features_of(path: Path, images: list[bytes], cache: Path | None) -> torch.Tensor:
    """EfficientNet-Lite0's features (N, 1280) at 64x64 pixels, kept in `cache` under the file's hash."""
    place = None if cache is None else cache / f"caption-map-{digest(path)[:16]}.npy"
    if place is not None and place.is_file():
        return torch.from_numpy(np.load(place))
    network = load_efficientnet()
    pictures = (np.asarray(to_rgb(Image.open(io.BytesIO(data)))) for data in images)
    with torch.inference_mode():
        parts = batches(pictures, 64, size=PICTURE_SIZE)
        found = torch.cat([network.features(torch.from_numpy(some).movedim(-1, 1)) for some in parts])
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, found.numpy())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--held-out", default="twemoji")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/nar/features").expanduser())
    arguments = parser.parse_args()

    rows = pq.read_table(arguments.data, columns=["image", "caption", "vendor", "hexcode"]).to_pylist()
    features = features_of(arguments.data, [row["image"]["bytes"] for row in rows], arguments.cache)
    concepts = sorted({row["caption"] for row in rows})
    place = {caption: index for index, caption in enumerate(concepts)}
    labels = torch.tensor([place[row["caption"]] for row in rows])
    embeddings = SentenceEncoder()(concepts)
    unseen = np.array([row["vendor"] == arguments.held_out for row in rows])
    new = held_out([row["hexcode"] or row["caption"] for row in rows], 0.1)
    pool = np.random.default_rng(0).permutation(len(concepts))[:1000].tolist()

    def measure(fitted: CaptionMap, chosen: np.ndarray, *, known: bool = True) -> dict[str, Any]:
        some = torch.from_numpy(np.flatnonzero(chosen))
        shown, asked = fitted.of_pictures(features[some]), fitted.of_captions(embeddings)
        ranks = retrieval(shown, asked, labels[some].tolist(), candidates=pool)
        numbers = {"R@1": float((ranks < 1).mean()), "R@5": float((ranks < 5).mean()), "num_pictures": len(some)}
        if known:  # a concept that was left out has no mean drawing
            nearest = retrieval(shown, fitted.prototypes, labels[some].tolist())
            numbers["concept accuracy"] = float((nearest < 1).mean())
        return numbers

    def fit(chosen: np.ndarray) -> CaptionMap:
        some = torch.from_numpy(np.flatnonzero(chosen))
        fitted = fit_caption_map(features[some], embeddings, labels[some])
        save(replace(fitted, concepts=tuple(concepts)), arguments.output)
        return CaptionMap.load(arguments.output)  # what is measured is what is stored

    partial, fitted = fit(~unseen & ~new), fit(~unseen)
    report = {
        "drawings of the fit": measure(fitted, ~unseen),
        "vendor left out": measure(fitted, unseen),
        "concepts left out": measure(partial, ~unseen & new, known=False),
        "vendor and concepts left out": measure(partial, unseen & new, known=False),
    }
    facts = {"held_out": arguments.held_out, "data_sha256": digest(arguments.data), "accuracy": report}
    save(replace(fitted, facts=facts), arguments.output)
    for name, numbers in report.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
