"""Fills of holes without a generative model, as floors: the nearest training pictures, and a linear regression.

Knows pixels and classes; does not know models. Legend: `M` pictures, `N` training pictures, `D` numbers of a picture,
`H W` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nar.data.open import load_pictures
from nar.data.source import Source
from nar.media.pixels import as_pixels

NEAREST = 8
COMPONENTS = 256  # principal ones, in which the regression is solved
# What is beside the components is alike in neighbours and in colours, and counts as so many times fewer pixels: in the
# centre of Fashion-MNIST 14.7 dB with 1, 16.0 with 3, 16.4 with 10; with the whole covariance of grey 16.5.
_ALIKE = 10
_FITTED = 10_000  # training pictures that the components are found in
_ROWS = 5_000  # at once


class Floors:
    """Training pictures (N, H, W, 3) uint8 with their classes (N,), and what they say about holes."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self._grey = torch.from_numpy(images.mean(-1, dtype=np.float32).reshape(len(images), -1) / 127.5 - 1)
        chosen = np.random.default_rng(0).permutation(len(images))[:_FITTED]
        rows, classes = as_pixels(images[chosen]).flatten(1), torch.from_numpy(labels[chosen])
        count = int(labels.max()) + 1
        self._means = torch.stack([_mean(rows[classes == label], rows) for label in range(count)])
        rows = rows - self._means[classes]
        rank = min(COMPONENTS, *rows.shape)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, scale, self._basis = torch.svd_lowrank(rows, rank)  # (rank,), (D, rank)
        self._variance = (scale**2 / len(rows)).clamp_min(1e-6)
        rest = rows.square().mean(0) - (self._basis.square() * self._variance).sum(1)
        self._noise = _ALIKE * rest.clamp_min(1e-3)  # (D,)

    @classmethod
    def of(cls, source: Source, *, size: int, class_names: Sequence[str]) -> Floors:
        """Read training pictures; raises ValueError where their classes are not `class_names`."""
        found = load_pictures(source, size=size)
        if list(found.class_names) != list(class_names):
            has = f"{source.origin} has the classes {list(found.class_names)}"
            raise ValueError(f"{has}, what is judged {list(class_names)}")
        return cls(found.images, found.labels)

    def measured(self, pixels: Tensor, mask: Tensor, labels: np.ndarray) -> dict[str, np.ndarray]:
        """PSNR (M,) in the holes of pictures (M, 3, H, W) under masks (M, H, W)."""
        inside, order = mask[:, None].expand_as(pixels), self.nearest(pixels, mask)
        close = torch.stack([as_pixels(self.images[rows]) for rows in order], 1)  # (M, K, 3, H, W)
        return {
            "psnr_nearest": psnr_inside(close[:, 0], pixels, inside),
            "psnr_nearest_mean": psnr_inside(close.mean(1), pixels, inside),
            "psnr_regression": psnr_inside(self.regression(pixels, mask, labels), pixels, inside),
        }

    def nearest(self, pixels: Tensor, mask: Tensor) -> np.ndarray:
        """The rows (8, M) of the training pictures that are nearest by the visible pixels, in grey."""
        seen = (~mask).flatten(1).float()
        grey = pixels.mean(1).flatten(1) * seen
        parts = []
        for rows in self._grey.split(_ROWS):  # |x - t|^2 over what is seen, without |x|^2
            parts.append(seen @ rows.square().T - 2 * grey @ rows.T)
        return torch.cat(parts, 1).topk(NEAREST, largest=False).indices.T.numpy()

    def classified(self, pixels: Tensor, labels: np.ndarray) -> np.ndarray:
        """1 where most of the 8 training pictures nearest to a whole picture (M, 3, H, W) have its class (M,), else 0.

        Of equal numbers the class of the nearest counts.
        """
        near = self.labels[self.nearest(pixels, torch.zeros_like(pixels[:, 0], dtype=torch.bool))]  # (8, M)
        votes = (near[:, None] == near[None]).sum(1)
        right: np.ndarray = near[votes.argmax(0), np.arange(len(labels))] == labels
        return right.astype(float)

    def regression(self, pixels: Tensor, mask: Tensor, labels: np.ndarray) -> Tensor:
        """The mean (M, 3, H, W) of the holes given what is visible and the class, of one Gaussian with class means."""
        means, made = self._means[torch.from_numpy(labels)], torch.empty_like(pixels)
        for row, (own, mean) in enumerate(zip(pixels.flatten(1), means, strict=True)):
            seen = (~mask[row]).expand(3, *mask.shape[1:]).flatten()
            basis = self._basis[seen]
            weighted = basis.T / self._noise[seen]
            state = torch.linalg.solve(weighted @ basis + torch.diag(1 / self._variance), weighted @ (own - mean)[seen])
            made[row] = (mean + self._basis @ state).clamp(-1, 1).view_as(made[row])
        return made


def psnr_inside(made: Tensor, true: Tensor, inside: Tensor) -> np.ndarray:
    """PSNR (M,) in dB of pixels (M, 3, H, W) in -1..1 where `inside`, at most 60."""
    error = ((made - true) ** 2 * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    return (10 * torch.log10(4 / error.clamp_min(4e-6))).double().numpy()


def _mean(rows: Tensor, otherwise: Tensor) -> Tensor:
    return (rows if len(rows) else otherwise).mean(0)
