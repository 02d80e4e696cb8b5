"""`nar train` and `nar extract`: recipes to models, pictures to codes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nar.cli.app import app, echo, refuse_unused
from nar.cli.options import finite


@app.command(epilog="Example: nar train fashion run=runs/mine batch_size=128")
def train(
    recipe: Annotated[str, Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="key=value", help="Settings that replace the recipe's.")
    ] = None,
    override: Annotated[
        bool, Option("--override", help="Go on with a run whose settings or data have changed.")
    ] = False,
    start: Annotated[
        str, Option("--from", metavar="STEP", help="Go on from this checkpoint of the run, such as step-200.")
    ] = "",
) -> None:
    """Train a tokenizer or a model from a recipe. The same command again resumes; DIR/model is the result."""
    from nar.training.tasks import run_recipe

    began = time.time()
    folder = run_recipe(recipe, overrides or [], override=override, start=start)
    if folder is None:
        echo("stopped, and saved: the same command goes on")
    elif folder.stat().st_mtime < began:
        echo(f"{folder} is finished: nothing was left to do")
    else:
        echo(f"wrote {folder}")


@app.command(epilog="Example: nar extract runs/tokenizer/model --data pictures/ --size 256 --views flip -o codes/")
def extract(
    context: typer.Context,
    model: Annotated[
        str, Argument(metavar="MODEL_OR_TOKENIZER", help="A tokenizer folder, or a model with one inside.")
    ],
    data: Annotated[str, Option(help="A folder, .parquet, .tar, hub id, .csv of clips, fashion-mnist or toy.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the codes. The same command resumes.")],
    size: Annotated[int | None, Option(min=1, help="Pixels a side. Default: the model's own, else 256.")] = None,
    views: Annotated[str, Option(help="centre, flip (and mirrored), shift, ten-crop; of clips also loop.")] = "centre",
    frames: Annotated[
        int | None, Option(min=0, help="Of a clip; 0: pictures. Default: the model's own, else 16.")
    ] = None,
    stride: Annotated[int, Option(min=1, help="Take every how many-th frame of a clip.")] = 1,
    frame_rate: Annotated[
        float, Option(min=0, callback=finite, help="Frames a second to count these at; 0: as they are.")
    ] = 0.0,
    windows: Annotated[str, Option(help="Where in a longer clip: start, centre, or all (one sample each).")] = "centre",
    given_frames: Annotated[
        list[int] | None, Option(min=1, help="Context frames, if the tokenizer reads whole clips: codes of these too.")
    ] = None,
    split: Annotated[str, Option(help="train or test.")] = "train",
    label: Annotated[str, Option(help="Column of a table that holds the class.")] = "label",
    group: Annotated[str, Option(help="Column of a table: samples of one group are held out together.")] = "",
    group_without: Annotated[str, Option(help="A regular expression; what it finds in a group does not count.")] = "",
    text_encoder: Annotated[str, Option(help="Encode captions too: a folder, a hub id, or minilm.")] = "",
    max_length: Annotated[int, Option(min=0, help="Tokens of a caption. Default: the encoder's, at most 120.")] = 0,
    clean: Annotated[bool, Option("--clean", help="Clean captions as for the published text models.")] = False,
    wording: Annotated[str, Option(help="Of each caption: plain, or varied (with tags and style).")] = "plain",
    batch_size: Annotated[int, Option(min=1)] = 64,
    threads: Annotated[int, Option(min=1, help="Threads that decode pictures.")] = 4,
    device: Annotated[str | None, Option(help="cpu, cuda, mps. Default: cuda where there is one.")] = None,
    pad: Annotated[bool, Option("--pad", help="Repeat edges up to a multiple of the tokenizer's patch.")] = False,
) -> None:
    """Turn pictures or clips into codes of a tokenizer, for training. Under torchrun the processes share the work."""
    from nar.data import extract as extraction
    from nar.data.clips import ClipSource
    from nar.data.codes import Codes
    from nar.data.config import DataConfig
    from nar.model import ModelConfig
    from nar.storage.fields import from_dict
    from nar.storage.files import read_json
    from nar.storage.folder import CONFIG, find_model, read_config
    from nar.text import TextEncoder, TextEncoderConfig, cached
    from nar.tokenizer import load_tokenizer
    from nar.tokenizer.larp import VideoTokenizer
    from nar.training.distributed import joined

    folder = find_model(model)
    config = read_config(folder)
    if config.get("kind") == "transformer":
        folder = folder / "tokenizer"
    tokenizer = load_tokenizer(folder)
    own: tuple[int, ...] = ()
    if config.get("kind") == "transformer":
        own = tokenizer.pixel_shape(from_dict(ModelConfig, config.get("model"), find_model(model) / CONFIG).grid)
    elif isinstance(tokenizer, VideoTokenizer):  # reads clips of one size
        own = tokenizer.pixel_shape(tokenizer.config.grid)
    size = size or (own[-1] if own else 256)
    if frames is None:
        frames = own[0] if len(own) == 3 else 0 if len(tokenizer.pixel_axes) == 2 else 16
    if not frames:
        refuse_unused(context, "extracting pictures", "stride", "frame_rate", "windows", "given_frames")
    if not text_encoder:
        refuse_unused(context, "extracting without --text-encoder", "max_length", "clean", "wording")
    if not group:
        refuse_unused(context, "extracting without --group", "group_without")
    if windows == "random":
        raise ValueError("--windows random is for the training of tokenizers: codes are made once; take all, or centre")
    options: dict[str, Any] = {"label": label, "group": group, "group_without": group_without}
    options |= {"num_frames": frames, "stride": stride, "frame_rate": frame_rate, "windows": windows}
    pictures = DataConfig(data, size, wording=wording, **options)
    options = {"size": size, "kind": views, "batch_size": batch_size, "threads": threads, "pad": pad}
    with joined(device or "auto") as workers:
        options |= {"device": workers.device, "rank": workers.rank, "count": workers.count, "wait": workers.wait}
        source = pictures.part(split)
        encoder = None
        if text_encoder:  # before the work
            encoder = TextEncoder(TextEncoderConfig(text_encoder, max_length, clean), device=workers.device)
            encoder.encode([""])  # its weights too
            if source.captions is None:
                raise ValueError(f"{data} has no captions for --text-encoder; leave it out, or give a source with some")
        wanted = [(source, output)]
        for given in given_frames or ():
            if not isinstance(source, ClipSource):
                raise ValueError("--given-frames is for clips: say how many frames they have with --frames")
            wanted.append((dataclasses.replace(source, given=given), output / extraction.given_folder(given)))
        for part, place in wanted:
            extraction.extract(folder, part, place, **options)
        if encoder is not None:
            forms = list(dict.fromkeys(form for forms in Codes.open(output).wordings(wording) for form in forms))
            cached(encoder, workers.share_of(forms), output / "text", quiet=not workers.first)
            workers.wait()
        if workers.first:
            if encoder is not None:
                echo(f"features of {len(cached(encoder, forms, output / 'text'))} captions")
            made = read_json(output / "manifest.json")
            views_of = f"{made['num_views']} views of {'x'.join(map(str, made['grid']))} codes each"
            echo(f"{made['num_samples']} pictures, {views_of}, {made['num_broken']} broken\nwrote {output}")
