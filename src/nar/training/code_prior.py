"""A small causal transformer over a tokenizer's codes, which in training makes them easier to predict (LARP).

Knows code vectors in raster order; does not know pixels, nor the model that will learn the codes later. Legend: `B`
batch, `Q` codes of a sample, `D` code_dim, `V` vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.attention import Block
from nar.tokenizer.quantize import sample_codes


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
        round predicts in their place: `uniforms` (B, 2, Q) in [0, 1) say which, and what is drawn.
        """
        inputs, targets = points[:, :-1], codes[:, 1:]
        first = self(inputs) @ codebook.float().T / temperature  # (B, Q - 1, V)
        with torch.no_grad():
            drawn = F.embedding(sample_codes(first, uniforms[:, 1, 1:]), codebook).to(points.dtype)
            replaced = (uniforms[:, 0, 1:-1] < share)[..., None]
        mixed = torch.cat((inputs[:, :1], torch.where(replaced, drawn[:, :-1], inputs[:, 1:])), dim=1)
        second = self(mixed) @ codebook.float().T / temperature
        return torch.stack(
            [F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in (first, second)]
        ).mean()
