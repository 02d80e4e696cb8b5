"""From a recipe to a trained tokenizer or model: the entry of `nar train`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from nar.data.config import recorded
from nar.data.look import ANY, look
from nar.data.source import Source
from nar.progress import Progress
from nar.storage.config import difference, keys_of, leaves, load
from nar.storage.fields import checked, filled
from nar.storage.folder import CONFIG, find_model, read_config
from nar.training.checkpoint import last_record, named
from nar.training.distributed import Workers, joined
from nar.training.lock import locked
from nar.training.loop import Metrics, steps_within, train
from nar.training.models import ModelTask
from nar.training.plan import LENGTHS, of_weights
from nar.training.recipe import OF_TOKENIZERS, Recipe
from nar.training.samples import facts
from nar.training.tokenizers import TokenizerTask

FIRST_SHARE = 1 / 3  # of a recipe's `minutes`, for the tokenizer that it trains first
TRIAL_STEPS = 1000  # that the curves of a trial think there are; it ends after seconds


@checked
def run_recipe(
    name: str, overrides: Sequence[str] = (), *, override: bool = False, start: str = "", metrics: Metrics | None = None
) -> Path | None:
    """Train what a recipe describes; returns the folder of the result, or None when a signal stopped it before.

    Running it again resumes, from the newest checkpoint or from `start`, such as "step-200"; with `override` also with
    other settings. `metrics` is called with the averaged module whenever previews are sampled.
    """
    recipe = read_recipe(name, overrides)
    with joined(recipe.engine.device) as workers:
        return _run(recipe, workers, override=override, start=start, metrics=metrics)


@checked
def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a command means, on this machine and for this number of pictures.

    Overrides of the tokenizer that a model's recipe trains first are those of its groups (`tokenizer.vocab_size=256`),
    and others behind `tokenizer_recipe.` (`tokenizer_recipe.epochs=10`).
    """
    # The short form of the command line: data=FOLDER.
    overrides = [f"data.source={given[5:]}" if given.startswith("data=") else given for given in overrides]
    own = [given for given in overrides if not _of_tokenizer(given)]
    if name == ANY:
        name, own = _chosen(own)
    recipe = load(Recipe, name, own)
    if recipe.cuda_recipe and recipe.engine.device in ("auto", "cuda") and torch.cuda.is_available():
        name = recipe.cuda_recipe
        recipe = load(Recipe, name, own)
    if recipe.task == "tokenizer" or not recipe.tokenizer_recipe:
        own = overrides
    recipe.refuse_of_models([*keys_of(name), *_keys(own)])
    if others := [given.removeprefix("tokenizer_recipe.") for given in overrides if given not in own]:
        if not recipe.trains_tokenizer:
            raise ValueError(f"{others[0]} has no effect: no tokenizer is trained, as one is given; leave it out")
        first = load(Recipe, recipe.tokenizer_recipe, others)  # says what is wrong with them
        first.refuse_of_models(_keys(others))
        own.append(f"tokenizer_overrides={json.dumps([*recipe.tokenizer_overrides, *others])}")
    return _fitted(name, own, recipe.run, None if recipe.data.codes or not recipe.data.source else recipe.data.open)


def _chosen(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe for data of one's own that fits them, which it says, and what it sets, before `overrides`."""
    data = load(Recipe, ANY, [given for given in overrides if given.startswith("data.")]).data
    if data.codes or not data.source:
        raise ValueError(f"{ANY} looks at pictures or clips: say where they are with data=FOLDER")
    found = look(data.source, label=data.label, group=data.group, broken=data.broken)
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    Progress(ANY, None, "", quiet=not first).say(f"found {found.summary}: {' '.join((found.recipe, *found.overrides))}")
    return found.recipe, [*found.overrides, *overrides]


def _keys(overrides: Sequence[str]) -> list[str]:
    return [given.partition("=")[0] for given in overrides]


def _of_tokenizer(override: str) -> bool:
    group, dot, _ = override.partition("=")[0].partition(".")
    return group in OF_TOKENIZERS or (group == "tokenizer_recipe" and bool(dot))


def _fitted(name: str, overrides: Sequence[str], run: str, sources: Callable[[], Sequence[Source]] | None) -> Recipe:
    """A recipe with what its `by_count` has for these sources. It then holds what of that counts, under their number.

    A run that was begun before there was `by_count` goes on as it was.
    """
    recipe = load(Recipe, name, overrides)
    begun = last_record(Path(run))
    if not recipe.by_count or sources is None or (begun and "by_count" not in begun["config"]):
        return recipe
    count = sum(map(len, sources()))
    limits = [limit for limit in sorted(map(int, recipe.by_count)) if count <= limit]
    settings = recipe.by_count[str(limits[0])] if limits else {}
    recipe = load(Recipe, name, overrides, layers=[settings])
    given = {*_keys(overrides)}
    given |= {*LENGTHS, "images_between"} if given & {*LENGTHS} else set()  # one takes the place of all
    return dataclasses.replace(recipe, by_count={str(count): {k: v for k, v in leaves(settings) if k not in given}})


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
        share = _first_share(recipe)
        if recipe.init and recipe.task == "model" and not (recipe.tokenizer_path or recipe.data.codes):
            recipe = dataclasses.replace(recipe, tokenizer_path=str(find_model(recipe.init) / "tokenizer"))
        if recipe.trains_tokenizer:
            folder = _run(_first(recipe, sources), workers, override=override)
            if folder is None:
                return None
            recipe = dataclasses.replace(recipe, tokenizer_path=str(folder))
        kind = TokenizerTask if recipe.task == "tokenizer" else ModelTask
        if recipe.minutes and not recipe.steps:
            seconds = 60 * recipe.minutes * (1 - share)
            trial = dataclasses.replace(recipe, minutes=0.0, steps=TRIAL_STEPS)
            steps = steps_within(seconds, kind(trial, workers, sources), trial, workers)
            recipe = dataclasses.replace(recipe, steps=steps)
            config["steps"] = steps
        task = kind(recipe, workers, sources)
        if recipe.init:
            task.summary += f", begun with {recipe.init}"
        if chosen := ", ".join(f"{key}={value}" for part in recipe.by_count.values() for key, value in leaves(part)):
            task.summary += f" (for so many: {chosen})"
        record = {"config": config, "data": data}
        return train(task, recipe, record, workers, start=start, metrics=metrics)


def _as_begun(recipe: Recipe) -> Recipe:
    """A recipe as the run that it goes on with was begun: with the steps that its minutes became, and with the split of
    that time if it was before `data.group_without` was."""
    record = last_record(Path(recipe.run))
    if recipe.minutes and record and record["config"].get("minutes") == recipe.minutes:
        recipe = dataclasses.replace(recipe, steps=record["config"]["steps"])
    data = record["config"].get("data", {}) if record else {}
    if not data or "group_without" in data or recipe.data.group_without:
        return recipe
    without = recorded(data)["group_without"]
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, group_without=without))


def _first_share(recipe: Recipe) -> float:
    """The share of a recipe's minutes for a tokenizer that is trained first; 0 where that has a length of its own."""
    own = any(key in LENGTHS for key in _keys(recipe.tokenizer_overrides))
    return FIRST_SHARE if recipe.trains_tokenizer and not own else 0.0


def _first(recipe: Recipe, sources: Sequence[Source]) -> Recipe:
    """What trains the tokenizer of a model's recipe, on the same data."""
    run = str(Path(recipe.run) / "tokenizer")
    within = [f"minutes={minutes}"] if (minutes := recipe.minutes * _first_share(recipe)) else []
    overrides = [f"run={run}", *within, *recipe.tokenizer_overrides]
    first = _fitted(recipe.tokenizer_recipe, overrides, run, lambda: sources)
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
