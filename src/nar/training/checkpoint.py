"""What a run needs to go on after a stop: a folder for each checkpoint, whole or absent.

A checkpoint is written by `torch.distributed.checkpoint` into a hidden folder, in the background, and renamed when all
of it is on disk. It can be read by another number of processes than wrote it. Knows files and tensors by name; does not
know what they are for.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils import _pytree as pytree

from nar.training.distributed import Workers

RECORD = "run.json"
_PREFIX = "step-"


class Checkpoints:
    """The checkpoints of a run, in its folder `checkpoints`: the last `keep_last` ones and the best.

    Best is the lowest held-out loss, the number `heldout` of a checkpoint's record.
    """

    def __init__(self, run: Path, keep_last: int, workers: Workers) -> None:
        self.folder = run / "checkpoints"
        self._keep_last = keep_last
        self._workers = workers
        # The writing thread's collectives must not mix with those of the training.
        self._group = dist.new_group(backend="gloo") if workers.count > 1 else None
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        if workers.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f".{_PREFIX}*"):  # of a run that was killed
                shutil.rmtree(leftover)
        workers.wait()

    def all(self) -> list[Path]:
        """The folders of all complete checkpoints, oldest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"))

    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, or None when none was measured."""
        scores = {path: read_record(path)["heldout"] for path in self.all()}
        known = {path: score for path, score in scores.items() if score is not None}
        return min(known, key=lambda path: known[path]) if known else None

    def save(self, step: int, state: dict[str, Any], record: dict[str, Any]) -> None:
        """Write `state`, nested dicts of tensors, and a JSON `record` of it, as the checkpoint of `step`.

        Returns when `state` is copied and may change again; call `wait` for what becomes of it.
        """
        self.wait()
        copied = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        self._writing = self._pool.submit(self._write, step, copied, record)

    def check(self) -> None:
        """Raise the error of a write that has ended with one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raises OSError when the last checkpoint could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the writing thread, after what it is writing."""
        self._pool.shutdown()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill the tensors of `state` from a checkpoint, in place.

        Raises:
            ValueError: the checkpoint is damaged or of something else.
        """
        try:
            with _without_notice():
                load(state, storage_reader=FileSystemReader(path), no_dist=self._workers.count == 1)
        except (CheckpointException, RuntimeError, KeyError, OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} can't be read ({_reason(error)}); delete this folder to go on from an earlier checkpoint"
            ) from error

    def _write(self, step: int, state: dict[str, Any], record: dict[str, Any]) -> None:
        target = self.folder / f"{_PREFIX}{step:09d}"
        staging = self.folder / f".{target.name}"
        try:
            if self._workers.first:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(exist_ok=True)  # another process may be in `save` already, which makes it too
                (staging / RECORD).write_text(json.dumps({"step": step, **record}, indent=1) + "\n", encoding="utf-8")
            with _without_notice():
                save(
                    state,
                    storage_writer=FileSystemWriter(staging),
                    process_group=self._group,
                    no_dist=self._workers.count == 1,
                )
            if self._workers.first:
                if target.exists():  # of a run that went on from an earlier checkpoint
                    _remove(target)
                staging.replace(target)
                self._prune()
        except (CheckpointException, OSError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"checkpoint {target} can't be written ({_reason(error)}); the ones before it are intact: "
                "make room, then run the same command again"
            ) from error

    def _prune(self) -> None:
        kept = {*self.all()[-self._keep_last :], self.best()}
        for path in self.all():
            if path not in kept:
                _remove(path)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint; raises ValueError when it is damaged."""
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no readable {RECORD} ({error}); delete this folder") from error
    return record


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}-old")
    path.replace(hidden)  # first out of sight: a folder that is half deleted must not look like a checkpoint
    shutil.rmtree(hidden)


@contextmanager
def _without_notice() -> Iterator[None]:
    """PyTorch warns each time that it is alone, even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
