"""Continuous latents to discrete codes and back: the codebook of a tokenizer, learned or fixed.

Does not know whether the latents come from pictures or clips, nor how they are trained. Legend: `B` batch, `D`
code_dim, `V` vocab_size, `...` the latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTIZERS = ("vq", "fsq", "lfq", "bsq")
_CHUNK_BYTES = 2**29  # of distances held at once
_GROUP = 9  # dimensions of a binary code whose joint distribution is held: 512 probabilities a latent


class Quantized(NamedTuple):
    """What a quantiser gives for training: straight-through latents, codes, and its two losses."""

    latents: Tensor  # (B, D, ...)
    codes: Tensor  # (B, ...) int64
    codebook_loss: Tensor  # pulls codes to the encoder's output; 0 where the codebook is fixed
    commitment_loss: Tensor  # pulls the encoder's output to its code; 0 for FSQ, whose codes are everywhere


class Quantizer(nn.Module):
    """The protocol of all quantisers: a kind says how latents become `points`, and what is `nearest` to them.

    All of it is computed in float32, whatever the latents are and whether autocast or TF32 is on: codes in training are
    those of `encode`.
    """

    vocab_size: int
    learned = False  # entries are parameters
    committed = True  # latents are pulled to their entries

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise `latents` (B, D, ...) with a straight-through gradient."""
        with torch.autocast(latents.device.type, enabled=False):
            points = self.points(latents)
            codes = self.nearest(points.detach())
            entries = self.entries(codes).float()
            none = points.new_zeros(())
            return Quantized(
                (points + (entries - points).detach()).movedim(-1, 1).to(latents.dtype),
                codes,
                F.mse_loss(entries, points.detach()) if self.learned else none,
                F.mse_loss(points, entries.detach()) if self.committed else none,
            )

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, D, ...) to codes (B, ...), int64."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.nearest(self.points(latents))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, ...) to latents (B, D, ...)."""
        return self.entries(codes).movedim(-1, 1)

    def points(self, latents: Tensor) -> Tensor:
        """Latents (B, D, ...) as they are compared with entries, (B, ..., D) float32."""
        raise NotImplementedError

    def nearest(self, points: Tensor) -> Tensor:
        """The codes (B, ...) of the entries nearest to `points` (B, ..., D)."""
        raise NotImplementedError

    def entries(self, codes: Tensor) -> Tensor:
        """The entries (B, ..., D) that `codes` (B, ...) stand for."""
        raise NotImplementedError

    def restart(self, latents: Tensor, dead: Tensor, generator: torch.Generator) -> None:
        """Move the entries marked in `dead` (V,) bool onto random points of latents (B, D, ...); revives a codebook.

        Only where entries are `learned`.
        """
        raise NotImplementedError


class VectorQuantizer(Quantizer):
    """Nearest entry of a learned codebook; with `l2_norm` both sides are normalised at use (LlamaGen, spherical VQ).

    The stored entries need not be of unit length. Ties go to the lowest index.
    """

    learned = True

    def __init__(self, vocab_size: int, code_dim: int, *, l2_norm: bool = True) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(vocab_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / vocab_size, 1.0 / vocab_size)

    def codebook(self) -> Tensor:
        """The entries as they are compared and decoded, (V, D)."""
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight

    def points(self, latents: Tensor) -> Tensor:
        points = latents.movedim(1, -1).float()
        return F.normalize(points, dim=-1) if self.l2_norm else points

    def nearest(self, points: Tensor) -> Tensor:
        return nearest_entries(points, self.codebook().detach().float())

    def entries(self, codes: Tensor) -> Tensor:
        return F.embedding(codes.long(), self.codebook())  # which takes no bytes

    @torch.no_grad()
    def restart(self, latents: Tensor, dead: Tensor, generator: torch.Generator) -> None:
        self.embedding.weight[dead] = chosen_points(self.points(latents), dead, generator)

    @torch.no_grad()
    def cluster(self, latents: Tensor, total: Callable[[Tensor], Tensor] = lambda share: share) -> Tensor:
        """Move every entry to the mean of its latents (B, D, ...): one step of k-means; returns their counts (V,).

        `total` sums over processes that each hold a share of the latents. Entries without latents stay.
        """
        counts, sums = (total(part) for part in self.members(latents, self.encode(latents)))
        used = counts > 0
        means = sums[used] / counts[used, None]
        means = F.normalize(means, dim=-1) if self.l2_norm else means
        self.embedding.weight[used] = means.to(self.embedding.weight.dtype)
        return counts

    @torch.no_grad()
    def members(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """For every entry the count (V,) and the sum (V, D) of the latents (B, D, ...) that have its code (B, ...)."""
        points = self.points(latents).flatten(0, -2)
        sums = points.new_zeros(self.vocab_size, points.shape[-1]).index_add_(0, codes.flatten(), points)
        return torch.bincount(codes.flatten(), minlength=self.vocab_size).float(), sums


def chosen_points(points: Tensor, dead: Tensor, generator: torch.Generator) -> Tensor:
    """A random row of `points` (..., D) for each entry marked in `dead` (V,) bool."""
    points = points.flatten(0, -2)
    return points[torch.randint(len(points), (int(dead.sum()),), generator=generator).to(points.device)]


def nearest_entries(points: Tensor, codebook: Tensor) -> Tensor:
    """The codes (...) of the entries of `codebook` (V, D) nearest to `points` (..., D); the lowest of those as near."""
    rows, codebook = _whole(points.flatten(0, -2)), _whole(codebook)
    squares = codebook.square().sum(-1)  # |z|^2 is the same for every entry and left out
    pieces = rows.split(max(1, _CHUNK_BYTES // (len(codebook) * rows.element_size())))
    codes = [torch.addmm(squares, piece, codebook.T, alpha=-2.0).argmin(-1) for piece in pieces]
    return torch.cat(codes).reshape(points.shape[:-1])


class ScalarQuantizer(Quantizer):
    """Finite scalar quantisation (Mentzer et al. 2023): every dimension is bounded and rounded to one of its levels.

    Nothing is learned and nothing can die. Entries run from -1 to 1; the first dimension is the fastest in a code.
    """

    committed = False

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels
        self.vocab_size = math.prod(levels)

    def points(self, latents: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, dtype=torch.float64)
        half = (levels - 1) * 1.001 / 2  # a little more, so that the ends are reached
        offset = (1 - levels % 2) / 2  # by which even numbers of levels are off
        shift = (offset / half).atanh()  # which keeps 0 at 0
        half, offset, shift = torch.stack((half, offset, shift)).float().to(latents.device).unbind()
        bounded = torch.tanh(latents.movedim(1, -1).float() + shift) * half - offset
        return bounded / (self._levels(latents) // 2)

    def nearest(self, points: Tensor) -> Tensor:
        middle = self._levels(points) // 2
        digits = (points * middle).round().long() + middle
        return (digits * self._places(points)).sum(-1)

    def entries(self, codes: Tensor) -> Tensor:
        levels = self._levels(codes)
        digits = codes[..., None] // self._places(codes) % levels
        return (digits - levels // 2) / (levels // 2)

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, device=like.device)

    def _places(self, like: Tensor) -> Tensor:
        return torch.tensor([math.prod(self.levels[:index]) for index in range(len(self.levels))], device=like.device)


class BinaryQuantizer(Quantizer):
    """The signs of a latent are the bits of its code: 2 ** code_dim codes without a table.

    Lookup-free quantisation (Yu et al. 2023) has entries of -1 and 1; `spherical` (BSQ, Zhao et al. 2024) first brings
    latents to unit length and has entries of that length. Both need the entropy loss, or bits stop changing.
    """

    def __init__(self, code_dim: int, *, spherical: bool) -> None:
        super().__init__()
        self.vocab_size = 2**code_dim
        self.code_dim = code_dim
        self.spherical = spherical
        self.scale = code_dim**-0.5 if spherical else 1.0

    def points(self, latents: Tensor) -> Tensor:
        points = latents.movedim(1, -1).float()
        return F.normalize(points, dim=-1) if self.spherical else points

    def nearest(self, points: Tensor) -> Tensor:
        return ((points > 0) * self._places(points)).sum(-1)

    def entries(self, codes: Tensor) -> Tensor:
        return ((codes[..., None] & self._places(codes)) > 0) * (2 * self.scale) - self.scale

    def entropies(
        self, latents: Tensor, sharpness: float = 4.0, mean: Callable[[Tensor], Tensor] = lambda share: share
    ) -> tuple[Tensor, Tensor]:
        """Mean entropy of single latents (B, D, ...), to be small, and that of the mean code, to be large; in nats.

        A latent gives each code the probability softmax(-|z - c|^2 / T), of which each bit is independent: its log-odds
        are `sharpness` where z is at its entry. The mean code is exact over groups of 9 bits at most, taken as
        independent of each other. `mean` averages over processes that each hold a share of the latents.
        """
        with torch.autocast(latents.device.type, enabled=False):
            odds = self.points(latents).flatten(0, -2) * (sharpness / self.scale)  # (N, D)
            single = (F.softplus(odds) - odds * odds.sigmoid()).sum(-1).mean()
            joint = odds.new_zeros(())
            for bits in odds.split(math.ceil(self.code_dim / math.ceil(self.code_dim / _GROUP)), dim=-1):
                both = torch.stack((F.logsigmoid(-bits), F.logsigmoid(bits)), -1)  # (N, d, 2)
                logs = both[:, 0]
                for index in range(1, bits.shape[-1]):
                    logs = (logs[:, :, None] + both[:, index, None, :]).flatten(1)  # (N, 2 ** (index + 1))
                share = logs.exp().mean(0)
                whole = share + (mean(share.detach()) - share.detach())  # of all processes; the gradient of this one
                joint = joint - torch.xlogy(whole, whole.clamp_min(1e-30)).sum()
            return single, joint

    def _places(self, like: Tensor) -> Tensor:
        return 2 ** torch.arange(self.code_dim, device=like.device)


def _whole(x: Tensor) -> Tensor:
    """`x` (..., D) in a format whose products keep all its digits: where training has allowed TF32, that is float64.

    TF32 keeps 10 bits of each factor, which changed 2.3 % of the codes of `emoji`. The setting belongs to the process,
    other threads included, and is left alone.
    """
    try:
        cut = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set through PyTorch's newer interface, which this one does not read
        cut = True
    return x.double() if cut and x.device.type != "mps" else x  # which has neither TF32 nor float64


def sample_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A code (...) for every row of `logits` (..., V): where its cumulative distribution passes `uniforms` (...)."""
    shares = logits.float().softmax(-1).cumsum(-1)
    codes = torch.searchsorted(shares, (uniforms.float() * shares[..., -1])[..., None], right=True).squeeze(-1)
    return codes.clamp_max(logits.shape[-1] - 1)


def build_quantizer(
    kind: str, vocab_size: int, code_dim: int, *, l2_norm: bool = True, levels: tuple[int, ...] = ()
) -> Quantizer:
    """The quantiser that a tokenizer's config describes, see `check_quantizer`."""
    if kind == "vq":
        return VectorQuantizer(vocab_size, code_dim, l2_norm=l2_norm)
    return ScalarQuantizer(levels) if kind == "fsq" else BinaryQuantizer(code_dim, spherical=kind == "bsq")


def check_quantizer(kind: str, vocab_size: int, code_dim: int, levels: tuple[int, ...]) -> None:
    """Raise ValueError unless `kind` is known and its sizes agree: `levels` of fsq, 2 ** code_dim of lfq and bsq."""
    if kind not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, not {kind!r}")
    if kind != "fsq" and levels:
        raise ValueError(f"levels {levels} are of quantizer fsq, not of {kind}; leave them out")
    if kind == "fsq" and min(levels, default=0) < 2:
        raise ValueError(f"quantizer fsq needs levels of at least 2 each, such as [8, 8, 8, 5, 5], not {levels}")
    if kind == "fsq" and (math.prod(levels), len(levels)) != (vocab_size, code_dim):
        made = f"vocab_size {math.prod(levels)} and code_dim {len(levels)}"
        raise ValueError(f"levels {levels} make {made}, not {vocab_size} and {code_dim}; they must agree")
    if kind in ("lfq", "bsq") and vocab_size != 2**code_dim:
        bits = f"one bit a dimension: code_dim {code_dim} makes vocab_size {2**code_dim}"
        raise ValueError(f"quantizer {kind} has {bits}, not {vocab_size}")
