"""Exponential moving average of a module's parameters: the weights that samplers use."""

from __future__ import annotations

import torch
from torch import nn

from nar.training.distributed import local


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Move the parameters of `average`, a copy of `module`, towards those of `module`, after step number `step`.

    The decay is min(decay, (1 + step) / (10 + step)), so that the start is forgotten in short trainings too; step 0
    copies. Buffers are copied.
    """
    weight = 1.0 - min(decay, (1 + step) / (10 + step)) if step else 1.0
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    averages, currents = zip(*((local(mean), local(now)) for mean, now in pairs), strict=True)
    torch._foreach_lerp_(list(averages), list(currents), weight)
    for mean, now in zip(average.buffers(), module.buffers(), strict=True):
        local(mean).copy_(local(now))
