"""Files that are written whole or not at all, whichever process writes them, and whenever it ends.

Also what a file holds in a word (its digest) and what a folder of parts was made with (its claim). Knows paths and
JSON; does not know what is in the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from nar.storage.text import read_text

_REPLACED = "replaced"
_SYSTEM = (("/", "dev"), ("/", "proc"))
READER_SECONDS = 15  # that a pipe is held for its reader
_FULL = 2**20  # bytes free, below which a failed write is the disk's fault
_PATIENCE = 2.0  # seconds for which Windows may refuse to move what a virus scanner or a reader has open


def atomically(path: Path, write: Callable[[Path], Any], *, replace_folder: bool = False) -> None:
    """Call `write` on a path in a private folder beside `path`, then move it there: `path` is whole or untouched.

    The name stays the same. Several processes may write one file at once; the last one's stays. `write` may make a
    folder instead, for which an empty one at `path` gives way, and with `replace_folder` any. Folders above `path` are
    made. A device, a pipe, and what leads to one (/dev/stdout) is written into, and never replaced.

    Raises:
        OSError: names `path`, also when the disk is full.
    """
    if _is_stream(path):
        _stream(path, write)
        return
    with _staged(path) as staged:
        write(staged)
        if not staged.is_dir():
            _refuse_folder(path)
        elif path.is_dir() and replace_folder:
            (staged.parent / _REPLACED).mkdir()  # from where it is restored if the new one never comes
            _move(path, staged.parent / _REPLACED / path.name)
        elif path.is_dir():
            path.rmdir()
        _move(staged, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    atomically(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds an object (or a `list`).

    Raises:
        ValueError: names the file, when it is no JSON, nested too deeply, or of another kind.
    """
    value = parse_json(read_text(path), str(path), "the file is damaged, copy it again")
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise ValueError(f"{path} must hold {expected} of JSON, not {type(value).__name__}")
    return value


def parse_json(text: str, name: str, fix: str = "") -> Any:
    """Parse JSON; raises ValueError that names where it stands, and the fix."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{name} is not valid JSON ({reason})" + (f"; {fix}" if fix else "")) from None


def check_output(path: Path) -> None:
    """Raise OSError where no file can be written, before the work that makes it."""
    if _is_stream(path) and (path.is_symlink() or not path.is_file()):  # of files under /proc few can be written
        return
    _refuse_folder(path)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder is needed", str(above))
    try:
        tempfile.TemporaryFile(dir=above).close()  # os.access says yes to root, also under /proc
    except OSError as error:
        raise PermissionError(errno.EACCES, "its folder can't be written to", str(path)) from error


def digest(path: str | Path, files: Iterable[Path] | None = None) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's `files`, in their order.

    Raises:
        OSError: the file is missing, or is a device or a pipe, which has no end.
    """
    path = Path(path).expanduser()
    if files is not None:
        listing = "".join(f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, most: int = -1) -> bytes:
    """Read a file, or its first `most` bytes.

    Raises:
        OSError: the file is missing, or is a device, which has no end, or a pipe, which would be waited for.
    """
    with _opened(path) as file:
        return file.read(most)


def claim(folder: Path, settings: Mapping[str, Any], *, record: str = "settings.json", empty: bool = False) -> None:
    """Record in a folder what its parts are made with, or check that they were made with the same.

    Every process that makes parts calls this first; one of them writes the record. What an older record does not have
    counts as None, and what only it has is ignored. With `empty` a folder that holds something else is refused.

    Raises:
        ValueError: names what changed, from what to what.
    """
    if folder.name.startswith(".") and folder.is_symlink():  # our name, not the user's: somebody else put it there
        raise ValueError(f"{folder} is a link, which parts are not written through; delete it")
    path, wanted = folder / record, json.loads(json.dumps(dict(settings)))
    if not path.is_file():
        if empty and folder.is_dir() and any(not other.name.startswith(".") for other in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no {record}; give a new folder")
        with _staged(path) as staged:
            staged.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
            try:
                os.link(staged, path)  # fails where another process was first
            except OSError:
                if not path.exists():  # a file system without links
                    staged.replace(path)
    old = read_json(path)
    changed = [f"{key} {old.get(key)} instead of {value}" for key, value in wanted.items() if old.get(key) != value]
    if changed:
        what = f"{folder} holds parts made with other settings: {', '.join(changed)}"
        raise ValueError(f"{what}; delete it to begin anew, or give another name")


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path of the same name in a private folder beside `path`, which is gone afterwards; errors name `path`."""
    machine = f".nar-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent, machine)
        staging = Path(tempfile.mkdtemp(prefix=f"{machine}{os.getpid()}-", dir=path.parent))
        yield staging / path.name
    except Exception as error:
        if (named := _named(error, path, staging)) is error:
            raise
        raise named from error
    finally:
        if staging is not None:
            _restore(staging, path.parent)
            shutil.rmtree(staging, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename, replacing what is there; on Windows again and again for as long as something holds a file open."""
    end = time.monotonic() + (_PATIENCE if sys.platform == "win32" else 0)
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


def check_file(path: Path) -> None:
    """Raise OSError for what is there and is no file: libraries wait for a pipe, and read a device without end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file", str(path))


def _opened(path: Path) -> BufferedReader:
    check_file(path)
    return path.open("rb")


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is there; give the name of a file", str(path))


def _restore(staging: Path, folder: Path) -> None:
    """Move back what had made way for a folder that never came."""
    with suppress(OSError):
        for kept in (staging / _REPLACED).iterdir():
            if not (folder / kept.name).exists():
                kept.replace(folder / kept.name)


@cache
def _clean(folder: Path, machine: str) -> None:
    """Remove what killed processes of this machine left in a folder; once, since the folder may be large."""
    for left in [other for other in folder.iterdir() if other.name.startswith(machine)]:
        number = left.name.removeprefix(machine).partition("-")[0]
        if number.isdecimal() and left.is_dir() and not left.is_symlink() and not is_running(int(number)):
            _restore(left, folder)
            shutil.rmtree(left, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process may still be there; on Windows, where asking would end it, every one may."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _named(error: Exception, path: Path, staging: Path | None) -> Exception:
    """The same error, about the file that was asked for; one that already names another file stays as it is."""
    about, number = (getattr(error, name, None) for name in ("filename", "errno"))
    if about is not None and not (staging and str(about).startswith(str(staging))):
        return error
    if stated := re.search(r"\(os error ([0-9]+)\)", str(error)):  # safetensors and other libraries in Rust
        number = int(stated[1])
    if number is None and not _is_full(path.parent):
        named = str(path) in str(error) or not isinstance(error, OSError)
        return error if named else OSError(f"{path}: {error}")
    number = number or errno.ENOSPC  # other libraries do not say why
    return OSError(number, getattr(error, "strerror", None) or os.strerror(number), str(path))


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL
    except OSError:
        return False


def _is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe, or leads to one of the process's own files, as /dev/stdout does."""
    at = path.absolute()
    for _ in range(40):  # links that lead to one another are followed no further
        if at.parts[:2] in _SYSTEM and at.parts[2:3] != ("shm",) and at.exists() and not at.is_dir():
            return True
        if not at.is_symlink():
            break
        at = Path(os.path.normpath(at.parent / at.readlink()))
    with suppress(OSError):
        kind = path.stat().st_mode
        return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))
    return False


def _stream(path: Path, write: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="nar-") as folder:
        staged = Path(folder) / path.name
        write(staged)
        if not staged.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "a device or pipe is there; give a new folder", str(path))
        for stream in (sys.stdout, sys.stderr):  # where these point to a file, opening it anew would begin it anew
            with suppress(OSError, ValueError, AttributeError):
                if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                    stream.flush()
                    stream.buffer.write(staged.read_bytes())
                    stream.flush()
                    return
        try:
            with staged.open("rb") as made, _reached(path) as into:
                shutil.copyfileobj(made, into)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise


def _reached(path: Path) -> IO[bytes]:
    """A device or pipe, opened to be written into; of a pipe a reader is waited for, but not for ever."""
    if not stat.S_ISFIFO(path.stat().st_mode):
        return path.open("wb")
    end = time.monotonic() + READER_SECONDS
    while True:
        try:
            number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise OSError(error.errno, "nobody reads this pipe; begin to, or give a file", str(path)) from error
            time.sleep(0.05)
        else:
            os.set_blocking(number, True)
            return os.fdopen(number, "wb")
