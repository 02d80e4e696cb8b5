"""Figures of a study: learning curves, and quality against latency. Knows results; does not know how they were made."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nar.storage.files import atomically
from nar.study.plan import kind_of
from nar.study.tables import Result


def write_figures(folder: Path, result: Result) -> list[Path]:
    """Write what there is to plot; returns the paths. Nothing without matplotlib, the extra `plot`."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    return [path for make in (curves, quality) if (path := make(result, folder)) is not None]


def curves(result: Result, folder: Path) -> Path | None:
    """Plot held-out bits over the pictures learned from: the mean of an arm's seeds, and from the least to the most."""
    from matplotlib.figure import Figure

    logs = {arm: [log.facts.get("curve") or [] for log in found] for arm, found in result.logs.items()}
    logs = {arm: found for arm, found in logs.items() if all(found) and not result.study.all_arms[arm].of}
    if not logs:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm, found in logs.items():
        length = min(map(len, found))
        values = np.array([[bits for _, bits in curve[:length]] for curve in found])
        images = [seen for seen, _ in found[0][:length]]
        (line,) = axes.plot(images, values.mean(0), marker=".", label=arm)
        axes.fill_between(images, values.min(0), values.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="pictures learned from", ylabel="held-out bits per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(figure, folder / "curves.png")


def quality(result: Result, folder: Path) -> Path | None:
    """Plot the Frechet distance, or bits per token, over latency, with their intervals over seeds."""
    from matplotlib.figure import Figure

    known = [found for found in result.arms.values() if "latency_seconds" in found]
    names = ["FD", *(name for found in known[:1] for name in found if kind_of(name) == "bits_per_token")]
    metric = next((name for name in names if all(name in found for found in known)), None)
    if not known or metric is None:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm, found in result.arms.items():
        if "latency_seconds" not in found:
            continue
        each, latency = found[metric], found["latency_seconds"].mean
        low, high = each.interval or (each.mean, each.mean)
        error = [[max(0.0, each.mean - low)], [max(0.0, high - each.mean)]]
        axes.errorbar([latency], [each.mean], yerr=error, marker="o", capsize=3, linestyle="", label=arm)
    axes.set(xscale="log", xlabel="seconds, smallest batch", ylabel=metric.replace("_", " "))
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _saved(figure, folder / "quality.png")


def _saved(figure: Any, path: Path) -> Path:
    atomically(path, partial(figure.savefig, dpi=120))
    return path
