"""Files that are written whole or not at all, whichever process writes them, and whenever it ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a path in a temporary folder beside `path`, then move it there: `path` is whole or untouched.

    The name stays the same. Several processes may write one file at once; the last one's stays. `write` may make a
    folder instead, for which an empty one at `path` gives way. Folders above `path` are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".nar-", dir=path.parent))
    try:
        staged = staging / path.name
        write(staged)
        if path.is_dir():
            path.rmdir()
        staged.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
