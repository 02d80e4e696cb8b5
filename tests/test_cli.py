"""Every verb of the command, run as people run it; mistakes are one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar import cli

NAR = Path(sys.executable).parent / "nar"


def nar(*arguments: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([NAR, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail, in this process; returns its one line on stderr."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["nar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stopped.value.code == 2, lines
        return lines[-1]

    return run


def test_help_is_fast_and_has_examples() -> None:
    nar("--help")
    assert min(_cpu_seconds("--help") for _ in range(3)) < 0.5
    for verb in ("sample", "train", "info", "convert"):
        assert verb in nar("--help").stdout
        assert "Example: nar " in nar(verb, "--help").stdout
    version = nar("--version").stdout
    assert version.strip()
    assert subprocess.run([sys.executable, "-m", "nar", "--version"], capture_output=True, text=True).stdout == version


def _cpu_seconds(*arguments: str) -> float:
    """Processor time of the command: what it takes on a machine that does nothing else."""
    before = os.times()
    nar(*arguments)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_sheet_and_growth(toy_folder: Path, tmp_path: Path) -> None:
    done = nar("sample", toy_folder, "-n", 2, "--gif", "-o", tmp_path / "new/sheet.png")
    assert str(tmp_path / "new/sheet.png") in done.stdout
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        assert 2 * 96 < sheet.width < 3 * 96 < sheet.height, "a row for each class"
    with Image.open(tmp_path / "new/sheet.gif") as growth:
        assert growth.n_frames == 7


def test_folder_and_array_hold_the_same_pictures(toy_folder: Path, tmp_path: Path) -> None:
    shared = ["--class-label", "plum", "--class-label", "0", "-n", 3, "--seed", 5]
    nar("sample", toy_folder, *shared, "-o", tmp_path / "folder")
    nar("sample", toy_folder, *shared, "-o", tmp_path / "array.npz", "--batch-size", 4)
    records = json.loads((tmp_path / "folder/samples.json").read_text())
    assert [record["label"] for record in records] == ["plum"] * 3 + ["red apple"] * 3
    assert records[0]["seed"] == 5
    assert records[0]["guidance_scale"] == 1.5
    with np.load(tmp_path / "array.npz") as arrays:
        assert arrays["labels"].tolist() == [2] * 3 + [0] * 3
        for record, row in zip(records, arrays["arr_0"], strict=True):
            with Image.open(tmp_path / "folder" / record["file"]) as picture:
                assert np.array_equal(np.asarray(picture), row)


def test_another_grid(toy_folder: Path, tmp_path: Path) -> None:
    nar("sample", toy_folder, "--class-label", "plum", "-n", 1, "--grid", "6x3", "-o", tmp_path / "folder")
    with Image.open(tmp_path / "folder/000000.png") as picture:
        assert picture.size == (6, 12)


def test_info(toy_folder: Path) -> None:
    facts = json.loads(nar("info", toy_folder, "--json").stdout)
    assert facts["grid"] == "4x4"
    assert facts["steps"] == "7 for 16 tokens"
    assert "pear" in nar("info", toy_folder).stdout
    assert "fashion" in nar("info").stdout
    assert "130,551,552" in nar("info", "--presets").stdout


def test_mistakes_of_sampling(refused: Callable[..., str], toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert "unknown class 'shoe'; classes: red apple, pear, plum" in refused(
        "sample", toy_folder, "--class-label", "shoe", "-o", out
    )
    assert "no model 'fashon'" in refused("sample", "fashon", "-o", out)
    assert "is not a model folder" in refused("sample", tmp_path, "-o", out)
    assert "must end in .png" in refused("sample", toy_folder, "-o", tmp_path / "x.bmp")
    assert "temperature must be a finite number" in refused("sample", toy_folder, "--temperature", "nan", "-o", out)
    assert "guidance_scale must be a finite" in refused("sample", toy_folder, "--guidance-scale", "inf", "-o", out)
    assert "dtype must be one of" in refused("sample", toy_folder, "--dtype", "float8", "-o", out)
    assert "grid '4by4' must be whole numbers joined by x" in refused("sample", toy_folder, "--grid", "4by4", "-o", out)
    assert "grid (4, 4, 4) does not fit this model" in refused("sample", toy_folder, "--grid", "4x4x4", "-o", out)
    assert "is not usable here" in refused("sample", toy_folder, "--device", "warp", "-o", out)
    assert "No such option" in refused("sample", toy_folder, "--sed", 3, "-o", out)
    if Path("/proc").is_dir():
        assert "can't be written" in refused("sample", toy_folder, "-o", "/proc/nowhere/out.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "must be new or empty" in refused("sample", toy_folder, "-o", tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"], "something half-written was left"


def test_words_without_a_text_are_refused(
    refused: Callable[..., str], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a shell makes of a variable that is not set is no default and no folder of work, and opens no server."""
    monkeypatch.chdir(tmp_path)
    empty = "is empty; was a variable of the shell not set? Give a value, or leave it out"
    assert f"--dtype {empty}" in refused("sample", toy_folder, "--dtype", "")
    assert f"--text-encoder {empty}" in refused("sample", toy_folder, "--text-encoder=")
    assert f"--api-key {empty}" in refused("serve", toy_folder, "--api-key", "")
    assert f"-o {empty}" in refused("extract", toy_folder, "--data", "fashion-mnist", "-o", "")
    assert f"an argument {empty}" in refused("sample", "")
    assert "takes no prompts" in refused("sample", toy_folder, "--prompt", "")  # which may say nothing
    assert not list(tmp_path.iterdir())


def test_mistakes_of_training(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no recipe 'fashon' (did you mean 'fashion'?)" in refused("train", "fashon")
    assert "unknown key 'batchsize'" in refused("train", "fashion", "batchsize=3")
    missing = refused("train", "fashion-tokenizer", f"data.source={tmp_path / 'nothing'}", f"run={tmp_path / 'run'}")
    assert "nothing" in missing


def test_mistakes_from_the_shell(tmp_path: Path) -> None:
    """The same as people see them: one line and exit code 2, or the traceback with --debug."""
    done = nar("sample", "fashon", "-o", tmp_path / "x.png", code=2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("nar: no model 'fashon'")
    assert "Traceback" in nar("sample", "fashon", "-o", tmp_path / "x.png", "--debug", code=1).stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("no\nsuch   thing"), 2, "nar: no such thing"),
        (OSError(28, "No space left on device", "a.png"), 2, "nar: a.png: No space left on device"),
        (OSError("broken"), 2, "nar: broken"),
        (ImportError("pip install x"), 2, "nar: pip install x"),
        (MemoryError(), 2, "nar: not enough memory: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 EB"), 2, "nar: not enough memory: Default"),
        (RecursionError("maximum recursion depth"), 2, "nar: an input is nested too deeply: maximum"),
        (KeyError("x"), 1, "nar: unexpected KeyError: 'x' (this is a bug; the same command with --debug shows where)"),
        (RuntimeError("size mismatch"), 1, "nar: unexpected RuntimeError: size mismatch (this is a bug"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["nar", "bench", "--preset", "NAR-B"])
    monkeypatch.setattr("nar.bench.bench_preset", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)
