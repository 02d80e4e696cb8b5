"""What the package needs of a system: little enough for Windows and macOS, as far as a Linux can tell."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import nar
from nar.storage import files
from nar.storage.files import write_text

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="imitates another system on Linux")


def elsewhere(code: str, *arguments: object, libraries: str) -> str:
    """Run code on a system without fork, signals and files that can be replaced while they are open; `libraries` are
    imported before, as they choose their system by its name."""
    tests = str(Path(__file__).parent)
    begin = f"import sys, {libraries}; sys.path.insert(0, {tests!r}); import other_system; other_system.become()"
    command = [sys.executable, "-c", f"{begin}\n{code}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
def test_a_model_is_saved_over_itself_where_open_files_stay(toy_folder: Path, tmp_path: Path) -> None:
    code = """
import os
try:
    with open(sys.argv[2] + "/held", "w") as held:
        os.replace(held.name, held.name + "2")
except PermissionError:
    print("refused")
sys.platform, real = "win32", sys.platform  # what the package asks; others have asked by now
from nar import Pipeline
pipe = Pipeline.from_pretrained(sys.argv[1], device="cpu")
pipe.save_pretrained(sys.argv[2] + "/mine")
for dtype in ("float32", "int8"):
    mine = Pipeline.from_pretrained(sys.argv[2] + "/mine", device="cpu", dtype=dtype)
    mine.save_pretrained(sys.argv[2] + "/mine")
    mine("pear", seed=1).save(sys.argv[2] + "/pear.png")
    mine("pear", seed=2).save(sys.argv[2] + "/pear.png")
print("saved")
"""
    libraries = "torch, safetensors.torch, numpy, PIL.Image"
    assert elsewhere(code, toy_folder, tmp_path, libraries=libraries).split() == ["refused", "saved"]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer",
    ]


@linux
@pytest.mark.slow
def test_training_and_resuming_elsewhere(tmp_path: Path) -> None:
    code = """
from nar.storage import files, folder
from nar.training import lock, log
from nar.training.tasks import run_recipe
class Windows:
    platform = "win32"
    def __getattr__(self, name):
        return getattr(sys, name)
for module in (files, folder, lock, log):  # the package asks these; libraries go on with this system
    module.sys = Windows()
for count in (64, 128):
    values = ["run=" + sys.argv[1], f"num_images={count}", "checkpoint_every=1", "batch_size=32"]
    run_recipe("toy-tokenizer", values, override=True)
print("trained")
"""
    libraries = "torch.distributed.checkpoint, torch.distributed.fsdp, torch.utils.tensorboard"
    assert "trained" in elsewhere(code, tmp_path / "run", libraries=libraries)
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_a_file_that_is_held_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = Path.replace, list[Path]()

    def replace(self: Path, target: Path) -> Any:
        if len(refused) < 3:
            refused.append(target)
            raise PermissionError(13, "Access is denied", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError, match=r"a\.txt"):  # here at once: nothing is held without a reason
        write_text(tmp_path / "a.txt", "text")
    monkeypatch.setattr(files.sys, "platform", "win32")
    refused.clear()
    write_text(tmp_path / "a.txt", "text")
    assert (len(refused), (tmp_path / "a.txt").read_text(encoding="utf-8")) == (3, "text")
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    monkeypatch.setattr(Path, "replace", lambda self, _: (_ for _ in ()).throw(PermissionError(13, "no", str(self))))
    with pytest.raises(PermissionError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "other")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_port_is_not_shared_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """There SO_REUSEADDR lets a second server take the port of the first."""
    pytest.importorskip("uvicorn", reason="serving is not installed: pip install nar-gen[serve]")
    from nar.serving import server

    options: list[int] = []

    class Socket:
        def __init__(self, *_: int) -> None: ...
        def setsockopt(self, _: int, option: int, __: int) -> None:
            options.append(option)

        def bind(self, _: tuple[str, int]) -> None: ...

    monkeypatch.setattr(socket, "socket", Socket)
    server.bound("127.0.0.1", 0)
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", -5, raising=False)
    server.bound("127.0.0.1", 0)
    assert options == [socket.SO_REUSEADDR, -5]


@pytest.mark.parametrize("host", ["\udcff", "x" * 300, "a..b"])
def test_what_is_no_address_is_said(host: str) -> None:
    pytest.importorskip("uvicorn", reason="serving is not installed: pip install nar-gen[serve]")
    from nar.serving import server

    with pytest.raises(OSError, match=r"^can't listen on .*; try another --"):
        server.bound(host, 0)


def test_a_console_without_a_character(tmp_path: Path) -> None:
    (tmp_path / "日本").mkdir()
    code = "import sys; from nar.cli import main; sys.argv[1:] = ['info', sys.argv[1]]; main()"
    environment = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "日本"], capture_output=True, env=environment)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert rb"\u65e5\u672c" in done.stderr


def test_names_of_files_are_taken_by_every_system() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    names = listed.stdout.splitlines()
    assert not [name for name in names if re.search(r'[:*?"<>|\\]|[ .]$', name)]
    assert len({name.lower() for name in names}) == len(names)
    assert max(map(len, names)) < 120


def test_workflows() -> None:
    """Every system runs what developers run; `make release` and a linter of workflows check the rest."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    systems = {one["os"].split("-")[0] for one in jobs["make"]["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu", "macos"}
    assert [step["run"] for step in jobs["make"]["steps"] if "run" in step][-1] == "make test"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in [step["run"] for step in jobs["windows"]["steps"] if "run" in step][2:]:
        assert line in makefile.replace("$(BIN)/", ""), line


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"message", "title", "authors", "version", "license"}
    pack = tomllib.loads((ROOT / "integrations/comfyui/pyproject.toml").read_text(encoding="utf-8"))
    assert citation["version"] == nar.__version__ == pack["project"]["version"]
