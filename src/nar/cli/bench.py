"""`nar bench`: the speed of models and tokenizers, as a table and JSON rows."""

# ruff: noqa: ARG001 options are passed on by their names

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from nar.cli.app import Verbs, app, echo
from nar.cli.options import finite
from nar.progress import Progress
from nar.storage.files import atomically, check_output, write_json

if TYPE_CHECKING:
    from nar.bench import Setup
    from nar.bench.report import Row

verbs = typer.Typer(cls=Verbs, rich_markup_mode=None, subcommand_metavar="| COMMAND ...")
app.add_typer(verbs, name="bench")


@verbs.callback(
    invoke_without_command=True,
    epilog="Examples: nar bench --preset NAR-B --dtype float16 --repetitions 2 --json bench.json --plot bench.png; "
    "nar bench --preset NAR-video-S --tokens-only --repetitions 1; nar bench --tokenizer VQ-16 --repetitions 1; "
    "nar bench --efficiency --preset NAR-M --against VAR-d16,LlamaGen-L,PAR-L-4x --batch-sizes 1,8 --plot figure6.png",
)
def bench(
    context: typer.Context,
    model: Annotated[str | None, Argument(metavar="[MODEL]", help="A bundled name, a folder, or a hub id.")] = None,
    preset: Annotated[str | None, Option(help="A published size with random weights; see nar info --presets.")] = None,
    tokenizer: Annotated[
        str | None, Option(help="Encode and decode: a folder, a bundled name; VQ-16, VQ-8, LARP-L-long at random.")
    ] = None,
    batch_sizes: Annotated[str, Option(metavar="N,N,...", help="Pictures at once.")] = "1",
    schedule: Annotated[
        list[str] | None,
        Option(
            help="raster, par or manhattan; jacobi: a trained raster model in parallel. Repeatable. Default: all for a "
            "preset, else its own."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, Option(help="1.0 is off. Default: the model's own; 2.0 for image presets, 1.25 for video.")
    ] = None,
    guidance_interval: Annotated[int | None, Option(help="End guidance after this number of tokens.")] = None,
    compiled: Annotated[bool, Option("--compile", help="Compile the feed-forward layers (for GPUs).")] = False,
    pixels: Annotated[bool, Option("--pixels/--tokens-only", help="Also time the pixel decoder.")] = True,
    warmups: Annotated[int, Option(min=0, max=10_000, help="Generations before the clock starts.")] = 2,
    repetitions: Annotated[int, Option(min=1, max=10_000, help="Generations timed; the median counts.")] = 3,
    clock: Annotated[str, Option(help="wall, or cpu: processor time, for one thread on a busy machine.")] = "wall",
    dtype: Annotated[str, Option(help="float32, bfloat16, on a CPU float16, int8; auto measures.")] = "float32",
    device: Annotated[str | None, Option(help="cpu, cuda, mps. Default: cuda where there is one.")] = None,
    efficiency: Annotated[
        bool, Option("--efficiency", help="The paper's figure 6: --preset beside --against, a process for each.")
    ] = False,
    against: Annotated[
        list[str] | None,
        Option(help="With --efficiency; repeatable, or joined by commas. Default: models of the nearest FID."),
    ] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the rows here.")] = None,
    plot_file: Annotated[Path | None, Option("--plot", help="Latency, memory, throughput (.png, .pdf, .svg).")] = None,
) -> None:
    """Measure how fast models sample: schedules side by side, beside the least time that the machine needs."""
    if context.invoked_subcommand is not None:
        return
    if against and not efficiency:
        raise ValueError("--against is of --efficiency; add that")
    if efficiency and (preset is None or schedule):
        raise ValueError("--efficiency compares published sizes: give --preset NAME, and no --schedule")
    if [model, preset, tokenizer].count(None) != 2:
        raise ValueError("give either MODEL or --preset NAME (see nar info --presets) or --tokenizer NAME, only one")
    if tokenizer is not None and plot_file is not None:
        raise ValueError("--plot shows models, not tokenizers; leave it out, or write --json FILE")
    try:
        sizes = tuple(int(part) for part in batch_sizes.split(","))
    except ValueError:
        raise ValueError(f"--batch-sizes must be numbers such as 1,8, not {batch_sizes!r}") from None
    import torch

    from nar import bench as measure
    from nar.bench import report as reports
    from nar.precision import usable_device

    if plot_file is not None:
        reports.check_plot(plot_file)
    for path in (json_file, plot_file):
        if path is not None:
            check_output(path)
    given = {field.name: context.params[field.name] for field in dataclasses.fields(measure.Setup)}
    place = usable_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    setup = measure.Setup(**given | {"batch_sizes": sizes, "device": place})
    if efficiency:
        _efficiency(
            str(preset), [name for part in against or () for name in part.split(",")], setup, json_file, plot_file
        )
        return

    with Progress("measuring", None, "rows") as progress:

        def report(row: reports.Row) -> None:
            what = row.schedule or f"{row.operation} {row.layout} in {row.dtype}"
            progress.say(f"{what}, batch {row.batch_size}: {row.latency_seconds:.3f} s")
            progress.update()

        if tokenizer is not None:
            rows = measure.bench_tokenizer(tokenizer, setup, report=report)
        elif preset is not None:
            rows = measure.bench_preset(preset, setup, schedule or measure.SCHEDULES, report=report)
        else:
            rows = measure.bench_folder(model or "", setup, schedule or (), report=report)
    first, what = rows[0], f"{rows[0].dtype}, guidance {rows[0].guidance_scale}"
    if tokenizer is not None:
        what = f"{'x'.join(map(str, first.size or ()))} pixels"
    echo(
        f"{first.model}: {what} on {first.device}, {first.threads} threads, medians of {repetitions} after "
        f"{warmups} warm-ups; seconds for a batch, and the least that reading and arithmetic take"
    )
    echo("\n".join([reports.table(rows), *(reports.compare(rows) if tokenizer is None else ())]))
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(row) for row in rows])
    if plot_file is not None:
        atomically(plot_file, lambda path: reports.plot(rows, path))


def _efficiency(preset: str, against: list[str], setup: Setup, json_file: Path | None, plot_file: Path | None) -> None:
    """Compare models, and write rows as they come: the same command goes on where it was stopped."""
    from nar.bench import efficiency

    names = list(dict.fromkeys([preset, *(against or efficiency.rivals(preset))]))
    known = efficiency.known_rows(json_file) if json_file is not None else []
    rows = list(known)
    with Progress("measuring", None, "rows") as progress:

        def report(row: Row) -> None:
            rows.append(row)
            if json_file is not None:
                write_json(json_file, efficiency.Comparison(rows, []).as_json())
            progress.say(f"{row.model}, batch {row.batch_size}: {row.latency_seconds:.3f} s")
            progress.update()

        comparison = efficiency.compare(names, setup, known, report=report)
    if known:
        echo(f"{len(known)} rows were in {json_file}")
    echo(efficiency.table(comparison))
    if json_file is not None:
        write_json(json_file, comparison.as_json(rows))
    if plot_file is not None:
        atomically(plot_file, lambda path: efficiency.plot(comparison, path))


@verbs.command(
    epilog="Example: nar bench serve http://127.0.0.1:8000 --model fashion --loads 0.3,0.6,1,2 --verify fashion "
    "--json load.json --plot load.png"
)
def serve(
    url: Annotated[str, Argument(help="Of any server with OpenAI's images, without /v1.")],
    model: Annotated[str | None, Option(help="A model of the server. Default: its first.")] = None,
    prompt: Annotated[
        list[str] | None, Option(help="Repeatable; they take turns. Default: the model's classes.")
    ] = None,
    concurrency: Annotated[int, Option(min=1, max=1000, help="Callers at once that measure the capacity.")] = 8,
    loads: Annotated[str, Option(metavar="X,X,...", help="Open loops at these shares of the capacity.")] = "0.3,1,2",
    rates: Annotated[str, Option(metavar="X,X,...", help="Open loops at so many requests a second.")] = "",
    seconds: Annotated[float, Option(min=1, max=86_400, callback=finite, help="Of each loop.")] = 10.0,
    partial_images: Annotated[int, Option(min=0, help="Pictures on the way, 0 asks for whole answers.")] = 1,
    num_seeds: Annotated[int, Option(min=1, help="Seeds that take turns.")] = 16,
    first_partial_limit: Annotated[
        float | None,
        Option(min=0, callback=finite, help="Seconds to the first picture on the way, for goodput. Default: any."),
    ] = None,
    limit: Annotated[
        float | None, Option(min=0, callback=finite, help="Seconds to the whole answer, for goodput. Default: any.")
    ] = None,
    timeout: Annotated[
        float, Option(min=0.1, max=86_400, callback=finite, help="Seconds after which a request counts as lost.")
    ] = 120.0,
    api_key: Annotated[str, Option(envvar="OPENAI_API_KEY", help="Sent as it is.")] = "none",
    verify: Annotated[
        str | None, Option(help="A model to load here: every picture must be its own, bit for bit.")
    ] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the rows here.")] = None,
    plot_file: Annotated[
        Path | None, Option("--plot", help="Latency and goodput over the rate (.png, .pdf, .svg).")
    ] = None,
) -> None:
    """Load a server with requests, as they come from people who do not wait for one another."""
    from nar.bench import load
    from nar.bench.report import check_plot

    if plot_file is not None:
        check_plot(plot_file)
    for path in (json_file, plot_file):
        if path is not None:
            check_output(path)
    setup = load.Setup(
        url.removesuffix("/").removesuffix("/v1"),
        tuple(prompt or load.prompts_of(url, model, api_key)),
        model,
        partial_images,
        key=api_key,
        num_seeds=num_seeds,
        first_partial_limit_seconds=math.inf if first_partial_limit is None else first_partial_limit,
        limit_seconds=math.inf if limit is None else limit,
        timeout_seconds=timeout,
    )
    known = None if verify is None else load.offline(setup, verify)
    with Progress("loading", None, "loops") as progress:

        def report(row: load.Row) -> None:
            what = f"{row.concurrency} at once" if row.rate is None else f"{row.rate:.2f}/s"
            progress.say(f"{what}: {row.throughput:.2f} answers a second, {row.refused} refused, {row.lost} lost")
            progress.update()

        numbers = {"loads": _numbers(loads, "--loads"), "rates": _numbers(rates, "--rates")}
        rows = load.measure(setup, concurrency=concurrency, seconds=seconds, known=known, report=report, **numbers)
    echo(load.table(rows))
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(row) for row in rows])
    if plot_file is not None:
        atomically(plot_file, lambda path: load.plot(rows, path))


def _numbers(text: str, name: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1.0]
    if not all(0 < number < 1e6 for number in numbers):
        raise ValueError(f"{name} must be numbers above 0 such as 0.3,1,2, not {text!r}")
    return numbers
