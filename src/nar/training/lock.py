"""One process at a time trains in a folder: a file there says which, and goes with it.

Knows processes and machines; does not know what a run is. Needs no locks of the file system, which networked ones may
lack: a file that can only be made once, and whoever finds it sees whether its owner is still there.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nar.storage.files import is_running

LOCK = "run.lock"
_BEAT = 30.0  # seconds between signs of life
_SILENT = 300.0  # seconds without one, after which a process of another machine counts as gone


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder within the context; raises ValueError while another process that is still there holds it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = json.dumps({"pid": os.getpid(), "host": platform.node(), **_start(os.getpid()), "since": since}) + "\n"
    while not _make(path, mine):
        _take_over(path)
    end = threading.Event()
    threading.Thread(target=_beat, args=(path, end), daemon=True).start()
    try:
        yield
    finally:
        end.set()
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == mine:
                path.unlink()
            if new:
                folder.rmdir()  # nothing came of it


def _make(path: Path, text: str) -> bool:
    """Make the lock, unless there is one."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _take_over(path: Path) -> None:
    """Remove a lock whose owner is gone; raises ValueError where it is there."""
    try:
        text = path.read_text(encoding="utf-8")
        silent = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # given back just now
        return
    try:
        owner = json.loads(text)
    except ValueError:  # not written yet
        owner = {}
    if _there(owner, silent):
        raise ValueError(
            f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} since "
            f"{owner.get('since', '?')}; wait for it, stop it, or use another run=DIR "
            f"(if there is no such process, delete {path})"
        )
    aside = path.with_name(f".{LOCK}-{os.getpid()}")
    with suppress(FileNotFoundError):  # another process was faster
        path.replace(aside)
        if aside.read_text(encoding="utf-8") != text:  # and holds it: give it back
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _there(owner: dict[str, Any], silent: float) -> bool:
    """Whether the owner of a lock may still be at work."""
    pid = owner.get("pid")
    if owner.get("host") != platform.node() or not isinstance(pid, int) or sys.platform == "win32":
        return silent < _SILENT
    return is_running(pid) and owner.items() >= _start(pid).items()


def _start(pid: int) -> dict[str, str]:
    """This start of the machine, and when in it a process began: ids are used again. "" where the system is silent."""
    start = {"boot": "", "began": ""}
    with suppress(OSError, IndexError):
        start["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        start["began"] = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return start


def _beat(path: Path, end: threading.Event) -> None:
    while not end.wait(_BEAT):
        with suppress(OSError):
            os.utime(path)
