"""Imports point one way, the public names are what they are, and habits that rot code stay out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import nar

SOURCE = Path(nar.__file__).parent

# Who may import whom: a room is a folder or a single file of `src/nar`, and may also import itself.
ALLOWED = {
    "scales": set(),
    "order": {"scales"},
    "attention": set(),
    "condition": set(),
    "precision": set(),
    "media": set(),
    "storage": set(),
    "progress": {"storage"},
    "model": {"scales", "order", "condition", "attention", "storage", "precision"},
    "tokenizer": {"scales", "storage", "attention", "media"},
    "text": {"storage", "progress", "precision"},
    "likelihood": {"model", "condition", "storage"},
    "sampling": {"model", "order", "attention", "condition", "precision", "storage"},
    "convert": {"scales", "model", "tokenizer", "storage"},
    "data": {"progress", "tokenizer", "text", "media", "storage", "precision"},
    "metrics": {"progress", "data", "text", "media", "storage", "precision"},
    "pipeline": {
        "progress",
        "order",
        "sampling",
        "model",
        "condition",
        "precision",
        "tokenizer",
        "text",
        "media",
        "storage",
    },
    "training": {
        "progress",
        "pipeline.continuation",
        "pipeline.holes",
        "convert",
        "likelihood",
        "sampling",
        "model",
        "order",
        "attention",
        "condition",
        "metrics",
        "data",
        "text",
        "tokenizer",
        "media",
        "storage",
    },
    "evaluation": {
        "progress",
        "pipeline",
        "metrics",
        "data",
        "likelihood",
        "sampling",
        "model",
        "condition",
        "precision",
        "tokenizer",
        "media",
        "storage",
    },
    "serving": {"pipeline", "sampling", "model", "attention", "condition", "media", "storage"},
    "bench": {"pipeline", "sampling", "model", "condition", "order", "precision", "tokenizer", "media", "storage"},
    "study": {
        "progress",
        "storage",
        "training",
        "evaluation",
        "bench",
        "pipeline",
        "metrics",
        "data",
        "sampling",
        "model",
        "tokenizer",
    },
    "cli": None,
    "__main__": {"cli"},
}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, as dotted names without `nar.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("nar.") for alias in node.names if alias.name.startswith("nar.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "nar":
            found |= {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nar."):
            found |= {f"{node.module.removeprefix('nar.')}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in ALLOWED, f"say in this test what nar.{own} may import"
        allowed = ALLOWED[own]
        for module in imports(path) if allowed is not None else ():
            if not any(f"{module}.".startswith(f"{room}.") for room in (own, *allowed)):
                wrong.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert wrong == []


def test_rooms_form_no_circle() -> None:
    """Modules import each other in one direction at the top of their files, within rooms too."""
    graph = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(path)
    nearest = {
        module: [name for name in graph if f"{module}.".startswith(f"{name}.")]
        for found in graph.values()
        for module in found
    }
    edges = {
        name: {max(nearest[module], key=len) for module in found if nearest[module]} - {name}
        for name, found in graph.items()
    }
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert edges == {}


def test_nothing_heavy_before_it_is_used() -> None:
    for command in ("import nar", "from nar import cli", "from nar.storage import presets"):
        code = f"import sys; {command}; print([m for m in ('torch', 'numpy', 'PIL', 'yaml') if m in sys.modules])"
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
