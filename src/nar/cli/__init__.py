"""The command `nar`: one module a verb or two, heavy imports inside their functions, errors as one line.

Knows options and files; the work is done by the modules that each verb names.
"""

# In the order in which `nar --help` lists them.
from nar.cli import sample, edit, serve, train, evaluate, compare, tune, bench, convert, info  # isort: skip
from nar.cli.app import app, main

__all__ = ["app", "bench", "compare", "convert", "edit", "evaluate", "info", "main", "sample", "serve", "train", "tune"]
