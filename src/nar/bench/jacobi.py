"""Exact parallel decoding of raster models: Jacobi iteration on all tokens of a window, with fixed random numbers.

With its random numbers given, sampling is a function of the tokens before, and its fixed point is what sampling one
after the other gives, token for token (Wiggers and Hoogeboom, arXiv 2002.09928). A pass predicts a window of positions
from drafts; what it predicts is final up to the first draft that it changes, and drafts what follows. Knows raster
models and random numbers; does not know clocks. Legend: `B` batch, `N` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nar.condition import AnyCondition, Condition
from nar.model import Transformer
from nar.sampling import Sampling, embed_sides, last_guided, probabilities, sample, uniforms

Noise = Literal["uniform", "gumbel"]


class Decoded(NamedTuple):
    """Codes (B, *grid), and how many passes the batch took: windows begin where all of its pictures are final."""

    codes: Tensor
    passes: int


@torch.inference_mode()
def jacobi(
    model: Transformer,
    condition: AnyCondition,
    sampling: Sampling | None = None,
    *,
    noise: Noise = "uniform",
    window: int | None = None,
    seed: int | Sequence[int] = 0,
    indices: Sequence[int] | None = None,
) -> Decoded:
    """Sample codes from a raster model in as few passes as its drafts allow.

    Args:
        noise: "uniform" takes the numbers and the inverse CDF of `nar.generate`, whose codes these then are. "gumbel"
            adds a number of its own to every token's log-probability and takes the largest sum: a small change of the
            distribution then changes fewer drafts, so that fewer passes are needed.
        window: positions predicted in a pass, by default all; 1 samples one after the other.
        seed, indices: as in `nar.generate`.

    Raises:
        ValueError: a model of another order than raster, a window below 1, or a guidance that ends on the way.
    """
    sampling, condition = sampling or Sampling(), Condition.of(condition)
    schedule, batch = model.layout.schedule, len(condition)
    count = schedule.num_positions
    if model.config.schedule != "raster":
        raise ValueError(f"Jacobi decoding is of raster models; this one's schedule is {model.config.schedule}")
    window = count if window is None else window
    if window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    guided = last_guided(sampling, schedule)
    if guided not in (-1, count - 1):
        raise ValueError("guidance that ends on the way is not decoded in windows: leave guidance_interval out")
    token_of = _sampler(sampling, noise, seed, range(batch) if indices is None else indices, count, model)
    embedded, key_mask = embed_sides(model, condition, None) if guided >= 0 else model.embed(condition)
    cache = model.new_cache(len(embedded))
    scales = torch.tensor([sampling.guidance_at(front, schedule) for front in range(count)], device=model.device)

    def predicted(hidden: Tensor, positions: slice) -> Tensor:
        if guided >= 0:
            hidden = hidden[batch:].lerp(hidden[:batch], scales[positions, None].to(hidden.dtype))
        return token_of(model.logits(hidden), positions)

    tokens = torch.zeros(batch, count, dtype=torch.long, device=model.device)
    tokens[:] = predicted(model.prefill(embedded, key_mask, cache), slice(0, 1))  # the first draft of all others too
    final = passes = 1
    while final < count:
        ahead = slice(final, min(final + window, count))
        fed = tokens[:, : ahead.stop - 1]
        fed = torch.cat([fed, fed]) if guided >= 0 else fed
        found = predicted(model.decode(fed, range(final - 1, ahead.stop - 1), cache), ahead)
        passes += 1
        changed = found != tokens[:, ahead]
        tokens[:, ahead] = found
        tokens[:, ahead.stop :] = found[:, -1:]
        # Final up to the first draft that changed in any picture, and that position too: what it saw was right.
        right = int((~changed.any(0)).long().cumprod(0).sum())
        done = min(right + 1, ahead.stop - final)
        cache.length -= ahead.stop - final - done
        final += done
    return Decoded(model.in_raster(tokens), passes)


def _sampler(
    sampling: Sampling, noise: Noise, seed: int | Sequence[int], indices: Sequence[int], count: int, model: Transformer
) -> Callable[[Tensor, slice], Tensor]:
    """What makes tokens (B, n) of logits (B, n, V) at positions, by random numbers that are fixed for each of them."""
    settings = sampling.temperature, sampling.top_k, sampling.top_p
    if noise == "uniform" or sampling.temperature == 0:
        numbers = uniforms(seed, indices, count).to(model.device)
        return lambda logits, positions: sample(logits, numbers[:, positions], *settings)
    vocab_size = model.config.vocab_size
    spread = uniforms(seed, indices, count * vocab_size).view(-1, count, vocab_size)
    added = -(-spread.double().clamp_min(torch.finfo(torch.float32).tiny).log()).log().float().to(model.device)
    return lambda logits, positions: (probabilities(logits, *settings).log() + added[:, positions]).argmax(-1)
