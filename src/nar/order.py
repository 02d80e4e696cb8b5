"""Generation orders as values: which positions of a grid are decoded together, and what each is predicted from.

Mask, readout, KV-cache layout, number of steps and loss all derive from a `Schedule`; nothing else in the package knows
what a diagonal is. Legend: `N` positions of the grid, `A` rows of predictions (one per axis for `manhattan`), `S`
slots.

A *slot* is what the model is fed: slot 0 is the last condition token, slots 1..S are the grid's tokens in generation
order, and, where a method needs them, learned special slots among them; or, with scales, sums of tokens.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nar.scales import check_sides

MOST_POSITIONS = 2**16  # every token attends to all before it: 2 billion pairs in each head of each block


@dataclass(frozen=True, eq=False)
class Schedule:
    """A generation order over a grid, in fronts that are decoded together.

    Positions are counted in generation order, except in `order`, which maps that order to raster indices.
    """

    grid: tuple[int, ...]
    order: Tensor
    """(N,) raster index of each position in generation order."""
    fronts: tuple[int, ...]
    """Number of positions in each front; they sum to N."""
    source: Tensor
    """(A, N) the slot whose prediction each position reads, for each row of predictions."""
    weight: Tensor
    """(A, N) the share of that prediction; columns sum to 1."""
    slots: Tensor
    """(S,) what each slot from 1 on holds: a position in generation order, or -1 - k for special slot k. With `sides`,
    the sum of all tokens before, at that position's place."""
    slot_fronts: tuple[int, ...]
    """Number of slots fed after each front is known."""
    places: Tensor
    """(S,) raster index at which each slot stands, for its position embedding."""
    sides: tuple[int, ...] = ()
    """Sides of the square scales that follow each other on a grid of one axis; none where positions are of one size."""

    def __post_init__(self) -> None:
        n = math.prod(self.grid)
        if sorted(self.order.tolist()) != list(range(n)):
            raise ValueError(f"order must list each of the {n} positions of grid {self.grid} once")
        if sum(self.fronts) != n or min(self.fronts) < 1 or len(self.slot_fronts) != len(self.fronts):
            raise ValueError(f"fronts {self.fronts} must be positive and sum to {n}, with one slot group each")
        if self.source.shape != self.weight.shape or self.source.shape[-1] != n:
            raise ValueError(
                f"source {tuple(self.source.shape)} and weight {tuple(self.weight.shape)} must be (A, {n})"
            )
        if not torch.allclose(self.weight.sum(0), torch.ones(n)):
            raise ValueError("the weights of every position must sum to 1")
        last = torch.tensor([0, *self.slot_fronts]).cumsum(0)  # last slot fed before each front
        first = torch.cat([torch.tensor([0]), last[:-2] + 1]) if len(self.fronts) > 1 else torch.tensor([0])
        front_of = torch.repeat_interleave(torch.arange(len(self.fronts)), torch.tensor(self.fronts))
        used = self.weight != 0
        if not (((self.source >= first[front_of]) & (self.source <= last[front_of])) | ~used).all():
            raise ValueError("every position must read slots that were fed right before its front")

    @property
    def num_positions(self) -> int:
        """Positions of the grid, N."""
        return len(self.order)

    @property
    def num_rows(self) -> int:
        """Rows of predictions, A: one head, or part of a shared one, serves each."""
        return len(self.source)

    @property
    def num_steps(self) -> int:
        """Forward passes that a whole grid takes."""
        return len(self.fronts)

    @property
    def num_special(self) -> int:
        """Learned special slots."""
        return int((self.slots < 0).sum())

    def front(self, index: int) -> slice:
        """The positions of front `index`, in generation order."""
        start = sum(self.fronts[:index])
        return slice(start, start + self.fronts[index])

    def fed(self, index: int) -> slice:
        """The slots (counted from slot 1) that are fed after front `index` is known."""
        start = sum(self.slot_fronts[:index])
        return slice(start, start + self.slot_fronts[index])

    def slot_levels(self) -> Tensor:
        """(S,) the front after which each slot is fed: a slot sees those of its own level and of earlier ones."""
        return torch.repeat_interleave(torch.arange(len(self.slot_fronts)), torch.tensor(self.slot_fronts))

    def decided_by(self, row: int) -> Schedule:
        """The same order, with one row of predictions deciding alone wherever it predicts (paper, table 5)."""
        own = torch.zeros_like(self.weight)
        own[row] = 1.0
        return dataclasses.replace(self, weight=torch.where(self.weight[row] > 0, own, self.weight))

    def coordinates(self, places: Tensor) -> Tensor:
        """Raster indices (...) to grid coordinates (..., axes)."""
        columns = []
        for size in reversed(self.grid):
            columns.append(places % size)
            places = places // size
        return torch.stack(columns[::-1], -1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and all(
            torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


def manhattan(grid: Sequence[int]) -> Schedule:
    """Neighboring Autoregressive Modeling (arXiv 2503.10696, section 3): fronts are the positions at equal Manhattan
    distance.

    Row k of predictions runs along axis A-1-k (width first, then height, then time). A position reads its neighbours
    one step nearer along each axis, with equal shares; the first one reads all rows at the condition.
    """
    grid = _checked(grid)
    axes, n = len(grid), math.prod(grid)
    coordinates = _coordinates(grid)
    distance = coordinates.sum(-1)
    order = torch.argsort(distance, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n)
    source = torch.zeros(axes, n, dtype=torch.long)
    exists = torch.zeros(axes, n)
    strides = [math.prod(grid[axis + 1 :]) for axis in range(axes)]
    for row in range(axes):
        axis = axes - 1 - row
        inside = coordinates[order, axis] > 0
        source[row] = torch.where(inside, rank[(order - strides[axis]).clamp_min(0)] + 1, 0)
        exists[row] = inside.float()
    exists[:, 0] = 1.0
    fronts = tuple(torch.bincount(distance).tolist())
    return Schedule(grid, order, fronts, source, exists / exists.sum(0), torch.arange(n), fronts, order)


def raster(grid: Sequence[int]) -> Schedule:
    """Plain next-token prediction in row-major order: N fronts of one position."""
    grid = _checked(grid)
    n = math.prod(grid)
    order, fronts = torch.arange(n), (1,) * n
    return Schedule(grid, order, fronts, torch.arange(n)[None], torch.ones(1, n), order, fronts, order)


def par(grid: Sequence[int], regions: Sequence[int]) -> Schedule:
    """Parallelized autoregressive generation (PAR, arXiv 2412.15119): the grid is cut into regions that grow together.

    The first token of each region comes one after another; then all regions' tokens at the same place inside their
    region together, each read at its region's previous token. The first such front has no own slot but the last
    region's first token: learned transition slots (one fewer than regions) stand in for the others, at the places of
    those first tokens.
    """
    grid, regions = _checked(grid), _whole(regions, "regions")
    if len(regions) != len(grid) or any(size % count or count < 1 for size, count in zip(grid, regions, strict=True)):
        raise ValueError(f"regions {regions} must divide grid {grid} axis by axis; set model.regions, such as [2, 2]")
    n, num_regions = math.prod(grid), math.prod(regions)
    cell = torch.tensor([size // count for size, count in zip(grid, regions, strict=True)])
    coordinates = _coordinates(grid)
    region = _raster_index(coordinates // cell, regions)
    inner = _raster_index(coordinates % cell, cell.tolist())
    order = torch.argsort(inner * num_regions + region)
    per_region = n // num_regions
    if per_region == 1:
        return raster(grid)
    fronts = (1,) * num_regions + (num_regions,) * (per_region - 1)
    special = num_regions - 1
    slots = torch.cat([torch.arange(special), -1 - torch.arange(special), torch.arange(special, n)])
    # The transition slots are fed with the last first token: a front of `num_regions` slots, in order of region.
    slot_fronts = (1,) * (num_regions - 1) + (num_regions,) * per_region
    places = torch.cat([order[: num_regions - 1], order[:special], order[num_regions - 1 :]])
    # With the slots in this order, every position reads the slot of its own number, as in plain next-token prediction.
    return Schedule(grid, order, fronts, torch.arange(n)[None], torch.ones(1, n), slots, slot_fronts, places)


def scales(sides: Sequence[int]) -> Schedule:
    """Next-scale prediction (VAR, arXiv 2404.02905): a picture's codes at growing scales, each predicted whole.

    The grid has one axis, all scales one after the other, row-major inside: 680 positions for sides 1, 2, 3, 4, 5, 6,
    8, 10, 13 and 16. The first position reads the condition, every other one the slot at its own place.
    """
    sides = _whole(sides, "scales")
    check_sides(sides)
    fronts = tuple(side * side for side in sides)
    (n,) = grid = _checked((sum(fronts),))
    order = torch.arange(n)
    return Schedule(
        grid, order, fronts, order[None], torch.ones(1, n), order[1:], (*fronts[1:], 0), order[1:], sides=sides
    )


CONSTRUCTORS: dict[str, Callable[..., Schedule]] = {
    "manhattan": manhattan,
    "raster": raster,
    "par": par,
    "scales": scales,
}


def build(name: str, grid: Sequence[int], regions: Sequence[int] = (), sides: Sequence[int] = ()) -> Schedule:
    """The schedule that a config names: "manhattan", "raster", "par" with its regions, or "scales" with their sides."""
    if not isinstance(name, str) or name not in CONSTRUCTORS:
        raise ValueError(f"schedule must be one of {', '.join(CONSTRUCTORS)}, not {name!r}")
    with torch.device("cpu"):  # whatever device a model is being built on
        if name != "scales":
            return par(grid, regions) if name == "par" else CONSTRUCTORS[name](grid)
        if (found := scales(sides)).grid != tuple(grid):
            raise ValueError(
                f"scales {list(sides)} have {found.num_positions} positions, grid is {grid}; set it to that"
            )
        return found


def _checked(grid: Sequence[int]) -> tuple[int, ...]:
    checked = _whole(grid, "grid")
    if not checked or min(checked) < 1:
        raise ValueError(f"grid must have at least one axis and positive sizes, such as (16, 16), not {checked}")
    if (n := math.prod(checked)) > MOST_POSITIONS:
        raise ValueError(f"grid {checked} has {n:,} positions; at most {MOST_POSITIONS:,}, that of 256x256, are taken")
    return checked


def _whole(sizes: Sequence[int], name: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(size) for size in (() if isinstance(sizes, bytes) else sizes))
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, such as (16, 16), not {str(sizes)[:80]}") from None


def _coordinates(grid: Sequence[int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(math.prod(grid), len(grid))


def _raster_index(coordinates: Tensor, grid: Sequence[int]) -> Tensor:
    index = torch.zeros_like(coordinates[..., 0])
    for axis, size in enumerate(grid):
        index = index * size + coordinates[..., axis]
    return index
