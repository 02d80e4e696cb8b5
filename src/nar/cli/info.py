"""`nar info`: what a model is, and the published sizes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from nar import __version__
from nar.cli.app import app, echo


@app.command(epilog="Example: nar info fashion")
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A bundled name, a model folder, or a hub id.")
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the published sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model is: parameters, grid, steps, tokenizer, how it was trained."""
    from nar.storage.config import recipe_names
    from nar.storage.folder import bundled_names
    from nar.storage.presets import PRESETS

    if model is not None and presets:
        raise ValueError("--presets lists the published sizes: leave MODEL out")
    if model is None and not presets:
        names = f"bundled models: {', '.join(bundled_names())}\nrecipes: {', '.join(recipe_names())}"
        echo(f"nar {__version__}\n{names}")
        return
    facts = {name: vars(preset) for name, preset in PRESETS.items()} if presets else _facts(str(model))
    if as_json:
        echo(json.dumps(facts, indent=2, default=list))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if presets:
            grid = "x".join(map(str, value["config"].get("grid", ()))) or "any"
            value = f"{value['kind']:<15} {value['num_parameters']:>13,} parameters  grid {grid}"
        echo(f"{key:<{width}}  {value}")


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
