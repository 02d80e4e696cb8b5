"""`nar sample`: options to pictures in files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nar import __version__
from nar.cli.app import Model, app, atomically, sizes, usable_device

if TYPE_CHECKING:
    from nar.pipeline import Output, Pipeline


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
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, help="Pictures of each class; in all with --labels.")
    ] = 4,
    drawn_labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="A set for evaluation, shared by torchrun's processes: balanced or random classes, or those of these "
            "real pictures (a folder, .npz, .parquet, fashion-mnist), paired as by `nar eval --labels real`.",
        ),
    ] = None,
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
    grid: Annotated[
        str | None, typer.Option(metavar="HxW", help="Codes per axis. Default: what it was trained on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 40,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or on a CPU int8.")] = "float32",
) -> None:
    """Draw pictures with a model."""
    if drawn_labels is not None:
        given = {
            "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "guidance_curve": guidance_curve,
            "temperature": temperature, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip
        if class_label or gif:
            raise ValueError("--labels draws from all classes: it goes with neither --class-label nor --gif")
        _sample_set(model, output, number, drawn_labels, given, seed, grid, batch_size, device, dtype)
        return
    _check_output(output)
    from time import perf_counter

    from tqdm import tqdm

    from nar.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, device=usable_device(device), dtype=dtype)
    if grid is not None:
        pipe = pipe.at_grid(sizes(grid))
    labels = class_label or [str(index) for index in range(min(10, pipe.model.config.num_classes))]
    fronts: dict[int, list[Any]] = {}
    animated = gif or output.suffix == ".gif"
    started = perf_counter()
    steps = len(labels) * number * pipe.model.layout.schedule.num_steps
    with tqdm(total=steps, desc="drawing", unit="step", leave=False, disable=None) as bar:

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
        "grid": list(pipe.model.config.grid),
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


def _sample_set(
    model: str, output: Path, number: int, labels: str, given: dict[str, Any], seed: int, grid: str | None,
    batch_size: int, device: str | None, dtype: str,
) -> None:  # fmt: skip
    import dataclasses

    from nar.cli.evaluate import real_classes
    from nar.pipeline import Pipeline, find_model
    from nar.samples import LABELS, made_by, sample_set
    from nar.training.distributed import joined

    with joined(device or "auto") as workers:
        pipe = Pipeline.from_pretrained(model, device=workers.device, dtype=dtype)
        pipe = pipe if grid is None else pipe.at_grid(sizes(grid))
        sampling = dataclasses.replace(
            pipe.sampling, **{key: value for key, value in given.items() if value is not None}
        )
        settings = {"model": model, "dtype": dtype, "grid": list(pipe.model.config.grid), **made_by(find_model(model))}
        num_frames = getattr(pipe.tokenizer.config, "num_frames", None)
        names = labels if labels in LABELS else real_classes(labels, "test", num_frames)
        sample_set(
            pipe, output, number, names, sampling=sampling, seed=seed, batch_size=batch_size, rank=workers.rank,
            num_processes=workers.count, wait=workers.wait,
            settings=settings,
        )  # fmt: skip
        if workers.first:
            typer.echo(f"{number} pictures, {labels} labels\nwrote {output}")


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
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(
            f"output {output} can't be written: {parent} is not a writable folder ({error.strerror})"
        ) from error


def _write(output: Path, pipe: Pipeline, result: Output, settings: dict[str, Any]) -> None:
    import numpy as np

    from nar.sheet import contact_sheet

    names = [pipe.label_name(label) for label in result.class_labels]
    if output.suffix == ".png":
        atomically(output, contact_sheet(result.images, names).save)
    elif output.suffix == ".npz":
        labels = np.array(result.class_labels)
        atomically(output, lambda path: np.savez_compressed(path, arr_0=result.images, labels=labels))
    elif not output.suffix:

        def write(folder: Path) -> None:
            folder.mkdir()
            records = []
            for index, (image, name) in enumerate(zip(result.images, names, strict=True)):
                image.save(folder / f"{index:06d}.png")
                records.append({"file": f"{index:06d}.png", "label": name, "index": index, **settings})
            (folder / "samples.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

        atomically(output, write)


def _write_growth(path: Path, pipe: Pipeline, fronts: dict[int, list[Any]], result: Output) -> None:
    import torch

    from nar.sheet import contact_sheet, save_animation

    names = [pipe.label_name(label) for label in result.class_labels]
    frames = [contact_sheet(pipe.pictures(torch.cat(codes)), names) for _, codes in sorted(fronts.items())]
    atomically(path, lambda staged: save_animation(frames, staged))
