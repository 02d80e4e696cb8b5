"""Drawing codes from a transformer, front by front.

Contract: one forward pass a front; picture i of a seed is the same at any batch size and beside any other pictures; the
result has the distribution that `Transformer.forward` states. Knows models, conditions and codes; never pixels, prompts
or files. Legend: `B` batch, `N` grid positions, `n` positions of a front, `V` vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar.condition import Condition, drop, map_condition, parts
from nar.model import Transformer

Curve = Callable[[float], float]
SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits.

    Attributes:
        guidance_scale: strength of classifier-free guidance; 1.0 is off. A sequence or a `guidance_curve` name varies
            it over fronts.
        guidance_interval: guidance ends, for good, before the first front that finds more than this number of tokens
            generated; the first front is always guided. None never ends it.
        guidance_curve: "constant"; "linear", "cosine" or "power" (cubic) rise from 1.0 at the first front to
            `guidance_scale` at the last.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, ties included; 0 keeps all.
        top_p: keep the most likely tokens up to this mass, the one that crosses it included; 1.0 keeps all.
    """

    guidance_scale: float = 1.0
    guidance_interval: int | None = None
    guidance_curve: str = "constant"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(
                f"guidance_scale must be a finite number of at least 0 (1.0 is off), not {self.guidance_scale}"
            )
        if self.guidance_interval is not None and self.guidance_interval < 0:
            raise ValueError(
                f"guidance_interval must be a number of tokens of at least 0, not {self.guidance_interval}"
            )
        if self.guidance_curve not in CURVES:
            raise ValueError(f"guidance_curve must be one of {', '.join(CURVES)}, not {self.guidance_curve!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0 (0 is greedy), not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps all), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")

    def guidance_at(self, front: int, num_fronts: int) -> float:
        """The guidance scale of one front."""
        progress = front / max(1, num_fronts - 1)
        return 1.0 + (self.guidance_scale - 1.0) * CURVES[self.guidance_curve](progress)


CURVES: dict[str, Curve] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "power": lambda progress: progress**3,
}


class Front(NamedTuple):
    """What one step gives: its number, and all codes (B, *grid) so far, -1 where nothing is decided yet."""

    number: int
    codes: Tensor


def generate(
    model: Transformer,
    condition: Condition,
    sampling: Sampling | None = None,
    *,
    negative: Condition | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Draw codes (B, *grid); see `generate_fronts` for the arguments."""
    codes = torch.empty(0)
    for _, codes in generate_fronts(  # noqa: B007 the last one is wanted
        model, condition, sampling, negative=negative, seed=seed, indices=indices, known=known
    ):
        pass
    return codes


@torch.inference_mode()
def generate_fronts(
    model: Transformer,
    condition: Condition,
    sampling: Sampling | None = None,
    *,
    negative: Condition | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    known: Tensor | None = None,
) -> Iterator[Front]:
    """Draw codes front by front; yields after each.

    Args:
        negative: what guidance leads away from; by default the null condition.
        seed, indices: sample i of the batch draws from the stream (seed, indices[i]), by default (seed, i).
        known: codes (B, *grid), -1 where free; the others are kept as given. Only later fronts take note of them: about
            half of what surrounds a hole in the middle is not seen.

    Raises:
        ValueError: guidance without a null condition, `known` of another grid, or a condition that the model does not
            take.
    """
    sampling = sampling or Sampling()
    schedule = model.layout.schedule
    batch = len(parts(condition)[0])
    scales = [sampling.guidance_at(front, schedule.num_steps) for front in range(schedule.num_steps)]
    guided = any(scale != 1.0 for scale in scales)
    if guided and negative is None:
        negative = _null(model, condition)
    streams = uniforms(seed, range(batch) if indices is None else indices, schedule.num_positions).to(model.device)
    given = None if known is None else model.in_order(known.to(model.device))
    tokens = torch.full((batch, schedule.num_positions), -1, device=model.device)

    embedded, key_mask = model.embed(condition)
    if guided and negative is not None:
        other, other_mask = model.embed(negative)
        embedded = torch.cat([embedded, other])
        key_mask = None if key_mask is None or other_mask is None else torch.cat([key_mask, other_mask])
    cache = model.new_cache(len(embedded))
    for front in range(schedule.num_steps):
        if front == 0:
            hidden = model.prefill(embedded, key_mask, cache)
        else:
            if cache.batch_size > batch and _guidance_over(sampling, schedule.front(front).start):
                cache.keep(batch)
            last = tokens[:, schedule.front(front - 1)]
            fed = torch.cat([last, last]) if cache.batch_size > batch else last
            hidden = model.decode(fed, range(front - 1, front), cache)
        if cache.batch_size > batch:
            hidden = hidden[batch:].lerp(hidden[:batch], scales[front])
        positions = schedule.front(front)
        drawn = draw(model.logits(hidden), streams[:, positions], sampling.temperature, sampling.top_k, sampling.top_p)
        if given is not None:
            drawn = torch.where(given[:, positions] >= 0, given[:, positions], drawn)
        tokens[:, positions] = drawn
        yield Front(front, model.in_raster(tokens))


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token (B, n) from each distribution of `logits` (B, n, V), by inverse CDF at `uniform` (B, n) in [0, 1)."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    cumulative = probabilities(logits, temperature, top_k, top_p).cumsum(-1)
    # Below the total even after rounding, so that the token found has a probability above zero.
    threshold = uniform.clamp(max=1 - 2**-23)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution (..., V) in float32 after temperature, then top-k (ties kept), then top-p."""
    logits = logits.float() / max(temperature, SMALLEST_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        share = ordered.softmax(-1)
        outside = share.cumsum(-1) - share > top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -math.inf)
    return logits.softmax(-1)


def uniforms(seed: int, indices: Sequence[int], count: int) -> Tensor:
    """(len(indices), count) float32 numbers in [0, 1): row i comes from the stream (seed, indices[i]) alone."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed}")
    rows = [np.random.default_rng((seed, index)).random(count, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count)


def _guidance_over(sampling: Sampling, num_generated: int) -> bool:
    return sampling.guidance_interval is not None and num_generated > sampling.guidance_interval


def _null(model: Transformer, condition: Condition) -> Condition:
    config = model.config
    if config.num_classes and not config.null_class:
        raise ValueError("guidance_scale must be 1.0: this model has no null class to lead away from")
    if not config.num_classes and not config.text_dim:
        raise ValueError(
            "guidance_scale must be 1.0: this model's only condition is given frames, which can't be left out"
        )
    return drop(condition, torch.ones(len(parts(condition)[0]), dtype=torch.bool, device=_device_of(condition)))


def _device_of(condition: Condition) -> torch.device:
    devices: list[torch.device] = []
    map_condition(condition, lambda tensor: devices.append(tensor.device) or tensor)  # type: ignore[func-returns-value]
    return devices[0]
