"""The specification of decoding, slow and obvious: no cache, no folding, one full forward per front."""

from __future__ import annotations

import torch
from torch import Tensor

from nar import Sampling, Transformer
from nar.condition import Condition
from nar.sampling import probabilities, uniforms


@torch.no_grad()
def reference_generate(
    model: Transformer, condition: Condition, sampling: Sampling, seed: int, known: Tensor | None = None
) -> Tensor:
    """What `nar.generate` must return: every front from logits of the whole grid, guidance on logits."""
    schedule, batch = model.layout.schedule, len(condition)
    codes = torch.zeros(batch, *model.config.grid, dtype=torch.long)
    streams = uniforms(seed, range(batch), schedule.num_positions)
    guided = True
    for front in range(schedule.num_steps):
        positions = schedule.front(front)
        logits = model(codes, condition).flatten(1, -2)[:, schedule.order[positions]]
        if front and sampling.guidance_interval is not None and positions.start > sampling.guidance_interval:
            guided = False
        if guided and sampling.guidance_scale != 1.0:
            null = model(codes, condition.drop(torch.ones(batch, dtype=torch.bool)))
            null = null.flatten(1, -2)[:, schedule.order[positions]]
            logits = null + sampling.guidance_at(front, schedule.num_steps) * (logits - null)
        for row in range(batch):
            for place in range(positions.start, positions.stop):
                mass = probabilities(
                    logits[row, place - positions.start], sampling.temperature, sampling.top_k, sampling.top_p
                ).cumsum(0)
                token = int((mass <= streams[row, place] * mass[-1]).sum())
                if sampling.temperature == 0:
                    token = int(logits[row, place - positions.start].argmax())
                if known is not None and known.flatten(1)[row, schedule.order[place]] >= 0:
                    token = int(known.flatten(1)[row, schedule.order[place]])
                codes.view(batch, -1)[row, schedule.order[place]] = token
    return codes
