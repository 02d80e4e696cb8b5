"""The batcher: every result is that of its call alone, whatever else runs, waits, is cancelled or refused."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import LAYOUTS, make_condition, make_model
from nar import Pipeline, Sampling, Transformer, generate
from nar.precision import convert
from nar.serving.batcher import Batcher, Done, Event, Failed, Partial, Refused, Ticket, Work
from nar.serving.engines import Cohort, Flight, Row

WAIT = 60.0


class Call:
    """A call and the events that it got."""

    def __init__(self, batcher: Batcher, work: Work) -> None:
        self.work, self.events, self.is_over = work, list[Event](), threading.Event()
        self.ticket: Ticket = batcher.submit(work, self.on_event)

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Failed) or len(self.of(Done)) == len(self.work.requests):
            self.is_over.set()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def results(self) -> list[Done]:
        assert self.is_over.wait(WAIT)
        if failed := self.of(Failed):
            raise failed[0].error
        return sorted(self.of(Done), key=lambda done: done.index)


def codes_alone(pipeline: Pipeline, work: Work) -> torch.Tensor:
    """What the pipeline samples for this work and nothing else."""
    rows = range(len(work.requests))
    condition, negative, sampling, known = pipeline.prepared(work.requests, work.sampling, work.known)
    options = {"negative": negative, "known": known, "seed": work.seed, "indices": rows}
    return generate(pipeline.model, condition, sampling, **options)


@pytest.fixture(scope="module")
def toy(toy_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(toy_folder, device="cpu")


@pytest.fixture
def batcher(toy: Pipeline) -> Iterator[Batcher]:
    batcher = Batcher(toy, slots=4, max_waiting=64)
    yield batcher
    batcher.close(drain=False)


def work_for(pipeline: Pipeline, number: int) -> Work:
    """Some work that differs by its number."""
    chance = random.Random(number)
    requests = pipeline.requests([chance.randrange(3)] * chance.choice([1, 1, 2, 3]))
    return Work(
        requests,
        Sampling(
            guidance_scale=chance.choice([1.0, 1.5, 3.0]),
            guidance_interval=chance.choice([None, 5]),
            guidance_curve=chance.choice(["constant", "linear"]),
            temperature=chance.choice([0.0, 1.0, 1.3]),
            top_k=chance.choice([0, 5]),
            top_p=chance.choice([1.0, 0.8]),
        ),
        seed=number,
        key=chance.choice("abc"),
    )


def test_a_call_gets_its_pictures_and_partial_codes(toy: Pipeline, batcher: Batcher) -> None:
    work = replace(work_for(toy, 2), requests=toy.requests(["pear", "plum"]), partial_fronts=(0, 3))
    call = Call(batcher, work)
    expected = codes_alone(toy, work)
    assert torch.equal(torch.stack([done.codes for done in call.results()]), expected)
    assert [done.index for done in call.results()] == [0, 1]
    partial: list[Partial] = call.of(Partial)
    assert sorted((event.index, event.front, event.num_fronts) for event in partial) == [
        (0, 0, 7), (0, 3, 7), (1, 0, 7), (1, 3, 7)
    ]  # fmt: skip
    for event in partial:
        decided = event.codes >= 0
        assert int(decided.sum()) == sum(range(event.front + 2))
        assert torch.equal(event.codes[decided], expected[event.index][decided])


def test_each_of_many_staggered_calls_is_what_it_is_alone(toy: Pipeline, batcher: Batcher) -> None:
    calls = []
    for number in range(64):
        while True:
            try:
                calls.append(Call(batcher, work_for(toy, number)))
                break
            except Refused:
                time.sleep(0.01)
        if number % 7 == 3:
            calls[-1].ticket.cancel()
        time.sleep(random.Random(number).random() * 0.004)
    for number, call in enumerate(calls):
        if number % 7 != 3:
            codes = torch.stack([done.codes for done in call.results()])
            assert torch.equal(codes, codes_alone(toy, call.work)), number
    assert (batcher.waiting, batcher.running, batcher.slots_used) == (0, 0, 0)


@pytest.fixture(scope="module")
def clips(clips_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(clips_folder, device="cpu")


def test_clips_of_several_passes(clips: Pipeline) -> None:
    given = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    requests = [*clips.requests(prompt="a red"), replace(clips.requests(prompt="a cat")[0], frames=given)]
    works = [Work(requests, Sampling(2.0), seed=5, num_frames=12), Work(requests, Sampling(), seed=6)]
    expected = [
        clips.sample(requests, range(2), work.sampling, seed=work.seed, num_frames=work.num_frames, exact=True)
        for work in works
    ]
    with closing(Batcher(clips, slots=2)) as batcher:
        calls = [Call(batcher, replace(work, partial_fronts=range(100))) for work in works]
        for call, alone in zip(calls, expected, strict=True):
            for done, clip in zip(call.results(), alone, strict=True):
                assert torch.equal(done.pixels, clip)
        assert batcher.running == 0
    fronts = [(event.front, event.num_fronts) for event in calls[0].of(Partial) if event.index == 0]
    steps = clips.model.layout.schedule.num_steps
    assert fronts == [(number, 5 * steps) for number in range(5 * steps)]


def flown(engine: Flight | Cohort, rows: list[Row], chance: random.Random) -> dict[int, torch.Tensor]:
    """The codes of rows that join one after the other, each at some step."""
    num_steps, waiting = engine.model.layout.schedule.num_steps, list(enumerate(rows))
    flying, codes = dict[int, int](), dict[int, torch.Tensor]()
    while waiting or flying:
        while waiting and engine.takes(waiting[0][1]) and (not flying or chance.random() < 0.6):
            number, row = waiting.pop(0)
            flying[engine.join(row)] = number
        for slot, front, error in engine.step():
            assert error is None
            if front == num_steps - 1:
                codes[flying.pop(slot)] = engine.codes(slot)
                engine.leave(slot)
    return codes


def rows_of(model: Transformer, count: int) -> list[Row]:
    """Rows of every kind of condition and setting, some with codes to keep."""
    chance, condition = random.Random(count), make_condition(model, count)
    guided = [1.0, 1.7, 3.0] if model.config.num_classes or model.config.text_dim else [1.0]
    known = torch.full((1, *model.config.grid), -1)
    known.view(-1)[1:3] = 5
    return [
        Row(
            condition.rows(slice(number, number + 1)),
            condition.rows(slice(0, 1)) if number % 5 == 4 else None,
            Sampling(
                chance.choice(guided), chance.choice([None, 3]), temperature=chance.choice([0.0, 1.0]), top_k=number % 3
            ),
            seed=number,
            index=number % 2,
            known=known if number % 3 == 1 else None,
        )
        for number in range(count)
    ]


def check_alone(codes: dict[int, torch.Tensor], model: Transformer, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        options = {"negative": row.negative, "seed": row.seed, "indices": [row.index], "known": row.known}
        assert torch.equal(codes[number], generate(model, row.condition, row.sampling, **options)[0]), number


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_at_their_own_fronts_are_what_they_are_alone(layout: str) -> None:
    model = convert(make_model(layout), "float32", "cpu")
    rows = rows_of(model, 12)
    codes = flown(Flight(model, 5), rows, random.Random(1))
    check_alone(codes, model, rows)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_number_formats_whose_rows_are_independent(precision: str) -> None:
    if precision != "float32" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no FBGEMM here")
    model = convert(make_model("text"), precision, "cpu")
    rows = rows_of(model, 12)
    codes = flown(Flight(model, 5), rows, random.Random(2))
    check_alone(codes, model, rows)


def test_rows_in_lock_step_are_what_they_are_alone() -> None:
    """The engine for CUDA, here without graphs."""
    model = convert(make_model("text"), "float32", "cpu")
    rows = rows_of(model, 12)
    codes = flown(Cohort(model, 5), rows, random.Random(3))
    check_alone(codes, model, rows)
