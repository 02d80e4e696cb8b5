"""Exponential moving average of a module's parameters: the weights that samplers use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average_of(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` that `update_parameters(module)` moves towards it.

    The decay is min(decay, (1 + n) / (10 + n)) at update n, so that the start is forgotten in short trainings too.
    """

    def blend(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        count = float(num_averaged)
        torch._foreach_lerp_(list(averaged), list(current), 1.0 - min(decay, (1 + count) / (10 + count)))

    multi_avg_fn: Callable[[Any, Any, Tensor | int], None] = torch.no_grad()(blend)
    return AveragedModel(module, multi_avg_fn=multi_avg_fn)
