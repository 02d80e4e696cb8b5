"""The batcher: every result is that of its call alone, whatever else runs, waits, is cancelled or refused."""

from __future__ import annotations

import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import LAYOUTS, make_condition, make_model
from nar import Pipeline, Sampling, Transformer, generate
from nar.condition import Condition
from nar.precision import convert
from nar.serving.batcher import Batcher, Done, Event, Failed, Partial, Refused, Ticket, Work, slot_bytes
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
    early: list[Partial] = call.of(Partial)
    assert sorted((event.index, event.front, event.num_fronts) for event in early) == [
        (0, 0, 7), (0, 3, 7), (1, 0, 7), (1, 3, 7)
    ]  # fmt: skip
    for event in early:
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


class Held:
    """A batcher whose engine waits inside a call of two results, until it is released."""

    def __init__(self, batcher: Batcher, toy: Pipeline) -> None:
        self.released, entered = threading.Event(), threading.Event()
        work = Work(toy.requests([0, 0]), Sampling(), seed=1, key="held", partial_fronts=(0,))

        def on_event(event: Event) -> None:
            if isinstance(event, Partial):
                entered.set()
                self.released.wait(WAIT)

        batcher.submit(work, on_event)
        assert entered.wait(WAIT)


@pytest.fixture
def held(toy: Pipeline) -> Iterator[tuple[Batcher, threading.Event]]:
    """Both of two slots are taken, and nothing moves before the event is set; three may wait, two of each key."""
    while True:
        batcher = Batcher(toy, slots=2, max_waiting=3, max_waiting_per_key=2)
        released = Held(batcher, toy).released
        if batcher.running == 2:  # else the first was sampled before the second was prepared
            break
        released.set()
        batcher.close(drain=False)
    yield batcher, released
    released.set()
    batcher.close(drain=False)


def one(toy: Pipeline, **others: Any) -> Work:
    return Work(toy.requests("pear"), Sampling(), seed=3, **others)


def test_a_full_queue_refuses_before_anything_is_done(
    toy: Pipeline, held: tuple[Batcher, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, released = held
    original, prepared = toy.prepared, list[object]()
    monkeypatch.setattr(toy, "prepared", lambda *arguments: prepared.append(arguments) or original(*arguments))
    calls = [Call(batcher, one(toy, key=key)) for key in "aab"]
    while batcher.front_seconds == 0 or len(prepared) < 3 or batcher.running < 2:
        time.sleep(0.01)
    late = one(toy, key="c")
    tracemalloc.start()
    for _ in range(200):
        with pytest.raises(Refused, match="3 results are waiting for 2 slots, at most 3 may") as refused:
            batcher.submit(late, calls[0].on_event)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.reason == "overloaded"
    assert 0 < refused.value.retry_after_seconds <= 14 * batcher.front_seconds
    assert (batcher.waiting, batcher.running, len(prepared)) == (3, 2, 3)
    assert peak < 2**18
    released.set()
    for call in calls:
        call.results()


def test_a_key_has_its_own_limit(toy: Pipeline, held: tuple[Batcher, threading.Event]) -> None:
    batcher, released = held
    calls = [Call(batcher, one(toy, key="a")) for _ in range(2)]
    with pytest.raises(Refused, match="3 results of this key would be waiting, at most 2 may") as refused:
        Call(batcher, one(toy, key="a"))
    assert refused.value.reason == "limit"
    calls.append(Call(batcher, one(toy, key="b")))
    released.set()
    for call in calls:
        call.results()


def test_keys_take_turns(toy: Pipeline) -> None:
    order = list[str]()
    with closing(Batcher(toy, slots=1, max_waiting=20)) as batcher:
        released = Held(batcher, toy).released
        over = threading.Event()

        def tell(key: str, event: Event) -> None:
            order.extend([key] * isinstance(event, Done))
            if len(order) == 8:
                over.set()

        for key in "aaaaaabb":
            batcher.submit(one(toy, key=key), partial(tell, key))
        released.set()
        assert over.wait(WAIT)
    assert "".join(order) == "ababaaaa"


def test_deadlines(toy: Pipeline, held: tuple[Batcher, threading.Event], monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, released = held
    in_time = Call(batcher, one(toy, deadline_seconds=1000.0))
    too_late = Call(batcher, one(toy, deadline_seconds=100.0))
    monkeypatch.setattr("nar.serving.batcher.monotonic", lambda: time.monotonic() + 200.0)
    released.set()
    assert torch.equal(in_time.results()[0].codes, codes_alone(toy, in_time.work)[0])
    with pytest.raises(Refused, match="the deadline of 100 s could not be met") as refused:
        too_late.results()
    assert refused.value.reason == "deadline"
    assert too_late.of(Done) == []
    with pytest.raises(Refused, match=r"it would take .* s, the deadline is after 1e-06 s") as refused:
        Call(batcher, one(toy, deadline_seconds=1e-6))
    assert refused.value.reason == "deadline"


def test_a_cancelled_call_is_gone_within_a_front(toy: Pipeline, batcher: Batcher) -> None:
    used, is_submitted = dict[int, int](), threading.Event()
    calls = list[Call]()

    class Leaving(Call):
        def on_event(self, event: Event) -> None:
            super().on_event(event)
            assert is_submitted.wait(WAIT)
            if isinstance(event, Partial) and event.front == 2:
                self.ticket.cancel()
                self.ticket.cancel()

    class Staying(Call):
        def on_event(self, event: Event) -> None:
            super().on_event(event)
            if isinstance(event, Partial):
                used[event.front] = batcher.slots_used

    work = one(toy, partial_fronts=range(7))
    held = Held(batcher, toy)  # so that both begin together
    calls = [Leaving(batcher, work), Staying(batcher, work)]
    is_submitted.set()
    held.released.set()
    assert torch.equal(calls[1].results()[0].codes, codes_alone(toy, work)[0])
    assert [event.front for event in calls[0].events] == [0, 1, 2]
    assert used[3] < used[2]
    assert (batcher.running, batcher.slots_used) == (0, 0)


def test_a_poisoned_call_fails_alone(toy_folder: Path) -> None:
    toy = Pipeline.from_pretrained(toy_folder, device="cpu")
    works = [Work(toy.requests([label]), Sampling(2.0), seed=label) for label in range(3)]
    alone = [codes_alone(toy, work)[0] for work in works]
    with torch.no_grad():
        toy.model.classes.weight[1] = torch.nan
    original = toy.prepared

    def prepared(requests: Any, *others: Any) -> Any:
        if requests[0].label == 2:
            raise RuntimeError("no words for it")
        return original(requests, *others)

    toy.prepared = prepared  # type: ignore[method-assign]
    with closing(Batcher(toy, slots=3)) as batcher:
        held = Held(batcher, toy)
        calls = [Call(batcher, works[number]) for number in (0, 1, 2, 0)]
        held.released.set()
        for call in (calls[0], calls[3]):
            assert torch.equal(call.results()[0].codes, alone[0])
        with pytest.raises(ValueError, match="NaN or infinite"):
            calls[1].results()
        with pytest.raises(RuntimeError, match="no words for it"):
            calls[2].results()


def test_an_on_event_that_fails_cancels_its_call(
    toy: Pipeline, batcher: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Call):
        def on_event(self, event: Event) -> None:
            raise KeyError(event)

    Failing(batcher, one(toy, partial_fronts=(0,)))
    assert Call(batcher, one(toy)).results()
    assert "its on_event failed" in caplog.text


def test_closing(toy: Pipeline) -> None:
    batcher = Batcher(toy, slots=1)
    calls = [Call(batcher, one(toy)) for _ in range(3)]
    batcher.close()
    assert [len(call.of(Done)) for call in calls] == [1, 1, 1]
    assert not batcher.is_alive()
    with pytest.raises(Refused, match="shutting down") as refused:
        Call(batcher, one(toy))
    assert refused.value.reason == "closing"

    batcher = Batcher(toy, slots=1)
    assert batcher.is_alive()
    held = Held(batcher, toy)
    call = Call(batcher, one(toy))
    threading.Timer(0.2, held.released.set).start()
    batcher.close(drain=False)
    with pytest.raises(Refused, match="shutting down"):
        call.results()


def test_what_is_refused_as_wrong(toy: Pipeline, batcher: Batcher) -> None:
    with pytest.raises(ValueError, match=r"9 slots of [\d,]+ bytes do not fit memory_bytes [\d,]+: it holds 8"):
        Batcher(toy, slots=9, memory_bytes=8 * slot_bytes(toy.model))
    with pytest.raises(ValueError, match="69 results are asked for; 1 to 68 are taken at once"):
        batcher.submit(Work(toy.requests(["pear"] * 69), Sampling(), seed=0), print)
    with pytest.raises(ValueError, match="known must be whole numbers"):
        batcher.submit(one(toy, known=torch.zeros(1, 3, 3)), print)
    with pytest.raises(ValueError, match="num_frames is for models that make clips"):
        batcher.submit(one(toy, num_frames=4), print)
    with pytest.raises(ValueError, match="known holds 99"):
        Call(batcher, one(toy, known=torch.full((1, 4, 4), 99))).results()


def test_waits_are_predicted(toy: Pipeline, held: tuple[Batcher, threading.Event]) -> None:
    batcher, _ = held
    while batcher.front_seconds == 0:
        time.sleep(0.01)
    fronts = {name: round(wait / batcher.front_seconds) for name, wait in (
        ("a slot", batcher.predicted_wait()),
        ("one more", batcher.predicted_wait(one(toy))),
        ("three more", batcher.predicted_wait(Work(toy.requests(["pear"] * 3), Sampling(), seed=0))),
    )}  # fmt: skip
    assert fronts["a slot"] in (6, 7)
    assert fronts["one more"] - fronts["a slot"] == 7
    assert fronts["three more"] - fronts["a slot"] == 14


def test_words_and_codes_to_keep(words_folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(words_folder, device="cpu")
    known = torch.full((2, 4, 4), -1)
    known[1, :2] = 7
    prompts = {"prompt": ["a red", "a cat"], "negative_prompt": ["", "red"]}
    works = [
        Work(pipeline.requests(**prompts), Sampling(2.0), seed=4, known=known),
        Work(pipeline.requests(prompt=["", "a"]), Sampling(2.0, top_k=3), seed=5),
    ]
    with closing(Batcher(pipeline, slots=3)) as batcher:
        for call in [Call(batcher, work) for work in works]:
            codes = torch.stack([done.codes for done in call.results()])
            assert torch.equal(codes, codes_alone(pipeline, call.work))
    assert (codes_alone(pipeline, works[0])[1, :2] == 7).all()


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

    def of(number: int) -> Condition:
        own = condition.rows(slice(number, number + 1))
        if own.prefix is None or number % 2:
            return own
        seen = torch.arange(own.prefix.codes.numel()).view_as(own.prefix.codes) % 3 != number % 3
        return replace(own, prefix=replace(own.prefix, mask=seen))

    return [
        Row(
            of(number),
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


def test_slots_never_leak() -> None:
    """10,000 times a row joins, leaves wherever it is, or all go on."""
    model = convert(make_model("nar", grid=(2, 2), num_layers=1), "float32", "cpu")
    condition, chance = make_condition(model, 10), random.Random(0)
    rows = [Row(condition.rows(slice(number, number + 1)), None, Sampling(2.0), number, 0) for number in range(10)]
    alone = [generate(model, row.condition, row.sampling, seed=row.seed)[0] for row in rows]
    flight, flying, num_finished = Flight(model, 7), dict[int, int](), 0
    for _ in range(10_000):
        what = chance.random()
        if what < 0.45:
            number = chance.randrange(10)
            assert flight.takes(rows[number]) == (len(flying) < 7)
            if len(flying) < 7:
                slot = flight.join(rows[number])
                assert slot not in flying
                flying[slot] = number
        elif what < 0.9 and flying:
            slot = chance.choice(list(flying))
            del flying[slot]
            flight.leave(slot)
        elif flying:
            advanced = flight.step()
            assert {own.slot for own in advanced} == set(flying)
            for slot in [own.slot for own in advanced if own.front == 2]:
                num_finished += 1
                assert torch.equal(flight.codes(slot), alone[flying.pop(slot)])
                flight.leave(slot)
    assert num_finished > 30
