"""Jobs in a folder: each is one of its own, with what was asked, how far it is, and what came of it.

Nothing is kept in memory, so a process that is killed loses nothing, and several may share a folder: who works on a job
holds a file in it, and whoever finds that file of a process that is gone takes the job over. Knows files and processes;
does not know models, or what a job makes.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nar.storage.files import atomically, is_running, read_json

RECORD, CLAIM = "job.json", "claim.json"
_DELETED = ".deleted-"
_OPEN = ("queued", "in_progress")
_LOST_SECONDS = 7 * 86_400.0  # without any change, after which a job that has not ended counts as nobody's
_SILENT_SECONDS = 30.0  # without a sign of life, after which the process of another machine counts as gone
_OWN = secrets.token_hex(8)  # a process that has our number and another token is one before us
Job = dict[str, Any]


class Store:
    """The jobs of a folder.

    Args:
        keep_seconds: how long a job stays after it has ended.
        most_bytes: of all files; above it the jobs that ended first go.
    """

    def __init__(self, folder: Path, *, keep_seconds: float = 86_400, most_bytes: int = 2**31) -> None:
        self.folder, self.keep_seconds, self.most_bytes = folder, keep_seconds, most_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def create(self, fields: Mapping[str, Any], files: Mapping[str, bytes]) -> Job:
        """Put a job in the queue, with files that belong to it.

        Raises:
            OSError: it can't be written; nothing is left of it.
        """
        number = f"video_{time.time_ns():016x}{secrets.token_hex(4)}"  # in the order in which they came
        created = int(time.time())
        job = {"id": number, "status": "queued", "progress": 0, "created_at": created, **fields}

        def write(folder: Path) -> None:
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            (folder / RECORD).write_text(json.dumps(job), encoding="utf-8")

        atomically(self.folder / number, write)
        return job

    def get(self, number: str) -> Job | None:
        """A job, or None when there is none of this name."""
        path = self.folder / number
        if path.parent != self.folder or not number.startswith("video_"):
            return None
        try:
            job: Job = read_json(path / RECORD)
        except (OSError, ValueError):  # deleted meanwhile, or no job
            return None
        return job

    def jobs(self) -> Iterator[Job]:
        """All jobs, the oldest first."""
        for number in sorted(path.name for path in self.folder.glob("video_*")):
            if (job := self.get(number)) is not None:
                yield job

    def file(self, number: str, name: str) -> Path:
        """Where a file of a job is, or will be."""
        return self.folder / number / name

    def delete(self, number: str) -> bool:
        """Remove a job and its files at once, whoever works on it; False when it is gone already."""
        hidden = self.folder / f"{_DELETED}{secrets.token_hex(8)}"
        try:
            (self.folder / number).rename(hidden)
        except OSError:
            return False
        shutil.rmtree(hidden, ignore_errors=True)
        return True

    def claim(self, wanted: Callable[[Job], bool], rank: Callable[[Job], float] = lambda _: 0.0) -> Job | None:
        """Take the job of the lowest rank, the oldest of several, among those that are wanted and that nobody works on
        who is still there; it is then in progress."""
        for job in sorted((job for job in self.jobs() if job["status"] in _OPEN and wanted(job)), key=rank):
            number, claim = job["id"], self.file(job["id"], CLAIM)
            if self._take(claim):
                if (now := self.get(number)) is not None and now["status"] in _OPEN:
                    return self.update(number, status="in_progress", progress=0)
                claim.unlink(missing_ok=True)  # it ended after it was read
        return None

    def update(self, number: str, **fields: Any) -> Job | None:
        """Change a job; None when it was deleted."""
        job = self.get(number)
        if job is None:
            return None
        job |= fields
        if job["status"] not in _OPEN:
            job["expires_at"] = int(time.time() + self.keep_seconds)
            job["completed_at"] = int(time.time()) if job["status"] == "completed" else None
        if not self.write(number, RECORD, lambda path: path.write_text(json.dumps(job), encoding="utf-8")):
            return None
        if job["status"] != "in_progress":
            self.file(number, CLAIM).unlink(missing_ok=True)
        return job

    def write(self, number: str, name: str, write: Callable[[Path], Any]) -> bool:
        """Write a file of a job, whole or not at all; False when the job was deleted, whose folder does not come back.

        Raises:
            OSError: it can't be written.
        """
        staged = self.file(number, f".{secrets.token_hex(8)}-{name}")
        try:
            write(staged)
            staged.replace(self.file(number, name))
        except OSError:
            with suppress(OSError):
                staged.unlink()
            if not (self.folder / number).is_dir():
                return False
            raise
        return True

    def beat(self, number: str) -> bool:
        """Say that the job is worked on; False when it was deleted, or is another's."""
        claim = self.file(number, CLAIM)
        with suppress(OSError, ValueError):
            if read_json(claim).get("token") == _OWN:
                os.utime(claim)
                return True
        return False

    def sweep(self) -> None:
        """Remove what has expired, what takes too much room, and what killed processes left."""
        now, kept = time.time(), list[tuple[Job, int]]()
        for path in self.folder.glob(f"{_DELETED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for job in list(self.jobs()):
            if self._expires(job) < now:
                self.delete(job["id"])
            else:
                kept.append((job, _bytes_in(self.folder / job["id"])))
        total = sum(size for _, size in kept)
        for job, size in sorted(kept, key=lambda pair: pair[0].get("expires_at", 0)):
            if total > self.most_bytes and job["status"] not in _OPEN:
                self.delete(job["id"])
                total -= size

    def _expires(self, job: Job) -> float:
        if job["status"] not in _OPEN:
            return float(job["expires_at"])
        try:
            return self.file(job["id"], RECORD).stat().st_mtime + _LOST_SECONDS
        except OSError:  # deleted meanwhile
            return 0.0

    def _take(self, path: Path) -> bool:
        """Make the file that says who works on a job, unless somebody does who is still there."""
        mine = json.dumps({"token": _OWN, "pid": os.getpid(), "host": platform.node()})
        if path.is_file():
            if not self._is_abandoned(path):
                return False
            gone = path.with_name(f".gone-{secrets.token_hex(8)}")
            try:  # one of several that find it moves it
                path.rename(gone)
            except OSError:
                return False
            gone.unlink(missing_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(mine)
        except OSError:  # another was first, or the job is gone
            return False
        return True

    def _is_abandoned(self, path: Path) -> bool:
        try:
            claim, age = read_json(path), time.time() - path.stat().st_mtime
        except ValueError:  # is being written, or was when its process was killed
            with suppress(OSError):
                return time.time() - path.stat().st_mtime > _SILENT_SECONDS
            return False
        except OSError:
            return False
        if claim.get("host") != platform.node() or age > _SILENT_SECONDS:
            return age > _SILENT_SECONDS
        pid = int(claim.get("pid", 0))
        return not is_running(pid) or (pid == os.getpid() and claim.get("token") != _OWN)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):
            total += path.stat().st_size
    return total
