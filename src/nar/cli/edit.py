"""`nar edit`: a part of a picture made anew, in files."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from nar.cli import options as shared
from nar.cli.app import app, echo
from nar.storage.files import check_output


@app.command(
    epilog="Example: nar edit fashion --image shirt.png --box 8,8,16,16 --class-label shirt -n 4 -o edited.png"
)
def edit(
    model: shared.Model,
    image: Annotated[Path, typer.Option("--image", help="The picture, of any size.")],
    mask: Annotated[
        Path | None, typer.Option("--mask", help="A picture of the same size, white where something new goes.")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="X,Y,W,H", help="What is to be new, in pixels, in place of a mask.")
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
    number: Annotated[int, typer.Option("--number", "-n", min=1, max=10_000, help="Results.")] = 1,
    guidance_scale: shared.GuidanceScale = None,
    guidance_interval: shared.GuidanceInterval = None,
    guidance_curve: shared.GuidanceCurve = None,
    temperature: shared.Temperature = None,
    top_k: shared.TopK = None,
    top_p: shared.TopP = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Result i depends on (seed, i).")] = 0,
    device: shared.Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or on a CPU float16 and int8.")] = "float32",
) -> None:
    """Make a part of a picture anew; the rest stays as it is, byte for byte."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    if output.suffix.lower() not in ("", ".npz", *kinds):
        raise ValueError(f"output {output} must end in .png, .jpg, .webp or .npz, or be a folder")
    if sheet is not None and sheet.suffix.lower() not in kinds:
        raise ValueError(f"sheet {sheet} must end in .png, .jpg or .webp")
    for path in filter(None, (output, sheet)):
        check_output(path if path.suffix else path / "000000.png")
    from nar.pipeline import Pipeline
    from nar.precision import usable_device
    from nar.sampling import settings_among

    settings: dict[str, Any] = settings_among(locals())
    pipe = Pipeline.from_pretrained(model, device=usable_device(device), dtype=dtype)
    if not pipe.makes_clips and not pipe.continuation.has_holes:
        echo(
            "nar: this model was not trained to edit: it keeps the codes around the mask, and sees half of them; "
            "see docs/howto/editing.md",
            err=True,
        )
    started = perf_counter()
    result = pipe.edit(
        image,
        mask=mask,
        box=None if box is None else _box(box),
        class_labels=class_label,
        prompt=prompt,
        negative_prompt=negative_prompt,
        mode=mode,
        num_images_per_prompt=number,
        seed=seed,
        **settings,
    )
    echo(f"{number} edited picture{'s' * (number > 1)} in {perf_counter() - started:.1f} s")
    result.save(output)
    echo(f"wrote {output}")
    if sheet is not None:
        _sheet(sheet, image, mask, box, result.images)
        echo(f"wrote {sheet}")


def _box(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.lstrip("-").isdecimal() for part in parts):
        raise ValueError(f"--box {text!r} must be four whole numbers, left,top,width,height, such as 8,8,16,16")
    return tuple(map(int, parts))


def _sheet(path: Path, image: Path, mask: Path | None, box: str | None, results: list[Any]) -> None:
    """Write before, what is hidden in grey, and after."""
    from nar.media.sheet import contact_sheet
    from nar.pipeline.edit import before
    from nar.storage.files import atomically

    given, hidden = before(image, mask, None if box is None else _box(box))
    names = ["before", "hidden", *(["after"] * len(results))]
    made = contact_sheet([given, hidden, *results], names, columns=min(8, len(names)))
    atomically(path, lambda staged: made.save(staged))
