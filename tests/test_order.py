"""Schedules, exhaustively on small grids."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from nar.order import Schedule, build, manhattan, par, raster, scales

GRIDS = [
    *((n,) for n in range(1, 8)),
    *itertools.product(range(1, 6), repeat=2),
    *itertools.product(range(1, 4), repeat=3),
    (2, 1, 2, 3),
]


def fed_before(schedule: Schedule, front: int) -> set[int]:
    """The slots whose predictions are computed right before `front`: slot 0, or those of the last front."""
    if front == 0:
        return {0}
    fed = schedule.fed(front - 1)
    return set(range(fed.start + 1, fed.stop + 1))


def check(schedule: Schedule) -> None:
    count = schedule.num_positions
    assert sorted(schedule.order.tolist()) == list(range(count))
    assert sum(schedule.fronts) == count
    assert schedule.num_steps == len(schedule.fronts) == len(schedule.slot_fronts)
    torch.testing.assert_close(schedule.weight.sum(0), torch.ones(count))
    if schedule.sides:  # slots hold sums, for the places that read them
        assert schedule.slots.tolist() == schedule.places.tolist() == list(range(1, count))
    else:
        assert sorted(slot for slot in schedule.slots.tolist() if slot >= 0) == list(range(count))
    for front in range(schedule.num_steps):
        positions = schedule.front(front)
        used = schedule.source[:, positions][schedule.weight[:, positions] != 0]
        assert set(used.tolist()) <= fed_before(schedule, front)
        if schedule.sides:
            continue
        held = [slot for slot in schedule.slots[schedule.fed(front)].tolist() if slot >= 0]
        assert sorted(held) == list(range(positions.start, positions.stop))
    real = schedule.slots >= 0
    assert torch.equal(schedule.places[real], schedule.order[schedule.slots[real]])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_manhattan(grid: tuple[int, ...]) -> None:
    schedule = manhattan(grid)
    check(schedule)
    axes = len(grid)
    assert schedule.num_steps == sum(grid) - axes + 1
    coordinates = schedule.coordinates(schedule.order).tolist()
    place = {tuple(coordinate): index for index, coordinate in enumerate(coordinates)}
    for index, coordinate in enumerate(coordinates):
        # Every parent: the neighbour one step back along each axis, head k along axis A-1-k, equal shares.
        parents = {}
        for row in range(axes):
            back = list(coordinate)
            back[axes - 1 - row] -= 1
            if min(back) >= 0:
                parents[row] = place[tuple(back)] + 1
        parents = parents or dict.fromkeys(range(axes), 0)
        for row in range(axes):
            share = schedule.weight[row, index].item()
            assert share == pytest.approx(1 / len(parents) if row in parents else 0)
            assert row not in parents or schedule.source[row, index].item() == parents[row]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fronts_are_the_positions_at_one_distance_in_raster_order(grid: tuple[int, ...]) -> None:
    schedule = manhattan(grid)
    distance = schedule.coordinates(schedule.order).sum(-1)
    for front in range(schedule.num_steps):
        positions = schedule.front(front)
        assert set(distance[positions].tolist()) == {front}
        assert schedule.order[positions].tolist() == sorted(schedule.order[positions].tolist())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_raster(grid: tuple[int, ...]) -> None:
    schedule = raster(grid)
    check(schedule)
    assert schedule.order.tolist() == schedule.source[0].tolist() == list(range(schedule.num_positions))


@pytest.mark.parametrize("count", range(1, 9))
def test_along_one_axis_all_are_next_token_prediction(count: int) -> None:
    assert manhattan((count,)) == raster((count,))
    assert par((count,), (1,)) == raster((count,))


@pytest.mark.parametrize(
    ("grid", "regions"), [((4, 4), (2, 2)), ((4, 6), (2, 3)), ((6,), (3,)), ((2, 4, 4), (1, 2, 2)), ((2, 2), (2, 2))]
)
def test_par(grid: tuple[int, ...], regions: tuple[int, ...]) -> None:
    schedule = par(grid, regions)
    check(schedule)
    num_regions, count = torch.tensor(regions).prod().item(), schedule.num_positions
    assert schedule.num_steps == num_regions + count // num_regions - 1
    assert schedule.num_special == (num_regions - 1 if count > num_regions else 0)
    cell = torch.tensor([size // parts for size, parts in zip(grid, regions, strict=True)])
    where = schedule.coordinates(schedule.order)
    for position in range(num_regions, count):
        # Each token is read at its region's previous token, or at the transition slot that stands at its place.
        previous = schedule.coordinates(schedule.places[schedule.source[0, position] - 1])
        assert torch.equal(previous // cell, where[position] // cell)


@pytest.mark.parametrize("sides", [(1,), (1, 2), (1, 2, 3, 4), (1, 3, 4), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)], ids=str)
def test_scales(sides: tuple[int, ...]) -> None:
    schedule = scales(sides)
    check(schedule)
    assert schedule.fronts == tuple(side * side for side in sides)
    assert (schedule.num_steps, schedule.num_special) == (len(sides), 0)
    assert build("scales", schedule.grid, sides=sides) == schedule
    scale = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor(schedule.fronts))
    assert torch.equal(schedule.slot_levels() + 1, scale[1:]), "a slot sees those of its own scale and of coarser ones"
    # The fronts read: all but the first at the slot of their own place.
    assert schedule.source[0].tolist() == list(range(sum(schedule.fronts)))


def test_published_step_counts() -> None:
    assert manhattan((16, 16)).num_steps == 31
    assert manhattan((24, 24)).num_steps == 47
    assert manhattan((32, 32)).num_steps == 63
    assert manhattan((4, 16, 16)).num_steps == 34
    assert manhattan((4, 16, 16)).fronts[:8] == (1, 3, 6, 10, 14, 18, 22, 26)
    assert raster((16, 16)).num_steps == 256
    four = par((16, 16), (2, 2))
    assert (four.num_steps, four.fronts[:6], four.num_special) == (67, (1, 1, 1, 1, 4, 4), 3)
    assert par((4, 16, 16), (1, 2, 2)).num_steps == 259
    assert scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).num_positions == 680
    assert scales((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).num_positions == 2240


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="positive sizes"):
        manhattan(b"\x02\x02")
    with pytest.raises(ValueError, match="positive sizes"):
        manhattan((0, 4))
    with pytest.raises(ValueError, match=r"regions \(3, 2\) must divide"):
        par((4, 4), (3, 2))
    with pytest.raises(ValueError, match="'diagonal'"):
        build("diagonal", (4, 4))
    for sides in ((), (2, 3), (1, 2, 2), (1, 0)):
        with pytest.raises(ValueError, match="scales must begin with 1 and grow"):
            scales(sides)
    with pytest.raises(ValueError, match=r"scales \[1, 2\] have 5 positions, grid is \(4, 4\)"):
        build("scales", (4, 4), sides=(1, 2))
    good = manhattan((2, 2))
    with pytest.raises(ValueError, match="once"):
        dataclasses.replace(good, order=torch.tensor([0, 1, 1, 3]))
    with pytest.raises(ValueError, match="sum to 1"):
        dataclasses.replace(good, weight=good.weight * 0.5)
    with pytest.raises(ValueError, match="right before"):
        dataclasses.replace(good, source=good.source.roll(1, 1))


def test_one_row_may_decide_alone() -> None:
    whole = manhattan((3, 4))
    for row, first in ((0, {0, 4, 8}), (1, {0, 1, 2, 3})):  # the raster indices that the row does not predict
        alone = whole.decided_by(row)
        predicted = whole.weight[row] > 0
        assert {*whole.order[~predicted].tolist()} == first - {0}
        assert torch.equal(alone.weight[row, predicted], torch.ones(int(predicted.sum())))
        assert torch.equal(alone.weight[:, ~predicted], whole.weight[:, ~predicted])
        assert torch.equal(alone.source, whole.source)
    assert torch.equal(whole.weight, manhattan((3, 4)).weight)
