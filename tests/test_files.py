"""Files that are whole or untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

from nar.storage.files import atomically


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "settings.json"

    def slow(staged: Path) -> None:
        staged.write_text("first")
        atomically(path, lambda other: other.write_text("second"))  # begins and ends while this one writes
        assert path.read_text() == "second"

    atomically(path, slow)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("before")

    def fails(staged: Path) -> None:
        staged.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomically(path, fails)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
