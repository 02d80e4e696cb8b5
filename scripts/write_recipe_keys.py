"""Write docs/reference/recipes.md: every key of a recipe, with the values that it takes, its default and its meaning.

The text is made of the dataclasses and their docstrings; a test compares the file with it.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from nar.storage.config import about, recipe_names
from nar.storage.described import Key, described
from nar.training.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs/reference/recipes.md"
HEAD = """# Recipes and their keys

Made by `scripts/write_recipe_keys.py` of the code itself; do not edit. A recipe is a YAML file; `key=value` on the
command line replaces any of it: `nar train fashion batch_size=128 optim.learning_rate=1e-3`. `base: NAME` takes another
recipe's keys first. `null` empties a key whose default is empty or 0. [Training](../howto/training.md) shows their use;
`nar info RECIPE` shows the values of one.

## The recipes

"""


def page() -> str:
    """The whole page."""
    rows = [f"| `{name}` | {cell(about(name))} |" for name in recipe_names()]
    parts = [HEAD + "\n".join(["| recipe | makes |", "|---|---|", *rows]) + "\n"]
    for group, keys in groupby(described(Recipe), lambda key: key.name.rpartition(".")[0]):
        title = f"`{group}.*`" if group else "Keys"
        parts.append(
            f"## {title}\n\n| key | values | default | meaning |\n|---|---|---|---|\n" + "".join(map(row, keys))
        )
    return "\n".join(parts)


def row(key: Key) -> str:
    """A row of a table."""
    default = "" if key.default in ("", None, [], {}) else f"`{key.default}`"
    return f"| `{key.name}` | {cell(key.values)} | {default} | {cell(key.meaning)} |\n"


def cell(text: str) -> str:
    """Text that breaks no table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
