"""`nar convert`: published checkpoints to model folders."""

# ruff: noqa: ARG001 options are passed on by their names

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nar.cli.app import app, echo, sizes


@app.command(epilog="Example: nar convert --kind nar-c2i c2i_L_256.pt --tokenizer models/vq-16 -o models/nar-l")
def convert(
    context: typer.Context,
    source: Annotated[Path, Argument(metavar="SRC", help="A published .pt, .pth or .safetensors file, or its folder.")],
    kind: Annotated[
        str, Option(help="nar-c2i, nar-t2i, nar-c2v, nar-fp, llamagen-gpt, var; llamagen-vq, larp-tokenizer, var-vae.")
    ],
    output: Annotated[Path, Option("--output", "-o", help="The model folder to write.")],
    preset: Annotated[str | None, Option(help="See nar info --presets. Default: recognised by its sizes.")] = None,
    weights: Annotated[str, Option(help="model, ema or ema:DECAY, of a file with several sets.")] = "model",
    num_heads: Annotated[int | None, Option(min=1, help="Attention heads of a size without preset.")] = None,
    grid: Annotated[str | None, Option(help="Codes along each axis: 24x24 for 384 pixels, 4x16x16 for video.")] = None,
    tokenizer: Annotated[Path | None, Option(help="A converted tokenizer's folder, to copy into the model's.")] = None,
    class_names: Annotated[Path | None, Option(help="A text file with one name a line, or a JSON list.")] = None,
    prefix_attention: Annotated[str, Option(help="Given codes see earlier ones (causal) or all (full).")] = "causal",
    l2_norm: Annotated[bool, Option(help="Image tokenizers: whether codes are compared by direction.")] = True,
    scales: Annotated[str | None, Option(help="Of var-vae: 1x2x3x4x6x9x13x18x24x32 for 512 pixels.")] = None,
) -> None:
    """Turn a published checkpoint into a model folder. Nothing in the file is run; every tensor is accounted for."""
    from nar.convert import convert as convert_checkpoint

    read = {"grid": sizes(grid) if grid else None, "scales": sizes(scales) if scales else ()}
    convert_checkpoint(**context.params | read | {"class_names": _names(class_names) if class_names else ()})
    echo(f"wrote {output}")


def _names(path: Path) -> list[str]:
    from nar.storage.files import read_json
    from nar.storage.text import read_lines

    if path.suffix != ".json":
        return [line.strip() for line in read_lines(path) if line.strip()]
    names: list[str] = read_json(path, list)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a JSON list of names, in the order of the classes")
    return names
