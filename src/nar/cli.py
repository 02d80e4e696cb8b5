"""The command `nar`: one verb a function, heavy imports inside them, errors as one line.

Knows options and files; the work is done by the modules that each verb names.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from nar import __version__

if TYPE_CHECKING:
    from nar.pipeline import Output, Pipeline

app = typer.Typer(
    name="nar",
    help="Fast autoregressive image and video generation. Every command has --help with an example.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A bundled name (fashion), a model folder, or a hub id.")]


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2, with a traceback only under --debug."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        typer.echo("stopped", err=True)
        code = 130
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if debug:
            raise
        typer.echo(f"nar: {' '.join(str(error).split())}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[  # noqa: ARG001 main() reads it, wherever it stands
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: nar sample fashion --class-label sneaker -n 8 --seed 1 -o sneakers.png --gif")
def sample(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="A contact sheet (.png), an animation (.gif), an array (.npz), or a folder for PNGs."
        ),
    ],
    class_label: Annotated[
        list[str] | None,
        typer.Option("--class-label", help="Name or number of a class; may be repeated. Default: all, at most ten."),
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Pictures of each class.")] = 4,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of guidance, 1.0 is off. Default: the model's own.")
    ] = None,
    guidance_interval: Annotated[
        int | None, typer.Option(help="End guidance once more than this number of tokens are drawn.")
    ] = None,
    guidance_curve: Annotated[
        str | None, typer.Option(help="constant, linear, cosine or power, over the fronts.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; 0 takes the most likely token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens, 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens up to this mass.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i depends on (seed, i) only.")] = 0,
    gif: Annotated[
        bool, typer.Option("--gif", help="Also write an animation of the pictures growing front by front.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 40,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or on a CPU int8.")] = "float32",
) -> None:
    """Draw pictures with a model."""
    _check_output(output)
    from time import perf_counter

    from nar.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, device=_device(device), dtype=dtype)
    labels = class_label or [str(index) for index in range(min(10, pipe.model.config.num_classes))]
    fronts: dict[int, list[Any]] = {}
    animated = gif or output.suffix == ".gif"
    started = perf_counter()
    with typer.progressbar(
        length=len(labels) * number * pipe.model.layout.schedule.num_steps, label="drawing", file=sys.stderr
    ) as bar:

        def report(_: Pipeline, front: int, codes: Any) -> None:
            bar.update(len(codes))
            if animated:
                fronts.setdefault(front, []).append(codes)

        result = pipe(
            labels,
            num_images_per_prompt=number,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_curve=guidance_curve,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            output_type="np" if output.suffix == ".npz" else "pil",
            callback_on_front_end=report,
        )
    seconds = perf_counter() - started
    settings = {
        "model": model,
        "seed": seed,
        "guidance_scale": pipe.sampling.guidance_scale if guidance_scale is None else guidance_scale,
        "guidance_interval": guidance_interval,
        "guidance_curve": guidance_curve or pipe.sampling.guidance_curve,
        "temperature": pipe.sampling.temperature if temperature is None else temperature,
        "top_k": pipe.sampling.top_k if top_k is None else top_k,
        "top_p": pipe.sampling.top_p if top_p is None else top_p,
        "dtype": dtype,
        "version": __version__,
    }
    _write(output, pipe, result, settings)
    written = [output]
    if animated:
        written = [output] if output.suffix == ".gif" else [output, output.with_suffix(".gif")]
        _write_growth(written[-1], pipe, fronts, result)
    count = len(result.class_labels)
    typer.echo(f"{count} pictures in {seconds:.1f} s, {pipe.model.layout.schedule.num_steps} steps each")
    for path in written:
        typer.echo(f"wrote {path}")


@app.command(epilog="Example: nar train fashion run=runs/mine batch_size=128")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the recipe's.")
    ] = None,
    override: Annotated[bool, typer.Option("--override", help="Go on with a run whose settings have changed.")] = False,
) -> None:
    """Train a tokenizer or a model from a recipe. The same command again resumes; DIR/model is the result."""
    from nar.training.tasks import run_recipe

    typer.echo(f"wrote {run_recipe(recipe, overrides or [], override=override)}")


@app.command(epilog="Example: nar info fashion")
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A bundled name, a model folder, or a hub id.")
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the published sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model is: parameters, grid, steps, tokenizer, how it was trained."""
    if presets:
        from nar.presets import PRESETS

        if as_json:
            typer.echo(json.dumps({name: vars(preset) for name, preset in PRESETS.items()}, indent=2, default=list))
            return
        for name, preset in PRESETS.items():
            typer.echo(f"{name:<16} {preset.kind:<16} {preset.num_parameters:>14,} parameters")
        return
    if model is None:
        from nar.config import recipe_names
        from nar.pipeline import bundled_names

        typer.echo(
            f"nar {__version__}\nbundled models: {', '.join(bundled_names())}\nrecipes: {', '.join(recipe_names())}"
        )
        return
    facts = _facts(model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        typer.echo(f"{key:<{width}}  {value}")


def _facts(model: str) -> dict[str, Any]:
    from nar.folder import read_config
    from nar.model import Transformer
    from nar.pipeline import find_model
    from nar.tokenizer import load_tokenizer

    folder = find_model(model)
    config = read_config(folder)
    facts: dict[str, Any] = {"folder": str(folder), "kind": config.get("kind")}
    if config.get("kind") == "transformer":
        transformer = Transformer.from_pretrained(folder)
        shape, schedule = transformer.config, transformer.layout.schedule
        facts |= {
            "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
            "grid": "x".join(map(str, shape.grid)),
            "schedule": shape.schedule,
            "steps": f"{schedule.num_steps} for {schedule.num_positions} tokens",
            "vocabulary": shape.vocab_size,
            "layers": f"{shape.num_blocks} blocks of width {shape.dim}, {shape.num_heads} attention heads",
            "classes": ", ".join(config.get("class_names", [])[:40]) or shape.num_classes,
        }
        folder = folder / "tokenizer"
    if folder.is_dir():
        tokenizer = load_tokenizer(folder)
        facts["tokenizer"] = (
            f"{read_config(folder).get('kind')}, {sum(p.numel() for p in tokenizer.parameters()):,} parameters, "
            f"patch {tokenizer.config.patch_size}, {tokenizer.config.vocab_size} codes"
        )
    training = config.get("training", {})
    facts["training"] = (
        f"{training['images_seen']:,} images, {training['hours']} h, held-out {training['heldout']}"
        if training
        else "not recorded"
    )
    return facts


def _device(name: str | None) -> str | None:
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}); try cpu") from error
    return name


def _check_output(output: Path) -> None:
    """Refuse a path that can't be written before any work is done."""
    if output.suffix not in {".png", ".gif", ".npz", ""}:
        raise ValueError(f"output {output} must end in .png, .gif or .npz, or be a folder, not {output.suffix!r}")
    if output.suffix and output.is_dir():
        raise ValueError(f"output {output} is a folder; give a file name")
    if not output.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output folder {output} must be new or empty")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {output} can't be written: {parent} is not a writable folder")


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary name beside `path`, then move it there: `path` is whole or untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".nar-", dir=path.parent))
    try:
        staged = staging / path.name
        write(staged)
        if path.is_dir():
            path.rmdir()
        staged.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(output: Path, pipe: Pipeline, result: Output, settings: dict[str, Any]) -> None:
    import numpy as np

    from nar.sheet import contact_sheet

    names = [pipe.label_name(label) for label in result.class_labels]
    if output.suffix == ".png":
        _atomically(output, contact_sheet(result.images, names).save)
    elif output.suffix == ".npz":
        labels = np.array(result.class_labels)
        _atomically(output, lambda path: np.savez_compressed(path, arr_0=result.images, labels=labels))
    elif not output.suffix:

        def write(folder: Path) -> None:
            folder.mkdir()
            records = []
            for index, (image, name) in enumerate(zip(result.images, names, strict=True)):
                image.save(folder / f"{index:06d}.png")
                records.append({"file": f"{index:06d}.png", "label": name, "index": index, **settings})
            (folder / "samples.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

        _atomically(output, write)


def _write_growth(path: Path, pipe: Pipeline, fronts: dict[int, list[Any]], result: Output) -> None:
    import torch

    from nar.sheet import contact_sheet, save_animation

    names = [pipe.label_name(label) for label in result.class_labels]
    frames = [contact_sheet(pipe.pictures(torch.cat(codes)), names) for _, codes in sorted(fronts.items())]
    _atomically(path, lambda staged: save_animation(frames, staged))
