"""Rows of measurements, as a table, a comparison, and a plot. Does not know how they were measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PLOTS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Row:
    """One measurement of a model or a tokenizer at a batch size. Times are medians for the whole batch.

    What is not measured, or not of this operation, is None.

    Attributes:
        model: the name it was asked for by.
        operation: "sample" of a model; of a tokenizer "encode" (pictures or clips to codes) or "decode" (back).
        clock: "wall", or "cpu" for processor time.
        latency_shortest_seconds, latency_longest_seconds: of the repetitions.
        latency_with_pixels_seconds: tokens and the pixel decoder.
        peak_memory_bytes: of the process (on a GPU: allocated there) while the row ran.
        reading_floor_seconds: reading the weights once a step.
        arithmetic_floor_seconds: the multiplications.
        floor_fraction: the larger floor over the latency.
        weights_per_step: matrix weights that one step reads.
        guidance_interval: tokens after which guidance ended; None is the whole sample.
        layout: of convolutions' weights, "contiguous" or "channels_last".
        change: against float32 of the contiguous layout: of codes, the share that differs; of pixels, the mean absolute
            difference in units of 1/255.
        fastest: whether it is that among the rows of its operation and batch size.
        size: of pictures (H, W) or clips (T, H, W).
    """

    model: str
    operation: str
    batch_size: int
    latency_seconds: float
    images_per_second: float
    dtype: str
    device: str
    threads: int
    warmups: int
    repetitions: int
    schedule: str | None = None
    clock: str = "wall"
    steps: float | None = None
    latency_shortest_seconds: float | None = None
    latency_longest_seconds: float | None = None
    latency_with_pixels_seconds: float | None = None
    images_per_second_with_pixels: float | None = None
    peak_memory_bytes: int | None = None
    reading_floor_seconds: float | None = None
    arithmetic_floor_seconds: float | None = None
    floor_fraction: float | None = None
    weights_per_step: int | None = None
    compiled: bool | None = None
    guidance_scale: float | None = None
    guidance_interval: int | None = None
    layout: str | None = None
    change: float | None = None
    fastest: bool | None = None
    size: tuple[int, ...] | None = None


def compare(rows: Sequence[Row]) -> list[str]:
    """For each batch size, how much faster the schedule of the fewest steps is, beside what its steps promise.

    The promise is the ratio of weights read, steps times weights a step: extra blocks and heads count.
    """
    lines = []
    for batch in sorted({row.batch_size for row in rows}):
        same = [row for row in rows if row.batch_size == batch]
        best = min(same, key=lambda row: row.steps or 0)
        for row in [row for row in same if row is not best]:
            ratio = row.latency_seconds / best.latency_seconds
            steps = (row.steps or 0) / (best.steps or 1)
            promised = steps * (row.weights_per_step or 0) / (best.weights_per_step or 1)
            lines.append(
                f"batch {batch}: {best.schedule} is {ratio:.2f} times as fast as {row.schedule}; ratio of steps "
                f"{steps:.2f}, with its extra blocks {promised:.2f}, of which {ratio / promised:.0%} is reached"
            )
    return lines


def _change(row: Row) -> str:
    if row.change is None:
        return ""
    return f"{row.change:.2%} of codes" if row.operation == "encode" else f"{row.change:.2f} of 255"


# Heads and cells; a column that is empty in every row is left out.
_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("operation", lambda row: "" if row.operation == "sample" else row.operation),
    ("schedule", lambda row: row.schedule or ""),
    ("steps", lambda row: "" if row.steps is None else f"{row.steps:g}"),
    ("batch", lambda row: str(row.batch_size)),
    ("dtype", lambda row: row.dtype if row.layout else ""),
    ("layout", lambda row: row.layout or ""),
    ("seconds", lambda row: f"{row.latency_seconds:.3f}"),
    ("per s", lambda row: f"{row.images_per_second:.2f}"),
    ("with pixels", lambda row: _number(row.latency_with_pixels_seconds, ".3f")),
    ("per s", lambda row: _number(row.images_per_second_with_pixels, ".2f")),
    ("memory", lambda row: "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e9:.2f} GB"),
    ("reading", lambda row: _number(row.reading_floor_seconds, ".3f")),
    ("arithmetic", lambda row: _number(row.arithmetic_floor_seconds, ".3f")),
    ("reached", lambda row: _number(row.floor_fraction, ".0%")),
    ("change", _change),
    ("", lambda row: "*" if row.fastest else ""),
)


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, aligned; a star marks the fastest of each operation and batch size of a tokenizer."""
    rows = sorted(rows, key=lambda row: (row.operation, row.batch_size if row.layout else 0))
    columns = [(head, *(cell(row) for row in rows)) for head, cell in _COLUMNS]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    )


def check_plot(path: Path) -> None:
    """Raise where `plot` could not write, before the work: ValueError its ending, ImportError without matplotlib."""
    if path.suffix not in PLOTS:
        raise ValueError(f"--plot {path} must end in {', '.join(PLOTS[:-1])} or {PLOTS[-1]}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'nar-gen[plot]'")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot latency, memory and throughput over batch sizes, one line a schedule, as in the paper's figure 5."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("seconds for a batch", lambda row: row.latency_seconds),
        ("peak memory, GB", lambda row: row.peak_memory_bytes and row.peak_memory_bytes / 1e9),
        ("pictures per second", lambda row: row.images_per_second),
    ]
    panels = [panel for panel in panels if all(panel[1](row) is not None for row in rows)]
    batches = sorted({row.batch_size for row in rows})
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for schedule in dict.fromkeys(row.schedule for row in rows):
            own = sorted((row for row in rows if row.schedule == schedule), key=lambda row: row.batch_size)
            axes.plot([row.batch_size for row in own], [value(row) for row in own], marker="o", label=schedule)
        axes.set_xscale("log")
        axes.set_xticks(batches, labels=[str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set(title=title, xlabel="batch size")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path)
