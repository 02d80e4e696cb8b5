"""`nar bench`: the speed of models and tokenizers, as a table and JSON rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nar.cli.app import app
from nar.storage.files import atomically, check_output, write_json


@app.command(
    epilog="Examples: nar bench --preset NAR-B --dtype float16 --repetitions 2 --json bench.json --plot bench.png; "
    "nar bench --preset NAR-video-S --tokens-only --repetitions 1; nar bench --tokenizer VQ-16 --repetitions 1"
)
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A bundled name, a model folder, or a hub id.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A published size with random weights instead; see nar info --presets.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Measure a tokenizer instead, encoding and decoding in every dtype and layout: a folder, a bundled "
            "name, or VQ-16, VQ-8, LARP-L-long with random weights."
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Pictures at once.")] = "1",
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="raster, par (four regions) or manhattan; may be repeated. Default: all for a preset, "
            "a model's own otherwise; its others run on random weights."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1.0 is off. Default: the model's own; 2.0 for image presets, 1.25 for video.")
    ] = None,
    guidance_interval: Annotated[int | None, typer.Option(help="End guidance after this number of tokens.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the feed-forward layers (torch.compile; for GPUs).")
    ] = False,
    pixels: Annotated[bool, typer.Option("--pixels/--tokens-only", help="Also time the pixel decoder.")] = True,
    warmups: Annotated[int, typer.Option(min=0, help="Generations before the clock starts.")] = 1,
    repetitions: Annotated[int, typer.Option(min=1, help="Generations timed; the median counts.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or on a CPU float16 and int8.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: cuda where there is one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Plot latency, memory, throughput (.png, .pdf, .svg)."),
    ] = None,
) -> None:
    """Measure how fast models sample: schedules side by side, beside the least time that the machine needs."""
    if [model, preset, tokenizer].count(None) != 2:
        raise ValueError(
            "give either MODEL or --preset NAME (see nar info --presets) or --tokenizer NAME, and only one of them"
        )
    if tokenizer is not None and plot_file is not None:
        raise ValueError("--plot shows models, not tokenizers; leave it out, or write --json FILE")
    try:
        sizes = tuple(int(part) for part in batch_sizes.split(","))
    except ValueError:
        raise ValueError(f"--batch-sizes must be numbers such as 1,8, not {batch_sizes!r}") from None
    import dataclasses

    import torch

    from nar import bench as measure
    from nar.bench import report as reports
    from nar.precision import usable_device

    if plot_file is not None:
        reports.check_plot(plot_file)
    for path in (json_file, plot_file):
        if path is not None:
            check_output(path)
    setup = measure.Setup(
        batch_sizes=sizes,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        dtype=dtype,
        device=usable_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"),
        pixels=pixels,
        compiled=compiled,
        warmups=warmups,
        repetitions=repetitions,
    )

    def report(row: reports.Row) -> None:
        typer.echo(f"{row.schedule}, batch {row.batch_size}: {row.latency_seconds:.3f} s", err=True)

    if tokenizer is not None:
        rows = measure.bench_tokenizer(tokenizer, setup)
        what = f"{'x'.join(map(str, rows[0].size or ()))} pixels"
    else:
        if preset is not None:
            rows = measure.bench_preset(preset, setup, schedule or measure.SCHEDULES, report=report)
        else:
            rows = measure.bench_folder(model or "", setup, schedule or (), report=report)
        what = f"{dtype}, guidance {rows[0].guidance_scale}"
    typer.echo(
        f"{rows[0].model}: {what} on {rows[0].device}, {rows[0].threads} threads, medians of {repetitions} after "
        f"{warmups + 1} warm-ups; seconds for a batch, and the least that reading and arithmetic take"
    )
    typer.echo(reports.table(rows))
    if tokenizer is None:
        for line in reports.compare(rows):
            typer.echo(line)
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(row) for row in rows])
    if plot_file is not None:
        atomically(plot_file, lambda path: reports.plot(rows, path))
