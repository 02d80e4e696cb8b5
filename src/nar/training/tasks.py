"""From a recipe to a trained tokenizer or model: the entry of `nar train`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from nar.data.config import recorded
from nar.storage.config import difference, load
from nar.storage.fields import filled
from nar.storage.folder import CONFIG, find_model, read_config
from nar.training.checkpoint import last_record, named
from nar.training.distributed import Workers, joined
from nar.training.lock import locked
from nar.training.loop import Metrics, train
from nar.training.models import ModelTask
from nar.training.plan import of_weights
from nar.training.recipe import Recipe
from nar.training.samples import facts
from nar.training.tokenizers import TokenizerTask


def run_recipe(
    name: str, overrides: Sequence[str] = (), *, override: bool = False, start: str = "", metrics: Metrics | None = None
) -> Path | None:
    """Train what a recipe describes; returns the folder of the result, or None when a signal stopped it before.

    Running it again resumes, from the newest checkpoint or from `start`, such as "step-200"; with `override` also with
    other settings. `metrics` is called with the averaged module whenever previews are sampled.
    """
    # The short form of the command line: data=FOLDER.
    overrides = [f"data.source={given[5:]}" if given.startswith("data=") else given for given in overrides]
    recipe = load(Recipe, name, overrides)
    if recipe.cuda_recipe and recipe.engine.device in ("auto", "cuda") and torch.cuda.is_available():
        recipe = load(Recipe, recipe.cuda_recipe, overrides)
    with joined(recipe.engine.device) as workers:
        return _run(recipe, workers, override=override, start=start, metrics=metrics)


def _run(
    recipe: Recipe, workers: Workers, *, override: bool, start: str = "", metrics: Metrics | None = None
) -> Path | None:
    recipe, run = _as_begun(recipe), Path(recipe.run)
    config = recipe.record()
    if start:
        named(run, start)  # before anything is written
    elif _finished(run, config):
        return run / "model"
    with ExitStack() as stack:
        refused = ""
        try:
            stack.enter_context(locked(run) if workers.first else nullcontext())  # the first holds it for all
        except ValueError as error:
            refused = str(error)
        if refused := workers.agree(refused):
            raise ValueError(refused)
        sources = () if recipe.data.codes else recipe.data.open()
        data = facts(recipe, sources)
        _refuse_changes(run, config, data, workers, override=override)
        if recipe.init and recipe.task == "model" and not (recipe.tokenizer_path or recipe.data.codes):
            recipe = dataclasses.replace(recipe, tokenizer_path=str(find_model(recipe.init) / "tokenizer"))
        if recipe.task == "model" and recipe.tokenizer_recipe and not (recipe.tokenizer_path or recipe.data.codes):
            folder = _run(_first(recipe), workers, override=override)
            if folder is None:
                return None
            recipe = dataclasses.replace(recipe, tokenizer_path=str(folder))
        kind = TokenizerTask if recipe.task == "tokenizer" else ModelTask
        task = kind(recipe, workers, sources)
        record = {"config": config, "data": data}
        return train(task, recipe, record, workers, start=start, metrics=metrics)


def _as_begun(recipe: Recipe) -> Recipe:
    """A recipe with the split of the run that it goes on with, if that was begun before `data.group_without` was."""
    record = last_record(Path(recipe.run))
    data = record["config"].get("data", {}) if record else {}
    if not data or "group_without" in data or recipe.data.group_without:
        return recipe
    without = recorded(data)["group_without"]
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, group_without=without))


def _first(recipe: Recipe) -> Recipe:
    """What trains the tokenizer of a model's recipe, on the same data."""
    first = load(Recipe, recipe.tokenizer_recipe, [f"run={Path(recipe.run) / 'tokenizer'}"])
    if first.task != "tokenizer":
        raise ValueError(f"tokenizer_recipe {recipe.tokenizer_recipe} trains a model; give the recipe of a tokenizer")
    engine = dataclasses.replace(first.engine, device=recipe.engine.device)
    data = dataclasses.replace(recipe.data, augment=first.data.augment, shift=first.data.shift)
    return dataclasses.replace(first, seed=recipe.seed, engine=engine, data=data)


def _refuse_changes(
    run: Path, config: dict[str, Any], data: dict[str, str], workers: Workers, *, override: bool
) -> None:
    """Raise ValueError where a run that would go on was begun with other settings or data, unless `override`.

    Then codes of other data are made anew.
    """
    record = last_record(run) or {"config": config}
    begun = record.get("data", {})
    changed = difference(of_weights(_known(record["config"])), of_weights(config))
    other = [name for name in data if begun.get(name, data[name]) != data[name]]
    if (changed or other) and not override:
        what = f"settings: {'; '.join(changed)}" if changed else f"data: {'; '.join(other)}"
        raise ValueError(
            f"{run} was started with other {what}; use another run=DIR, or --override to go on with the new ones"
        )
    workers.wait()  # until all have looked
    if other and workers.first:
        shutil.rmtree(run / "codes", ignore_errors=True)
    workers.wait()


def _finished(run: Path, config: dict[str, Any]) -> bool:
    """Whether the run has left its model, and with these settings."""
    if not (run / "model" / CONFIG).is_file():
        return False
    made_with = read_config(run / "model").get("training", {}).get("config")
    return made_with is not None and of_weights(_known(made_with)) == of_weights(json.loads(json.dumps(config)))


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the settings that came later."""
    config = {**config, "data": recorded(config["data"])} if "data" in config else config
    return filled(config, json.loads(json.dumps(dataclasses.asdict(Recipe(num_images=1)))))
