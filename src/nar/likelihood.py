"""How well a model predicts codes: the losses of training, and bits per token of held-out samples.

Raster, PAR and NAR models all define a likelihood, so these numbers compare any two models of one tokenizer, picture by
picture. Knows models and codes; not pixels, and not how numbers are reported. Dimensions: M samples, B of a batch, N
tokens in generation order, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nar.condition import Condition
from nar.model import Dropout, Transformer
from nar.storage.fields import Size, checked, holds_whole_numbers


def token_losses(
    model: Transformer,
    codes: Tensor,
    condition: Condition,
    *,
    seen: Tensor | None = None,
    dropout: Dropout | None = None,
    chunk: int = 16384,
) -> Tensor:
    """Cross-entropy in nats of every token, (B, N) in generation order; `seen` are the codes that the model is shown.

    Works on `chunk` tokens at a time and computes their logits again in the backward pass, so that (B, N, V) never
    exists.
    """
    hidden = model.hidden(codes if seen is None else seen, condition, dropout=dropout)
    targets = model.in_order(codes).to(hidden.device)

    def piece(states: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(states), tokens, reduction="none")

    pieces = [
        piece(states, tokens)
        if hidden[..., 0].numel() <= chunk or not torch.is_grad_enabled()
        else checkpoint(piece, states, tokens, use_reentrant=False)
        for states, tokens in zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    ]
    return torch.cat(pieces).view_as(targets)


def sample_losses(model: Transformer, losses: Tensor, weight: Tensor | None) -> Tensor:
    """The mean loss (B,) of each sample's tokens, of (B, N), weighted by `weight` (B, *grid); None weighs all alike.

    What is known has no weight: sampling never asks for it, and with frames given it would teach to copy. Each sample
    counts the same, whatever its weights, so that pieces of a batch add up.
    """
    if weight is None:
        return losses.mean(-1)
    share = model.in_order(weight).to(losses.dtype)
    return (losses * share).sum(-1) / share.sum(-1)


def check_samples(model: Transformer, codes: Tensor, known: Tensor | None) -> None:
    """Raise ValueError for codes that are not (M, *grid) of a model, and for a `known` of another shape or kind."""
    model.check_codes(codes)
    if codes.ndim == 0 or codes.shape[1:] != model.config.grid:
        raise ValueError(f"codes must be (M, {str(model.config.grid)[1:-1]}), not {tuple(codes.shape)}")
    if known is not None and (known.shape != codes.shape or not holds_whole_numbers(known)):
        raise ValueError(f"known must be whole numbers {tuple(codes.shape)}, not {known.dtype} {tuple(known.shape)}")


@checked
@torch.no_grad()
def bits_per_token(
    model: Transformer,
    codes: Tensor,
    condition: Condition,
    *,
    known: Tensor | None = None,
    batch_size: Size = 100,
) -> Tensor:
    """Mean bits (M,) of every sample's tokens, of codes (M, *grid), without guidance and without what `known` decides.

    `known` (M, *grid) holds -1 where codes are free. See `sample_losses`.
    """
    check_samples(model, codes, known)
    parts = []
    for start in range(0, len(codes), batch_size):
        rows = slice(start, start + batch_size)
        losses = token_losses(model, codes[rows].long().to(model.device), condition.rows(rows).to(model.device))
        parts.append(sample_losses(model, losses, None if known is None else known[rows].to(model.device) < 0))
    return torch.cat(parts).cpu().double() / math.log(2)
