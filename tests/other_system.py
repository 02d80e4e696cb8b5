"""This Linux without what Windows lacks: `become()`, before anything is imported. Open files stay where they are.

Knows system calls; does not know the package. Paths, consoles and processes of Windows are not imitated.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "posix_spawn")
_CALLS = (
    "fork",
    "forkpty",
    "mkfifo",
    "killpg",
    "getuid",
    "geteuid",
    "getpgid",
    "setsid",
    "sched_setaffinity",
    "statvfs",
)
_SIGNALS = ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGQUIT", "SIGXCPU")


def become() -> None:
    """Take away modules, calls and signals, and refuse to move or delete what is open or mapped."""
    for name in _MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    for owner, names in ((os, _CALLS), (signal, _SIGNALS)):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, _refusing(getattr(os, name)))


def _refusing(call: Callable[..., None]) -> Callable[..., None]:
    def refuse(*paths: Any, **options: Any) -> None:
        where = options.get("dir_fd", options.get("src_dir_fd"))
        base = Path.cwd() if where is None else Path(f"/proc/self/fd/{where}").resolve()
        held = _held()
        for path in paths:
            place = os.path.realpath(base / os.fsdecode(path))
            if any(one == place or one.startswith(f"{place}/") for one in held):
                raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
        call(*paths, **options)

    return refuse


def _held() -> set[str]:
    """Files that this process has open or mapped."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    found = {line.split(maxsplit=5)[5] for line in mapped if line.count("/")}
    for one in Path("/proc/self/fd").iterdir():
        try:
            target = one.readlink()
        except OSError:  # the folder itself, which is closed by now
            continue
        if target.is_file():
            found.add(str(target))
    return found
