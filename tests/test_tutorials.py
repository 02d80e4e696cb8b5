"""The notebooks are the tutorials, and every cell of them runs, trainings at reduced length."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SHORT = " steps=2 tokenizer_recipe.steps=2 model.num_layers=1 engine.device=cpu"
SHORT += " optim.warmup_images=0 tokenizer_recipe.optim.warmup_images=0"


def writer() -> Any:
    spec = importlib.util.spec_from_file_location("write_notebooks", ROOT / "scripts/write_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebooks_are_the_tutorials() -> None:
    script = writer()
    for name in script.NAMES:
        written = (script.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        assert written == script.notebook(name), "run scripts/write_notebooks.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("first-pictures", ["fashion.png", "sneakers.png", "cat.gif"]),
        ("own-pictures", ["mine.png", "runs/mine/model/config.json"]),
    ],
)
def test_the_notebooks_run(name: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.source.startswith("!nar train"):
            cell.source = cell.source.replace(" minutes=10", "") + SHORT
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "nar: " not in text, text  # how a command says that something is wrong
    shown = [output for output in outputs if output.output_type == "execute_result"]
    assert shown
    assert all({"image/png", "text/html"} & output.data.keys() for output in shown)
    for file in files:
        assert (tmp_path / file).is_file()
