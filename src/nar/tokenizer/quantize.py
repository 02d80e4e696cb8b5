"""Continuous latents to discrete codes and back: the codebook of a tokenizer.

Does not know whether the latents come from pictures or clips. Legend: `B` batch, `D` code_dim, `V` vocab_size,
`...` the latent grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a quantiser gives for training: straight-through latents, codes, and its two losses."""

    latents: Tensor  # (B, D, ...)
    codes: Tensor  # (B, ...) int64
    codebook_loss: Tensor  # pulls codes to the encoder's output
    commitment_loss: Tensor  # pulls the encoder's output to its code


class VectorQuantizer(nn.Module):
    """Nearest entry of a learned codebook; with `l2_norm` both sides are normalised at use (LlamaGen, spherical VQ).

    The stored entries need not be of unit length. Ties go to the lowest index.
    """

    def __init__(self, vocab_size: int, code_dim: int, *, l2_norm: bool = True) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(vocab_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / vocab_size, 1.0 / vocab_size)

    def codebook(self) -> Tensor:
        """The entries as they are compared and decoded, (V, D)."""
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise `latents` (B, D, ...) with a straight-through gradient; in float32 whatever the input is."""
        points = latents.movedim(1, -1).float()
        if self.l2_norm:
            points = F.normalize(points, dim=-1)
        codebook = self.codebook().float()
        with torch.autocast(latents.device.type, enabled=False):
            codes = _nearest(points.detach(), codebook.detach())
        entries = F.embedding(codes, codebook)
        straight_through = points + (entries - points).detach()
        return Quantized(
            straight_through.movedim(-1, 1).to(latents.dtype),
            codes,
            F.mse_loss(entries, points.detach()),
            F.mse_loss(points, entries.detach()),
        )

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, D, ...) to codes (B, ...), int64."""
        points = latents.movedim(1, -1).float()
        return _nearest(F.normalize(points, dim=-1) if self.l2_norm else points, self.codebook().float())

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, ...) to latents (B, D, ...)."""
        return F.embedding(codes, self.codebook()).movedim(-1, 1)

    @torch.no_grad()
    def restart(self, latents: Tensor, dead: Tensor, generator: torch.Generator) -> None:
        """Move the entries marked in `dead` (V,) bool onto randomly drawn latents (B, D, ...); revives a codebook."""
        points = latents.movedim(1, -1).flatten(0, -2).float()
        if self.l2_norm:
            points = F.normalize(points, dim=-1)
        drawn = torch.randint(len(points), (int(dead.sum()),), generator=generator)
        self.embedding.weight[dead] = points[drawn.to(points.device)].to(self.embedding.weight.dtype)


def _nearest(points: Tensor, codebook: Tensor) -> Tensor:
    flat = points.flatten(0, -2)
    # |z|^2 is the same for every entry and left out.
    distance = torch.addmm(codebook.square().sum(-1), flat, codebook.T, alpha=-2.0)
    return distance.argmin(-1).reshape(points.shape[:-1])
