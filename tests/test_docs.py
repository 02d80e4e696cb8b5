"""Every command of the docs and cards is one: its verb and options exist, its recipe, and the keys that it sets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from nar.cli import app
from nar.data.look import ANY
from nar.storage.config import load, recipe_names
from nar.training.recipe import OF_TOKENIZERS, Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/nar/bundled/**/README.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(?:\$ )?(?:(?:srun )?torchrun .*--no-python )?nar (.*)$")


def commands() -> list[tuple[str, list[str]]]:
    """The words after `nar` of each line in a block, with the page that it is from."""
    found = []
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language not in ("", "sh", "bash", "console"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if (words := COMMAND.match(line)) and "..." not in line:
                    found.append((page.name, shlex.split(words[1].removesuffix("&"), comments=True)))
    return found


def silenced(command: Any) -> Any:
    """A command, and those below it, that read their options and do nothing."""
    command.callback = lambda **_: None
    for below in getattr(command, "commands", {}).values():
        silenced(below)
    return command


def test_every_command_has_a_verb_and_options_that_exist() -> None:
    nar, given = silenced(typer.main.get_command(app)), commands()
    assert len(given) > 80
    for page, words in given:
        try:
            nar.main(words, standalone_mode=False)
        except Exception as error:
            pytest.fail(f"{page}: nar {' '.join(words)}: {getattr(error, 'format_message', error.__str__)()}")


def test_every_training_names_a_recipe_and_its_keys() -> None:
    given = [(page, words) for page, words in commands() if words[0] == "train"]
    assert len(given) > 20
    for page, (_, name, *overrides) in given:
        assert name in (*recipe_names(), ANY), f"{page}: nar train {name}"
        keys = [f"data.source={word[5:]}" if word.startswith("data=") else word for word in overrides]
        of_tokenizer = [word for word in keys if word.split(".")[0] in (*OF_TOKENIZERS, "tokenizer_recipe")]
        load(Recipe, name, keys if name.endswith("tokenizer") else sorted({*keys} - {*of_tokenizer}))
