"""How well a model predicts held-out codes: bits per token, and what sampling a front's tokens independently costs.

Raster, PAR and NAR models all define a likelihood, so these numbers compare any two models of one tokenizer, picture by
picture. Knows models and codes; not pixels, and not how numbers are reported.
Dimensions: M pictures, N tokens in generation order, V vocabulary, R rank of the coupling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nar.condition import ClassCondition, Condition
from nar.model import Dropout, Transformer
from nar.progress import steps as shown

RANK = 16
STEPS = 120
RATES = (3e-2, 5e-4)  # for strong and for faint dependence; the better one on checked pictures counts


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


def sample_losses(model: Transformer, losses: Tensor, known: Tensor | None) -> Tensor:
    """The mean loss (B,) of each sample's tokens, of (B, N); without those that `known` (B, *grid) decides.

    Known codes are -1 where they are free. Sampling never asks for the others, and with the frames given they would
    teach to copy. Each sample counts the same, however many are known, so that pieces of a batch add up.
    """
    if known is None:
        return losses.mean(-1)
    free = (model.in_order(known) < 0).to(losses.dtype)
    return (losses * free).sum(-1) / free.sum(-1)


@torch.no_grad()
def bits_per_token(
    model: Transformer,
    codes: Tensor,
    condition: Condition | Tensor,
    *,
    known: Tensor | None = None,
    batch_size: int = 100,
    progress: bool = False,
) -> Tensor:
    """Mean bits (M,) of every sample's tokens, given codes (M, *grid) and any condition, or classes (M,).

    Without guidance. Tokens that `known` decides are left out, see `sample_losses`.
    """
    condition = ClassCondition(condition) if isinstance(condition, Tensor) else condition
    parts = []
    for start in shown(range(0, len(codes), batch_size), "likelihood", "batches", quiet=not progress):
        rows = slice(start, start + batch_size)
        losses = token_losses(model, codes[rows].long().to(model.device), condition.rows(rows).to(model.device))
        parts.append(sample_losses(model, losses, None if known is None else known[rows].to(model.device)))
    return torch.cat(parts).cpu().double() / math.log(2)


def independence_cost(
    model: Transformer,
    codes: Tensor,
    condition: Condition | Tensor,
    *,
    known: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 32,
    steps: int = STEPS,
    progress: bool = False,
) -> Tensor:
    """Bits per token (M / 2,) that sampling the tokens of a front independently costs at least; of the second half.

    Tokens of one front are sampled from p(x_j | earlier fronts), although x_j also depends on its neighbours in the
    front. Here a coupling a(x_i) . b(x_j), with x_i the token before x_j in the same front, is added to the frozen
    model's logits and fitted on the first half of the pictures; what it gains on the second half is dependence that
    sampling ignores. It is a lower bound: pairs only, and of rank R. A second coupling, fitted in the same way with x_i
    taken from another picture, gains what the model could gain without any dependence; that is subtracted. A fifth of
    the first half decides when each fit stops, so that neither gains by memory.

    Raster models have fronts of one token, and the answer is 0. Codes that the model sampled itself give about 0.
    Samples come with any condition, or classes (M,); what `known` decides of the first one is left out of all.
    """
    condition = ClassCondition(condition) if isinstance(condition, Tensor) else condition
    if len(codes) < 4:
        raise ValueError(f"{len(codes)} pictures; at least 4 are needed to fit a coupling and to measure it")
    half = len(codes) // 2
    places, num_free = _after_another(model, known)
    if not len(places):
        return torch.zeros(len(codes) - half, dtype=torch.float64)
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    # Factors are linear in the model's own token embeddings: a free row for each token would need far more pictures
    # (with 1,024 tokens and 1,600 pictures it found nothing that held on others).
    embedding = model.tokens.weight.detach().float()
    embedding = (embedding - embedding.mean(0)) / (embedding.std(0) + 1e-6) / embedding.shape[1] ** 0.5
    shape = (2, 2, embedding.shape[1], RANK)  # true and strange neighbours, left and right
    start = torch.randn(shape, generator=generator)
    start[:, 1] = 0  # the right factors start at 0, so no coupling at all is the first to beat
    embedding, start = embedding.to(device), start.to(device)
    # The next one in a random circle of all: never the picture itself, whatever the sizes of batches.
    circle = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    another = torch.empty_like(circle).scatter_(0, circle, circle.roll(1))

    def losses(rows: Tensor, coupling: Tensor) -> Tensor:
        """Nats (2, B, n) with the two couplings."""
        with torch.no_grad():
            batch = codes[rows].long().to(device)
            hidden = model.hidden(batch, condition.rows(rows).to(device))
            logits = model.logits(hidden[:, places.to(device)])  # (B, n, V)
            tokens, others = model.in_order(batch), model.in_order(codes[another[rows]].long().to(device))
        targets = tokens[:, places]
        coupled = []
        for (left, right), source in zip(coupling, (tokens, others), strict=True):
            changed = logits + (embedding @ left)[source[:, places - 1]] @ (embedding @ right).T
            coupled.append(F.cross_entropy(changed.transpose(1, 2), targets, reduction="none"))
        return torch.stack(coupled)

    @torch.no_grad()
    def measured(rows: Tensor, coupling: Tensor) -> Tensor:
        return torch.cat([losses(part, coupling) for part in rows.split(batch_size)], 1)

    num_fitted = half - max(1, half // 5)
    checked = torch.arange(num_fitted, half)
    best, best_coupling = measured(checked, start).mean((1, 2)), start.clone()
    for rate in RATES:
        coupling = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([coupling], lr=rate)
        for step in shown(range(steps), "coupling", "steps", quiet=not progress):
            loss = losses(torch.randint(num_fitted, (min(batch_size, num_fitted),), generator=generator), coupling)
            optimizer.zero_grad()
            loss.mean((1, 2)).sum().backward()
            optimizer.step()
            if (step + 1) % 20 == 0:
                found = measured(checked, coupling).mean((1, 2))
                better = found < best
                best = torch.where(better, found, best)
                best_coupling[better] = coupling.detach()[better]
    true, strange = measured(torch.arange(half, len(codes)), best_coupling)
    cost: Tensor = (strange - true).sum(1).cpu().double() / (num_free * math.log(2))
    return cost


def _after_another(model: Transformer, known: Tensor | None) -> tuple[Tensor, int]:
    """The places (n,) in generation order of tokens that follow another of their front, and how many tokens are free.

    What `known` decides of the first sample is neither.
    """
    sizes = torch.tensor(model.layout.schedule.fronts)
    free = torch.ones(int(sizes.sum()), dtype=torch.bool) if known is None else model.in_order(known[:1].cpu())[0] < 0
    follows = free.clone()
    follows[sizes.cumsum(0) - sizes] = False
    return follows.nonzero()[:, 0], int(free.sum())
