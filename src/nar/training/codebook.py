"""The codebook of a tokenizer in training: its start, its upkeep, how much of it is in use, and a word of warning.

Knows latents and codes of a step, on all processes; does not know pixels, losses or who calls it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from nar.storage.fields import Range, Share, check
from nar.tokenizer.quantize import BinaryQuantizer, Quantizer, VectorQuantizer
from nar.training.distributed import Workers

_NEVER = 2**30  # steps since a code was used that never was
_WINDOW = 50  # steps over which usage is stated, at least
_ITERATIONS = 5  # of k-means on each of the first batches


@dataclass(frozen=True)
class CodebookConfig:
    """How a learned codebook is kept in use.

    `restart_every` steps, codes that were not used since the last time move onto random latents, until `restart_until`
    (a fraction of the training); 0 turns it off. On each of the first `kmeans_steps` batches k-means goes on from the
    entries that the batch before has left, unless they were trained before. `codebook_decay` above 0, say 0.99, makes
    each entry a moving average of its latents in place of learning it by gradient.

    A warning comes when less than `warn_usage` of the codes, or less than half of what once was, is in use; 0 turns
    it off.
    """

    restart_every: Annotated[int, Range(0)] = 0
    restart_until: Share = 0.6
    kmeans_steps: Annotated[int, Range(0)] = 0
    codebook_decay: Annotated[float, Range(0, below=1)] = 0.0
    warn_usage: Annotated[float, Range(0, below=1)] = 0.1

    def __post_init__(self) -> None:
        check(self, "tokenizer_loss.")


class Codebook:
    """Upkeep of `quantizer` after every step, the same on all processes, from what was observed in it.

    `fresh` says whether its entries are random and have to be brought to the data first, or trained already. `group` is
    that of the recipe which has the tokenizer's sizes, for advice.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        config: CodebookConfig,
        workers: Workers,
        *,
        fresh: bool = True,
        group: str = "tokenizer",
    ) -> None:
        self.quantizer, self.config, self._workers = quantizer, config, workers
        self._fresh, self._group = fresh, group
        self._vectors = quantizer if isinstance(quantizer, VectorQuantizer) else None
        self._observed: list[tuple[Tensor, Tensor]] = []
        self._warned = False
        state = {
            # Steps since a code was used.
            "idle": torch.full((quantizer.vocab_size,), _NEVER if fresh else 0, dtype=torch.int32),
            "recent": torch.zeros(quantizer.vocab_size),  # counts, those of earlier steps fading
            "window": torch.ones((), dtype=torch.int32),  # steps over which usage is stated
            "peak": torch.zeros(()),  # the highest usage so far
        }
        if self._vectors is not None and config.codebook_decay:
            self._vectors.requires_grad_(False)
            weight = self._vectors.embedding.weight
            state |= {"mean_counts": torch.ones(len(weight)), "mean_sums": weight.detach().clone()}
        self._state = {name: tensor.to(workers.device) for name, tensor in state.items()}

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        """Note latents (B, D, ...) and codes (B, ...) of this process until the step ends."""
        self._observed.append((latents.detach(), codes.detach()))

    def update(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:
        """Look after the codebook, after optimizer step number `step`; returns a warning when it first collapses."""
        observed, self._observed = self._observed, []
        tokens = sum(codes.numel() for _, codes in observed) * self._workers.count
        # Long enough for each of equally frequent codes to occur, all but 1 in 50.
        window = max(_WINDOW, math.ceil(4 * self.quantizer.vocab_size / tokens))
        codes = torch.cat([codes.flatten() for _, codes in observed])
        counts = self._workers.sum(torch.bincount(codes, minlength=self.quantizer.vocab_size).float())
        self._state["idle"].add_(1).clamp_(max=_NEVER).masked_fill_(counts > 0, 0)
        self._state["recent"].mul_(1 - 1 / window).add_(counts)
        self._state["window"].fill_(window)
        if self.quantizer.learned:
            self._keep_in_use(observed, step, num_steps, generator)
        return self._warning(step, window)

    def scalars(self) -> dict[str, Tensor]:
        """What is in use, over a window of at least 50 steps: "usage", "perplexity" and "dead_codes", to be logged."""
        recent = self._state["recent"]
        shares = recent / recent.sum().clamp_min(1e-12)
        dead = (self._state["idle"] >= self._state["window"]).sum().float()
        return {
            "usage": 1 - dead / len(recent),
            "perplexity": torch.exp(-torch.xlogy(shares, shares).sum()),
            "dead_codes": dead,
        }

    def state(self) -> dict[str, Tensor]:
        """All that is remembered between steps."""
        return {f"codebook.{name}": tensor for name, tensor in self._state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, tensor in self._state.items():
            tensor.copy_(state[f"codebook.{name}"])

    def _keep_in_use(
        self, observed: list[tuple[Tensor, Tensor]], step: int, num_steps: int, generator: torch.Generator
    ) -> None:
        """Average, restart and cluster the entries, as the config asks for at this step."""
        config, until = self.config, self.config.restart_until * num_steps
        restarts = config.restart_every and step % config.restart_every == 0 and step <= until
        vectors = self._vectors
        clusters = vectors is not None and self._fresh and step < config.kmeans_steps
        first = self._fresh and step == 0  # all of them: a start on the data
        if vectors is not None and config.codebook_decay:
            self._average(vectors, observed)
        if not (restarts or clusters):
            return
        # In the order of the batch, whatever number of processes and pieces computed it.
        latents = torch.stack([self._workers.gather(piece) for piece, _ in observed]).flatten(0, 1)
        moved = torch.ones_like(self._state["idle"]) > 0 if first else self._state["idle"] >= config.restart_every
        if first or not clusters:
            self.quantizer.restart(latents, moved, generator)
        if vectors is not None and clusters:
            own = torch.cat([piece for piece, _ in observed])
            for _ in range(_ITERATIONS):
                counts = vectors.cluster(own, self._workers.sum)
                vectors.restart(latents, counts == 0, generator)
            moved = torch.ones_like(moved)
        if vectors is not None and config.codebook_decay:
            self._state["mean_counts"][moved] = 1.0
            self._state["mean_sums"][moved] = vectors.embedding.weight.detach()[moved]

    @torch.no_grad()
    def _average(self, quantizer: VectorQuantizer, observed: list[tuple[Tensor, Tensor]]) -> None:
        """Move entries to the moving averages of their latents; one whose average is of almost nothing stays."""
        found = quantizer.members(*(torch.cat(pieces) for pieces in zip(*observed, strict=True)))
        means = self._state["mean_counts"], self._state["mean_sums"]
        for mean, now in zip(means, found, strict=True):
            mean.lerp_(self._workers.sum(now), 1 - self.config.codebook_decay)
        alive = means[0] > 1e-3
        quantizer.embedding.weight[alive] = (means[1] / means[0].clamp_min(1e-3)[:, None])[alive]

    def _warning(self, step: int, window: int) -> str | None:
        if self._warned or not self.config.warn_usage or (step + 1) % window:
            return None
        usage, peak = float(self.scalars()["usage"]), float(self._state["peak"])
        self._state["peak"].fill_(max(usage, peak))
        low, falling = usage < self.config.warn_usage, usage < 0.5 * peak
        if step + 1 < 2 * window or not (low or falling):
            return None
        self._warned = True
        size = self.quantizer.vocab_size
        what = f"is only {usage:.1%}" if low else f"has fallen from {peak:.1%} to {usage:.1%}"
        return (
            f"the codebook collapses: usage {what} after {step + 1} steps, {round(usage * size)} of {size} codes "
            f"in the last {window}; {self._advice()}"
        )

    def _advice(self) -> str:
        if not self.quantizer.learned:
            entropy = "raise tokenizer_loss.entropy, " if isinstance(self.quantizer, BinaryQuantizer) else ""
            return f"{entropy}lower optim.learning_rate, or look whether all pictures are alike"
        vectors = self._vectors
        unset = [] if vectors is None or vectors.l2_norm else [f"{self._group}.l2_norm=true"]
        unset += [] if vectors is None or self.config.kmeans_steps else ["tokenizer_loss.kmeans_steps=10"]
        unset += [] if self.config.restart_every else ["tokenizer_loss.restart_every=100"]
        return f"set {', '.join(unset) or f'a smaller {self._group}.vocab_size'}, or lower optim.learning_rate"
