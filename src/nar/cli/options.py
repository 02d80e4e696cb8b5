"""Options that several verbs have, with their help, and what they check of them."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from nar.storage.files import check_output


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which typer's own bounds let through in some of its versions."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, not {value}")
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A bundled name (fashion), a model folder, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: cuda where there is one.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Strength of guidance, 1.0 is off. Default: the model's own.")
]
GuidanceInterval = Annotated[
    int | None, typer.Option(help="End guidance once more than this number of tokens are sampled.")
]
GuidanceCurve = Annotated[
    str | None,
    typer.Option(help="constant; linear, cosine or power, over the fronts; linear-tokens or cosine-tokens."),
]
GuidancePower = Annotated[float | None, typer.Option(help="Exponent of how far a curve is. Default: 1, the curve.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits; 0 takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens, 0 is off.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the most likely tokens up to this mass.")]


def check_results(output: Path) -> None:
    """Refuse a place for results, a folder where it has no ending, that can't be written before they are made."""
    if output.suffix.lower() == ".mp4" and find_spec("av") is None:
        raise ModuleNotFoundError("writing .mp4 needs PyAV: pip install nar-gen[video]")
    if not output.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output folder {output} must be new or empty")
    check_output(output if output.suffix else output / "samples.json")
