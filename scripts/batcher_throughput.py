"""Pictures a second of the batcher beside those of batches of the same size, in one run, alternating.

    OMP_NUM_THREADS=1 python scripts/batcher_throughput.py --models fashion emoji NAR-B

Callers ask for one picture each, and for the next as soon as they have it. "In step" all begin together; "staggered"
each begins a part of a generation after the one before, so that all stand at different fronts: the worst case. Times
are processor time of the whole process, the batcher's own threads included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from nar import Pipeline, Sampling, generate
from nar.bench import IMAGE_GUIDANCE, preset_model, preset_tokenizer
from nar.sampling import Session
from nar.serving.batcher import Batcher, Done, Event, Failed, Partial, Work
from nar.storage.presets import PRESETS


def pipeline_of(name: str, dtype: str) -> Pipeline:
    """A model folder, or a published size with random weights."""
    if name not in PRESETS:
        return Pipeline.from_pretrained(name, device="cpu", dtype=dtype)
    return Pipeline(preset_model(name, precision=dtype), preset_tokenizer(name), sampling=Sampling(IMAGE_GUIDANCE))


class Callers:
    """Callers of a batcher, each with one picture on its way."""

    def __init__(self, batcher: Batcher, works: list[Work], *, staggered: bool) -> None:
        self.batcher, self.works = batcher, works
        self.events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        num_steps = batcher.pipeline.model.layout.schedule.num_steps
        for number in range(len(works)):
            self.ask(number, (num_steps // len(works),) if staggered else ())
            if staggered:
                while not isinstance(self.next(), Partial):
                    pass

    def ask(self, number: int, partial_fronts: tuple[int, ...] = ()) -> None:
        work = dataclasses.replace(self.works[number], partial_fronts=partial_fronts)
        self.batcher.submit(work, lambda event: self.events.put((number, event)))

    def next(self) -> Event:
        """The next event; a caller that has its picture asks for another."""
        number, event = self.events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            self.ask(number)
        return event

    def done(self, count: int) -> None:
        """Wait for pictures."""
        while count:
            count -= isinstance(self.next(), Done)


def measured(pipeline: Pipeline, size: int, rounds: int) -> dict[str, float]:
    """Milliseconds a picture: of batches, and of as many callers in step and staggered."""
    model, config = pipeline.model, pipeline.model.config
    words = {"prompt": ["a red apple"] * size} if config.text_dim else {}
    labels = [number % config.num_classes for number in range(size)] if config.num_classes else None
    requests = pipeline.requests(labels, **words)
    condition, negative = pipeline.condition(requests)
    session, seconds = Session(model), dict[str, list[float]]()

    def timed(name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        seconds.setdefault(name, []).append((time.process_time() - begun) / size)

    works = [Work([request], pipeline.sampling, seed=number) for number, request in enumerate(requests)]
    for number in range(rounds + 1):
        if number == 1:  # all before was a warm-up
            seconds.clear()
        for _ in timed("batches"):
            generate(model, condition, pipeline.sampling, negative=negative, session=session)
        for staggered in (False, True):
            with closing(Batcher(pipeline, slots=size)) as batcher:
                callers = Callers(batcher, works, staggered=staggered)
                callers.done(size - 1 if staggered else 0)
                for _ in timed("staggered" if staggered else "in step"):
                    callers.done(size)
                batcher.close(drain=False)
    return {name: 1000 * statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["fashion", "emoji", "NAR-B"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=8, help="callers, and pictures of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for name in given.models:
        times = measured(pipeline_of(name, given.dtype), given.size, given.rounds)
        rows.append({"model": name, "dtype": given.dtype, "size": given.size, "milliseconds": times})
        shown = ", ".join(f"{key} {value:.1f} ms ({times['batches'] / value:.2f})" for key, value in times.items())
        print(f"{name}, {given.dtype}, {given.size}: {shown}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
