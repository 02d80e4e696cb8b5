"""The Inception network of 2015 that FID is defined with: pictures to pooled features, spatial features and logits.

Its parameter names are those of the weight files that pytorch-fid and torch-fidelity distribute; it does not know
statistics or where pictures come from. Dimensions: B pictures, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.storage.pickled import load_pickle

SIZE = 299
NUM_SPATIAL = 7  # channels of the spatial features, as in the ADM evaluator: 7 x 17 x 17 = 2023 numbers
POOLED_DIMS = (64, 192, 768, 2048)
_COUNTER = ".num_batches_tracked"  # of batch norm; present in some weight files, without meaning here


@dataclass(frozen=True)
class InceptionOutput:
    """`pooled` (B, dim) by its dim: 64, 192, 768 and 2048 (FID); `spatial` (B, 2023) for sFID; `logits` (B, 1008).

    `logits_unbiased` leave out the bias of the last layer, as the published Inception Score does.
    """

    pooled: dict[int, Tensor]
    spatial: Tensor
    logits: Tensor
    logits_unbiased: Tensor


class Inception(nn.Module):
    """The network, in TensorFlow's layout of 2015: it has 1008 classes, and pools differ from later definitions.

    Three differences matter for the numbers: pictures are resized as TensorFlow 1 did, average pools inside blocks do
    not count the padding, and the last block has a max pool in place of the average.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = Block35(192, 32)
        self.Mixed_5c = Block35(256, 64)
        self.Mixed_5d = Block35(288, 64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b = Block17(128)
        self.Mixed_6c = Block17(160)
        self.Mixed_6d = Block17(160)
        self.Mixed_6e = Block17(192)
        self.Mixed_7a = Reduce17(768)
        self.Mixed_7b = Block8(1280, _average_pool)
        self.Mixed_7c = Block8(2048, _max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.eval()  # batch statistics make no sense for a detector, so it is born ready to judge
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> InceptionOutput:
        """Return features of uint8 pictures (B, 3, H, W) of any size, or of floats with values 0..255."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W) with values 0..255, not {tuple(images.shape)}")
        x = resize_tensorflow1(images.to(self.fc.weight.dtype), SIZE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        first = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first))
        second = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(second)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :NUM_SPATIAL]
        third = self.Mixed_6e(self.Mixed_6d(x))
        last = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(third)))  # (B, 2048, 8, 8)
        pooled = {maps.shape[1]: maps.mean((2, 3)) for maps in (first, second, third, last)}
        unbiased = F.linear(pooled[2048], self.fc.weight)
        # The evaluator flattens TensorFlow's NHWC layout.
        return InceptionOutput(pooled, spatial.permute(0, 2, 3, 1).flatten(1), unbiased + self.fc.bias, unbiased)


def load_inception(path: str | Path) -> Inception:
    """Load weights from a local file of pytorch-fid or torch-fidelity (`.pth`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or holds another network (torchvision's Inception is another one).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; FID needs the 2015 Inception weights, as pytorch-fid and torch-fidelity use them"
        )
    state = load_pickle(path)
    with torch.device("meta"):
        network = Inception()
    expected = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(_COUNTER)}
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    given = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    wrong = sorted(
        name
        for name in expected.keys() | given.keys()
        if name not in given or name not in expected or given[name].shape != expected[name].shape
    )
    if wrong:
        raise ValueError(
            f"{path} is not the 2015 Inception network: {len(wrong)} tensors are missing, left over or of another "
            f"shape ({', '.join(wrong[:3])}, ...); torchvision's weights are another network and give other numbers"
        )
    counters = {name: torch.zeros((), dtype=torch.long) for name in network.state_dict() if name.endswith(_COUNTER)}
    network.load_state_dict({name: tensor.float() for name, tensor in given.items()} | counters, assign=True)
    return network.requires_grad_(False)


def resize_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to `size` x `size` bilinearly as TensorFlow 1 did: pixel i is read at i * H / size.

    PyTorch aligns pixel centres instead, which shifts the picture by up to half a pixel and moves FID.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        if length == size:
            continue
        position = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = position.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = position - low
        share = share[:, None] if axis == 2 else share
        start, end = images.index_select(axis, low), images.index_select(axis, high)
        images = start + (end - start) * share
    return images


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _row(in_channels: int, out_channels: int, width: int) -> ConvNorm:
    """A 1 x width convolution that keeps the size."""
    return ConvNorm(in_channels, out_channels, (1, width), padding=(0, width // 2))


def _column(in_channels: int, out_channels: int, height: int) -> ConvNorm:
    """A height x 1 convolution that keeps the size."""
    return ConvNorm(in_channels, out_channels, (height, 1), padding=(height // 2, 0))


class Block35(nn.Module):
    """The block at 35 x 35."""

    def __init__(self, in_channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(in_channels, 64, 1)
        self.branch5x5_1 = ConvNorm(in_channels, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average_pool(x))], 1)


class Reduce35(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Block17(nn.Module):
    """The block at 17 x 17, with 7 x 7 convolutions split into rows and columns."""

    def __init__(self, middle: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, middle, 1)
        self.branch7x7_2 = _row(middle, middle, 7)
        self.branch7x7_3 = _column(middle, 192, 7)
        self.branch7x7dbl_1 = ConvNorm(768, middle, 1)
        self.branch7x7dbl_2 = _column(middle, middle, 7)
        self.branch7x7dbl_3 = _row(middle, middle, 7)
        self.branch7x7dbl_4 = _column(middle, middle, 7)
        self.branch7x7dbl_5 = _row(middle, 192, 7)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], 1)


class Reduce17(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(in_channels, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(in_channels, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class Block8(nn.Module):
    """The block at 8 x 8; `pool` keeps the size."""

    def __init__(self, in_channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(in_channels, 320, 1)
        self.branch3x3_1 = ConvNorm(in_channels, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = ConvNorm(in_channels, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = ConvNorm(in_channels, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)
