"""From a recipe to a trained tokenizer or model: the entry of `nar train`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nar.storage.config import load
from nar.storage.folder import CONFIG, find_model, read_config
from nar.training.distributed import Workers, joined
from nar.training.loop import Metrics, of_weights, train
from nar.training.models import ModelTask
from nar.training.recipe import Recipe
from nar.training.tokenizers import TokenizerTask


def run_recipe(
    name: str, overrides: Sequence[str] = (), *, override: bool = False, metrics: Metrics | None = None
) -> Path | None:
    """Train what a recipe describes; returns the folder of the result, or None when SIGTERM stopped it before.

    Running it again resumes. `metrics` is called with the averaged module whenever previews are drawn.
    """
    # The short forms of the command line: data=FOLDER, and for pictures of one's own the size that suits the machine.
    overrides = [f"data.source={given[5:]}" if given.startswith("data=") else given for given in overrides]
    if name == "my-pictures" and torch.cuda.is_available() and "engine.device=cpu" not in overrides:
        name = "my-pictures-cuda"
    recipe = load(Recipe, name, overrides)
    with joined(recipe.engine.device) as workers:
        return _run(recipe, workers, override=override, metrics=metrics)


def _run(recipe: Recipe, workers: Workers, *, override: bool, metrics: Metrics | None = None) -> Path | None:
    config = recipe.record()
    if _finished(Path(recipe.run), config):
        return Path(recipe.run) / "model"
    if recipe.init and recipe.task == "model" and not (recipe.tokenizer_path or recipe.data.codes):
        recipe = dataclasses.replace(recipe, tokenizer_path=str(find_model(recipe.init) / "tokenizer"))
    if recipe.task == "model" and recipe.tokenizer_recipe and not (recipe.tokenizer_path or recipe.data.codes):
        first = load(Recipe, recipe.tokenizer_recipe, [f"run={Path(recipe.run) / 'tokenizer'}"])
        first = dataclasses.replace(
            first, seed=recipe.seed, engine=dataclasses.replace(first.engine, device=recipe.engine.device),
            data=dataclasses.replace(recipe.data, augment=first.data.augment, shift=first.data.shift),
        )  # fmt: skip
        folder = _run(first, workers, override=override)
        if folder is None:
            return None
        recipe = dataclasses.replace(recipe, tokenizer_path=str(folder))
    task = TokenizerTask(recipe, workers) if recipe.task == "tokenizer" else ModelTask(recipe, workers)
    return train(task, recipe, config=config, workers=workers, override=override, metrics=metrics)


def _finished(run: Path, config: dict[str, Any]) -> bool:
    """Whether the run has left its model, and with these settings."""
    if not (run / "model" / CONFIG).is_file():
        return False
    made_with = read_config(run / "model").get("training", {}).get("config")
    return made_with is not None and of_weights(made_with) == of_weights(json.loads(json.dumps(config)))
