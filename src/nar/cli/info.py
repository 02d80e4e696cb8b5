"""`nar info`: what a model, a recipe or a folder of pictures is, and the published sizes."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from nar import __version__
from nar.cli.app import app, echo
from nar.storage.fields import suggestion


@app.command(epilog="Example: nar info fashion")
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="WHAT",
            help="A model (bundled name, folder, hub id), a recipe, or pictures to learn from (a folder, ...).",
        ),
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the published sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model, a recipe or a folder of pictures is. Without WHAT: the bundled models and the recipes."""
    from nar.storage.config import recipe_names
    from nar.storage.presets import PRESETS

    if model is not None and presets:
        raise ValueError("--presets lists the published sizes: leave MODEL out")
    if model is None and not presets:
        _list()
        return
    facts: dict[str, Any] = {name: vars(preset) for name, preset in PRESETS.items()} if presets else {}
    facts = facts or _described(str(model), recipe_names())
    if as_json:
        echo(json.dumps(facts, indent=2, default=list))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if presets:
            grid = "x".join(map(str, value["config"].get("grid", ()))) or "any"
            value = f"{value['kind']:<15} {value['num_parameters']:>13,} parameters  grid {grid}"
        echo(f"{key:<{width}}  {value}")


def _list() -> None:
    """Print the bundled models and the recipes, a line each with what it makes."""
    from nar.storage.config import about, recipe_names
    from nar.storage.folder import BUNDLED, bundled_names, read_config

    echo(f"nar {__version__}\n\nmodels (nar sample NAME):")
    for name in bundled_names():
        echo(_line(name, read_config(BUNDLED / name).get("training", {}).get("config", {}).get("about", "")))
    echo("\nrecipes (nar train NAME; nar info NAME says more):")
    for name in recipe_names():
        echo(_line(name, about(name)))


def _line(name: str, about: str) -> str:
    first = " ".join(about.split()).split(". ")[0].rstrip(".")
    return f"  {name:<26} {textwrap.shorten(first, 90, placeholder=' ...')}"


def _described(what: str, recipes: list[str]) -> dict[str, Any]:
    """What is known of a model, a recipe, of both where they share a name, or else of pictures.

    Raises:
        FileNotFoundError: it is none of them.
    """
    from nar.storage.folder import bundled_names

    if what in recipes and what in bundled_names():
        return _facts(what) | _recipe_facts(what)
    if what in recipes or (what.endswith((".yaml", ".yml")) and Path(what).is_file()):
        return _recipe_facts(what)
    try:
        return _facts(what)
    except FileNotFoundError as no_model:
        path = Path(what)
        if path.exists() and not (path / "config.json").exists():
            return _data_facts(what)
        near = suggestion(what, recipes)
        raise FileNotFoundError(f"{no_model}{f'; no recipe of that name{near}' if near else ''}") from no_model


def _recipe_facts(name: str) -> dict[str, Any]:
    """What a recipe makes, and all that it sets apart from defaults."""
    from nar.storage.config import leaves, load
    from nar.training.recipe import Recipe

    recipe = load(Recipe, name)
    # Records have every size written out: those of the data (classes) and of another task are in both.
    config, defaults = (dict(leaves(which.record())) for which in (recipe, Recipe(num_images=1)))
    defaults["num_images"] = 0
    facts: dict[str, Any] = {"recipe": name, "about": " ".join(recipe.about.split())}
    if not (recipe.data.source or recipe.data.codes):
        facts["data"] = "needs your own: data=FOLDER"
    if recipe.task == "model":
        learned = (("classes", recipe.learns_classes), ("captions", recipe.text_encoder.source))
        facts["learns from"] = ", ".join([*(name for name, used in learned if used), "pictures or clips"])
    facts |= {key: value for key, value in config.items() if defaults.get(key, value) != value and key != "about"}
    for limit, settings in sorted(recipe.by_count.items(), key=lambda item: int(item[0])):
        facts[f"up to {int(limit):,} samples"] = ", ".join(f"{key}={value}" for key, value in leaves(settings))
    return facts | {"all keys": "docs/reference/recipes.md"}


def _data_facts(source: str) -> dict[str, Any]:
    """What there is to learn from in a folder or file, and the command that learns it."""
    from nar.data.look import look

    found = look(source)
    facts: dict[str, Any] = {"data": source, found.kind: f"{found.count:,}"}
    if len(found.class_names) > 1:
        facts["classes"] = ", ".join(found.class_names[:40]) + (", ..." if len(found.class_names) > 40 else "")
    if found.num_captions:
        facts["captions"] = f"for {found.num_captions:,}, such as {found.example!r}"
    return facts | {"train": found.command("runs/mine")}


def _made(shape: tuple[int, ...], frame_rate: float) -> str:
    *frames, height, width = shape
    clips = f"clips of {frames[0]} frames of" if frames else "pictures of"
    return f"{clips} {height}x{width} pixels" + (f", {frame_rate:g} frames per second" if frames else "")


def _facts(model: str) -> dict[str, Any]:
    from nar.model import ModelConfig, Transformer
    from nar.storage.fields import from_dict
    from nar.storage.folder import CONFIG, Weights, check_shapes, find_model, read_config, without_weights
    from nar.tokenizer import load_tokenizer
    from nar.tokenizer.larp import VideoTokenizerConfig

    folder = find_model(model)
    config = read_config(folder)
    facts: dict[str, Any] = {"folder": str(folder), "kind": config.get("kind")}
    if config.get("kind") == "transformer":
        with without_weights():
            transformer = Transformer(from_dict(ModelConfig, config.get("model"), folder / CONFIG))
        check_shapes(transformer, Weights(folder).shapes, folder)
        shape, schedule = transformer.config, transformer.layout.schedule
        facts |= {
            "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
            "grid": "x".join(map(str, shape.grid)),
            "schedule": shape.schedule,
            "steps": f"{schedule.num_steps} for {schedule.num_positions} tokens",
            "vocabulary": shape.vocab_size,
            "layers": f"{shape.num_blocks} blocks of width {shape.dim}, {shape.num_heads} attention heads",
        }
        if shape.num_classes:
            facts["classes"] = ", ".join(config.get("class_names", [])[:40]) or shape.num_classes
        if shape.text_dim:
            encoder = config.get("text_encoder", {}).get("source", "none is named: give --text-encoder")
            facts["text"] = f"{shape.text_length} features of width {shape.text_dim}, encoder: {encoder}"
        if shape.prefix_grid:
            facts["given codes"] = f"{'x'.join(map(str, shape.prefix_grid))}, {shape.prefix_attention}"
        if "given_frames" in config:
            counts = [str(count) for count in config["given_frames"]]
            facts["given frames"] = " or ".join([", ".join(counts[:-1]), counts[-1]] if counts[1:] else counts)
        folder = folder / "tokenizer"
        facts["tokenizer"] = f"none: copy a converted tokenizer to {folder} for pictures"
        if folder.is_dir():
            facts["makes"] = _made(load_tokenizer(folder).pixel_shape(shape.grid), config.get("frame_rate", 8.0))
    if folder.is_dir():
        tokenizer = load_tokenizer(folder)
        sizes = tokenizer.config
        patch = [sizes.patch_size] * 2
        if isinstance(sizes, VideoTokenizerConfig):
            patch = [sizes.temporal_patch_size, *patch]
        facts["tokenizer"] = (
            f"{read_config(folder).get('kind')}, {sum(p.numel() for p in tokenizer.parameters()):,} parameters, "
            f"patch {'x'.join(map(str, patch))}, {sizes.vocab_size} codes"
        )
    training = config.get("training", {})
    if {"images_seen", "hours"} <= training.keys():
        measured = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in training.get("heldout", {}).items())
        heldout = ", ".join(measured) or "not measured"
        facts["training"] = f"{training['images_seen']:,} images, {training['hours']} h; held-out: {heldout}"
    else:
        source = config.get("converted_from")
        facts["training"] = f"not recorded; converted from {source}" if source else "not recorded"
    return facts
