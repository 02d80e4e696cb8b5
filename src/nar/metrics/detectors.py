"""Networks that judge pictures, and what `evaluate` wants of any network: a detector.

They make features of uint8 pictures, or clips; they do not know statistics or where those come from.
Dimensions: B pictures of H x W pixels, or clips of T frames, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from nar.metrics.networks import efficientnet
from nar.metrics.networks.inception import load_inception
from nar.metrics.networks.transnet import load_transnet, transnet_file
from nar.precision import usable_device
from nar.storage.files import digest

VARIANTS = ("stylegan-v", "videogpt")
I3D_SIZE = 224
I3D_FRAMES = 10  # fewer leave nothing after its pooling over time


@dataclass(frozen=True)
class Detected:
    """What a detector makes of B pictures: features (B, D); where it has them spatial ones and probabilities."""

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


@runtime_checkable
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
        return f"{metric}-{self.label}"

    def __call__(self, images: Tensor) -> Detected:
        """Features of uint8 pictures (B, 3, H, W)."""
        ...


class EfficientNetDetector(Detector):
    """EfficientNet-Lite0, whose weights come with a package: FD-EffLite0, KID-EffLite0."""

    label = "EffLite0"
    num_features = efficientnet.NUM_FEATURES
    ddof = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.digest = digest(efficientnet.weights_file())
        self.network = efficientnet.load_efficientnet().to(device)
        self.device = device

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


class I3DDetector:
    """The Kinetics-400 I3D torchscript file that FVD is computed with; features are its 400 logits.

    Two ways to prepare clips are published, and their numbers differ: "stylegan-v" squeezes whole frames to 224x224
    inside the file (also LARP's and NAR's way), "videogpt" resizes the shorter side to 224 and cuts the middle. For
    square clips only the interpolation differs. Covariances are divided by n, as published.
    """

    num_features = 400
    ddof = 0
    clips = True

    def __init__(self, path: str | Path, variant: str = "stylegan-v", device: torch.device | str = "cpu") -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be {' or '.join(VARIANTS)}, not {variant!r}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; FVD needs the published file i3d_torchscript.pt")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not torchscript ({str(error).splitlines()[0]})") from error
        schema = getattr(getattr(self.network, "forward", None), "schema", None)
        if not {"rescale", "resize", "return_features"} <= {part.name for part in getattr(schema, "arguments", ())}:
            raise ValueError(f"{path} is another network: the published file takes rescale, resize, return_features")
        self.label, self.variant, self.device = f"I3D, {variant}", variant, device
        self.digest = digest(path)

    def name(self, metric: str) -> str:
        return {"FD": f"FVD-{self.variant}", "KID": f"KVD-{self.variant}"}.get(metric, f"{metric}-I3D")

    def __call__(self, images: Tensor) -> Detected:
        clips = _checked(images, I3D_FRAMES).to(self.device).float()
        whole = self.variant == "stylegan-v"
        if not whole:
            frames = clips.transpose(1, 2).flatten(0, 1)  # (B * T, 3, H, W)
            scale = I3D_SIZE / min(frames.shape[2:])
            size = [max(I3D_SIZE, round(length * scale)) for length in frames.shape[2:]]
            frames = F.interpolate(frames, size=size, mode="bilinear")
            top, left = ((length - I3D_SIZE) // 2 for length in size)
            frames = frames[:, :, top : top + I3D_SIZE, left : left + I3D_SIZE]
            clips = frames.unflatten(0, (len(images), -1)).transpose(1, 2) / 127.5 - 1
        return Detected(self.network(clips, rescale=whole, resize=whole, return_features=True).flatten(1))


class TransNetDetector(Detector):
    """TransNetV2, trained to find cuts: its convolutions over space and time see how frames change.

    The features are the mean and the spread over time of the last 256 channels: FD-TransNetV2, KID-TransNetV2. They say
    little about fine detail: frames are 48x27 pixels.
    """

    label = "TransNetV2"
    num_features = 512
    ddof = 0
    clips = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.digest = digest(transnet_file())
        self.device = device
        self.network = load_transnet().to(device)

    def __call__(self, images: Tensor) -> Detected:
        maps = self.network(_checked(images, 2).to(self.device))
        over_time = maps.mean((3, 4))  # (B, C, T)
        return Detected(torch.cat([over_time.mean(2), over_time.std(2, correction=0)], 1))


def _refuse_clips(images: Tensor) -> None:
    if images.ndim == 5:
        what = f"these are clips of {images.shape[2]} frames, this network judges pictures"
        raise ValueError(f"{what}; give --video or --i3d FILE (TransNetDetector or I3DDetector)")


def _checked(clips: Tensor, num_frames: int) -> Tensor:
    if clips.ndim != 5 or clips.shape[1] != 3:
        hint = "are these pictures? For folders of frames, one a clip, give the number of frames (--num-frames)"
        raise ValueError(f"clips must be (B, 3, T, H, W), not {tuple(clips.shape)}; {hint}")
    if clips.shape[2] < num_frames:
        raise ValueError(f"clips of {clips.shape[2]} frames are too short; at least {num_frames} are needed")
    return clips


def default_detector(inception: str | Path | None, device: torch.device | str | None) -> Detector:
    """Inception from its file, else EfficientNet-Lite0; `device` None is a GPU where there is one."""
    place = usable_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    return EfficientNetDetector(place) if inception is None else InceptionDetector(inception, place)
