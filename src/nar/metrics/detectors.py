"""Networks that judge pictures, and what `evaluate` wants of any network: a detector.

They make features of uint8 pictures; they do not know statistics or where pictures come from. Detectors of clips are in
`nar.metrics.video`. Dimensions: B pictures of H x W pixels, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nar.metrics.networks import efficientnet
from nar.metrics.networks.inception import load_inception
from nar.metrics.pictures import digest


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


def default_detector(inception: str | Path | None, device: torch.device | str | None) -> Detector:
    """Inception from its file, else EfficientNet-Lite0; `device` None is a GPU where there is one."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return EfficientNetDetector(place) if inception is None else InceptionDetector(inception, place)
