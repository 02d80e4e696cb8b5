"""What is said of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

import pytest

from nar import progress
from nar.progress import Progress, duration, steps


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.1)
    monkeypatch.setattr(progress, "EVERY", 0.2)


@pytest.mark.usefixtures("_often")
def test_lines_come_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 1000, "images", done=200) as shown:
        shown.say("\x1b]0;x\x07begins")
        shown.update(200, loss="1.5")
        time.sleep(0.45)  # without an update
        shown.update(600, loss="1.25")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "\ufffd]0;x\ufffdbegins", "names cannot command the terminal"
    assert lines[1].startswith("training: 400 of 1,000 images (40%), ")
    assert lines[1].endswith(" a second, 0 s left, loss 1.5")
    assert len(lines) == 4
    assert lines[3] == "training: 1,000 images in 0 s, loss 1.25"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(steps(range(3), "counting", "numbers")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_often")
def test_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in steps(range(2), "counting", "numbers", quiet=True):
        time.sleep(0.1)
    with Progress("training", 1, "images", quiet=True) as shown:
        shown.say("begins")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_often")
def test_an_open_end_and_one_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        with Progress("reading", None, "pictures") as shown:
            shown.update(3)
            time.sleep(0.15)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        read()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reading: 3 pictures, ")
    assert line.endswith(" a second")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in steps(range(4), "counting", "numbers"):
        pass
    said = capsys.readouterr().err
    assert "counting: 100%" in said
    assert "4/4" in said


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (5999, "100 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
