"""What a run needs to go on after a stop: a folder for each checkpoint, whole or absent.

A checkpoint is written by `torch.distributed.checkpoint` into a hidden folder, in the background, and renamed when all
of it is on disk. It can be read by another number of processes than wrote it, and no code in it is run. Knows files and
tensors by name; does not know what they are for.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils import _pytree as pytree

from nar.storage.files import digest, read_json
from nar.training.distributed import Workers

RECORD = "run.json"
_PREFIX = "step-"
_ASIDE = "aside"  # the folder of checkpoints that a run does not go on from
Fill = Callable[[dict[str, Any]], None]
"""Fills the tensors of nested dicts, in place."""


class Checkpoints:
    """The checkpoints of a run, in its folder `checkpoints`: the last `keep_last` ones and the best.

    Best is the lowest held-out loss, the number `heldout` of a checkpoint's record. One process at a time
    may write to a run, see `nar.training.lock`.
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
        """The checkpoint with the lowest held-out loss of those that can be read, or None when none was measured."""
        scores = [((_readable(path) or {}).get("heldout"), path) for path in self.all()]
        return min(((score, path) for score, path in scores if score is not None), default=(0, None))[1]

    def resume(self, take: Callable[[Fill], None], start: str = "") -> dict[str, Any] | None:
        """Go on from the newest whole checkpoint, or from that named `start`; returns its record, None without any.

        `take` is called with what fills a state. Checkpoints after this one are moved into the folder `aside`. Raises
        ValueError when there is no such checkpoint, or none that can be read.
        """
        found = self.all()
        candidates = [named(self.folder.parent, start)] if start else found[::-1]
        reasons: list[str] = []
        for path in candidates:
            try:
                self.load(path, take)
            except ValueError as error:
                reasons.append(str(error))
                continue
            later = found[found.index(path) + 1 :]
            if later and self._workers.first:
                aside = self.folder / _ASIDE
                aside.mkdir(exist_ok=True)
                for other in later:
                    shutil.rmtree(aside / other.name, ignore_errors=True)
                    other.replace(aside / other.name)
                why = "; ".join(reasons) or f"later ones ({', '.join(other.name for other in later)})"
                warnings.warn(f"{why}: going on from {path.name}, and later ones are in {aside}", stacklevel=2)
            self._workers.wait()
            return read_record(path)
        if reasons:
            raise ValueError("; ".join(reasons))
        return None

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

    def load(self, path: Path, take: Callable[[Fill], None]) -> None:
        """Call `take` with what fills a state from a checkpoint; raises ValueError for a damaged or another one."""
        if damage := self._workers.agree(_damage(path) if self._workers.first else ""):
            raise ValueError(f"{path} is damaged ({damage})")

        def fill(state: dict[str, Any]) -> None:
            with _without_notice():
                load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=self._workers.count == 1)

        try:
            take(fill)
        except (CheckpointException, Exception) as error:  # damaged files make PyTorch raise anything
            whole = "files" in read_record(path)
            why = "is whole, but of another model or other optimizers" if whole else "can't be read"
            raise ValueError(f"{path} {why} ({_reason(error)})") from error

    def _write(self, step: int, state: dict[str, Any], record: dict[str, Any]) -> None:
        target = self.folder / f"{_PREFIX}{step:09d}"
        staging = self.folder / f".{target.name}"
        try:
            if self._workers.first:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(exist_ok=True)  # another process may be in `save` already, which makes it too
            with _without_notice():
                writer, alone = FileSystemWriter(staging), self._workers.count == 1
                save(state, storage_writer=writer, process_group=self._group, no_dist=alone)
            if self._workers.first:
                _write_record(staging, {"step": step, **record})
                if target.exists():  # of a run that went on from an earlier checkpoint
                    _remove(target)
                staging.replace(target)
                kept = {*self.all()[-self._keep_last :], self.best()}
                for path in set(self.all()) - kept:
                    _remove(path)
        except (CheckpointException, OSError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"checkpoint {target} can't be written ({_reason(error)}); the ones before it are intact: "
                "make room, then run the same command again"
            ) from error


def read_record(path: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint; raises ValueError when it is damaged."""
    try:
        record: dict[str, Any] = read_json(path / RECORD)
    except OSError as error:
        raise ValueError(f"{path} has no readable {RECORD} ({error})") from error
    own = record.pop("digest", None)
    if own is not None and own != _digest_of(record):
        raise ValueError(f"{path / RECORD} is damaged: it is not what was written")
    return record


def named(run: Path, start: str) -> Path:
    """The checkpoint of a run that is called `start`, such as "step-200"; raises ValueError when there is none."""
    found = {_number(path.name): path for path in sorted((run / "checkpoints").glob(f"{_PREFIX}*"))}
    if _number(start) not in found:
        there = ", ".join(f"{_PREFIX}{number}" for number in found) or "none"
        raise ValueError(f"{run / 'checkpoints'} has no checkpoint {start!r}; there are: {there}")
    return found[_number(start)]


def last_record(run: Path) -> dict[str, Any] | None:
    """The newest record that can be read of a run's checkpoints, None where there is none."""
    newest_first = sorted((run / "checkpoints").glob(f"{_PREFIX}*"), reverse=True)
    return next(filter(None, map(_readable, newest_first)), None)


def _readable(path: Path) -> dict[str, Any] | None:
    """The record of a checkpoint, None when it is damaged."""
    try:
        return read_record(path)
    except ValueError:
        return None


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    files = sorted(path for path in folder.iterdir() if path.name != RECORD)
    record = json.loads(json.dumps(record | {"files": {path.name: digest(path) for path in files}}))
    text = json.dumps(record | {"digest": _digest_of(record)}, indent=1) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def _digest_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _damage(path: Path) -> str:
    """Why a checkpoint is not what was written; "" where it is, or was written before there were digests."""
    try:
        for name, expected in read_record(path).get("files", {}).items():
            if digest(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return _reason(error)
    return ""


def _number(name: str) -> int:
    """The step of a checkpoint's name, also in short: step-000000200, step-200 or 200; -1 for other names."""
    digits = name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else -1


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}-old")
    path.replace(hidden)  # first out of sight: a folder that is half deleted must not look like a checkpoint
    shutil.rmtree(hidden)


class _Reader(FileSystemReader):
    """Reads a checkpoint whose `.metadata`, a pickle, may hold what describes tensors, and nothing that runs."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    _allowed: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        number_format = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if number_format or name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint of a run does")


class _Planner(DefaultLoadPlanner):
    """Reads tensors only: other values are pickles, and could run code."""

    def load_bytes(self, read_item: Any, value: Any) -> NoReturn:  # noqa: ARG002
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


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
