"""Rows of one model that begin and end together, as `nar.generate_fronts` samples them.

The engine for CUDA, where a recorded graph holds a front of a whole batch and a generation is short. Knows conditions
and sessions; does not know queues, clocks or callers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nar.condition import Condition
from nar.model import Transformer
from nar.sampling import Front, Sampling, Session, generate_fronts


@dataclass(frozen=True, eq=False)
class Row:
    """One sample: its conditions and `known` codes, each of one row, its settings, and its stream (seed, index)."""

    condition: Condition
    negative: Condition | None
    sampling: Sampling
    seed: int
    index: int
    known: Tensor | None = None


class Advanced(NamedTuple):
    """That the row of a slot has a front more; or that it can't have, for its `error`."""

    slot: int
    front: int
    error: Exception | None = None


class Cohort:
    """Up to `num_slots` rows with equal settings, in lock-step; others join when all have ended.

    Batches are filled up to 1, 2, 4, 8, ... rows by copies of the last one, so that few graphs are recorded.
    """

    def __init__(self, model: Transformer, num_slots: int) -> None:
        self.model, self.num_slots = model, num_slots
        self._session = Session(model, num_kept=num_slots.bit_length() + 1)
        self._rows: dict[int, Row] = {}
        self._fronts: Iterator[Front] | None = None
        self._codes = torch.empty(0)

    def takes(self, row: Row) -> bool:
        """Whether this row could join now."""
        alike = all(other.sampling == row.sampling for other in self._rows.values())
        return self._fronts is None and len(self._rows) < self.num_slots and alike

    def join(self, row: Row) -> int:
        """Give a row a slot; it begins with the next step."""
        slot = min(set(range(self.num_slots)) - self._rows.keys())
        self._rows[slot] = row
        return slot

    def step(self) -> list[Advanced]:
        """Sample one front for every row.

        Raises:
            ValueError: one of the rows can't be sampled; none is.
        """
        if self._fronts is None:
            self._places = {slot: place for place, slot in enumerate(self._rows)}
            self._fronts = self._begin(list(self._rows.values()))
        front, self._codes = next(self._fronts)
        if front == self.model.layout.schedule.num_steps - 1:
            self._fronts = None
        return [Advanced(slot, front) for slot in self._rows]

    def codes(self, slot: int) -> Tensor:
        """A copy of the codes (*grid) of a row, -1 where undecided."""
        return self._codes[self._places[slot]].clone()

    def leave(self, slot: int) -> None:
        """Free a slot, whose row may be at any front."""
        del self._rows[slot]
        if not self._rows:
            self._fronts = None

    def _begin(self, rows: Sequence[Row]) -> Iterator[Front]:
        rows = [*rows, *[rows[-1]] * (2 ** (len(rows) - 1).bit_length() - len(rows))]
        null = torch.ones(1, dtype=torch.bool, device=rows[0].condition.device)
        negative, known = None, None
        if any(row.negative is not None for row in rows):
            negative = _together([row.negative or row.condition.drop(null) for row in rows])
        if any(row.known is not None for row in rows):
            free = torch.full((1, *self.model.config.grid), -1, device=self.model.device)
            known = torch.cat([free if row.known is None else row.known.to(free.device) for row in rows])
        return generate_fronts(
            self.model,
            _together([row.condition for row in rows]),
            rows[0].sampling,
            negative=negative,
            seed=[row.seed for row in rows],
            indices=[row.index for row in rows],
            known=known,
            session=self._session,
        )


def _together(conditions: Sequence[Condition]) -> Condition:
    """One condition of all rows."""
    tensors: list[list[Tensor]] = [[] for _ in conditions]
    for condition, own in zip(conditions, tensors, strict=True):
        condition.map(lambda tensor, own=own: own.append(tensor) or tensor)  # type: ignore[misc]
    columns = zip(*tensors, strict=True)
    return conditions[0].map(lambda _: torch.cat(next(columns)))
