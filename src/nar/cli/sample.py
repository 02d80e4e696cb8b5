"""`nar sample`: options to pictures and clips in files."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nar import __version__
from nar.cli.app import Model, app, given_settings, sizes
from nar.storage.files import atomically

if TYPE_CHECKING:
    from nar.pipeline import Output, Pipeline

PICTURES, CLIPS = (".png", ".gif", ".npz", ""), (".png", ".gif", ".mp4", ".webp", ".npz", "")
EACH = 4  # pictures of everything that is asked for, where nothing says how many


@app.command(
    epilog="Example: nar sample fashion --class-label sneaker -n 8 --seed 1 -o sneakers.png --gif. "
    'With words: --prompt "a red apple" --prompt "purple octopus" -n 4 -o sheet.png. '
    "Clips: --frames start.gif -o next.gif."
)
def sample(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Pictures: a contact sheet (.png), how they grow (.gif), an array (.npz), or a folder of PNGs. "
            "Clips: .mp4, .gif or .webp, one row of frames a clip (.png), an array (.npz), or a folder of folders.",
        ),
    ],
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
        str | None, typer.Option("--negative-prompt", help="Words that guidance leads away from.")
    ] = None,
    frames: Annotated[
        list[Path] | None,
        typer.Option("--frames", help="A clip to continue: a video, an animation, or a folder of frames; repeatable."),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of clips, given frames included. Long ones take several passes, over the last frames."
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--number", "-n", min=1, help="Pictures of each class, prompt or clip, by default 4; in all with --labels."
        ),
    ] = None,
    drawn_labels: Annotated[
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
        float | None, typer.Option(min=0.1, max=240, help="Frames per second of clips. Default: the model's own.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder or hub id of the text encoder, where the model's folder names none.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="HxW", help="Codes per axis. Default: what it was trained on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 40,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or on a CPU float16 and int8.")] = "float32",
) -> None:
    """Draw pictures or clips with a model."""
    given = given_settings(guidance_scale, guidance_interval, guidance_curve, temperature, top_k, top_p)
    if drawn_labels is not None or geneval is not None:
        of_prompts = drawn_labels == "prompts"
        unused = {
            "--class-label": class_label, "--prompt": prompt, "--frames": frames, "--gif": gif or None, "--fps": fps,
            "--negative-prompt": negative_prompt, "--num-frames": num_frames,
            "--prompts-file": None if of_prompts else prompts_file, "-n": number if of_prompts else None,
            "--labels": drawn_labels if geneval else None,
        }  # fmt: skip
        if wrong := [name for name, value in unused.items() if value is not None]:
            told = "--geneval" if geneval else f"--labels {drawn_labels}"
            raise ValueError(f"{told} says what is drawn: leave out {', '.join(wrong)}")
        if of_prompts and prompts_file is None:
            raise ValueError("--labels prompts draws one picture of each line of a file: give --prompts-file FILE")
        _sample_set(
            model, output, number, drawn_labels or "", _lines(prompts_file) if prompts_file else [], geneval, given,
            seed, grid, batch_size, device, dtype, text_encoder,
        )  # fmt: skip
        return
    number = number or EACH
    _check_output(output)
    from time import perf_counter

    from tqdm import tqdm

    from nar.pipeline import Pipeline
    from nar.precision import usable_device

    pipe = Pipeline.from_pretrained(model, device=usable_device(device), dtype=dtype, text_encoder=text_encoder)
    if grid is not None:
        pipe = pipe.at_grid(sizes(grid))
    if output.suffix not in (CLIPS if pipe.makes_clips else PICTURES):
        raise ValueError(f"this model makes pictures: output {output} must end in .png, .gif or .npz, or be a folder")
    if fps is not None and not pipe.makes_clips:
        raise ValueError("--fps is for clips; this model makes pictures")
    if gif and pipe.makes_clips:
        raise ValueError("--gif shows pictures growing; for a clip as an animation give an output that ends in .gif")
    config = pipe.model.config
    prompts = [*(prompt or []), *(_lines(prompts_file) if prompts_file else [])]
    if config.num_classes and not (class_label or prompts or frames):
        class_label = [pipe.label_name(index) for index in range(min(10, config.num_classes))]
    fronts: dict[int, list[Any]] = {}
    growing = gif or (output.suffix == ".gif" and not pipe.makes_clips)
    started = perf_counter()
    count = max(len(class_label or ()), len(prompts), len(frames or ())) * number
    total = None if num_frames else count * pipe.model.layout.schedule.num_steps  # long clips take several passes
    steps = 0
    with tqdm(total=total, desc="drawing", unit="step", leave=False, disable=None) as bar:

        def report(_: Pipeline, front: int, codes: Any) -> None:
            nonlocal steps
            steps += len(codes)
            bar.update(len(codes))
            if growing:
                fronts.setdefault(front, []).append(codes.cpu())

        result = pipe(
            class_label or None,
            prompt=prompts or None,
            negative_prompt=negative_prompt,
            frames=[str(path) for path in frames] if frames else None,
            num_frames=num_frames,
            num_images_per_prompt=number,
            seed=seed,
            batch_size=batch_size,
            output_type="np" if output.suffix == ".npz" else "pil",
            callback_on_front_end=report,
            **given,
        )
    seconds = perf_counter() - started
    settings = {
        "model": model,
        "seed": seed,
        **dataclasses.asdict(dataclasses.replace(pipe.sampling, **given)),
        "negative_prompt": negative_prompt,
        "num_frames": num_frames,
        "text_encoder": text_encoder,
        "grid": list(config.grid),
        "dtype": dtype,
        "version": __version__,
    }
    columns = {"class_label": class_label, "prompt": prompts, "frames": [str(path) for path in frames or ()]}
    records = [
        {"label": name, "index": index, **settings}
        | {kind: values[index // number % len(values)] for kind, values in columns.items() if values}
        for index, name in enumerate(result.names)
    ]
    if pipe.makes_clips:
        _write_clips(output, result, records, fps or pipe.frame_rate)
    else:
        _write(output, result, records)
    written = [output]
    if growing:
        written = [output] if output.suffix == ".gif" else [output, output.with_suffix(".gif")]
        _write_growth(written[-1], pipe, fronts, result)
    kind = "clips" if pipe.makes_clips else "pictures"
    typer.echo(f"{len(result.names)} {kind} in {seconds:.1f} s, {steps / len(result.names):.0f} steps each")
    for path in written:
        typer.echo(f"wrote {path}")


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    if not any(lines):
        raise ValueError(f"{path} holds no prompts: write one a line")
    return [line for line in lines if line]


def _sample_set(
    model: str, output: Path, number: int | None, labels: str, prompts: list[str], geneval: Path | None,
    given: dict[str, Any], seed: int, grid: str | None, batch_size: int, device: str | None, dtype: str,
    text_encoder: str | None,
) -> None:  # fmt: skip
    from nar.evaluation.real import real_classes
    from nar.evaluation.sets import LABELS, geneval_set, made_by, sample_set
    from nar.pipeline import Pipeline
    from nar.storage.folder import find_model
    from nar.text import TextEncoder
    from nar.training.distributed import joined

    with joined(device or "auto") as workers:
        pipe = Pipeline.from_pretrained(model, device=workers.device, dtype=dtype, text_encoder=text_encoder)
        pipe = pipe if grid is None else pipe.at_grid(sizes(grid))
        settings = {"model": model, "dtype": dtype, "grid": list(pipe.model.config.grid), **made_by(find_model(model))}
        if pipe.model.config.text_dim and (prompts or geneval):
            encoder = pipe.text_encoder()
            settings["text_encoder_sha256"] = encoder.digest if isinstance(encoder, TextEncoder) else None
        number = number or EACH
        options: dict[str, Any] = {
            "sampling": dataclasses.replace(pipe.sampling, **given), "seed": seed, "batch_size": batch_size,
            "rank": workers.rank, "num_processes": workers.count, "wait": workers.wait, "settings": settings,
        }  # fmt: skip
        if geneval is not None:
            drawn = f"{number} pictures of each of {geneval_set(pipe, output, geneval, number, **options)} prompts"
        elif prompts:
            drawn = f"a picture of each of {len(prompts)} prompts"
            sample_set(pipe, output, len(prompts), "prompts", prompts=prompts, **options)
        else:
            num_frames = pipe.pixel_shape[0] if pipe.makes_clips else None
            try:
                names = labels if labels in LABELS else real_classes(labels, "test", num_frames, pipe.class_names)
            except FileNotFoundError as error:
                raise ValueError(f"--labels is {', '.join(LABELS)}, prompts, or real pictures; {error}") from error
            drawn = f"{number} pictures, {labels} labels"
            sample_set(pipe, output, number, names, **options)
        if workers.first:
            typer.echo(f"{drawn}\nwrote {output}")


def _check_output(output: Path) -> None:
    """Refuse a path that can't be written before any work is done."""
    if output.suffix not in CLIPS:
        raise ValueError(
            f"output {output} must end in .png, .gif or .npz (clips also .mp4, .webp), or be a folder without a dot in "
            f"its name, not {output.suffix!r}"
        )
    if output.suffix == ".mp4" and find_spec("av") is None:
        raise ModuleNotFoundError("writing .mp4 needs PyAV: pip install nar-gen[video]")
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


def _write(output: Path, result: Output, records: list[dict[str, Any]]) -> None:
    from nar.media.sheet import contact_sheet

    if output.suffix == ".png":
        atomically(output, contact_sheet(result.images, result.names).save)
    elif output.suffix == ".npz":
        _write_array(output, result.images, result)
    elif not output.suffix:

        def write(folder: Path) -> None:
            folder.mkdir()
            for index, image in enumerate(result.images):
                image.save(folder / f"{index:06d}.png")
            _write_records(folder, [{"file": f"{index:06d}.png"} | record for index, record in enumerate(records)])

        atomically(output, write)


def _write_clips(output: Path, result: Output, records: list[dict[str, Any]], frame_rate: float) -> None:
    from nar.media.clips import save_clip
    from nar.media.sheet import film_strips, moving_sheet

    clips = result.videos
    if output.suffix == ".png":
        atomically(output, film_strips(clips, result.names).save)
    elif output.suffix == ".npz":
        _write_array(output, clips, result)
    elif output.suffix:  # one clip as it is, so that it can be continued; several side by side
        moving = clips[0] if len(clips) == 1 else moving_sheet(clips, result.names)
        atomically(output, lambda path: save_clip(moving, path, frame_rate=frame_rate))
    else:

        def write(folder: Path) -> None:
            for index, clip in enumerate(clips):
                save_clip(clip, folder / f"{index:06d}", frame_rate=frame_rate)
            named = [{"file": f"{index:06d}", "frame_rate": frame_rate} for index in range(len(clips))]
            _write_records(folder, [name | record for name, record in zip(named, records, strict=True)])

        atomically(output, write)


def _write_array(output: Path, array: Any, result: Output) -> None:
    import numpy as np

    labels = np.array(result.class_labels)
    arrays = {"arr_0": array, "names": np.array(result.names)} | ({"labels": labels} if labels.min() >= 0 else {})
    atomically(output, lambda path: np.savez_compressed(path, **arrays))


def _write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    """`samples.json`: what each file is, and how it can be drawn again."""
    (folder / "samples.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _write_growth(path: Path, pipe: Pipeline, fronts: dict[int, list[Any]], result: Output) -> None:
    import torch

    from nar.media.sheet import contact_sheet, save_animation

    frames = [contact_sheet(pipe.pictures(torch.cat(codes)), result.names) for _, codes in sorted(fronts.items())]
    atomically(path, lambda staged: save_animation(frames, staged))
