"""The Inception network of 2015 that FID is defined with: pictures to pooled features, spatial features and logits.

Its parameter names are those of the weight files that pytorch-fid and torch-fidelity distribute; it does not know
statistics or where pictures come from. Dimensions: B pictures, H x W pixels, C channels.
"""

from __future__ import annotations

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


Kernel = int | tuple[int, int]
# Names of branches, and in each the ends of its layers' names, their channels and kernels; 2a and 2b both read 1.
Branches = dict[str, list[tuple[str, int, Kernel]]]
_DOUBLE: list[tuple[str, int, Kernel]] = [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)]
_BLOCK_35: Branches = {"1x1": [("", 64, 1)], "5x5": [("_1", 48, 1), ("_2", 64, 5)], "3x3dbl": _DOUBLE}
_REDUCE_35: Branches = {"3x3": [("", 384, 3)], "3x3dbl": _DOUBLE}
_REDUCE_17: Branches = {
    "3x3": [("_1", 192, 1), ("_2", 320, 3)],
    "7x7x3": [("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, 3)],
}
_BLOCK_8: Branches = {
    "1x1": [("", 320, 1)],
    "3x3": [("_1", 384, 1), ("_2a", 384, (1, 3)), ("_2b", 384, (3, 1))],
    "3x3dbl": [("_1", 448, 1), ("_2", 384, 3), ("_3a", 384, (1, 3)), ("_3b", 384, (3, 1))],
}


def _block_17(width: int) -> Branches:
    """7 x 7 convolutions, split into rows and columns."""
    row, column = (1, 7), (7, 1)
    return {
        "1x1": [("", 192, 1)],
        "7x7": [("_1", width, 1), ("_2", width, row), ("_3", 192, column)],
        "7x7dbl": [
            ("_1", width, 1),
            ("_2", width, column),
            ("_3", width, row),
            ("_4", width, column),
            ("_5", 192, row),
        ],
    }


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
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.Mixed_5b = Mixed(192, _BLOCK_35, pooled=32)
        self.Mixed_5c = Mixed(256, _BLOCK_35, pooled=64)
        self.Mixed_5d = Mixed(288, _BLOCK_35, pooled=64)
        self.Mixed_6a = Mixed(288, _REDUCE_35, halves=True)
        self.Mixed_6b = Mixed(768, _block_17(128))
        self.Mixed_6c = Mixed(768, _block_17(160))
        self.Mixed_6d = Mixed(768, _block_17(160))
        self.Mixed_6e = Mixed(768, _block_17(192))
        self.Mixed_7a = Mixed(768, _REDUCE_17, halves=True)
        self.Mixed_7b = Mixed(1280, _BLOCK_8)
        self.Mixed_7c = Mixed(2048, _BLOCK_8, max_pool=True)
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
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :NUM_SPATIAL]
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
        what = "FID needs the 2015 Inception weights, as pytorch-fid and torch-fidelity use them"
        raise FileNotFoundError(f"{path} does not exist; {what}")
    state = load_pickle(path)
    with torch.device("meta"):
        network = Inception()
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, and not tensors by name")
    counters = {name: torch.zeros((), dtype=torch.long) for name in network.state_dict() if name.endswith(_COUNTER)}
    given = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    own, found = ({name: x.shape for name, x in part.items()} for part in (network.state_dict(), given | counters))
    wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{path} is not the 2015 Inception network: {len(wrong)} tensors are missing, left over or of another "
            f"shape ({', '.join(wrong[:3])}, ...); torchvision's weights are another network and give other numbers"
        )
    network.load_state_dict({name: tensor.float() for name, tensor in given.items()} | counters, assign=True)
    return network.requires_grad_(False)


def resize_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to `size` x `size` bilinearly as TensorFlow 1 did: pixel i is read at i * H / size.

    PyTorch aligns pixel centres instead, which shifts the picture by up to half a pixel and moves FID.
    """
    for axis, length in enumerate(images.shape[2:], start=2):
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


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU; where it is `padded` the size stays (at stride 1)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Kernel, *, stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, chains of convolutions as the tables above list them, and a pool with a convolution.

    A block that halves the size does so at the end of every branch, and its pool has no convolution.
    """

    def __init__(
        self,
        channels: int,
        branches: Branches,
        *,
        pooled: int = 192,
        max_pool: bool = False,
        halves: bool = False,
    ) -> None:
        super().__init__()
        self.branches, self.max_pool, self.halves = branches, max_pool, halves
        for branch, layers in branches.items():
            width = channels
            for mark, out_channels, kernel in layers:
                last = halves and mark == layers[-1][0]
                layer = ConvNorm(width, out_channels, kernel, stride=2 if last else 1, padded=not last)
                self.add_module(f"branch{branch}{mark}", layer)
                width = out_channels
        if not halves:
            self.branch_pool = ConvNorm(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch, layers in self.branches.items():
            hidden = x
            for mark, _, _ in layers:
                made = self.get_submodule(f"branch{branch}{mark}")(hidden)
                if mark.endswith("a"):  # a fork: the next one reads the same
                    found.append(made)
                else:
                    hidden = made
            found.append(hidden)
        if self.halves:
            found.append(F.max_pool2d(x, 3, stride=2))
        elif self.max_pool:
            found.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            found.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(found, 1)
