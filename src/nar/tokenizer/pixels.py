"""Pictures as arrays, as tensors and as Pillow images: the edge between uint8 and -1..1."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float32 -1..1 (B, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """Float -1..1 (B, 3, H, W), clamped, to Pillow pictures."""
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in images]


def pad_to_multiple(pixels: Tensor, patch_size: int) -> Tensor:
    """Pictures (B, 3, H, W) with the last row and column repeated up to the next multiple of the patch, below and right.

    Cut what a tokenizer makes of them to `[..., :H, :W]`.
    """
    height, width = pixels.shape[-2:]
    below, right = -height % patch_size, -width % patch_size
    return F.pad(pixels, (0, right, 0, below), mode="replicate") if below or right else pixels
