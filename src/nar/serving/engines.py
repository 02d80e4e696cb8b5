"""What samples rows of one model front by front: each at its own front (`Flight`), or in lock-step (`Cohort`).

Knows conditions, caches and slots; does not know queues, clocks or callers. A row is a sample, in a slot from `join` to
`leave`. On CUDA a recorded graph holds a front of a whole batch and a generation is short: lock-step is for there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nar.attention import Cache
from nar.condition import Condition
from nar.model import Feed, Transformer
from nar.sampling import (
    Front,
    Sampling,
    Session,
    check_known,
    embed_sides,
    generate_fronts,
    last_guided,
    no_numbers,
    sample_rows,
    uniforms,
)


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


@dataclass(eq=False)
class _Rider:
    """A row in a slot, and the front that it samples next."""

    row: Row
    embedded: Tensor  # (1 or 2, C, d)
    is_masked: bool
    last_guided: int
    front: int = 0


class _Group(NamedTuple):
    """Slots that are one batch: neighbours at one front, guided or not, with or without a mask."""

    start: int
    stop: int
    front: int
    is_guided: bool
    is_masked: bool

    @property
    def slots(self) -> slice:
        return slice(self.start, self.stop)


class Flight:
    """Up to `num_slots` rows, each with its own settings and at its own front; they join and leave between any steps.

    Memory is taken once. Both sides of guidance stand next to each other in the cache, and a slot has room for both.
    """

    def __init__(self, model: Transformer, num_slots: int) -> None:
        schedule = model.layout.schedule
        self.model, self.num_slots, self._sides = model, num_slots, num_sides(model)
        num_rows, count, device = num_slots * self._sides, schedule.num_positions, model.device
        self._cache = model.new_cache(num_rows)
        self._key_mask = torch.ones(num_rows, model.config.num_condition, dtype=torch.bool, device=device)
        self._streams = torch.zeros(num_slots, count, device=device)
        self._scales = torch.ones(num_slots, schedule.num_steps, device=device)
        self._known = torch.full((num_slots, count), -1, device=device)
        self._tokens = torch.full((num_slots, count), -1, device=device)
        self._riders: dict[int, _Rider] = {}
        self._next = 0

    def takes(self, row: Row) -> bool:  # noqa: ARG002 any row will do
        """Whether this row could join now."""
        return len(self._riders) < self.num_slots

    def join(self, row: Row) -> int:
        """Give a row a slot; it begins with the next step.

        Raises:
            ValueError: what `nar.generate` refuses.
        """
        model, schedule = self.model, self.model.layout.schedule
        check_known(model, row.known)
        last = last_guided(row.sampling, schedule)
        embedded, key_mask = (
            embed_sides(model, row.condition, row.negative) if last >= 0 else model.embed(row.condition)
        )
        stream = uniforms(row.seed, [row.index], schedule.num_positions)[0]
        free = [slot for slot in range(self.num_slots) if slot not in self._riders]
        slot = next((slot for slot in free if slot >= self._next), free[0])  # beside the one before: one batch
        self._next = slot + 1
        self._streams[slot], self._tokens[slot] = stream, -1
        self._known[slot] = -1 if row.known is None else model.in_order(row.known.to(model.device))[0]
        scales = [row.sampling.guidance_at(front, schedule) for front in range(last + 1)]
        self._scales[slot, : last + 1] = torch.tensor(scales)
        if key_mask is not None:
            self._key_mask[self._sides * slot :][: len(key_mask)] = key_mask
        self._riders[slot] = _Rider(row, embedded, key_mask is not None, last)
        return slot

    @torch.inference_mode()
    def step(self) -> list[Advanced]:
        """Sample one front for every row; a row whose logits are no numbers has an error, and must leave."""
        model, schedule, groups = self.model, self.model.layout.schedule, self._groups()
        feeds = [self._feed(group) for group in groups]
        hidden = []
        for group, feed, states in zip(groups, feeds, model.run(feeds), strict=True):
            if group.front == 0:
                self._keep_modulations(group, feed.cache)
            if group.is_guided:
                pairs = states.unflatten(0, (-1, 2))
                states = pairs[:, 1].lerp(
                    pairs[:, 0], self._scales[group.slots, group.front, None, None].to(pairs.dtype)
                )
            hidden.append(states)
        slots = [slot for group in groups for slot in range(group.start, group.stop)]
        positions = {slot: schedule.front(self._riders[slot].front) for slot in slots}
        logits = model.logits(torch.cat([states.flatten(0, 1) for states in hidden]))
        counts = [positions[slot].stop - positions[slot].start for slot in slots]
        sampled = self._sample(dict(zip(slots, logits.split(counts), strict=True)), positions)
        advanced = []
        for slot in slots:
            rider, given = self._riders[slot], self._known[slot, positions[slot]]
            self._tokens[slot, positions[slot]] = torch.where(given >= 0, given, sampled[slot])
            fault = no_numbers(model) if bool((self._tokens[slot, positions[slot]] < 0).any()) else None
            advanced.append(Advanced(slot, rider.front, fault))
            rider.front += 1
        return advanced

    def codes(self, slot: int) -> Tensor:
        """A copy of the codes (*grid) of a row, -1 where undecided."""
        return self.model.in_raster(self._tokens[slot, None])[0]

    def leave(self, slot: int) -> None:
        """Free a slot, whose row may be at any front."""
        del self._riders[slot]

    def _groups(self) -> list[_Group]:
        groups: list[_Group] = []
        for slot, rider in sorted(self._riders.items()):
            group = _Group(slot, slot + 1, rider.front, rider.front <= rider.last_guided, rider.is_masked)
            if groups and groups[-1][1:] == (slot, *group[2:]):
                groups[-1] = groups[-1]._replace(stop=slot + 1)
            else:
                groups.append(group)
        return groups

    def _rows(self, group: _Group) -> slice:
        """Its rows of the cache: without guidance each second one."""
        return slice(self._sides * group.start, self._sides * group.stop, 1 if group.is_guided else self._sides)

    def _feed(self, group: _Group) -> Feed:
        model, schedule, rows = self.model, self.model.layout.schedule, self._rows(group)
        key_mask = self._key_mask[rows] if group.is_masked else None
        if group.front == 0:
            embedded = torch.cat([self._riders[slot].embedded for slot in range(group.start, group.stop)])
            return model.condition_feed(embedded, key_mask, self._cache.part(rows, 0))
        part = self._cache.part(rows, model.config.num_condition + schedule.fed(group.front - 1).start)
        part.key_mask = key_mask
        tokens = self._tokens[group.slots, : schedule.front(group.front).start].clamp_min(0)
        tokens = tokens.repeat_interleave(2, 0) if group.is_guided else tokens
        return model.fronts_feed(tokens, range(group.front - 1, group.front), part)

    def _keep_modulations(self, group: _Group, part: Cache) -> None:
        """Put those of a new row, which stay the same, where the next step finds them."""
        whole, num_rows = self._cache, self.num_slots * self._sides
        if not whole.modulations:
            whole.modulations = [own.new_empty(num_rows, *own.shape[1:]) for own in part.modulations]
        for kept, own in zip(whole.modulations, part.modulations, strict=True):
            kept[self._rows(group)] = own

    def _sample(self, logits: dict[int, Tensor], positions: dict[int, slice]) -> dict[int, Tensor]:
        """Tokens (n,) of each slot, together where temperature and filters are equal."""
        alike: dict[tuple[float, int, float], list[int]] = {}
        for slot in logits:
            sampling = self._riders[slot].row.sampling
            alike.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(slot)
        sampled: dict[int, Tensor] = {}
        for slots in alike.values():
            rows = torch.cat([logits[slot] for slot in slots])
            numbers = torch.cat([self._streams[slot, positions[slot]] for slot in slots])
            tokens = sample_rows(rows, numbers, self._riders[slots[0]].row.sampling)
            sampled.update(zip(slots, tokens.split([len(logits[slot]) for slot in slots]), strict=True))
        return sampled


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


def num_sides(model: Transformer) -> int:
    """Rows of the cache that a sample takes: two where the model can be guided."""
    config = model.config
    return 2 if (config.num_classes and config.null_class) or config.text_dim else 1


def _together(conditions: Sequence[Condition]) -> Condition:
    """One condition of all rows."""
    tensors: list[list[Tensor]] = [[] for _ in conditions]
    for condition, own in zip(conditions, tensors, strict=True):
        condition.map(lambda tensor, own=own: own.append(tensor) or tensor)  # type: ignore[misc]
    columns = zip(*tensors, strict=True)
    return conditions[0].map(lambda _: torch.cat(next(columns)))
