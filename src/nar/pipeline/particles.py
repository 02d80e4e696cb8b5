"""Sampling of codes amid known ones by weighted choice: sequential Monte Carlo over fronts.

A front sees only earlier ones, so that what is sampled takes no note of known codes that come later. Here several
samples of each picture, its particles, go on side by side; each is weighted by how likely it made the known codes, and
those of little weight give way to copies of others. With many particles the result has the model's own distribution
given all that is known, and the weights' means multiply to an unbiased estimate of the probability of what is known,
whose logarithm is therefore biased low. Knows models, conditions and codes; does not know pixels. Legend: `B` pictures,
`K` particles of each, `N` grid positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nar.condition import AnyCondition, Condition
from nar.model import Transformer
from nar.sampling import Sampling, check_known, embed_sides, last_guided, no_numbers, sample_rows, uniforms
from nar.storage.fields import checked

MOST_PARTICLES = 1024
LEAST_EFFECTIVE = 0.5  # of the particles: below, those of little weight give way
STREAMS = 48  # bits before the number of a particle in that of its stream: passes over a clip have those from 32 on


class Weighted(NamedTuple):
    """What one step gives: its number, the codes (B, *grid) so far of a likely particle, after the last one of the one
    that is taken, estimates (B,) of the log-probability in nats of the known codes so far, and the codes of all
    particles, (B, K, *grid), before any gives way."""

    number: int
    codes: Tensor
    log_known: Tensor
    particles: Tensor


@checked
@torch.inference_mode()
def weighted_fronts(
    model: Transformer,
    condition: AnyCondition,
    sampling: Sampling | None = None,
    *,
    known: Tensor,
    particles: int,
    negative: Condition | None = None,
    seed: int | Sequence[int] = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Weighted]:
    """Sample codes front by front, `particles` of each picture, weighted by what is `known` (B, *grid), -1 where free.

    Weights are the model's own probabilities, without guidance and at temperature 1, whatever settings propose. So the
    estimates are those of the model where settings change nothing, and with them the choice leans to what is known.
    Particle 0 has the random numbers of `nar.generate`: one alone gives its sample. K particles take K rows.

    Raises:
        ValueError: a number of particles out of range, and as of `nar.generate`.
    """
    check_particles(particles, known)
    check_known(model, known)
    sampling, condition = sampling or Sampling(), Condition.of(condition)
    schedule, count = model.layout.schedule, len(condition)
    numbers, rows = list(range(count) if indices is None else indices), count * particles

    def each(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(particles, 0)

    last = last_guided(sampling, schedule)
    sides = condition.map(each), None if negative is None else negative.map(each)
    embedded, key_mask = embed_sides(model, *sides) if last >= 0 else model.embed(sides[0])
    cache, device = model.new_cache(len(embedded)), model.device
    seeds = [*seed] if isinstance(seed, Sequence) else [seed] * count
    streams = [number + (own << STREAMS) for number in numbers for own in range(particles)]
    uniform = uniforms([own for own in seeds for _ in range(particles)], streams, schedule.num_positions).to(device)
    choice = uniforms(seeds, [number + (particles << STREAMS) for number in numbers], schedule.num_steps).to(device)
    given = each(model.in_order(known.to(device)))
    tokens = torch.full_like(given, -1)
    weight = torch.zeros(count, particles, dtype=torch.float64, device=device)  # log, since they were last equal
    log_known = torch.zeros(count, dtype=torch.float64, device=device)
    for front in range(schedule.num_steps):
        positions = schedule.front(front)
        if front == 0:
            hidden = model.prefill(embedded, key_mask, cache)
        else:
            if cache.batch_size > rows and front > last:
                cache.keep(rows)
            earlier = tokens[:, : positions.start].repeat(cache.batch_size // rows, 1)
            hidden = model.decode(earlier, range(front - 1, front), cache)
        own, proposing = hidden[:rows], hidden[:rows]
        if cache.batch_size > rows:
            proposing = hidden[rows:].lerp(own, sampling.guidance_at(front, schedule))
        there = given[:, positions]
        sampled = sample_rows(model.logits(proposing).flatten(0, 1), uniform[:, positions].flatten(), sampling)
        tokens[:, positions] = torch.where(there >= 0, there, sampled.view_as(there))
        if bool((sampled < 0).any()):
            raise no_numbers(model)
        if bool((there >= 0).any()):
            shares = model.logits(own).float().log_softmax(-1).gather(-1, there.clamp_min(0)[..., None])[..., 0]
            weight += shares.masked_fill(there < 0, 0.0).sum(-1).view(count, particles).double()
        share, final = weight.softmax(-1), front == schedule.num_steps - 1
        taken = _at(share, choice[:, front, None])[:, 0] if final else share.argmax(-1)
        codes = model.in_raster(tokens).unflatten(0, (count, particles))
        estimate = log_known + weight.logsumexp(-1) - math.log(particles)
        yield Weighted(front, codes[torch.arange(count, device=device), taken], estimate, codes)
        poor = 1 / (share**2).sum(-1) < LEAST_EFFECTIVE * particles
        if final or not bool(poor.any()):
            continue
        steps = (torch.arange(particles, device=device) + choice[:, front, None]) / particles
        chosen = torch.where(poor[:, None], _at(share, steps), torch.arange(particles, device=device))
        source = (chosen + torch.arange(count, device=device)[:, None] * particles).flatten()
        tokens = tokens[source]
        _take(cache, source)
        log_known, weight = torch.where(poor, estimate, log_known), weight.masked_fill(poor[:, None], 0.0)


def check_particles(particles: int, known: Any) -> None:
    """Raise ValueError for what is no number of particles, and for several where nothing is known."""
    if isinstance(particles, bool) or not isinstance(particles, int) or not 1 <= particles <= MOST_PARTICLES:
        raise ValueError(f"particles must be a whole number from 1 to {MOST_PARTICLES}, not {particles!r}")
    if particles > 1 and known is None:
        raise ValueError("particles choose among samples by what is known: give known codes, or leave them out")


def _at(share: Tensor, uniform: Tensor) -> Tensor:
    """Which particle of shares (B, K) each number (B, n) in [0, 1) falls on."""
    cumulative = share.cumsum(-1)
    found = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    return found.clamp_max(share.shape[-1] - 1)


def _take(cache: Any, source: Tensor) -> None:
    """Give every row what another one has seen; the unconditional half goes along."""
    rows = torch.cat([source + start for start in range(0, cache.batch_size, len(source))])
    for memory in (cache.keys, cache.values):
        memory[:, : len(rows), :, : cache.length] = memory[:, rows, :, : cache.length]
