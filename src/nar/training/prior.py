"""The prior of tokenizer training: a small causal transformer that makes codes easier to predict (LARP).

It has its own optimizer and learns beside the tokenizer. Knows latents and codes of a step, in raster order; does not
know pixels, the tokenizer's other losses, nor the model that will learn the codes later. Legend: `B` batch, `Q` codes
of a sample, `D` code_dim, `V` vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.attention import Block
from nar.storage.fields import NotNegative, Positive, Range, Share, Size, check
from nar.tokenizer.base import Reconstruction
from nar.tokenizer.quantize import Quantizer, sample_codes
from nar.training.distributed import Workers
from nar.training.optim import Side


@dataclass(frozen=True)
class PriorConfig:
    """A causal transformer that makes codes predictable in raster order; `weight` 0 turns it off.

    Sizes and rates are the published ones by default.

    In its second round of scheduled sampling it replaces a share of its inputs by its own predictions, which grows
    from 0 to `mix` over the first `mix_until` of the training.

    Attributes:
        dim, num_layers, num_heads: sizes of the transformer.
        temperature: divides its logits.
        learning_rate: of its own AdamW.
    """

    weight: NotNegative = 0.0
    dim: Size = 384
    num_layers: Size = 12
    num_heads: Size = 6
    temperature: Positive = 1.0
    mix: Share = 0.5
    mix_until: Annotated[float, Range(above=0, most=1)] = 0.3
    learning_rate: Positive = 1e-4

    def __post_init__(self) -> None:
        check(self, "prior.")


class Prior(Side):
    """Learns to predict codes, and turns that into a loss for the tokenizer."""

    network: CodePrior

    def __init__(self, config: PriorConfig, grid_size: int, code_dim: int, num_steps: int, workers: Workers) -> None:
        self.config, self._num_steps = config, num_steps
        network = CodePrior(grid_size, code_dim, config.dim, config.num_layers, config.num_heads)
        super().__init__("prior", network, config.learning_rate, (0.5, 0.9), workers)

    def loss(self, quantizer: Quantizer, made: Reconstruction, uniforms: Tensor, step: int) -> Tensor:
        """Cross-entropy of a step's codes, in nats; its gradient also trains the prior. `uniforms` are (B, 2, Q)."""
        points = quantizer.points(made.latents)
        entries = quantizer.entries(made.codes)
        straight_through = (points + (entries - points).detach()).flatten(1, -2)  # (B, Q, D)
        codebook = F.normalize(quantizer.entries(torch.arange(quantizer.vocab_size, device=points.device)), dim=-1)
        straight_through, uniforms = F.normalize(straight_through, dim=-1), uniforms.to(points.device)
        share = self.config.mix * min(1.0, step / (self.config.mix_until * self._num_steps))
        temperature = self.config.temperature
        return self.network.losses(straight_through, made.codes.flatten(1), codebook, uniforms, share, temperature)

    def update(self) -> None:
        """One step of the prior with the gradient that the tokenizer's backward pass has left."""
        self.step(scale=self.config.weight)


class CodePrior(nn.Module):
    """Predicts the next code from the vectors of those before; the defaults have the size of LARP's (21.7 M)."""

    def __init__(self, num_codes: int, code_dim: int, dim: int = 384, num_layers: int = 12, num_heads: int = 6) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(num_codes, dim))
        self.embed = nn.Linear(code_dim, dim)
        # SwiGLU of 8/3 * dim has as many weights as the published MLP of 4 * dim.
        self.layers = nn.ModuleList(Block(dim, num_heads, round(8 / 3 * dim), 1e-6) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, code_dim)

    def forward(self, points: Tensor) -> Tensor:
        """Vectors (B, Q, D) to predictions of unit length (B, Q, D) of the next ones."""
        length = points.shape[1]
        x = self.embed(points) + self.positions[:length]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer in self.layers:
            x = layer(x, None, mask)
        return F.normalize(self.head(self.norm(x)).float(), dim=-1)

    def losses(
        self, points: Tensor, codes: Tensor, codebook: Tensor, uniforms: Tensor, share: float, temperature: float = 1.0
    ) -> Tensor:
        """Cross-entropy in nats of `codes` (B, Q) given those before, averaged over two rounds of scheduled sampling.

        `points` (B, Q, D) are the vectors of the codes, through which the gradient reaches the encoder; `codebook`
        (V, D) has entries of unit length. In the second round a `share` of the inputs is replaced by what the first
        round predicts in their place: `uniforms` (B, 2, Q) in [0, 1) say which, and what is sampled.
        """
        inputs, targets = points[:, :-1], codes[:, 1:]
        first = self(inputs) @ codebook.float().T / temperature  # (B, Q - 1, V)
        with torch.no_grad():
            sampled = F.embedding(sample_codes(first, uniforms[:, 1, 1:]), codebook).to(points.dtype)
            replaced = (uniforms[:, 0, 1:-1] < share)[..., None]
        mixed = torch.cat((inputs[:, :1], torch.where(replaced, sampled[:, :-1], inputs[:, 1:])), dim=1)
        second = self(mixed) @ codebook.float().T / temperature
        entropies = [F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in (first, second)]
        return torch.stack(entropies).mean()
