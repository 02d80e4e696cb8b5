"""`nar sample`: options to pictures and clips in files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nar import __version__
from nar.cli import options as shared
from nar.cli.app import app, echo, sizes
from nar.storage.files import atomically
from nar.storage.text import read_lines

if TYPE_CHECKING:
    from nar.pipeline import Output, Pipeline
    from nar.training.distributed import Workers

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".npz", "")
CLIPS = (".gif", ".mp4", ".webp", ".png", ".jpg", ".jpeg", ".npz", "")
EACH = 4  # pictures of everything that is asked for, where nothing says how many


@app.command(
    epilog="Example: nar sample fashion --class-label sneaker -n 8 --seed 1 -o sneakers.png --gif. "
    'With words: --prompt "a red apple" --prompt "purple octopus" -n 4 -o sheet.png. '
    "Clips: --frames start.gif -o next.gif."
)
def sample(
    model: shared.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Pictures: a contact sheet (.png, .jpg, .webp), how they grow (.gif), an array (.npz), or a folder of "
            "PNGs. Clips: .gif, .mp4 or .webp, one row of frames a clip (.png, .jpg), an array (.npz), or a folder of "
            "folders. Default: MODEL.png or MODEL.gif here, with a number where that is there.",
        ),
    ] = None,
    class_label: Annotated[
        list[str] | None,
        typer.Option("--class-label", help="Name or number of a class; may be repeated. Default: all, at most ten."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Words; may be repeated. Empty: unconditional.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts-file", help="A file with one prompt a line; empty lines are left out.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="Words in place of the null condition in guidance.")
    ] = None,
    frames: Annotated[
        list[Path] | None,
        typer.Option("--frames", help="A clip to continue: a video, an animation, or a folder of frames; repeatable."),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of clips, context frames included. Long ones take several passes, over the last frames."
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--number",
            "-n",
            min=1,
            max=10_000_000,
            help="Pictures of each class, prompt or clip, by default 4; in all with --labels.",
        ),
    ] = None,
    set_labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="A set for evaluation, shared by torchrun's processes: balanced or random classes, or those of these "
            "real pictures (a folder, .npz, .parquet, fashion-mnist), paired as by `nar eval --labels real`; or "
            "prompts: one picture of each line of --prompts-file.",
        ),
    ] = None,
    geneval: Annotated[
        Path | None,
        typer.Option(
            help="GenEval's metadata, one JSON with a prompt a line: -n pictures of each, in the folders it reads."
        ),
    ] = None,
    guidance_scale: shared.GuidanceScale = None,
    guidance_interval: shared.GuidanceInterval = None,
    guidance_curve: shared.GuidanceCurve = None,
    guidance_power: shared.GuidancePower = None,
    temperature: shared.Temperature = None,
    top_k: shared.TopK = None,
    top_p: shared.TopP = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**64 - 1,
            help="Picture i depends on (seed, i), not on its batch (but for bfloat16, and on GPUs).",
        ),
    ] = 0,
    gif: Annotated[
        bool, typer.Option("--gif", help="Also write an animation of the pictures growing front by front.")
    ] = False,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=240, callback=shared.finite, help="Frames per second of clips. Default: the model's own."
        ),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder or hub id of the text encoder, where the model's folder names none.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="HxW", help="Codes per axis. Default: what it was trained on.")
    ] = None,
    heads: Annotated[
        str, typer.Option(help="Who decides where heads overlap: mean, or horizontal, vertical, temporal alone.")
    ] = "mean",
    batch_size: Annotated[int, typer.Option(min=1)] = 40,
    device: shared.Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, on a CPU float16, int8; auto measures.")] = "float32",
) -> None:
    """Sample pictures or clips with a model."""
    if set_labels is not None or geneval is not None:
        of_prompts = set_labels == "prompts"
        unused = {
            "--class-label": class_label,
            "--prompt": prompt,
            "--frames": frames,
            "--gif": gif or None,
            "--fps": fps,
            "--negative-prompt": negative_prompt,
            "--num-frames": num_frames,
            "--prompts-file": None if of_prompts else prompts_file,
            "-n": number if of_prompts else None,
            "--labels": set_labels if geneval else None,
        }
        if wrong := [name for name, value in unused.items() if value is not None]:
            chosen = "--geneval" if geneval else f"--labels {set_labels}"
            raise ValueError(f"{chosen} says what is sampled: leave out {', '.join(wrong)}")
        if output is None:
            raise ValueError("a set needs a place: give --output FILE.npz, or a folder")
        if of_prompts and prompts_file is None:
            raise ValueError("--labels prompts samples one picture of each line of a file: give --prompts-file FILE")
        from nar.pipeline.folder import number_format
        from nar.sampling import settings_among
        from nar.training.distributed import joined

        lines = _lines(prompts_file) if prompts_file else []
        settings = settings_among(locals())
        with joined(device or "auto") as workers:
            pipe = _pipeline(model, workers.device, dtype, text_encoder, grid, heads)
            how: dict[str, Any] = {"sampling": dataclasses.replace(pipe.sampling, **settings), "seed": seed}
            # Not why: measurements differ from one process or day to another, and parts are shared and kept.
            how |= {"batch_size": batch_size, "settings": {"model": model, "dtype": number_format(pipe.model)}}
            how["settings"] |= {"heads": heads} if heads != "mean" else {}
            _sample_set(pipe, workers, output, number or EACH, set_labels or "", lines, geneval, how)
        return
    number = number or EACH
    if output is not None:
        _check_output(output)
    from nar.pipeline.folder import format_facts
    from nar.precision import usable_device
    from nar.sampling import settings_among

    pipe = _pipeline(model, usable_device(device), dtype, text_encoder, grid, heads)
    output = output or _free(model, ".gif" if pipe.makes_clips else ".png")
    _check_kind(pipe, output, fps, gif)
    prompts = [*(prompt or []), *(_lines(prompts_file) if prompts_file else [])]
    if pipe.model.config.num_classes and not (class_label or prompts or frames):
        class_label = [pipe.label_name(index) for index in range(min(10, pipe.model.config.num_classes))]
    columns = {"class_label": class_label or [], "prompt": prompts, "frames": [str(path) for path in frames or ()]}
    settings = settings_among(locals())
    options: dict[str, Any] = {"negative_prompt": negative_prompt, "num_frames": num_frames, "seed": seed}
    growing = gif or (output.suffix == ".gif" and not pipe.makes_clips)
    steps, fronts, started = list[int](), dict[int, list[Any]](), perf_counter()

    def after_front(_: Pipeline, front: int, codes: Any) -> None:
        steps.append(len(codes))
        if growing:
            fronts.setdefault(front, []).append(codes.cpu())

    result = pipe(
        class_labels=columns["class_label"] or None,
        prompt=columns["prompt"] or None,
        frames=columns["frames"] or None,
        num_images_per_prompt=number,
        batch_size=batch_size,
        callback_on_front_end=after_front,
        progress=True,
        **options,
        **settings,
    )
    seconds = perf_counter() - started
    how = {"model": model, **dataclasses.asdict(dataclasses.replace(pipe.sampling, **settings)), **options}
    how |= {"text_encoder": text_encoder, "grid": list(pipe.model.config.grid), "version": __version__}
    how |= {"heads": heads, **format_facts(pipe.model, pipe.choice)}
    rate, ending = fps or pipe.frame_rate, "" if pipe.makes_clips else ".png"
    how |= {"frame_rate": rate} if pipe.makes_clips else {}
    records = [
        {"file": f"{index:06d}{ending}", "label": name, "index": index, **how}
        | {kind: values[index // number % len(values)] for kind, values in columns.items() if values}
        for index, name in enumerate(result.names)
    ]
    if output.suffix != ".gif" or pipe.makes_clips:
        _write(output, result, records, rate)
    written = [output]
    if growing:
        written = [output] if output.suffix == ".gif" else [output, output.with_suffix(".gif")]
        _write_growth(written[-1], pipe, fronts, result)
    kind = ("clip" if pipe.makes_clips else "picture") + "s" * (len(result) != 1)
    echo(f"{len(result)} {kind} in {seconds:.1f} s, {sum(steps) / len(result):.0f} steps each")
    for path in written:
        echo(f"wrote {path}")


def _pipeline(model: str, device: Any, dtype: str, text_encoder: str | None, grid: str | None, heads: str) -> Pipeline:
    from nar.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, device=device, dtype=dtype, text_encoder=text_encoder)
    pipe = pipe if grid is None else pipe.at_grid(sizes(grid))
    return pipe if heads == "mean" else pipe.with_heads(heads)


def _check_kind(pipe: Pipeline, output: Path, fps: float | None, gif: bool) -> None:
    """Refuse options for clips where the model makes pictures, and the other way round."""
    if output.suffix not in (CLIPS if pipe.makes_clips else PICTURES):
        allowed = ".png, .jpg, .webp, .gif or .npz, or be a folder"
        raise ValueError(f"this model makes pictures: output {output} must end in {allowed}")
    if fps is not None and not pipe.makes_clips:
        raise ValueError("--fps is for clips; this model makes pictures")
    if gif and pipe.makes_clips:
        raise ValueError("--gif shows pictures growing; for a clip as an animation give an output that ends in .gif")


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts: write one a line")
    return lines


def _sample_set(
    pipe: Pipeline,
    workers: Workers,
    output: Path,
    number: int,
    labels: str,
    prompts: list[str],
    geneval: Path | None,
    options: dict[str, Any],
) -> None:
    """Sample a set for evaluation: of prompts, of GenEval's metadata, or of classes."""
    from nar.data.open import open_source
    from nar.evaluation.sets import LABELS, geneval_set, made_by, sample_set
    from nar.media.video import Windows
    from nar.storage.folder import find_model

    settings = options["settings"]
    settings |= {"grid": list(pipe.model.config.grid), **made_by(find_model(settings["model"]))}
    if pipe.model.config.text_dim and (prompts or geneval):
        settings["text_encoder_sha256"] = pipe.text_encoder().digest
    options |= {"rank": workers.rank, "num_processes": workers.count, "wait": workers.wait}
    if geneval is not None:
        said = f"{number} pictures of each of {geneval_set(pipe, output, geneval, number, **options)} prompts"
    elif prompts:
        said = f"a picture of each of {len(prompts)} prompts"
        sample_set(pipe, output, len(prompts), "prompts", prompts=prompts, **options)
    else:
        windows = Windows(pipe.pixel_shape[0], kind="all", whole=True) if pipe.makes_clips else None
        try:
            names: Any = labels
            if labels not in LABELS:
                names = open_source(labels, split="test", whole=True, windows=windows).classes(pipe.class_names)
        except FileNotFoundError as error:
            raise ValueError(f"--labels is {', '.join(LABELS)}, prompts, or real pictures; {error}") from error
        said = f"{number} pictures, {labels} labels"
        sample_set(pipe, output, number, names, **options)
    if workers.first:
        echo(f"{said}\nwrote {output}")


def _check_output(output: Path) -> None:
    """Refuse a path that can't be written before any work is done."""
    if output.suffix not in CLIPS:
        allowed = ".png, .jpg, .webp, .gif or .npz (clips also .mp4), or be a folder without a dot in its name"
        raise ValueError(f"output {output} must end in {allowed}, not {output.suffix!r}")
    shared.check_results(output)


def _free(model: str, ending: str) -> Path:
    """The first of MODEL.png, MODEL-2.png, ... that is not there."""
    stem = Path(model.rstrip("/")).name or "sample"
    names = (f"{stem}{'' if number == 1 else f'-{number}'}{ending}" for number in itertools.count(1))
    return next(path for path in map(Path, names) if not path.exists())


def _write(output: Path, result: Output, records: list[dict[str, Any]], frame_rate: float) -> None:
    """Write results as the path says; a folder also holds `samples.json`: how each was made."""
    if output.suffix:
        result.save(output, frame_rate=frame_rate)
        return

    def write(folder: Path) -> None:
        result.save(folder, frame_rate=frame_rate)
        (folder / "samples.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    atomically(output, write)


def _write_growth(path: Path, pipe: Pipeline, fronts: dict[int, list[Any]], result: Output) -> None:
    import torch

    from nar.media.sheet import contact_sheet, save_animation

    pictures = (pipe.pictures(torch.cat(codes)) for _, codes in sorted(fronts.items()))
    frames = [contact_sheet(each, result.names, columns=result.columns) for each in pictures]
    atomically(path, lambda staged: save_animation(frames, staged))
