"""The specification of sampling, slow and obvious: no cache, no folding, one full forward pass a front, one token at a
time.

Takes nothing from `nar.sampling`: streams, guidance over the fronts, filters and inverse CDF are stated here again.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from nar import Sampling, Transformer
from nar.condition import Condition


def stream(seed: int, index: int, count: int) -> np.ndarray:
    """The uniforms (count,) of sample `index` of a seed below 2**32."""
    words = np.random.SeedSequence([seed, index])
    return np.random.Generator(np.random.PCG64(words)).random(count, dtype=np.float32)


def guidance(sampling: Sampling, front: int, fronts: tuple[int, ...]) -> float:
    """The guidance scale of a front, the interval aside; `fronts` are numbers of tokens."""
    by_tokens = sampling.guidance_curve.endswith("-tokens")
    progress = sum(fronts[:front]) / sum(fronts) if by_tokens else front / max(1, len(fronts) - 1)
    progress = progress**sampling.guidance_power
    risen = {
        "constant": 1.0,
        "linear": progress,
        "cosine": 0.5 - 0.5 * math.cos(math.pi * progress),
        "power": progress * progress * progress,
    }
    return 1.0 + (sampling.guidance_scale - 1.0) * risen[sampling.guidance_curve.removesuffix("-tokens")]


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities (V,), in float64: temperature, then top-k with ties kept, then top-p with the token that
    crosses it."""
    scaled = logits.astype(np.float64) / max(sampling.temperature, 1e-5)
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = set(order)
    if sampling.top_k:
        kept = {token for token in order if scaled[token] >= scaled[order[min(sampling.top_k, len(order)) - 1]]}
    weights = np.array([math.exp(scaled[token] - scaled[order[0]]) * (token in kept) for token in range(len(scaled))])
    weights /= weights.sum()
    if sampling.top_p < 1:
        mass = 0.0
        for token in order:
            if mass > sampling.top_p:
                weights[token] = 0.0
            mass += weights[token]
    return weights / weights.sum()


def choose(shares: np.ndarray, number: float) -> int:
    """The first token at which the sum of the shares passes `number`."""
    total = 0.0
    for token, share in enumerate(shares):
        total += share
        if total > number:
            return token
    return int(np.flatnonzero(shares)[-1])


@torch.no_grad()
def reference_generate(
    model: Transformer, condition: Condition, sampling: Sampling, seed: int, known: Tensor | None = None
) -> Tensor:
    """What `nar.generate` must return: every front from logits of the whole grid, guidance on logits."""
    schedule, batch = model.layout.schedule, len(condition)
    codes = torch.zeros(batch, *model.config.grid, dtype=torch.long)
    streams = [stream(seed, row, schedule.num_positions) for row in range(batch)]
    guided = True
    for front in range(schedule.num_steps):
        positions = schedule.front(front)
        logits = model(codes, condition).flatten(1, -2)[:, schedule.order[positions]]
        if front and sampling.guidance_interval is not None and positions.start > sampling.guidance_interval:
            guided = False
        if guided and sampling.guidance_scale != 1.0:
            null = model(codes, condition.drop(torch.ones(batch, dtype=torch.bool)))
            null = null.flatten(1, -2)[:, schedule.order[positions]]
            logits = null + guidance(sampling, front, schedule.fronts) * (logits - null)
        for row in range(batch):
            for place in range(positions.start, positions.stop):
                own = logits[row, place - positions.start].numpy()
                token = int(own.argmax())
                if sampling.temperature > 0:
                    token = choose(distribution(own, sampling), float(streams[row][place]))
                if known is not None and known.flatten(1)[row, schedule.order[place]] >= 0:
                    token = int(known.flatten(1)[row, schedule.order[place]])
                codes.view(batch, -1)[row, schedule.order[place]] = token
    return codes
