"""`nar train` and `nar extract`: recipes to models, pictures to codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nar.cli.app import app


@app.command(epilog="Example: nar train fashion run=runs/mine batch_size=128")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the recipe's.")
    ] = None,
    override: Annotated[
        bool, typer.Option("--override", help="Go on with a run whose settings or data have changed.")
    ] = False,
    start: Annotated[
        str, typer.Option("--from", metavar="STEP", help="Go on from this checkpoint of the run, such as step-200.")
    ] = "",
) -> None:
    """Train a tokenizer or a model from a recipe. The same command again resumes; DIR/model is the result."""
    from nar.training.tasks import run_recipe

    folder = run_recipe(recipe, overrides or [], override=override, start=start)
    typer.echo("stopped, and saved: the same command goes on" if folder is None else f"wrote {folder}")


@app.command(epilog="Example: nar extract runs/tokenizer/model --data pictures/ --size 256 --views flip -o codes/")
def extract(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_TOKENIZER", help="A tokenizer folder, or a model that has one inside.")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A folder, .parquet, .tar, hub id, .csv of clips, or the word fashion-mnist or toy."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the codes. The same command resumes.")],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side. Default: the model's own, else 256.")] = None,
    views: Annotated[
        str, typer.Option(help="Of each picture: centre, flip (and mirrored), shift, ten-crop; of clips: loop.")
    ] = "centre",
    frames: Annotated[
        int | None, typer.Option(min=0, help="Frames of a clip. Default: the model's own, else 16; 0 for pictures.")
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="Take every how many-th frame of a clip.")] = 1,
    frame_rate: Annotated[
        float, typer.Option(min=0, help="Frames a second at which clips are read before that; 0 leaves them as is.")
    ] = 0.0,
    windows: Annotated[
        str, typer.Option(help="Where in a longer clip: start, centre, or all (one sample each).")
    ] = "centre",
    given_frames: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Frames to continue, for tokenizers that need whole clips: codes of these alone too."),
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    label: Annotated[str, typer.Option(help="Column of a table that holds the class.")] = "label",
    group: Annotated[str, typer.Option(help="Column of a table: samples of one group are held out together.")] = "",
    group_without: Annotated[
        str, typer.Option(help="A regular expression; what it finds in a group does not count.")
    ] = "",
    text_encoder: Annotated[
        str,
        typer.Option(help="Encode the captions too: with a folder, a hub id, or the word minilm."),
    ] = "",
    max_length: Annotated[
        int, typer.Option(min=0, help="Tokens of a caption. Default: the encoder's, at most 120.")
    ] = 0,
    clean: Annotated[bool, typer.Option("--clean", help="Clean captions as for the published text models.")] = False,
    wording: Annotated[str, typer.Option(help="Of each caption: plain, or varied (with tags and style).")] = "plain",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: cuda where there is one.")] = None,
    pad: Annotated[bool, typer.Option("--pad", help="Repeat edges up to a multiple of the tokenizer's patch.")] = False,
) -> None:
    """Turn pictures or clips into codes of a tokenizer, for training. Under torchrun the processes share the work."""
    from dataclasses import replace

    from nar.data import extract as extraction
    from nar.data.clips import ClipSource
    from nar.data.open import open_source
    from nar.data.split import families
    from nar.media.video import Windows
    from nar.storage.folder import find_model, read_config
    from nar.tokenizer import load_tokenizer
    from nar.tokenizer.image import ImageTokenizerConfig
    from nar.training.distributed import joined

    folder = find_model(model)
    config = read_config(folder)
    if config.get("kind") == "transformer":
        folder = folder / "tokenizer"
    tokenizer = load_tokenizer(folder)
    own = tokenizer.pixel_shape(tuple(config["model"]["grid"])) if config.get("kind") == "transformer" else ()
    size = size or (own[-1] if own else 256)
    if frames is None:
        frames = own[0] if len(own) == 3 else 0 if isinstance(tokenizer.config, ImageTokenizerConfig) else 16
    if windows == "random":
        raise ValueError("--windows random is for the training of tokenizers: codes are made once; take all, or centre")
    clips = Windows(frames, stride, frame_rate, windows) if frames else None
    with joined(device or "auto") as workers:
        source = open_source(data, size=size, split=split, label=label, group=group, windows=clips)
        if group_without:
            source = replace(source, groups=families(source.groups, group_without))
        wanted = [(source, output)]
        for given in given_frames or ():
            if not isinstance(source, ClipSource):
                raise ValueError("--given-frames is for clips: say how many frames they have with --frames")
            wanted.append((replace(source, given=given), output / extraction.given_folder(given)))
        for part, place in wanted:
            extraction.extract(
                folder,
                part,
                place,
                size=size,
                kind=views,
                batch_size=batch_size,
                device=workers.device,
                threads=threads,
                rank=workers.rank,
                count=workers.count,
                wait=workers.wait,
                pad=pad,
            )
        if workers.first and text_encoder:
            from nar.data.codes import Codes
            from nar.text import TextEncoder, TextEncoderConfig, cached

            forms = [form for forms in Codes.open(output).wordings(wording) for form in forms]
            encoder = TextEncoder(TextEncoderConfig(text_encoder, max_length, clean), device=workers.device)
            typer.echo(f"features of {len(cached(encoder, forms, output / 'text'))} captions")
        if workers.first:
            manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
            grid = "x".join(map(str, manifest["grid"]))
            typer.echo(
                f"{manifest['num_samples']} pictures, {manifest['num_views']} views of {grid} codes each, "
                f"{manifest['num_broken']} broken"
            )
            typer.echo(f"wrote {output}")
