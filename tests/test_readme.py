"""Every example of the README and of docs/howto/sampling.md runs as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nar import cli
from nar.media.clips import as_array

SAMPLING = Path(__file__).parents[1] / "docs/howto/sampling.md"
README = Path(__file__).parents[1] / "README.md"


def blocks(language: str, document: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python blocks in one session, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 3
    exec(compile("\n".join(blocks("python")), str(README), "exec"), {})
    assert (tmp_path / "sheet.png").is_file()


def test_commands(tmp_path: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "nar"
        program = str(Path(sys.executable).parent / words[0])
        done = subprocess.run([program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert (tmp_path / "sheet.gif").is_file()
    assert len(list((tmp_path / "sneakers").glob("*.png"))) == 8


def test_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of docs/howto/sampling.md, in this process."""
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("sh", SAMPLING)).splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0, line
    assert len(list((tmp_path / "octopus").glob("*.png"))) == 4
    assert len(as_array("long.webp")) == 30
    given, continued = as_array("cat.gif"), as_array("next.gif")
    assert len(continued) > len(given)
    names: dict[str, Any] = {}
    exec(compile("".join(blocks("python", SAMPLING)), str(SAMPLING), "exec"), names)
    assert (tmp_path / "apple.png").is_file()
    assert names["longer"][0][: len(names["cat"][0])] == names["cat"][0]


def test_links_lead_somewhere() -> None:
    documents = [README, *(README.parent / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
