"""Better codes for given pixels: descent through the decoder, from what the encoder proposes.

An encoder answers at once, for all pictures in the same way; which codes decode closest to *this* picture it only
estimates. Here they are searched: a code is relaxed to a mixture of the entries near it, the mixture is sampled with
noise and sharpened until one entry is left (stochastic Gumbel annealing: Yang, Bamler and Mandt 2020, arXiv
2006.04240). Knows any tokenizer with one quantiser; weights and vocabulary stay what they are. Legend: `B` batch,
`N` codes a sample, `D` code_dim, `V` vocab_size, `K` candidates.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from torch import Tensor

from nar.storage.fields import Range, Seed, checked
from nar.tokenizer.base import Tokenizer

MOST_ENTRIES = 2**18  # distances to all entries are taken
_CANDIDATES = 32
_RENEWED = 10  # steps after which candidates are looked for again
_RATE = 0.04  # of Adam; this and the temperatures in units of the entries' spacing, see `_spacing`
_HOT, _COLD = 0.15, 0.02  # half or twice as hot: within 0.15 dB (emoji, clips)
_CHUNK = 2**27  # distances held at once: half a gigabyte


@checked
@torch.inference_mode(False)
@torch.enable_grad()
def refine_codes(
    tokenizer: Tokenizer, pixels: Tensor, *, steps: Annotated[int, Range(1, 10_000)] = 100, seed: Seed = 0
) -> Tensor:
    """Codes of `pixels` that decode closer to them than those of `tokenizer.encode`, of the same shape.

    Args:
        pixels: pictures (B, 3, H, W) or clips (B, 3, T, H, W), as `encode` takes them.
        steps: passes forward and back through the decoder; 100 give most of the gain.
        seed: of the noise, the same for each sample: its codes do not depend on its batch, but for rounding.

    What counts is the squared error of pixels in -1..1. No sample becomes worse: where the search does not help, the
    encoder's codes are returned. `docs/howto/tokenizers.md` has what it gains and costs.

    Raises:
        ValueError: fewer than one step, a vocabulary of more than 2 ** 18, or pixels that `encode` refuses.
    """
    quantizer = tokenizer.quantizer
    if quantizer.vocab_size > MOST_ENTRIES:
        raise ValueError(f"refining searches at most {MOST_ENTRIES} entries, this tokenizer has {quantizer.vocab_size}")
    options = tokenizer.decode_options(pixels)
    pixels = pixels.clone()  # not of inference mode
    with torch.no_grad():
        latents = tokenizer.latents(pixels)
        first = quantizer.encode(latents)
        table = quantizer.entries(torch.arange(quantizer.vocab_size, device=pixels.device)).float()  # (V, D)
        points = quantizer.points(latents).flatten(1, -2)  # (B, N, D)
        spacing = _spacing(table)
    noise = torch.Generator(pixels.device).manual_seed(seed)
    points.requires_grad_()
    optimizer = torch.optim.Adam([points], lr=_RATE * spacing)
    for step in range(steps):
        if step % _RENEWED == 0:
            near = table[_nearest(points.detach(), table)]  # (B, N, K, D)
        temperature = _HOT * (_COLD / _HOT) ** (step / steps) * spacing**2
        scores = (points[..., None, :] - near).square().sum(-1) / (-2 * temperature)  # (B, N, K)
        exponentials = torch.empty(scores.shape[1:], device=scores.device).exponential_(generator=noise)
        shares = (scores - exponentials.clamp_min(1e-20).log()).softmax(-1)  # Gumbel noise; one may be 0
        mixed = (shares[..., None, :] @ near).squeeze(-2).mT.unflatten(-1, first.shape[1:])
        error = _error(tokenizer.decode_latents(mixed, **options), pixels)
        (points.grad,) = torch.autograd.grad(error.log().sum(), points)
        optimizer.step()
    with torch.no_grad():
        refined = quantizer.nearest(points).view_as(first)
        after, before = (_error(tokenizer.decode(codes, **options), pixels) for codes in (refined, first))
    return torch.where((after < before).view(-1, *[1] * (first.ndim - 1)), refined, first)


def _error(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error (B,) of what a picture can show: values outside -1..1 are cut off."""
    return (decoded.float().clamp(-1.0, 1.0) - pixels).square().flatten(1).mean(1).clamp_min(1e-12)


def _nearest(points: Tensor, table: Tensor) -> Tensor:
    """The indices (B, N, K) of the entries nearest to points (B, N, D)."""
    squares = table.square().sum(-1)
    pieces = points.flatten(0, 1).split(max(1, _CHUNK // len(table)))
    count = min(_CANDIDATES, len(table))
    nearest = [torch.addmm(squares, piece, table.T, alpha=-2.0).topk(count, largest=False).indices for piece in pieces]
    return cast(Tensor, torch.cat(nearest).unflatten(0, points.shape[:2]))


def _spacing(table: Tensor) -> float:
    """The root mean square distance of entries (V, D), of some 512, to the nearest other one."""
    some = table[:: max(1, len(table) // 512)]
    distances: Tensor = torch.cdist(some, table)
    second = distances.topk(min(2, len(table)), largest=False).values[:, -1]
    return max(float(second.square().mean().sqrt()), 1e-6)
