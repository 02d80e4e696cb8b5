"""Pictures and clips as arrays, as tensors and as Pillow images: the edge between uint8 and -1..1, and its guards."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float32 -1..1 (B, 3, H, W); clips (B, T, H, W, 3) to (B, 3, T, H, W)."""
    return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """Float -1..1 (B, 3, H, W), clamped, to Pillow pictures; of clips (B, 3, T, H, W) the frames side by side."""
    if pixels.ndim == 5:
        pixels = pixels.movedim(2, 3).flatten(3, 4)
    return [Image.fromarray(image) for image in as_images(pixels)]


def as_images(pixels: Tensor) -> np.ndarray:
    """Float -1..1 (B, 3, H, W) or (B, 3, T, H, W), clamped, to uint8 (B, H, W, 3) or (B, T, H, W, 3)."""
    images: np.ndarray = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return images


def pad_to_multiple(pixels: Tensor, patch_size: int) -> Tensor:
    """Pictures (B, 3, H, W) or clips (B, 3, T, H, W), the last row and column repeated up to a multiple of the patch.

    Cut what a tokenizer makes of them to `[..., :H, :W]`.
    """
    height, width = pixels.shape[-2:]
    rows, columns = (
        torch.arange(size + -size % patch_size, device=pixels.device).clamp(max=size - 1) for size in (height, width)
    )
    return pixels[..., rows[:, None], columns]


def check_values(pixels: Tensor, what: str) -> None:
    """Raise ValueError unless `pixels`, named as in "pictures", are floats of about -1..1; NaN and infinity are not."""
    if not pixels.is_floating_point():
        raise ValueError(f"{what} must be float in -1..1, not {pixels.dtype}; use x / 127.5 - 1")
    if pixels.numel():
        low, high = (float(value) for value in torch.aminmax(pixels.detach()))
        if not (low >= -1.5 and high <= 1.5):  # also false for NaN
            raise ValueError(f"{what} have values from {low:.3g} to {high:.3g}, not -1..1; use x / 127.5 - 1")


def check_codes(codes: Tensor, vocab_size: int) -> None:
    """Raise ValueError for what are no whole numbers, and for codes outside 0..vocab_size - 1."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be whole numbers, not {codes.dtype}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < vocab_size:
        raise ValueError(
            f"codes run from {int(codes.min())} to {int(codes.max())}, this tokenizer has 0..{vocab_size - 1}; "
            "were they made with another tokenizer?"
        )
