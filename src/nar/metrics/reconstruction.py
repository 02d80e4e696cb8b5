"""How much of pictures and clips survives: numbers of pairs, real and reconstructed, and of what a weak code ties.

Knows arrays; does not know who reconstructed them. Dimensions: B pictures, T frames, H x W pixels, V codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5


def psnr(error: Tensor | float, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; 100 at most, which equal pictures get."""
    return min(100.0, 10 * math.log10(peak**2 / max(float(error), 1e-30)))


def squared_error(real: Tensor, made: Tensor) -> Tensor:
    """Mean squared error (B,) of pictures or clips (B, ...) on one scale."""
    return (made.float() - real.float()).square().flatten(1).mean(1)


def ssim(real: Tensor, made: Tensor, peak: float = 255.0) -> Tensor:
    """Structural similarity (B,) of pictures (B, C, H, W) (Wang et al. 2004), the mean over channels.

    A Gaussian window of 11 pixels (sigma 1.5) slides over places where it fits; it is smaller in smaller pictures.
    `peak` is the range of the values.
    """
    real, made = real.float(), made.float()
    channels, height, width = real.shape[1:]
    column, row = (_taps(min(_WINDOW, length), real) for length in (height, width))
    kernel = (column[:, None] * row).expand(channels, 1, -1, -1)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=channels)

    mean_real, mean_made = blurred(real), blurred(made)
    variance_real = blurred(real.square()) - mean_real.square()
    variance_made = blurred(made.square()) - mean_made.square()
    covariance = blurred(real * made) - mean_real * mean_made
    luminance, contrast = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similar = (2 * mean_real * mean_made + luminance) * (2 * covariance + contrast)
    possible = (mean_real.square() + mean_made.square() + luminance) * (variance_real + variance_made + contrast)
    return (similar / possible).mean((1, 2, 3))


def _taps(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device) - (size - 1) / 2
    return torch.softmax(-places.square() / (2 * _SIGMA**2), 0)


def code_use(counts: Tensor) -> dict[str, float]:
    """What share of the codes is used, as how many equally frequent ones they count, and how many never occur.

    `counts` (V,) says how often each code occurs.
    """
    shares = counts.double() / counts.sum().clamp_min(1)
    return {
        "usage": float((counts > 0).double().mean()),
        "perplexity": float(torch.exp(-torch.xlogy(shares, shares).sum())),
        "dead_codes": float((counts == 0).sum()),
    }
