"""The log of a run: numbers by step in `metrics.jsonl`, preview pictures, and both in TensorBoard where installed.

Knows files; does not know what the numbers mean.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from nar.storage.files import atomically, write_text


class Log:
    """The log in the folder `run`, a context; with `quiet`, on all processes but the first, nothing is written.

    What a killed run logged after `first_step`, from which it goes on, is taken out.
    """

    def __init__(self, run: Path, first_step: int, batch_size: int, *, quiet: bool = False) -> None:
        self._run, self._first_step, self._batch_size, self._quiet = run, first_step, batch_size, quiet
        self._stack = ExitStack()
        self._board: Any = None

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        path = self._run / "metrics.jsonl"
        write_text(path, "".join(f"{line}\n" for line in _records(path, self._first_step)))
        self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            first = self._first_step * self._batch_size + 1
            # Its thread hands errors to the next call, which names the file; it need not print them too.
            self._stack.callback(setattr, threading, "excepthook", previous := threading.excepthook)
            threading.excepthook = lambda args: _is_board(args.thread) or previous(args)
            with self._named("tensorboard"):
                self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=first)
            self._stack.callback(self._board.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError) if kind else self._named("metrics.jsonl"):  # the first error is the one to see
            self._stack.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers, after `step` steps."""
        self.record(step, values)
        with self._named("tensorboard"):
            for name, value in values.items() if self._board else ():
                self._board.add_scalar(name, value, step * self._batch_size)

    def record(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log numbers or words in `metrics.jsonl` alone."""
        if self._quiet:
            return
        record = {"step": step, "images_seen": step * self._batch_size, "time": round(time.time(), 1), **values}
        with self._named("metrics.jsonl"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def picture(self, step: int, picture: Image.Image) -> None:
        """Write a preview."""
        path = self._run / "previews" / f"{step:07d}.png"
        atomically(path, lambda staging: picture.save(staging, format="png"))
        with self._named("tensorboard"):
            if self._board is None:
                return
            self._board.add_image("preview", np.asarray(picture), step * self._batch_size, dataformats="HWC")

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors of writing, a full disk's say, name the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self._run / name)) from error


def _is_board(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.partition(".")[0] == "tensorboard"


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory as a number to log: of the GPU, or of this process where the system tells."""
    if device.type == "cuda":
        return {"memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    if sys.platform == "win32":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": float(peak if sys.platform == "darwin" else peak * 1024)}


def _records(path: Path, last_step: int) -> list[str]:
    """The lines of a log up to a step; lines that can't be read are left out, and said unless it is the last one,
    which a kill may cut."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    kept, damaged = list[str](), list[int]()
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    if damaged and damaged != [len(lines)]:
        warnings.warn(
            f"{path} is damaged: {len(damaged)} of its {len(lines)} lines can't be read, the first is line "
            f"{damaged[0]}; they are left out",
            stacklevel=2,
        )
    return kept
