"""`nar compare`: a study file to trained arms and one table, a study's folder to its table, or models to one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nar.cli.app import app, echo, refuse_unused


@app.command(
    epilog="Examples: nar compare studies/toy.yaml run=runs/toy-study; nar compare runs/toy-study, which makes the "
    "tables again; nar compare fashion runs/raster/model --real fashion-mnist -o out/compared"
)
def compare(
    context: typer.Context,
    what: Annotated[
        list[str], Argument(metavar="STUDY.yaml [key=value ...] | FOLDER | MODEL MODEL ...", help="What is compared.")
    ],
    real: Annotated[str | None, Option(help="Of models: real pictures or clips that they did not learn from.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Of models: a folder for tables and logs.")] = None,
    number: Annotated[int, Option("--number", "-n", min=8, help="Of models: held-out samples, two halves.")] = 10_000,
    sampled: Annotated[int, Option(min=0, help="Of models: pictures sampled; 0 leaves their scores out.")] = 5_000,
    tune: Annotated[bool, Option("--tune", help="Of models: choose the guidance of each on one half.")] = False,
    jobs: Annotated[int, Option(min=1, help="Of a study: arms that are trained at a time.")] = 1,
) -> None:
    """Compare orders, heads, settings: train what a study asks for, judge all alike, one table with intervals."""
    from nar.study.figures import write_figures
    from nar.study.plan import STUDY, Judging, read_study
    from nar.study.run import compare_models, run_study
    from nar.study.tables import markdown, read_result, result, write_tables

    first, others, folder = what[0], what[1:], output
    of_models = ("real", "output", "number", "sampled", "tune")
    if first.endswith((".yaml", ".yml")):
        refuse_unused(context, "a study", *of_models)
        folder = run_study(read_study(first, others), jobs)
        if folder is None:
            echo("stopped, and saved: the same command goes on")
            return
        compared = read_result(folder)
    elif (Path(first) / STUDY).is_file():
        refuse_unused(context, "making tables again", *of_models, "jobs")
        if others:
            raise ValueError(f"the tables of {first} are made again of its logs: leave {' '.join(others)} out")
        folder = Path(first)
        compared = read_result(folder)
    else:
        refuse_unused(context, "comparing models", "jobs")
        if real is None or not others:
            raise ValueError("compare models with --real R and at least two of them; or give a study, a .yaml file")
        judging = Judging(number=number, num_sampled=sampled, guidance=(1.0, 4.0) if tune else ())
        compared = result(*compare_models(what, real, judging, output))
    echo(markdown(compared))
    for path in [] if folder is None else [*write_tables(folder, compared), *write_figures(folder, compared)]:
        echo(f"wrote {path}")
