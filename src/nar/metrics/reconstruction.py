"""Reconstruction quality of pictures and clips: numbers of pairs, real and reconstructed, and cheap baselines.

Knows arrays; does not know who reconstructed them. Dimensions: B pictures, T frames, H x W pixels, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nar.metrics.frechet import RunningStatistics, frechet_distance, nearest
from nar.storage.fields import Seed, Size, checked

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) of pictures (B, 3, H, W) in -1..1."""

_WINDOW, _SIGMA = 11, 1.5
_PRODUCTS = 2**40  # of one iteration of k-means: a minute on one core


def psnr(error: Tensor | float, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; 100 at most, which equal pictures get."""
    return min(100.0, 10 * math.log10(peak**2 / max(float(error), 1e-30)))


def squared_error(real: Tensor, reconstructed: Tensor) -> Tensor:
    """Mean squared error (B,) of pictures or clips (B, ...) on one scale."""
    return (reconstructed.float() - real.float()).square().flatten(1).mean(1)


def ssim(real: Tensor, reconstructed: Tensor, peak: float = 255.0) -> Tensor:
    """Structural similarity (B,) of pictures (B, C, H, W) (Wang et al. 2004), the mean over channels.

    A Gaussian window of 11 pixels (sigma 1.5) slides over places where it fits; it is smaller in smaller pictures.
    `peak` is the range of the values.
    """
    real, reconstructed = real.float(), reconstructed.float()
    channels, height, width = real.shape[1:]
    column, row = (_taps(min(_WINDOW, length), real) for length in (height, width))
    kernel = (column[:, None] * row).expand(channels, 1, -1, -1)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=channels)

    mean_real, mean_made = blurred(real), blurred(reconstructed)
    variance_real = blurred(real.square()) - mean_real.square()
    variance_made = blurred(reconstructed.square()) - mean_made.square()
    covariance = blurred(real * reconstructed) - mean_real * mean_made
    luminance, contrast = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similar = (2 * mean_real * mean_made + luminance) * (2 * covariance + contrast)
    possible = (mean_real.square() + mean_made.square() + luminance) * (variance_real + variance_made + contrast)
    return (similar / possible).mean((1, 2, 3))


def _taps(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device) - (size - 1) / 2
    return torch.softmax(-places.square() / (2 * _SIGMA**2), 0)


def code_use(counts: Tensor) -> dict[str, float]:
    """Share of the codes that is used, as how many equally frequent ones they count, and how many never occur.

    `counts` (V,) says how often each code occurs.
    """
    counts = counts.cpu()  # MPS has no float64
    shares = counts.double() / counts.sum().clamp_min(1)
    return {
        "usage": float((counts > 0).double().mean()),
        "perplexity": float(torch.exp(-torch.xlogy(shares, shares).sum())),
        "dead_codes": float((counts == 0).sum()),
    }


def compare(
    real: np.ndarray,
    reconstructed: np.ndarray,
    *,
    distances: Mapping[str, Distance] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """How near `reconstructed` pictures or clips are to `real` ones, both uint8 (B, H, W, 3) or (B, T, H, W, 3).

    "psnr" is that of the mean error over all of them, "psnr_each" the mean of each one's own, in dB; "ssim" and
    `distances` are means, of clips over their frames. Clips also have "psnr_of_differences": that of the changes from
    frame to frame, which a motionless clip gets without any.

    Raises:
        ValueError: the two have not one shape, or are not uint8 pictures or clips.
    """
    if real.shape != reconstructed.shape or real.ndim not in (4, 5) or real.shape[-1] != 3 or not len(real):
        shapes = f"{real.shape}, {reconstructed.shape}"
        raise ValueError(f"pictures must be (B, H, W, 3) or (B, T, H, W, 3) on both sides, not {shapes}")
    if real.dtype != np.uint8 or reconstructed.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 0..255, not {real.dtype} and {reconstructed.dtype}")
    errors, rows, motion = [], [], []
    for start in range(0, len(real), batch_size):
        parts = (np.ascontiguousarray(side[start : start + batch_size]) for side in (real, reconstructed))
        first, second = (torch.from_numpy(part).to(device).float() for part in parts)
        errors.append(squared_error(first, second))
        if real.ndim == 5:
            motion.append(squared_error(first.diff(dim=1), second.diff(dim=1)))
        frames = [side.reshape(-1, *side.shape[-3:]).movedim(-1, 1) for side in (first, second)]
        scaled = [side / 127.5 - 1 for side in frames]
        apart = [distance(*scaled) for distance in (distances or {}).values()]
        rows.append(torch.stack([ssim(frames[0], frames[1]), *apart], -1))
    error, means = torch.cat(errors), torch.cat(rows).mean(0)
    numbers = {"psnr": psnr(error.mean()), "psnr_each": sum(map(psnr, error.tolist())) / len(error)}
    if motion:
        numbers["psnr_of_differences"] = psnr(torch.cat(motion).mean())
    return numbers | dict(zip(("ssim", *(distances or {})), means.tolist(), strict=True))


@checked
def frechet_distances(
    real: np.ndarray,
    reconstructed: np.ndarray,
    features: Callable[[Tensor], Tensor],
    *,
    seed: Seed = 0,
    batch_size: Size = 64,
) -> dict[str, tuple[float, int, int]]:
    """Frechet distances of `real` and `reconstructed` pictures or clips (B, ...), and the counts of both sides.

    "all" compares all. Four or more are also split into random halves, all frames of a clip in one: "real" compares the
    second half with the first, and "reconstructed" the reconstructions of the second half with the same. So what comes
    back unchanged has the same distance as real ones. `features` takes uint8 (n, 3, H, W) and gives (n, D).
    """
    halves = np.array_split(np.random.default_rng(seed).permutation(len(real)), 2)
    fitted: list[list[RunningStatistics]] = []
    for side in (real, reconstructed):
        parts = [RunningStatistics() for _ in range(3)]  # the halves, and all
        for part, rows in zip(parts, halves, strict=False):
            for start in range(0, len(rows), batch_size):
                shown = side[rows[start : start + batch_size]]
                with torch.inference_mode():
                    found = features(torch.from_numpy(shown.reshape(-1, *shown.shape[-3:])).movedim(-1, 1))
                part.add(found)
                parts[2].add(found)
        fitted.append(parts)
    (base, other, whole), (_, coded, everything) = fitted
    pairs = {"all": (whole, everything)}
    if len(real) >= 4:
        pairs |= {"reconstructed": (base, coded), "real": (base, other)}
    return {
        name: (frechet_distance(left.result(), right.result()), left.count, right.count)
        for name, (left, right) in pairs.items()
    }


def thumbnails(real: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pictures (B, H, W, 3) reduced to one pixel a token of the `grid` and enlarged again, both bicubic."""
    size = real.shape[2], real.shape[1]
    small = (Image.fromarray(picture).resize(grid[::-1], Image.Resampling.BICUBIC) for picture in real)
    return np.stack([np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) for picture in small])


def motionless(real: np.ndarray) -> np.ndarray:
    """Clips (B, T, H, W, 3) in which every frame is the mean of all."""
    return np.broadcast_to(real.mean(1, keepdims=True).round().astype(np.uint8), real.shape)


def num_fitted_patches(train: np.ndarray, patch: tuple[int, ...], vocab_size: int) -> int:
    """How many patches of `train` k-means is fitted to: 64 an entry, where there are so many and it can be done.

    Of large patches fewer, as an iteration multiplies at most 2 ** 40 numbers: 87,381 of 16x16 pixels, 16,384 entries.
    """
    there = len(train) * (math.prod(train.shape[1:-1]) // math.prod(patch))
    return min(there, 64 * vocab_size, _PRODUCTS // (vocab_size * 3 * math.prod(patch)))


@checked
def nearest_patches(
    train: np.ndarray,
    real: np.ndarray,
    patch: tuple[int, ...],
    vocab_size: int,
    *,
    iterations: int = 15,
    seed: Seed = 0,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """`real` pictures or clips with each patch replaced by the nearest of `vocab_size` ones.

    Those are the k-means of `num_fitted_patches`, drawn from the pictures in `train`; `patch` is (h, w) or (t, h, w),
    and divides both.

    Raises:
        ValueError: it would be fitted to fewer than two patches an entry.
    """
    generator = np.random.default_rng(seed)
    wanted = num_fitted_patches(train, patch, vocab_size)
    if wanted < 2 * vocab_size:
        what = f"{len(train)} pictures have too few patches to fit {vocab_size} of them"
        raise ValueError(f"{what}, or these are too large")
    places = _patch_places(real.shape[1:-1], patch)

    def cut(picture: np.ndarray) -> np.ndarray:
        patches: np.ndarray = picture.reshape(-1, 3)[places].reshape(len(places), -1)
        return patches

    # From as many pictures as there are, a few patches of each.
    shown = train[generator.permutation(len(train))[: -(-wanted // max(1, wanted // len(train)))]]
    share = -(-wanted // len(shown))
    some = [cut(picture)[generator.permutation(len(places))[:share]] for picture in shown]
    points = torch.from_numpy(np.concatenate(some)).to(device).float()
    entries = points[torch.from_numpy(generator.permutation(len(points))[:vocab_size]).to(device)]
    for _ in range(iterations):
        codes = nearest(points, entries)[1]
        counts = torch.bincount(codes, minlength=vocab_size)
        sums = torch.zeros_like(entries).index_add_(0, codes, points)
        entries = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], entries)
    pixels = entries.round().clamp(0, 255).to(torch.uint8).cpu().numpy().reshape(vocab_size, -1, 3)
    made = np.empty(real.shape, np.uint8)
    for picture, into in zip(real, made, strict=True):
        codes = nearest(torch.from_numpy(cut(picture)).to(device).float(), entries)[1]
        into.reshape(-1, 3)[places] = pixels[codes.cpu()]
    return made


def _patch_places(size: tuple[int, ...], patch: tuple[int, ...]) -> np.ndarray:
    """Where in a picture or clip, in raster order, the pixels of every patch are: (patches, pixels of one)."""
    split = [part for length, step in zip(size, patch, strict=True) for part in (length // step, step)]
    order = [*range(0, 2 * len(patch), 2), *range(1, 2 * len(patch), 2)]
    return np.arange(math.prod(size)).reshape(split).transpose(order).reshape(-1, math.prod(patch))
