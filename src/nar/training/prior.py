"""The prior of tokenizer training: a model of the codes with its own optimizer, trained beside the tokenizer.

Knows latents and codes of a step; does not know pixels or the tokenizer's other losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nar.tokenizer.base import Reconstruction
from nar.tokenizer.quantize import Quantizer
from nar.training.code_prior import CodePrior
from nar.training.distributed import Workers
from nar.training.optim import load_side_state, side_state


@dataclass(frozen=True)
class PriorConfig:
    """A causal transformer that makes codes predictable in raster order; `weight` 0 turns it off.

    Sizes and rates are the published ones by default.

    In its second round of scheduled sampling it replaces a share of its inputs by its own predictions, which grows
    from 0 to `mix` over the first `mix_until` of the training.
    """

    weight: float = 0.0
    dim: int = 384
    num_layers: int = 12
    num_heads: int = 6
    temperature: float = 1.0
    mix: float = 0.5
    mix_until: float = 0.3
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.mix <= 1 or not 0 < self.mix_until <= 1 or self.temperature <= 0:
            raise ValueError(
                f"prior.weight {self.weight} must be at least 0, mix {self.mix} from 0 to 1, mix_until "
                f"{self.mix_until} above 0 up to 1, temperature {self.temperature} above 0"
            )


class Prior:
    """Learns to predict codes, and turns that into a loss for the tokenizer."""

    def __init__(self, config: PriorConfig, grid_size: int, code_dim: int, num_steps: int, workers: Workers) -> None:
        self.config, self._num_steps, self._workers = config, num_steps, workers
        self.network = CodePrior(grid_size, code_dim, config.dim, config.num_layers, config.num_heads)
        self.network.to(workers.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), config.learning_rate, betas=(0.5, 0.9))

    def loss(self, quantizer: Quantizer, made: Reconstruction, uniforms: Tensor, step: int) -> Tensor:
        """Cross-entropy of a step's codes, in nats; its gradient also trains the prior. `uniforms` are (B, 2, Q)."""
        points = quantizer.points(made.latents)
        entries = quantizer.entries(made.codes)
        straight_through = (points + (entries - points).detach()).flatten(1, -2)  # (B, Q, D)
        every = torch.arange(quantizer.vocab_size, device=points.device)
        share = self.config.mix * min(1.0, step / (self.config.mix_until * self._num_steps))
        return self.network.losses(
            F.normalize(straight_through, dim=-1), made.codes.flatten(1), F.normalize(quantizer.entries(every), dim=-1),
            uniforms.to(points.device), share, self.config.temperature,
        )  # fmt: skip

    def update(self) -> None:
        """One step of the prior with the gradient that the tokenizer's backward pass has left, of all processes."""
        parameters: Sequence[Tensor] = [*self.network.parameters()]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self._workers.sum(parameter.grad) / self._workers.count / self.config.weight
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer moments by name."""
        return side_state("prior", self.network, self.optimizer)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        load_side_state("prior", self.network, self.optimizer, state)
