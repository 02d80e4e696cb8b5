"""Imports point one way, the public names are what they are, and habits that rot code stay out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import nar

SOURCE = Path(nar.__file__).parent

# Who may import whom inside the package; a package's name stands for its modules.
ALLOWED = {
    "order": set(),
    "config": set(),
    "files": set(),
    "folder": {"config"},
    "sheet": set(),
    "crops": set(),
    "clips": {"data", "crops"},
    "presets": set(),
    "precision": set(),
    "attention": set(),
    "condition": {"attention"},
    "model": {"order", "condition", "attention", "folder", "precision"},
    "sampling": {"model", "order", "attention", "condition", "precision"},
    "text": {"text", "folder", "files"},
    "prompts": set(),
    "colours": set(),
    "efficientnet": set(),
    "tokenizer": {"tokenizer", "folder", "attention", "efficientnet"},
    "data": {"data", "tokenizer", "folder", "files", "prompts", "colours", "crops"},
    "metrics": {"metrics", "efficientnet", "prompts", "colours", "crops", "files"},
    "training": {
        "training", "model", "tokenizer", "data", "metrics", "order", "config", "condition", "sampling", "folder",
        "sheet", "text", "window", "crops", "files",
    },
    "pipeline": {
        "sampling", "model", "condition", "tokenizer", "text", "folder", "config", "clips", "window"
    },
    "window": {"condition", "model", "tokenizer"},
    "convert": {"convert", "model", "tokenizer", "presets", "folder"},
    "bench": {
        "pipeline", "sampling", "model", "condition", "presets", "order", "tokenizer", "folder", "precision"
    },
    "samples": {"pipeline", "sampling", "condition", "folder", "files", "tokenizer"},
    "calibration": {"tokenizer"},
    "cli": None,
}  # fmt: skip


def home(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {home(alias.name) for alias in node.names if alias.name.startswith("nar.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nar":
            found |= {home(node.module)} if "." in node.module else {alias.name for alias in node.names}
    return found - {"__version__", ""}


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in ALLOWED, f"say in this test what nar.{own} may import"
        allowed = ALLOWED[own]
        wrong += [f"{own} imports {other}" for other in imports(path) if allowed is not None and other not in allowed]
    assert wrong == []


def test_nothing_heavy_before_it_is_used() -> None:
    for command in ("import nar", "from nar import cli", "from nar import presets"):
        code = f"import sys; {command}; print([m for m in ('torch', 'numpy', 'PIL', 'omegaconf') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", command


def test_public_names() -> None:
    assert nar.__all__ == sorted(nar.__all__)
    for name in nar.__all__:
        assert getattr(nar, name) is not None
    assert set(nar._HOMES) == set(nar.__all__)


def test_habits_that_rot_code() -> None:
    forbidden = (
        r"sys\.path|\.cuda\(|(import|from) torchvision|(?<![\w.])print\(|\b(TODO|FIXME)\b|['\"]/(home|root|work)/"
        r"|^(?!.*zip\().*strict=False"
    )
    method = {"order", "attention", "condition", "model", "sampling"}
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path.name}: {line.strip()}" for line in text.splitlines() if re.search(forbidden, line)]
        if path.stem in method and "self.training" in text:
            wrong.append(f"{path.name}: model code reads self.training")
    assert wrong == []
