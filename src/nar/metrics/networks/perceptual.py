"""How different two pictures look to a network: distances of its features, for losses and for measuring.

Knows pictures in -1..1; does not know who made them. Gradients flow to the pictures, the networks are frozen.
Dimensions: B pictures, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.metrics.networks.efficientnet import load_efficientnet
from nar.storage.pickled import load_pickle

# The convolutions of VGG16 by the index that torchvision gives them, in the five parts that LPIPS compares.
_VGG_PARTS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_VGG_CHANNELS = (64, 128, 256, 512, 512)


class EfficientNetDistance(nn.Module):
    """Distance of the features of EfficientNet-Lite0 at several resolutions, each scaled to length 1 in its channels.

    Its size is not that of LPIPS, whose features are another network's and weighted by human judgements. It is the
    mean of 1 - cosine: 0 for equal pictures, below 2.
    """

    name = "distance-EffLite0"

    def __init__(self, strides: Sequence[int] = (2, 4, 8, 16), weights: str | Path | None = None) -> None:
        super().__init__()
        self.network = load_efficientnet(weights)
        self.strides = tuple(strides)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance (B,) between pictures (B, 3, H, W) in -1..1."""
        with torch.autocast(first.device.type, enabled=False):  # bfloat16 rounds away the differences of good pictures
            both = torch.cat((first.float(), second.float())) * 127.5 + 127.5
            features = [F.normalize(stage, dim=1).chunk(2) for stage in self.network.stages(both, self.strides)]
            distances = [1 - (one * other).sum(1).mean((1, 2)) for one, other in features]
            return torch.stack(distances).mean(0)


class Lpips(nn.Module):
    """LPIPS 0.1 with VGG16 (Zhang et al. 2018), from local weights of both its parts."""

    name = "LPIPS"
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        self.features = nn.ModuleDict()
        for part, width in zip(_VGG_PARTS, _VGG_CHANNELS, strict=True):
            for index in part:
                self.features[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        self.linear = nn.ParameterList([torch.zeros(1, width, 1, 1) for width in _VGG_CHANNELS])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance (B,) between pictures (B, 3, H, W) in -1..1, of at least 16x16 pixels."""
        with torch.autocast(first.device.type, enabled=False):
            x = (torch.cat((first.float(), second.float())) - self.shift) / self.scale
            total = x.new_zeros(len(first))
            for number, (part, weight) in enumerate(zip(_VGG_PARTS, self.linear, strict=True)):
                x = F.max_pool2d(x, 2) if number else x
                for index in part:
                    x = F.relu(self.features[str(index)](x))
                one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                total = total + ((one - other).square() * weight).sum(1).mean((1, 2))
            return total


def load_lpips(folder: str | Path) -> Lpips:
    """Read LPIPS from a folder with torchvision's VGG16 (`vgg16*.pth`) and the linear weights (`vgg.pth` of `lpips`).

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file holds something else.
    """
    folder = Path(folder).expanduser()
    networks = sorted(folder.glob("vgg16*.pth"))
    linear = folder / "vgg.pth"
    if not networks or not linear.is_file():
        missing = "vgg.pth, the linear weights of the package lpips" if networks else "vgg16*.pth, torchvision's VGG16"
        raise FileNotFoundError(f"{folder} has no {missing}; LPIPS needs both files in one folder")
    metric = Lpips()
    names = {f"features.{index}.{kind}" for part in _VGG_PARTS for index in part for kind in ("weight", "bias")}
    state = _read(networks[0], names)
    weights = _read(linear, {f"lin{index}.model.1.weight" for index in range(len(_VGG_PARTS))})
    state |= {f"linear.{name[3]}": tensor for name, tensor in weights.items()}
    try:
        metric.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the files in {folder} do not fit VGG16 ({str(error).splitlines()[-1].strip()})") from error
    return metric.eval().requires_grad_(False)


def _read(path: Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors of a PyTorch file that `names` lists; others, a classifier's say, are left out."""
    state = load_pickle(path)
    try:
        return {name: state[name] for name in names}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} holds other weights ({error})") from error
