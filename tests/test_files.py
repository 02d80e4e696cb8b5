"""Files that are whole or untouched, what they are called when they fail, claims of folders, digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nar.storage import files
from nar.storage.files import atomically, check_output, claim, digest, read_json, write_json, write_text


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "settings.json"

    def slow(staged: Path) -> None:
        staged.write_text("first", encoding="utf-8")
        write_text(path, "second")  # begins and ends while this one writes
        assert path.read_text() == "second"

    atomically(path, slow)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("before")

    def fails(staged: Path) -> None:
        staged.write_text("half", encoding="utf-8")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomically(path, fails)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("free", [10**9, 0])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), OSError("problem writing element 5 to file"), RuntimeError("I/O error")],
)
def test_an_error_names_the_file(tmp_path: Path, error: Exception, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    path = tmp_path / "set.npz"

    def fails(_: Path) -> None:
        raise error

    with pytest.raises((OSError, RuntimeError)) as caught:
        atomically(path, fails)
    if free == 0:
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
    elif isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert ".nar-" not in str(caught.value)


def test_weights_that_do_not_fit_are_an_error_of_the_file(tmp_path: Path) -> None:
    """The library that writes them has errors of its own kind, which only say the number of the system's."""
    resource = pytest.importorskip("resource", reason="this system can't limit the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            atomically(tmp_path / "a.safetensors", lambda staged: save_file({"a": torch.zeros(5_000)}, staged))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "a.safetensors"))
    assert not [*tmp_path.iterdir()]


def test_an_error_about_the_staged_file_names_the_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        atomically(tmp_path / "a.json", lambda staged: (staged / "missing").open("wb"))
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError) as caught:
        atomically(tmp_path / "a.json", lambda _: (tmp_path / "input").read_text())
    assert caught.value.filename == str(tmp_path / "input")


def killed_while_writing(path: Path, **options: bool) -> None:
    code = (
        "import os, pathlib, sys; from nar.storage import files\n"
        "def write(staged):\n"
        "    staged.mkdir()\n"
        "def stop(*_): os._exit(9)\n"
        "files.Path.replace, kept = (lambda self, to: stop() if self.parent.name.startswith('.nar-') "
        "else kept(self, to)), files.Path.replace\n"
        f"files.atomically(pathlib.Path(sys.argv[1]), write, **{options!r})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9


@pytest.mark.skipif(sys.platform == "win32", reason="there every process may still run")
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "model")
    (left,) = tmp_path.iterdir()
    alive = tmp_path / left.name.replace(left.name.split("-")[2], str(os.getpid()))
    other = tmp_path / left.name.replace(left.name.split("-")[1], "0" * 8)
    alive.mkdir()
    other.mkdir()
    write_text(tmp_path / "a.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", alive.name, other.name}


@pytest.mark.skipif(sys.platform == "win32", reason="there every process may still run")
def test_a_folder_that_made_way_comes_back(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    killed_while_writing(model, replace_folder=True)
    assert not model.exists()
    write_text(tmp_path / "a.txt", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "model"]
    assert (model / "config.json").read_text() == "{}"


def test_folders_make_way_as_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    atomically(target, lambda staged: staged.mkdir())  # an empty one
    (target / "a").touch()
    with pytest.raises(OSError, match="out"):
        atomically(target, lambda staged: staged.mkdir())
    assert (target / "a").is_file()
    atomically(target, lambda staged: staged.mkdir(), replace_folder=True)
    assert list(target.iterdir()) == []
    with pytest.raises(IsADirectoryError, match="a folder is there"):
        write_text(target, "text")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
def test_a_pipe_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "pipe", tmp_path / "link"):
        os.mkfifo(path) if path.name == "pipe" else path.symlink_to("pipe")
        found: list[str] = []
        reader = threading.Thread(target=lambda path=path, found=found: found.append(path.read_text()))
        reader.start()
        write_json(path, {"a": 1})
        reader.join()
        assert json.loads(found[0]) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
    assert (tmp_path / "link").is_symlink()
    monkeypatch.setattr("nar.storage.files.READER_SECONDS", 0.2)
    with pytest.raises(OSError, match="nobody reads this pipe; begin to, or give a file"):
        write_json(tmp_path / "pipe", {"a": 1})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_devices_that_take_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_text(Path("/dev/full"), "x")
    with pytest.raises(PermissionError, match=r"its folder can't be written to: '/proc/self/mem'"):  # before the work
        check_output(Path("/proc/self/mem"))
    (tmp_path / "link").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"error: '.*link'"):
        write_text(tmp_path / "link", "x")


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no such device")
def test_standard_output_is_written_into(tmp_path: Path) -> None:
    """Also where it is a file, which was begun by others and goes on after it."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "import pathlib, sys; from nar.storage.files import write_text; sys.stdout.write('before ')\n"
        "for path in sys.argv[1:]: write_text(pathlib.Path(path), f'{path[-6:]} ')\n"
        "sys.stdout.write('after')"
    )
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", code, "/dev/stdout", str(tmp_path / "link")], stdout=log, check=True)
    assert (tmp_path / "log").read_text().split()[::3] == ["before", "after"]
    assert "stdout" in (tmp_path / "log").read_text()
    assert (tmp_path / "link").is_symlink()
    assert Path("/dev/stdout").is_symlink()


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "new" / "a.json")
    with pytest.raises(IsADirectoryError, match="a folder is there"):
        check_output(tmp_path)
    with pytest.raises(NotADirectoryError, match="file"):
        check_output(tmp_path / "file" / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ', "not valid JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("[]", "must hold an object of JSON, not list"),
        ("null", "must hold an object of JSON, not NoneType"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_claim_names_what_changed(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    claim(folder, {"seed": 3, "size": (4, 4)})
    claim(folder, {"seed": 3, "size": (4, 4)})
    claim(folder, {"seed": 3})
    with pytest.raises(ValueError, match=r"seed 3 instead of 4, size \[4, 4\] instead of \[4, 5\], new None instead"):
        claim(folder, {"seed": 4, "size": (4, 5), "new": 1})


def test_a_claim_keeps_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"not empty and holds no settings\.json"):
        claim(tmp_path, {"seed": 3}, empty=True)
    claim(tmp_path, {"seed": 3})
    (tmp_path / "victim").mkdir()
    (tmp_path / ".set.npz.parts").symlink_to("victim")
    with pytest.raises(ValueError, match="is a link"):
        claim(tmp_path / ".set.npz.parts", {"seed": 3})
    assert list((tmp_path / "victim").iterdir()) == []


def test_one_of_two_claims_at_once_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one began before it, and finds its record only when it writes its own."""
    link = os.link

    def late(staged: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        claim(tmp_path, {"seed": 1})
        link(staged, path)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match="seed 1 instead of 2"):
        claim(tmp_path, {"seed": 2})


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    assert digest(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    both, one = digest(tmp_path, [tmp_path / "a", tmp_path / "b"]), digest(tmp_path, [tmp_path / "a"])
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({both, one, digest(tmp_path, [tmp_path / "a", tmp_path / "c"])}) == 3
    with pytest.raises(OSError, match="is no file"):
        digest(tmp_path)
