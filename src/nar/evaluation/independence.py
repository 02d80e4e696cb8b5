"""What sampling the tokens of a front independently of each other costs, in bits per token.

Knows models and codes; does not know where they come from, nor how numbers are reported. Dimensions: M pictures, N
tokens in generation order, n those that follow another one of their front, V vocabulary, R rank of the coupling.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nar.condition import Condition
from nar.likelihood import check_samples
from nar.model import Transformer
from nar.progress import steps
from nar.storage.fields import Seed, Size, checked

RANK = 16
STEPS = 120
HELD_BYTES = 2**30  # of hidden states that are kept: the model is then run once on each picture, not 8,000 times
RATES = (3e-2, 5e-4)  # for strong and for faint dependence; the better one on checked pictures counts


@checked
def independence_cost(
    model: Transformer,
    codes: Tensor,
    condition: Condition,
    *,
    known: Tensor | None = None,
    seed: Seed = 0,
    batch_size: Size = 32,
) -> Tensor:
    """Bits per token (M / 2,) that sampling the tokens of a front independently costs at least; of the second half.

    Tokens of one front are sampled from p(x_j | earlier fronts), although x_j also depends on its neighbours in the
    front. Here a coupling a(x_i) . b(x_j), with x_i the token before x_j in the same front, is added to the frozen
    model's logits and fitted on the first half of the pictures; what it gains on the second half is dependence that
    sampling ignores. It is a lower bound: pairs only, and of rank R. A second coupling, fitted in the same way with x_i
    taken from another picture, gains what the model could gain without any dependence; that is subtracted. A fifth of
    the first half decides when each fit stops, so that neither gains by memory.

    Raster models have fronts of one token, and the answer is 0. Codes that the model sampled itself give about 0.
    What `known` decides of the first sample is left out of all.
    """
    check_samples(model, codes, known)
    if len(codes) < 4:
        raise ValueError(f"{len(codes)} pictures; at least 4 are needed to fit a coupling and to measure it")
    half, device = len(codes) // 2, model.device
    places, num_free = _after_another(model, known)
    if not len(places):
        return torch.zeros(len(codes) - half, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # Factors are linear in the model's own token embeddings: a free row for each token would need far more pictures
    # (with 1,024 tokens and 1,600 pictures it found nothing that held on others).
    embedding = model.token_vectors.detach().float()
    embedding = (embedding - embedding.mean(0)) / (embedding.std(0) + 1e-6) / embedding.shape[1] ** 0.5
    # True and strange neighbours, left and right factors; the right ones start at 0: no coupling is the first to beat.
    start = torch.randn(2, 2, embedding.shape[1], RANK, generator=generator)
    start[:, 1] = 0
    start = start.to(device)
    # The next one in a random circle of all: never the picture itself, whatever the sizes of batches.
    circle = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    another = torch.empty_like(circle).scatter_(0, circle, circle.roll(1))

    hidden = _hidden(model, codes, condition, places.to(device), batch_size)

    def losses(rows: Tensor, coupling: Tensor) -> Tensor:
        """Nats (2, B, n) with the two couplings."""
        tokens, others = (model.in_order(codes[some].long().to(device)) for some in (rows, another[rows]))
        with torch.no_grad():
            logits = model.logits(hidden(rows))  # (B, n, V)
        coupled = []
        for (left, right), source in zip(coupling, (tokens, others), strict=True):
            changed = logits + (embedding @ left)[source[:, places - 1]] @ (embedding @ right).T
            coupled.append(F.cross_entropy(changed.transpose(1, 2), tokens[:, places], reduction="none"))
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
        for step in steps(range(1, STEPS + 1), "coupling", "steps"):
            loss = losses(torch.randint(num_fitted, (min(batch_size, num_fitted),), generator=generator), coupling)
            optimizer.zero_grad()
            loss.mean((1, 2)).sum().backward()
            optimizer.step()
            if step % 20 == 0:
                found = measured(checked, coupling).mean((1, 2))
                better = found < best
                best = torch.where(better, found, best)
                best_coupling[better] = coupling.detach()[better]
    true, strange = measured(torch.arange(half, len(codes)), best_coupling)
    cost: Tensor = (strange - true).sum(1).cpu().double() / (num_free * math.log(2))
    return cost


def _hidden(
    model: Transformer, codes: Tensor, condition: Condition, places: Tensor, batch_size: int
) -> Callable[[Tensor], Tensor]:
    """What gives the hidden states (b, n, H * d) of samples at `places`; the first half's are kept where they fit."""
    half = len(codes) // 2

    @torch.no_grad()
    def computed(rows: Tensor) -> Tensor:
        return model.hidden(codes[rows].long().to(model.device), condition.rows(rows).to(model.device))[:, places]

    if half * len(places) * len(model.config.head_depths) * model.config.dim * 4 > HELD_BYTES:
        return computed
    held = torch.cat([computed(part) for part in torch.arange(half).split(batch_size)])
    return lambda rows: held[rows.to(model.device)] if int(rows.max()) < half else computed(rows)


def _after_another(model: Transformer, known: Tensor | None) -> tuple[Tensor, int]:
    """The places (n,) in generation order of tokens that follow another of their front, and how many tokens are free.

    What `known` decides of the first sample is neither.
    """
    sizes = torch.tensor(model.layout.schedule.fronts)
    free = torch.ones(int(sizes.sum()), dtype=torch.bool) if known is None else model.in_order(known[:1].cpu())[0] < 0
    follows = free.clone()
    follows[sizes.cumsum(0) - sizes] = False
    return follows.nonzero()[:, 0], int(free.sum())
