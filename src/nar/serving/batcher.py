"""Calls of many callers through one model: who waits, who runs, who is refused.

Knows queues, threads, clocks, memory and slots, and what a pipeline makes of requests; does not know HTTP, nor how a
front is sampled (`nar.serving.engines`). One thread runs the model and nothing else; a second encodes words and context
frames and decodes clips. Both call `on_event`, which must not block.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor

from nar.model import Transformer
from nar.pipeline import Pipeline, Request
from nar.pipeline.requests import known_codes
from nar.sampling import Sampling
from nar.serving.engines import Cohort, Flight, Row, num_sides

MOST_SLOTS = {"cpu": 8, "cuda": 64}  # where more rows bring little and make everyone's front longer
MEMORY_BYTES = 2**31  # of keys and values: 50 guided pictures of NAR-B in float32
WAITING_PER_SLOT = 4
SMOOTHING = 0.1  # of the mean time of a front: the last ten or so
UNKNOWN_SECONDS = 1.0  # to come again after, before any front was timed
TICK_SECONDS = 0.5  # how often waiting threads look at deadlines
STALLED_SECONDS = 60.0  # without a front while there is work: `is_alive` says no


@dataclass(frozen=True, eq=False)
class Work:
    """One call: a picture or clip for each request; number i has the stream (seed, i), as in a call of `Pipeline`.

    Attributes:
        known: codes (n, *grid) to keep, -1 where free.
        num_frames: length of clips, context included; several passes where one does not reach it.
        key: whose share of the queue it counts in.
        deadline_seconds: from now; after it nobody wants the results.
        partial_fronts: the fronts after which codes so far are wanted; those of later passes count on.
    """

    requests: Sequence[Request]
    sampling: Sampling
    seed: int
    known: Tensor | None = None
    num_frames: int | None = None
    key: str = ""
    deadline_seconds: float | None = None
    partial_fronts: Collection[int] = ()


@dataclass(frozen=True, eq=False)
class Partial:
    """Codes (*grid) of the running pass of result `index` after a front of `num_fronts`, -1 where undecided."""

    index: int
    front: int
    num_fronts: int
    codes: Tensor


@dataclass(frozen=True, eq=False)
class Done:
    """Result `index`: its codes (*grid), of a clip those of the last pass beside all `pixels` (3, T, H, W) in -1..1."""

    index: int
    codes: Tensor
    pixels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Failed:
    """The end of a call: ValueError for what the model does not take, `Refused` for a deadline that passed."""

    error: Exception


Event = Partial | Done | Failed


class Refused(RuntimeError):  # noqa: N818 an answer, not a fault
    """A call that is not taken. `reason` is "overloaded", "limit" (of its key), "deadline" or "closing"; after
    `retry_after_seconds` there should be room."""

    def __init__(self, reason: str, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after_seconds = reason, retry_after_seconds


class Ticket:
    """A call that was taken."""

    def __init__(self, work: Work, on_event: Callable[[Event], None]) -> None:
        self.work = work
        self.deadline = math.inf if work.deadline_seconds is None else monotonic() + work.deadline_seconds
        self._on_event: Callable[[Event], None] | None = on_event

    @property
    def is_wanted(self) -> bool:
        """Whether anyone waits for more of it."""
        return self._on_event is not None

    def cancel(self) -> None:
        """Drop what is left of the call, within one front. No event comes after; one may be on its way."""
        self._on_event = None

    def tell(self, event: Event) -> None:
        """Call back, unless cancelled; a call back that fails cancels. After `Failed` nothing more comes."""
        on_event = self._on_event
        if on_event is None:
            return
        if isinstance(event, Failed):
            self.cancel()
        try:
            on_event(event)
        except Exception:
            self.cancel()
            logging.getLogger(__name__).exception("a call is cancelled, for its on_event failed")


@dataclass(eq=False)
class _Result:
    """One picture or clip on its way."""

    ticket: Ticket
    index: int
    request: Request  # of a clip after some passes: with all frames so far
    num_passes: int
    num_done: int = 0  # passes
    row: Row | None = None
    has_begun: bool = False
    codes: Tensor | None = None  # of a pass that is to be decoded


class _Shares:
    """Results that wait, first come first served within a key; keys take turns."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[_Result]] = OrderedDict()

    def __iter__(self) -> Iterator[_Result]:
        return (result for queue in self._queues.values() for result in queue)

    def __bool__(self) -> bool:
        return bool(self._queues)

    def push(self, result: _Result) -> None:
        """Append; a clip that goes on comes first."""
        queue = self._queues.setdefault(result.ticket.work.key, deque())
        if result.has_begun:
            queue.appendleft(result)
        else:
            queue.append(result)

    def first(self) -> _Result:
        """The one whose turn it is."""
        return next(iter(self._queues.values()))[0]

    def pop(self) -> _Result:
        """Take it; the next turn is another key's."""
        key, queue = next(iter(self._queues.items()))
        result = queue.popleft()
        self._queues.move_to_end(key)
        if not queue:
            del self._queues[key]
        return result

    def drop(self, unwanted: Collection[_Result]) -> None:
        """Take out those that nobody waits for."""
        for key, queue in list(self._queues.items()):
            kept = deque(result for result in queue if result not in unwanted)
            if kept:
                self._queues[key] = kept
            else:
                del self._queues[key]


def slot_bytes(model: Transformer) -> int:
    """Memory of keys and values of one sample, of both sides of guidance where the model has any."""
    config, schedule = model.config, model.layout.schedule
    length: int = config.num_condition + schedule.fed(schedule.num_steps - 1).start
    element = torch.empty(0, dtype=model.cache_dtype).element_size()
    return 2 * num_sides(model) * config.num_blocks * length * config.dim * element


class Batcher:
    """One model for many callers. Results are those of `pipeline` alone with the same seed, bit for bit on a CPU.

    Args:
        slots: results that run at once; by default as many as the memory holds, at most 8 on a CPU and 64 on CUDA.
        max_waiting: results beyond them that are taken; by default four a slot.
        max_waiting_per_key: those of one key; by default all.
        memory_bytes: bound for keys and values, which are all of the memory that grows with `slots`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        slots: int | None = None,
        max_waiting: int | None = None,
        max_waiting_per_key: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.pipeline, model = pipeline, pipeline.model
        each = slot_bytes(model)
        most = memory_bytes // each
        slots = min(most, MOST_SLOTS.get(model.device.type, 8)) if slots is None else slots
        if not 1 <= slots <= most:
            raise ValueError(
                f"{slots} slots of {each:,} bytes do not fit memory_bytes {memory_bytes:,}: it holds {most}"
            )
        self.slots, self.memory_bytes = slots, slots * each
        self.max_waiting = WAITING_PER_SLOT * slots if max_waiting is None else max_waiting
        self.max_waiting_per_key = self.max_waiting if max_waiting_per_key is None else max_waiting_per_key
        self.front_seconds = 0.0  # a mean of the last fronts, of all rows together; 0 before the first
        self._engine: Flight | Cohort = (Cohort if model.device.type == "cuda" else Flight)(model, slots)
        self._num_steps = model.layout.schedule.num_steps
        self._unprepared, self._ready = _Shares(), _Shares()
        self._outstanding: dict[_Result, None] = {}
        self._flying: dict[int, tuple[_Result, int]] = {}  # by slot; the number of fronts that are sampled
        self._is_closing = False
        self._ticked = monotonic()
        self._changed = threading.Condition()
        threads = {"nar-engine": self._run, "nar-prepare": self._prepare_all}
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=name, daemon=True) for name, run in threads.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work, on_event: Callable[[Event], None]) -> Ticket:
        """Take a call; its events come from the batcher's threads: partial ones, `Done` for each result, or `Failed`.

        Raises:
            Refused: there is no room, no time before its deadline, or no more work is taken. Nothing was done for it.
            ValueError: lengths or codes that can't be, or more results than are ever taken at once.
        """
        count, known = len(work.requests), work.known
        if not 0 < count <= self.slots + self.max_waiting:
            raise ValueError(f"{count} results are asked for; 1 to {self.slots + self.max_waiting} are taken at once")
        self.pipeline.check_length(work.num_frames, work.requests, "pil")
        if known is not None:
            work = dataclasses.replace(work, known=known_codes(known, count, self.pipeline.model.config.grid))
        with self._changed:
            self._refuse(work)
            ticket = Ticket(work, on_event)
            for index, request in enumerate(work.requests):
                result = _Result(ticket, index, request, self._passes(request, work.num_frames))
                self._outstanding[result] = None
                self._unprepared.push(result)
            self._changed.notify_all()
        return ticket

    def close(self, *, drain: bool = True) -> None:
        """Take no more work; finish what was taken, or with `drain` False end it with `Failed`; then return."""
        with self._changed:
            self._is_closing = True
            dropped = [] if drain else list({result.ticket: None for result in self._outstanding})
            self._changed.notify_all()
        for ticket in dropped:
            ticket.tell(Failed(Refused("closing", "the server is shutting down", 1.0)))
        for thread in self._threads:
            thread.join()

    @property
    def waiting(self) -> int:
        """Results that were taken and have not begun."""
        with self._changed:
            return sum(not result.has_begun for result in self._outstanding)

    @property
    def running(self) -> int:
        """Results that have begun, clips between two passes included."""
        with self._changed:
            return sum(result.has_begun for result in self._outstanding)

    @property
    def slots_used(self) -> int:
        """Slots that hold a result."""
        with self._changed:
            return len(self._flying)

    def is_alive(self) -> bool:
        """Whether both threads run, and fronts come where there is work."""
        with self._changed:
            stalled = self._flying and monotonic() - self._ticked > STALLED_SECONDS
            return not stalled and all(thread.is_alive() for thread in self._threads)

    def predicted_wait(self, work: Work | None = None) -> float:
        """Seconds until this work would be done if it came now; without any, until a slot is free."""
        with self._changed:
            free = [0] * (self.slots - len(self._flying))
            for result, done in self._flying.values():
                free.append((result.num_passes - result.num_done) * self._num_steps - done)
            heapq.heapify(free)
            passes = [result.num_passes - result.num_done for result in self._queued()]
        own = [] if work is None else [self._passes(request, work.num_frames) for request in work.requests]
        ends = []
        for count in passes + own:
            ends.append(free[0] + count * self._num_steps)
            heapq.heapreplace(free, ends[-1])
        return max(ends[len(passes) :], default=free[0]) * self.front_seconds

    def _refuse(self, work: Work) -> None:
        """Raise `Refused` when there is no room for this work, or no time."""
        if self._is_closing:
            raise Refused("closing", "the server is shutting down", 1.0)
        queued = [result for result in self._queued() if not result.has_begun]
        free = max(0, self.slots - (len(self._outstanding) - len(queued)))
        late = len(queued) + len(work.requests) - free  # of these and those before them
        own = sum(result.ticket.work.key == work.key for result in queued) + len(work.requests)
        if late > self.max_waiting:
            message = f"{len(queued)} results are waiting for {self.slots} slots, at most {self.max_waiting} may"
            raise Refused("overloaded", message, self.predicted_wait() or UNKNOWN_SECONDS)
        if min(late, own) > self.max_waiting_per_key:
            message = f"{own} results of this key would be waiting, at most {self.max_waiting_per_key} may"
            raise Refused("limit", message, self.predicted_wait() or UNKNOWN_SECONDS)
        if work.deadline_seconds is not None and (wait := self.predicted_wait(work)) > work.deadline_seconds:
            message = f"it would take {wait:.1f} s, the deadline is after {work.deadline_seconds:g} s"
            raise Refused("deadline", message, wait - work.deadline_seconds)

    def _queued(self) -> list[_Result]:
        """What has no slot now."""
        flying = {result for result, _ in self._flying.values()}
        return [result for result in self._outstanding if result not in flying]

    def _passes(self, request: Request, num_frames: int | None) -> int:
        length = 0 if request.frames is None else request.frames.shape[1]
        return self.pipeline.continuation.num_passes(length, num_frames) if self.pipeline.makes_clips else 1

    def _is_finished(self) -> bool:
        return self._is_closing and not self._outstanding

    def _wait(self, queue: _Shares) -> None:
        with self._changed:
            if not queue and not self._is_finished():
                self._changed.wait(TICK_SECONDS)

    def _forget(self, result: _Result) -> None:
        with self._changed:
            self._outstanding.pop(result, None)
            self._changed.notify_all()

    def _guarded(self, run: Callable[[], None]) -> None:
        """Run a thread; should it fail, nobody waits for it in vain."""
        try:
            run()
        except BaseException as error:
            with self._changed:
                self._is_closing = True
                tickets = list({result.ticket: None for result in self._outstanding})
            for ticket in tickets:
                ticket.tell(Failed(RuntimeError(f"the batcher has failed: {error!r}")))
            raise

    @torch.inference_mode()
    def _run(self) -> None:
        """The engine's thread: a front of all that fly, then changes."""
        while not self._is_finished():
            self._drop()
            self._admit()
            if self._flying:
                self._advance()
            else:
                self._wait(self._ready)

    def _drop(self) -> None:
        """Give up what is cancelled or too late."""
        now, least = monotonic(), self._num_steps * self.front_seconds
        with self._changed:
            late = {
                result.ticket
                for result in self._outstanding
                if now + (0.0 if result.has_begun else least) > result.ticket.deadline
            }
        for ticket in late:
            message = f"the deadline of {ticket.work.deadline_seconds:g} s could not be met"
            ticket.tell(Failed(Refused("deadline", message, self.predicted_wait())))
        with self._changed:
            unwanted = {result for result in self._outstanding if not result.ticket.is_wanted}
            for result in unwanted:
                self._forget(result)
            for queue in (self._unprepared, self._ready):
                queue.drop(unwanted)
            slots = [slot for slot, (result, _) in self._flying.items() if result in unwanted]
        for slot in slots:
            self._leave(slot)

    def _admit(self) -> None:
        """Give free slots to those whose turn it is."""
        while True:
            with self._changed:
                if not self._ready or not self._engine.takes(_row(self._ready.first())):
                    return
                result = self._ready.pop()
            try:
                slot = self._engine.join(_row(result))
            except Exception as error:  # whatever it is, it is this call's alone
                result.ticket.tell(Failed(error))
                continue
            with self._changed:
                result.has_begun = True
                self._flying[slot] = result, 0

    def _advance(self) -> None:
        """Sample one front of all that fly, and tell."""
        begun = monotonic()
        try:
            advanced = self._engine.step()
        except Exception as error:  # out of memory, say: nobody knows whose it was
            for result, _ in self._flying.values():
                result.ticket.tell(Failed(error))
            return
        self._ticked = monotonic()
        seconds = self._ticked - begun
        self.front_seconds += (SMOOTHING if self.front_seconds else 1.0) * (seconds - self.front_seconds)
        for slot, front, fault in advanced:
            result, _ = self._flying[slot]
            if fault is not None:
                result.ticket.tell(Failed(fault))
                continue
            with self._changed:
                self._flying[slot] = result, front + 1
            number, count = result.num_done * self._num_steps + front, result.num_passes * self._num_steps
            if number in result.ticket.work.partial_fronts:
                result.ticket.tell(Partial(result.index, number, count, self._engine.codes(slot)))
            if front == self._num_steps - 1:
                self._land(slot, result)

    def _land(self, slot: int, result: _Result) -> None:
        """End a pass: a picture is done, a clip is decoded and may go on."""
        codes = self._engine.codes(slot)
        self._leave(slot)
        if not self.pipeline.makes_clips:
            result.ticket.tell(Done(result.index, codes))
            self._forget(result)
            return
        with self._changed:
            result.codes, result.row = codes, None
            if result in self._outstanding:
                self._unprepared.push(result)
                self._changed.notify_all()

    def _leave(self, slot: int) -> None:
        with self._changed:
            del self._flying[slot]
        self._engine.leave(slot)

    @torch.inference_mode()
    def _prepare_all(self) -> None:
        """The second thread: what comes before a pass and after a clip's."""
        while not self._is_finished():
            with self._changed:
                result = self._unprepared.pop() if self._unprepared else None
            if result is None:
                self._wait(self._unprepared)
                continue
            try:
                self._prepare(result)
            except Exception as error:  # a poisoned request fails alone
                result.ticket.tell(Failed(error))

    def _prepare(self, result: _Result) -> None:
        """Decode the pass that a clip has behind it; then the conditions of the next one, if there is one."""
        work, pipeline = result.ticket.work, self.pipeline
        if result.codes is not None:
            decoded = pipeline.decode(result.codes[None], exact=True)[0]
            clip = pipeline.continuation.extended(result.request.frames, decoded)
            result.num_done += 1
            if result.num_done == result.num_passes:
                result.ticket.tell(Done(result.index, result.codes, clip[:, : work.num_frames]))
                self._forget(result)
                return
            result.request = dataclasses.replace(result.request, frames=clip)
        known = work.known[result.index, None] if work.known is not None and result.num_done == 0 else None
        prepared = pipeline.prepared([result.request], work.sampling, known)
        condition, negative, sampling, known = prepared
        stream = result.index + (result.num_done << 32)  # each pass has its own
        with self._changed:
            result.row = Row(condition, negative, sampling, work.seed, stream, known)
            if result in self._outstanding:
                self._ready.push(result)
                self._changed.notify_all()


def _row(result: _Result) -> Row:
    assert result.row is not None
    return result.row
