"""Write notebooks/: the first two tutorials of docs/, whose blocks become cells.

python scripts/write_notebooks.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs/tutorials"
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("first-pictures", "own-pictures")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?=[^)])")


def notebook(name: str) -> str:
    """A tutorial as the text of a notebook: words, and cells of Python and of commands."""
    page, cells, end = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8"), list[dict[str, Any]](), 0
    for block in BLOCK.finditer(page):
        cells += words(page[end : block.start()])
        lines = block[2].rstrip()
        code = lines if block[1] == "python" else "\n".join(f"!{line}" for line in lines.splitlines())
        cells.append({"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": code})
        end = block.end()
    cells += words(page[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"{name}-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def words(text: str) -> list[dict[str, Any]]:
    """A cell of Markdown, whose links lead from notebooks/; none where there are only blank lines."""
    text = LINK.sub("../docs/tutorials/", text.strip())
    return [{"cell_type": "markdown", "metadata": {}, "source": text}] if text else []


if __name__ == "__main__":
    for name in NAMES:
        (NOTEBOOKS / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
