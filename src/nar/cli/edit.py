"""`nar edit`: a part of a picture made anew, in files."""

from __future__ import annotations

import re
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from nar.cli import options as shared
from nar.cli.app import app, echo


@app.command(
    epilog="Example: nar edit fashion --image shirt.png --box 8,8,16,16 --class-label shirt -n 4 -o edited.png"
)
def edit(
    model: shared.Model,
    image: Annotated[Path, typer.Option("--image", help="The picture, of any size; of a model of clips a clip.")],
    mask: Annotated[
        Path | None, typer.Option("--mask", help="A picture of the same size, white where something new goes.")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="X,Y,W,H", help="What is to be new, in pixels, in place of a mask.")
    ] = None,
    larger: Annotated[
        str | None,
        typer.Option(
            "--extend",
            metavar="2x|HxW",
            help="Continue the picture beyond its edges to so many times its sides, or to a height and width.",
        ),
    ] = None,
    position: Annotated[
        str | None,
        typer.Option("--at", metavar="X,Y", help="Where it lies in the extended one. Default: in the middle."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The edited picture (.png, .jpg, .webp), or several on a sheet; a folder of PNGs; or .npz.",
        ),
    ] = Path("edited.png"),
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also a picture of before, the mask, and the results side by side.")
    ] = None,
    class_label: Annotated[
        str | None, typer.Option("--class-label", help="Name or number of its class. Default: none.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Words on what the picture is to show.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="Words in place of the null condition in guidance.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="fill takes no notice of what the mask hides; replace keeps the codes around it, which know of it."
        ),
    ] = "fill",
    particles: Annotated[
        int,
        typer.Option(min=1, help="Of models not trained to edit: samples of each result, weighted by what is kept."),
    ] = 1,
    number: Annotated[int, typer.Option("--number", "-n", min=1, max=10_000, help="Results.")] = 1,
    guidance_scale: shared.GuidanceScale = None,
    guidance_interval: shared.GuidanceInterval = None,
    guidance_curve: shared.GuidanceCurve = None,
    guidance_power: shared.GuidancePower = None,
    temperature: shared.Temperature = None,
    top_k: shared.TopK = None,
    top_p: shared.TopP = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Result i depends on (seed, i).")] = 0,
    device: shared.Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, on a CPU float16, int8; auto measures.")] = "float32",
) -> None:
    """Make a part of a picture anew, or continue it beyond its edges; the rest stays as it is, byte for byte."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    if output.suffix.lower() not in ("", ".npz", ".gif", ".mp4", *kinds):
        raise ValueError(
            f"output {output} must end in .png, .jpg, .webp or .npz, of clips .gif or .mp4, or be a folder"
        )
    if sheet is not None and sheet.suffix.lower() not in kinds:
        raise ValueError(f"sheet {sheet} must end in .png, .jpg or .webp")
    for path in filter(None, (output, sheet)):
        shared.check_results(path)
    from nar.pipeline import Pipeline
    from nar.pipeline.canvas import before, extended, masked
    from nar.pipeline.edit import opened
    from nar.precision import usable_device
    from nar.sampling import settings_among

    settings: dict[str, Any] = settings_among(locals())
    pipe = Pipeline.from_pretrained(model, device=usable_device(device), dtype=dtype)
    if not pipe.makes_clips and output.suffix.lower() in (".gif", ".mp4"):
        raise ValueError(
            f"output {output} must end in .png, .jpg, .webp or .npz, or be a folder: {model} makes no clips"
        )
    if not pipe.makes_clips and not pipe.continuation.has_holes:
        echo(
            "nar: this model was not trained to edit: it keeps the codes around what is new, and sees half of them; "
            "see docs/howto/editing.md",
            err=True,
        )
    settings |= {"class_labels": class_label, "prompt": prompt, "negative_prompt": negative_prompt}
    settings |= {"num_images_per_prompt": number, "seed": seed, "particles": particles}
    picture, started = opened(pipe, image), perf_counter()
    if larger is None:
        if position is not None:
            raise ValueError("--at says where the picture lies in an extended one: give --extend too")
        where = None if box is None else _numbers(box, "--box", ("left", "top", "width", "height"))
        result = pipe.edit(picture, mask=mask, box=where, mode=mode, **settings)
        hidden = masked(picture, mask, where)
    else:
        if mask is not None or box is not None or mode != "fill":
            raise ValueError("--extend makes all that is beyond the edges: leave out --mask, --box and --mode")
        at = None if position is None else _numbers(position, "--at", ("left", "top"))
        size = _size(larger, picture)
        result = pipe.extend(picture, size, position=at, **settings)
        picture, hidden, _ = extended(picture, size, at)
    noun = "clip" if pipe.makes_clips else "picture"
    echo(f"{number} edited {noun}{'s' * (number > 1)} in {perf_counter() - started:.1f} s")
    result.save(output)
    echo(f"wrote {output}")
    if sheet is not None:
        _sheet(sheet, [*before(picture, hidden), *result.pictures()])
        echo(f"wrote {sheet}")


def _numbers(text: str, option: str, names: tuple[str, ...]) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != len(names) or not all(part.lstrip("-").isdecimal() for part in parts):
        example = ",".join(["8"] * len(names))
        raise ValueError(f"{option} {text!r} must be {len(names)} whole numbers, {','.join(names)}, such as {example}")
    return tuple(map(int, parts))


def _size(text: str, picture: Any) -> tuple[int, int]:
    """Height and width of an extended picture (H, W, 3): those said, or so many times its own."""
    times, sides = (re.fullmatch(how, text.strip()) for how in (r"(\d+(?:\.\d+)?)x", r"(\d+)x(\d+)"))
    if times:
        return round(float(times[1]) * picture.shape[0]), round(float(times[1]) * picture.shape[1])
    if sides:
        return int(sides[1]), int(sides[2])
    raise ValueError(f"--extend {text!r} must be a number of times, such as 2x, or a height and width, as 64x128")


def _sheet(path: Path, shown: list[Any]) -> None:
    """Write before, what is hidden in grey, and after; of clips their frames in rows."""
    from nar.media.sheet import contact_sheet, film_strips
    from nar.storage.files import atomically

    names = ["before", "hidden", *(["after"] * (len(shown) - 2))]
    clips = isinstance(shown[0], list)
    made = film_strips(shown, names) if clips else contact_sheet(shown, names, columns=min(8, len(names)))
    atomically(path, lambda staged: made.save(staged))
