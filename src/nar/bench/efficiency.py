"""The paper's comparison of efficiency (figure 6): latency, memory and throughput of models over batch sizes.

Knows which models stand beside which, what they compute by arithmetic, and what the paper states of them; times and
memory come from `nar.bench`, each from a process of its own. Does not know options.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nar.bench import IMAGE_GUIDANCE, WEIGHT_BYTES, Setup, bench_preset, device_name, work
from nar.bench.report import Row
from nar.model import ModelConfig, Transformer
from nar.sampling import Sampling, last_guided
from nar.storage.fields import from_dict
from nar.storage.folder import without_weights
from nar.storage.presets import find

_SETTINGS = ("dtype", "compiled", "guidance_interval", "clock", "warmups", "repetitions")  # of a setup and its rows
CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2}  # of a key's number, beside weights of a format


class Stated(NamedTuple):
    """What the paper states of a model (arXiv 2503.10696, tables 1 and figure 6, ImageNet 256x256, one A100)."""

    fid: float
    images_per_second: float
    """At the largest batch that fits."""
    batch_256_seconds: float | None = None


PAPER = {
    "NAR-B": Stated(4.65, 420),
    "NAR-M": Stated(3.27, 249, 1.13),
    "NAR-L": Stated(3.06, 195),
    "NAR-XL": Stated(2.70, 98),
    "NAR-XXL": Stated(2.58, 57),
    "LlamaGen-B": Stated(5.46, 118),
    "LlamaGen-L": Stated(3.80, 47),
    "LlamaGen-XL": Stated(3.39, 24),
    "LlamaGen-XXL": Stated(3.09, 14),
    "PAR-B-4x": Stated(6.21, 174),
    "PAR-L-4x": Stated(4.32, 94),
    "PAR-XL-4x": Stated(3.50, 54),
    "PAR-XXL-4x": Stated(3.20, 34),
    "VAR-d16": Stated(3.30, 129, 2.02),
    "VAR-d20": Stated(2.57, 78),
    "VAR-d24": Stated(2.09, 51),
    "VAR-d30": Stated(1.92, 30),
}


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What sampling one picture takes on any machine, guidance included.

    Attributes:
        operations: two for each multiplication, of all matrix products and of attention.
        cache_bytes: keys and values of both halves.
        read_bytes: weights that a generation reads, every matrix once a step. A batch shares them.
        weight_bytes: of the model's matrices.
    """

    model: str
    steps: int
    operations: int
    cache_bytes: int
    read_bytes: int
    weight_bytes: int


class Comparison(NamedTuple):
    """What was measured, and what stands beside it."""

    rows: list[Row]
    arithmetic: list[Arithmetic]

    def as_json(self, rows: Sequence[Row] | None = None) -> dict[str, Any]:
        """All of it as plain values, the paper's numbers too; with `rows` these in place of its own."""
        return {
            "rows": [dataclasses.asdict(row) for row in (self.rows if rows is None else rows)],
            "arithmetic": [dataclasses.asdict(each) for each in self.arithmetic],
            "paper": {each.model: PAPER[each.model]._asdict() for each in self.arithmetic if each.model in PAPER},
        }


def known_rows(path: Path) -> list[Row]:
    """The rows of a comparison in a file, none where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [from_dict(Row, row, path) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no comparison of efficiency ({error}); move it away") from error


def rivals(name: str) -> list[str]:
    """The model of the nearest FID in the paper, of each other family; none for what the paper does not have."""
    if name not in PAPER:
        return []
    families: dict[str, list[str]] = {}
    for other in PAPER:
        families.setdefault(other.split("-")[0], []).append(other)
    others = [family for family in families if family != name.split("-")[0]]
    return [min(families[family], key=lambda other: abs(PAPER[other].fid - PAPER[name].fid)) for family in others]


def preset_of(name: str) -> tuple[str, str]:
    """The preset and the schedule that a name stands for: PAR-B-4x is LlamaGen-B with four regions.

    Raises:
        ValueError: no such model.
    """
    if name.startswith("PAR-") and name.endswith("-4x"):
        preset, schedule = f"LlamaGen-{name[4:-3]}", "par"
        find(preset)
        return preset, schedule
    config = ModelConfig(**find(name).config)
    if len(config.grid) == 3:
        raise ValueError(f"the paper's figure 6 is about pictures; {name} is a model of clips")
    return name, config.schedule


def arithmetic(
    name: str,
    guidance_scale: float = IMAGE_GUIDANCE,
    dtype: str = "float32",
    *,
    guidance_interval: int | None = None,
) -> Arithmetic:
    """What a model computes and reads for one picture."""
    from nar.bench import with_schedule

    preset, schedule = preset_of(name)
    with without_weights():
        model = Transformer(with_schedule(ModelConfig(**find(preset).config), schedule))
    sampling = Sampling(guidance_scale=guidance_scale, guidance_interval=guidance_interval)
    needed, layout = work(model, sampling), model.layout.schedule
    length = model.config.num_condition + layout.fed(layout.num_steps - 1).start
    rows = 1 if last_guided(sampling, layout) < 0 else 2
    numbers = 2 * rows * model.config.num_blocks * length * model.config.dim
    read = layout.num_steps * needed.weights_per_step + needed.weights_once
    size = WEIGHT_BYTES[dtype]
    return Arithmetic(
        name,
        layout.num_steps,
        2 * needed.products,
        numbers * CACHE_BYTES[dtype],
        read * size,
        (needed.weights_per_step + needed.weights_once) * size,
    )


def compare(
    names: Sequence[str], setup: Setup, known: Iterable[Row] = (), *, report: Callable[[Row], None] | None = None
) -> Comparison:
    """Measure every model at every batch size of `setup`, each in a process of its own, so that memory is its own.

    What is in `known` with the same settings, on the same device, is not measured again; other rows are left out.
    Models of a name that is no preset's are refused before the first is measured.
    """
    if setup.dtype not in WEIGHT_BYTES:
        raise ValueError(f"models are compared in one format, not {setup.dtype}: give one of {', '.join(WEIGHT_BYTES)}")
    scale = IMAGE_GUIDANCE if setup.guidance_scale is None else setup.guidance_scale
    facts = [arithmetic(name, scale, setup.dtype, guidance_interval=setup.guidance_interval) for name in names]
    threads, device = torch.get_num_threads(), device_name(torch.device(setup.device))
    settings = {name: getattr(setup, name) for name in _SETTINGS} | {"guidance_scale": scale}
    settings |= {"threads": threads, "device": device}
    rows = [row for row in known if all(getattr(row, name) == value for name, value in settings.items())]
    done = {(row.model, row.batch_size) for row in rows}
    for batch in sorted(setup.batch_sizes):
        for name in names:
            if (name, batch) in done:
                continue
            alone = dataclasses.replace(setup, batch_sizes=(batch,), guidance_scale=scale, pixels=False)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                rows.append(process.submit(_measured, name, alone, threads).result())
            if report is not None:
                report(rows[-1])
    return Comparison([row for row in rows if row.model in names and row.batch_size in setup.batch_sizes], facts)


def _measured(name: str, setup: Setup, threads: int) -> Row:
    """The row of one model at one batch size, in this process."""
    torch.set_num_threads(threads)
    preset, schedule = preset_of(name)
    (row,) = bench_preset(preset, setup, (schedule,))
    return dataclasses.replace(row, model=name)


def table(comparison: Comparison) -> str:
    """The arithmetic of every model, and its times, as text."""
    lines = []
    for facts in comparison.arithmetic:
        stated = PAPER.get(facts.model)
        paper = "" if stated is None else f"; paper: FID {stated.fid}, {stated.images_per_second:g} pictures/s (A100)"
        lines.append(
            f"{facts.model}: {facts.steps} steps, {facts.operations / 1e9:.0f} GFLOP, cache "
            f"{facts.cache_bytes / 1e6:.0f} MB a picture, {facts.read_bytes / 1e9:.1f} GB of weights read{paper}"
        )
        for row in (row for row in comparison.rows if row.model == facts.model):
            lines.append(
                f"  batch {row.batch_size:>3}: {row.latency_seconds:.3f} s ({row.latency_shortest_seconds:.3f} to "
                f"{row.latency_longest_seconds:.3f}), {row.images_per_second:.2f} pictures/s"
                + ("" if row.peak_memory_bytes is None else f", {row.peak_memory_bytes / 1e9:.2f} GB")
            )
    return "\n".join(lines)


def plot(comparison: Comparison, path: Path) -> None:
    """Plot figure 6: above what was measured over batch sizes, below what is arithmetic; log axes, error bars are the
    shortest and longest repetition, hollow marks the paper's own points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    above, below = figure.subplots(2, 3)
    names = [facts.model for facts in comparison.arithmetic]
    batches = sorted({row.batch_size for row in comparison.rows})
    for number, facts in enumerate(comparison.arithmetic):
        paper, colour = PAPER.get(facts.model), f"C{number}"
        label = facts.model if paper is None else f"{facts.model} (FID {paper.fid})"
        own = sorted((row for row in comparison.rows if row.model == facts.model), key=lambda row: row.batch_size)
        sizes = [row.batch_size for row in own]
        seconds = [row.latency_seconds for row in own]
        shortest = [row.latency_shortest_seconds or row.latency_seconds for row in own]
        longest = [row.latency_longest_seconds or row.latency_seconds for row in own]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3, "label": label}
        low = [middle - least for middle, least in zip(seconds, shortest, strict=True)]
        high = [most - middle for middle, most in zip(seconds, longest, strict=True)]
        above[0].errorbar(sizes, seconds, yerr=(low, high), **style)
        memory = [math.nan if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e9 for row in own]
        above[1].plot(sizes, memory, color=colour, marker="o", markersize=4)
        least_bytes = [(facts.weight_bytes + size * facts.cache_bytes) / 1e9 for size in sizes]
        above[1].plot(sizes, least_bytes, color=colour, linestyle=":")
        rates = [row.images_per_second for row in own]
        slow = [rate - row.batch_size / most for rate, row, most in zip(rates, own, longest, strict=True)]
        fast = [row.batch_size / least - rate for rate, row, least in zip(rates, own, shortest, strict=True)]
        above[2].errorbar(sizes, rates, yerr=(slow, fast), color=colour, marker="o", markersize=4, capsize=3)
        if paper is not None:
            hollow: dict[str, Any] = {"color": colour, "marker": "*", "markersize": 11, "fillstyle": "none"}
            if paper.batch_256_seconds is not None:
                above[0].plot([256], [paper.batch_256_seconds], linestyle="", **hollow)
            above[2].plot([256], [paper.images_per_second], linestyle="", **hollow)
    panels = (
        ("seconds for a batch", "measured; stars: the paper, A100, batch 256"),
        ("peak memory of the process, GB", "measured; dotted: weights and cache, arithmetic"),
        ("pictures per second", "measured; stars: the paper, A100, largest batch"),
    )
    stated = [PAPER[name] for name in names if name in PAPER]
    starred = any(each.batch_256_seconds is not None for each in stated), False, bool(stated)
    for axes, (quantity, title), has_stars in zip(above, panels, starred, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel=quantity)
        axes.set_title(title, fontsize=9)
        ticks = sorted({*batches, *([256] if has_stars else [])})
        axes.set_xticks(ticks, labels=[str(size) for size in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    bars = (
        ("GFLOP a picture", [facts.operations / 1e9 for facts in comparison.arithmetic]),
        ("cache, MB a picture", [facts.cache_bytes / 1e6 for facts in comparison.arithmetic]),
        ("GB of weights read a batch", [facts.read_bytes / 1e9 for facts in comparison.arithmetic]),
    )
    for axes, (quantity, values) in zip(below, bars, strict=True):
        drawn = axes.bar(names, values, color=[f"C{number}" for number in range(len(names))])
        axes.bar_label(drawn, fmt="%.3g", fontsize=8)
        axes.set(yscale="log", ylabel=quantity, ylim=(min(values) / 3, max(values) * 2))
        axes.set_title("arithmetic", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
    for axes in (*above, *below):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    above[0].legend(fontsize=8)
    if comparison.rows:
        row = comparison.rows[0]
        setup = f"{row.dtype}, guidance {row.guidance_scale:g}, {row.device}, threads: {row.threads}"
        figure.suptitle(setup, fontsize=10)
    figure.savefig(path, dpi=150)
