"""What was measured in a study as one result: means, intervals, differences from the baseline, and what was expected.

Made of the logs alone, so that every table can be made again. Knows logs and arms; does not know models or trainings.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nar.data.source import some
from nar.storage.arrays import read_arrays
from nar.storage.fields import from_dict
from nar.storage.files import read_json, write_json, write_text
from nar.study.judge import Judged
from nar.study.plan import STUDY, Kept, Prediction, Study, kind_of, title
from nar.study.statistics import Estimate, difference, estimate, holm

_EXACT = ("steps", "num_images", "num_parameters", "training_flops")  # the same for all seeds
_BY_PICTURE = ("bits_per_token", "independence_cost")
_TESTED = ("bits_per_token", "FD", "KID", "precision", "recall", "coverage")
HELD, OPEN, FAILED = "held", "not shown", "failed"


@dataclass(frozen=True)
class Result:
    """A study's numbers.

    Attributes:
        study: what was asked.
        arms: estimates by arm and metric.
        differences: from the baseline, by arm and metric, each with its p-value after correction over the arms.
        logs: of each arm, one a seed.
    """

    study: Study
    arms: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, tuple[Estimate, float | None]]]
    logs: dict[str, list[Judged]]

    def held(self, prediction: Prediction) -> tuple[str, Estimate | None]:
        """Whether a prediction held, and by how much its left side is larger: shown only where the interval is on one
        side."""
        if prediction.metric not in self.arms.get(prediction.arm, {}):
            return OPEN, None
        logs, margin = self.logs[prediction.arm], prediction.margin
        if isinstance(prediction.other, str):
            if prediction.metric not in self.arms.get(prediction.other, {}):
                return OPEN, None
            found = _difference(logs, self.logs[prediction.other], prediction.metric)
        else:
            found, margin = self.arms[prediction.arm][prediction.metric], margin + prediction.other
        if found.interval is None and prediction.metric not in _EXACT:
            return OPEN, found  # one seed
        low, high = found.interval or (found.mean, found.mean)
        low, high = (low - margin, high - margin) if prediction.below else (margin - high, margin - low)
        missed = low >= 0 if prediction.metric in _EXACT else low > 0
        return HELD if high < 0 else FAILED if missed else OPEN, found


def read_result(folder: Path) -> Result:
    """The result of a study's folder, by its logs."""
    study = from_dict(Kept, read_json(folder / STUDY), folder / STUDY)
    logs: dict[str, list[Judged]] = {}
    stale = []
    for arm in study.all_arms:
        for seed in study.seeds:
            path = folder / "logs" / f"{arm}-{seed}.json"
            if path.is_file():
                facts = _read_log(path)
                by_picture = [name for name in facts["metrics"] if kind_of(name) in _BY_PICTURE]
                log = Judged(facts, _read_pictures(path.with_suffix(".npz"), by_picture))
                if study.digests and log.facts.get("digest", study.digests[0]) not in study.digests:
                    stale.append(path.stem)
                else:
                    logs.setdefault(arm, []).append(log)
    if stale:
        warnings.warn(
            f"{some(stale)} in {folder / 'logs'} are of the study before it was changed, and are left out; run the "
            f"study again: nar compare STUDY.yaml run={folder}",
            stacklevel=2,
        )
    if not logs:
        raise ValueError(f"{folder} has no logs yet; run the study: nar compare STUDY.yaml run={folder}")
    return result(study, logs)


def _read_log(path: Path) -> dict[str, Any]:
    """What a log says; raises ValueError where what tables and figures show of it are no numbers."""
    facts: dict[str, Any] = read_json(path)
    try:
        pairs = [*facts["interval"].values(), *(facts.get("curve") or ())]
        numbers = [*_metrics(facts).values(), facts["seed"], *(number for low, high in pairs for number in (low, high))]
        wrong = [number for number in numbers if isinstance(number, bool) or not isinstance(number, int | float)]
        if wrong:
            raise TypeError(f"{str(wrong[0])[:40]!r} is no number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and run the study again") from error
    return facts


def _read_pictures(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The numbers of every picture, where they are kept; raises ValueError for what are none."""
    arrays = read_arrays(path, names) if path.is_file() else {}
    for name, values in arrays.items():
        if values.dtype.kind != "f" or values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            found = f"{name} is {values.dtype} {values.shape}, and must be a finite number for each picture"
            raise ValueError(f"{path} is damaged ({found}); delete it and the log beside it, and run the study again")
    return arrays


def result(study: Study, logs: dict[str, list[Judged]]) -> Result:
    """Everything that the logs say."""
    arms = {arm: _estimates(found) for arm, found in logs.items()}
    baseline = next(iter(logs))
    differences: dict[str, dict[str, tuple[Estimate, float | None]]] = {arm: {} for arm in logs if arm != baseline}
    metrics = dict.fromkeys(name for found in arms.values() for name in found if kind_of(name) in _TESTED)
    for metric in metrics:
        found = {
            arm: _difference(logs[arm], logs[baseline], metric)
            for arm in differences
            if metric in arms[arm] and metric in arms[baseline]
        }
        corrected = iter(holm([each.p for each in found.values() if each.p is not None]))
        for arm, each in found.items():
            differences[arm][metric] = each, None if each.p is None else next(corrected)
    return Result(study, arms, differences, logs)


def write_tables(folder: Path, result: Result) -> list[Path]:
    """Write the tables of a result as Markdown, LaTeX, CSV and JSON; returns their paths."""
    write_text(folder / "table.md", markdown(result))
    write_text(folder / "table.tex", latex(result))
    write_text(folder / "table.csv", as_csv(result))
    write_json(folder / "table.json", as_json(result))
    return [folder / f"table.{ending}" for ending in ("md", "tex", "csv", "json")]


def markdown(result: Result) -> str:
    """The question, a table of all arms, differences from the baseline, and the predictions."""
    study, arms = result.study, list(result.arms)
    fewest, seeds = _num_seeds(result)
    lines = [f"**{study.question}**\n"] if study.question else []
    said = f"Means of {seeds} seeds; in brackets the 95 % interval over seeds (Student's t)"
    if fewest < seeds:
        said = said.replace("of", f"of {fewest} to", 1) + ", of one seed over pictures"
    said = said if seeds > 1 else "One seed; in brackets the 95 % interval over pictures, which says nothing of seeds"
    lines += [f"{said}.\n", f"| | {' | '.join(arms)} |", "|---|" + "---|" * len(arms)]
    lines += [f"| {head} | {' | '.join(cells)} |" for head, cells in _rows(result)]
    if result.differences:
        head = f"difference from {next(iter(result.arms))}"
        columns = ["arm", "metric", head, "95 % over seeds", "95 % over pictures", "p, corrected over arms (Holm)"]
        lines += ["", f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
        for arm, found in result.differences.items():
            for metric, (each, p) in found.items():
                cells = [_ends(each.seeds), _ends(each.pictures), "" if p is None else f"{p:.3g}"]
                mean = _mean(each, "+.4g", seeds)
                lines.append(f"| {arm} | {title(metric)} | {mean} | {' | '.join(cells)} |")
    if study.predictions:
        lines += ["", "| expected before it ran | | found |", "|---|---|---|"]
        for prediction in study.predictions:
            answer, found_by = result.held(prediction)
            what = "difference " if isinstance(prediction.other, str) else ""
            found_text = "" if found_by is None else f"{what}{_mean(found_by, '.4g', seeds)} {_ends(found_by.interval)}"
            lines.append(f"| {prediction.text} | **{answer}** | {found_text} |")
    return "\n".join(lines) + "\n"


def latex(result: Result) -> str:
    """The table of all arms for LaTeX."""
    lines = [f"\\begin{{tabular}}{{l{'r' * len(result.arms)}}}", "\\hline"]
    lines += [" & ".join(["", *map(_escaped, result.arms)]) + r" \\ \hline"]
    lines += [" & ".join([_escaped(head), *map(_escaped, cells)]) + r" \\" for head, cells in _rows(result)]
    return "\n".join([*lines, "\\hline", "\\end{tabular}", ""])


def as_csv(result: Result) -> str:
    """Every estimate in a line of its own."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ["seeds_low", "seeds_high", "pictures_low", "pictures_high", "p", "p_holm", "num_seeds"]
    writer.writerow(["arm", "metric", "difference_from", "mean", *names])
    baseline = next(iter(result.arms))
    for arm, found in result.arms.items():
        rows = ([arm, metric, "", *_numbers(each)[:5], "", "", each.num_seeds] for metric, each in found.items())
        writer.writerows(rows)
    for arm, differences in result.differences.items():
        found_by = differences.items()
        writer.writerows([arm, name, baseline, *_numbers(each), p, each.num_seeds] for name, (each, p) in found_by)
    return file.getvalue()


def as_json(result: Result) -> dict[str, Any]:
    """Everything, as plain data."""
    plain = dataclasses.asdict
    arms = {arm: {name: plain(each) for name, each in found.items()} for arm, found in result.arms.items()}
    differences = {
        arm: {name: plain(each) | {"p_holm": p} for name, (each, p) in found.items()}
        for arm, found in result.differences.items()
    }
    expected = [(one, *result.held(one)) for one in result.study.predictions]
    predictions = [
        {"text": one.text, "answer": answer, "found": None if found is None else plain(found)}
        for one, answer, found in expected
    ]
    return {"study": plain(result.study), "arms": arms, "differences": differences, "expect": predictions}


def _estimates(logs: Sequence[Judged]) -> dict[str, Estimate]:
    """Of every metric that all seeds of an arm have."""
    facts = [_metrics(log.facts) for log in logs]
    found = {}
    for name in [name for name in facts[0] if all(name in each for each in facts)]:
        each = estimate([metrics[name] for metrics in facts], _pictures(logs, name))
        ends = logs[0].facts["interval"].get(name) if len(logs) == 1 and each.pictures is None else None
        found[name] = dataclasses.replace(each, pictures=tuple(ends)) if ends else each
    return found


def _difference(logs: Sequence[Judged], baseline: Sequence[Judged], metric: str) -> Estimate:
    """A paired difference, of the seeds that both arms have."""
    seeds = [log.facts["seed"] for log in baseline]
    pairs = [(log, baseline[seeds.index(log.facts["seed"])]) for log in logs if log.facts["seed"] in seeds]
    if not pairs:
        raise ValueError(f"no seed is common to the arms that are compared: {[log.facts['seed'] for log in logs]}")
    left, right = zip(*pairs, strict=True)
    values = [[_metrics(log.facts)[metric] for log in logs] for logs in (left, right)]
    both = _pictures(left, metric), _pictures(right, metric)
    paired = both if both[0] is not None and both[1] is not None and both[0].shape == both[1].shape else None
    return difference(values[0], values[1], paired)  # type: ignore[arg-type]


def _metrics(facts: Mapping[str, Any]) -> dict[str, float]:
    further = {name: facts[name] for name in ("num_images", "training_flops", "num_parameters") if facts.get(name)}
    return {**facts["metrics"], "guidance_scale": facts["sampling"]["guidance_scale"], **further}


def _pictures(logs: Sequence[Judged], metric: str) -> np.ndarray | None:
    """Numbers of pictures (S, M), where all seeds have the same ones."""
    arrays = [log.pictures[metric] for log in logs if metric in log.pictures]
    if len(arrays) < len(logs) or len({len(array) for array in arrays}) != 1:
        return None
    return np.stack(arrays).astype(np.float64)


def _rows(result: Result) -> list[tuple[str, list[str]]]:
    metrics = list(dict.fromkeys(name for found in result.arms.values() for name in found))
    cells = {name: [_cell(name, found.get(name)) for found in result.arms.values()] for name in metrics}
    fewest, most = _num_seeds(result)
    counts = [("seeds", [str(len(logs)) for logs in result.logs.values()])] if fewest < most else []
    return counts + [(title(name), cells[name]) for name in metrics]


def _num_seeds(result: Result) -> tuple[int, int]:
    """How many seeds the arms have, at least and at most."""
    counts = [len(logs) for logs in result.logs.values()]
    return min(counts), max(counts)


def _mean(each: Estimate, style: str, most: int) -> str:
    """A mean, and of how many seeds it is where others are of more."""
    fewer = "" if each.num_seeds == most else f" ({each.num_seeds} seed{'s' * (each.num_seeds > 1)})"
    return f"{each.mean:{style}}{fewer}"


def _cell(name: str, each: Estimate | None) -> str:
    if each is None:
        return ""
    exact = name in (*_EXACT, "guidance_scale")
    shown = f"{each.mean:,.0f}" if name in ("num_images", "num_parameters") else f"{each.mean:.4g}"
    return shown if exact else f"{shown} {_ends(each.interval)}".strip()


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.4g}, {interval[1]:.4g}]"


def _numbers(each: Estimate) -> list[Any]:
    return [each.mean, *(each.seeds or ("", "")), *(each.pictures or ("", "")), "" if each.p is None else each.p]


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "%_&#$" else letter for letter in text)
