"""Reports as Markdown tables: a number a row, the same number of other pictures beside it.

Knows how a report is laid out: numbers at its top, their intervals, other rows of numbers below; not what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Keys of a report that hold numbers of something else, and what their columns are called.
_BESIDE = {
    "refined": "refined",
    "scales": "scale {}",
    "baselines": "{}",
    "at_floor_counts": "at the floor's counts",
    "floor": "floor: real",
    "calibration": "real, {}",
    "real": "real, {}",
}


def metric_names(report: Mapping[str, Any]) -> list[str]:
    """Which of a report's keys are metrics."""
    return [name for name, value in report.items() if isinstance(value, float)]


def as_table(report: Mapping[str, Any], value: str = "fake", names: Mapping[str, str] | None = None) -> str:
    """Lay a report out: a metric a row; `value` is what its own column is called, `names` what rows are called."""
    beside = list(_beside(report))
    intervals = report.get("interval", {})
    columns = [value, *(["95 %"] if intervals else []), *(title for title, _ in beside)]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in metric_names(report):
        cells = [_cell(report[name])]
        if intervals:
            cells.append(" to ".join(map(_cell, intervals.get(name, ()))))
        cells += [_cell(numbers[name]) if name in numbers else "" for _, numbers in beside]
        mark = " (primary)" if name == report.get("primary") else ""
        lines.append(f"| {(names or {}).get(name, name)}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, title in _BESIDE.items():
        found = report.get(key, {})
        if "{}" in title:
            yield from ((title.format(name), numbers) for name, numbers in found.items())
        elif found:
            yield title, found


def _cell(number: float) -> str:
    return f"{number:.5g}"
