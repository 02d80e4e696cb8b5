"""Progress of long work on standard error: a bar on a terminal, and in logs and pipes a line every half a minute.

Knows counts and times; does not know what is counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

from nar.storage.text import without_commands

Item = TypeVar("Item")
FIRST, EVERY = 5.0, 30.0  # seconds to the first line, and between lines


class Progress:
    """A context in which `update` is called as work is done: "extracting codes: 512 of 2,048 pictures (25 %), ...".

    `done` of `total`, which None leaves open, were done before. A line also comes where nothing was updated, so that
    silence means the end.
    """

    def __init__(self, doing: str, total: int | None, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.doing, self.total, self.unit = doing, total, unit
        self._first = self._done = done
        self._quiet, self._shown, self._said = quiet, dict[str, str](), False
        self._bar: Any = None
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._quiet:
            return self
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, initial=self._first, desc=self.doing, unit=f" {self.unit}")
        else:
            threading.Thread(target=self._lines, daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end.set()
        if self._bar is not None:
            self._bar.close()
        elif self._said and kind is None:
            self._say_state(f"{self._done:,} {self.unit} in {duration(time.monotonic() - self._began)}")

    def update(self, count: int = 1, **shown: str) -> None:
        """Add to what is done; `shown` are further values, by name."""
        self._done += count
        self._shown |= shown
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(count)

    def say(self, text: str) -> None:
        """Write a line beside the bar."""
        text = without_commands(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def _lines(self) -> None:
        pause = FIRST
        while not self._end.wait(pause):
            pause, self._said = EVERY, True
            done, total = self._done, self.total
            rate = (done - self._first) / (time.monotonic() - self._began)
            state = f"{done:,} of {total:,} {self.unit} ({done / total:.0%})" if total else f"{done:,} {self.unit}"
            state += f", {rate:,.3g} a second" if rate else ""
            self._say_state(state + (f", {duration((total - done) / rate)} left" if total and rate else ""))

    def _say_state(self, state: str) -> None:
        details = "".join(f", {name} {value}" for name, value in self._shown.items())
        self.say(f"{self.doing}: {state}{details}")


def steps(items: Sequence[Item], doing: str, unit: str, *, quiet: bool = False) -> Iterator[Item]:
    """Yield items, and show how many of them are done."""
    with Progress(doing, len(items), unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """A time as people say it: "45 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
