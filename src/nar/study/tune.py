"""Guidance and temperature of one model: chosen on one half of real samples, reported on the other.

Knows curves of guidance and how they are searched; does not know how samples are scored (`judge`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nar import __version__
from nar.evaluation.sets import made_by, trained_on
from nar.model import Transformer
from nar.pipeline import Pipeline
from nar.progress import Progress
from nar.sampling import LARGEST_GUIDANCE, Sampling
from nar.storage.fields import checked, suggestion
from nar.storage.files import write_json
from nar.storage.folder import BUNDLED, CONFIG, find_model, read_config
from nar.study.judge import SCORES, golden_section, halves
from nar.study.plan import Judging

TEMPERATURES = (0.7, 1.1)  # times the model's own
OFF, OWN = "no guidance", "the model's own"


@dataclass(frozen=True)
class Family:
    """Settings of guidance that differ in one number, the strength: the mean guidance scale of a token.

    Families are searched over the same strengths: a curve that rises late needs a far larger scale at its end.
    """

    curve: str = "constant"
    power: float = 1.0
    first_half: bool = False

    @property
    def name(self) -> str:
        """Of the table, and of options."""
        power = f"-{self.power:g}" if self.power != 1 else ""
        return f"{self.curve}{power}{'-half' if self.first_half else ''}"

    def sampling(self, own: Sampling, model: Transformer, strength: float) -> Sampling:
        """`own` with this family's guidance at a strength, as far as scales go."""
        schedule, end = model.layout.schedule, model.layout.schedule.num_positions // 2 if self.first_half else None
        guided = {"guidance_curve": self.curve, "guidance_power": self.power, "guidance_interval": end}
        unit = dataclasses.replace(own, guidance_scale=2.0, **guided)  # type: ignore[arg-type]
        before = [schedule.front(front).start for front in range(schedule.num_steps)]
        shares = [
            count * (unit.guidance_at(front, schedule) - 1) if front == 0 or end is None or start <= end else 0.0
            for front, (start, count) in enumerate(zip(before, schedule.fronts, strict=True))
        ]
        mean = sum(shares) / schedule.num_positions
        scale = 1 + (strength - 1) / mean if mean else 1.0
        return dataclasses.replace(unit, guidance_scale=round(min(max(scale, 0.0), LARGEST_GUIDANCE), 4))


_CURVES = [("constant", 1.0), ("linear-tokens", 1.0), *(("cosine-tokens", power) for power in (1.0, 1.5, 2.0, 2.75))]
# Steeper curves that end half way hardly guide: cosine-tokens-2.75 would need a scale of 1,000 for a mean of 3.8.
FAMILIES = [Family(*curve) for curve in _CURVES] + [Family(*curve, True) for curve in _CURVES[:3]]


def chosen_families(names: Sequence[str]) -> list[Family]:
    """Families by their names, all of them for none."""
    known = {family.name: family for family in FAMILIES}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"no family {wrong[0]!r}{suggestion(wrong[0], known)}; there are {', '.join(known)}")
    return [known[name] for name in names] or FAMILIES


def own_folder(model: str) -> Path:
    """The folder of a model whose settings may be changed; raises ValueError for what comes with the package or from
    the hub."""
    folder = find_model(model)
    if folder.is_relative_to(BUNDLED) or not Path(model).expanduser().is_dir():
        raise ValueError(f"{model} is not a folder of yours: save it as one (save_pretrained), or leave --write out")
    return folder


@checked
def tune(
    model: str,
    real: str,
    how: Judging,
    families: Sequence[Family] = FAMILIES,
    metric: str = "KID",
    *,
    device: Any = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Search the best strength of each family, then the temperature beside the best one; returns the report.

    Searched on the first half: `how.tuning_steps` values of `how.guidance`, each judged by `metric` of
    `how.tuning_number` samples, with the same random numbers and conditions. Reported are `how.num_sampled` samples,
    against the second half. A model without a null condition has its temperature searched alone. Features of real
    samples are kept in the folder `cache`.

    Raises:
        ValueError: a metric that is not computed, or real samples that the model can't be compared with.
    """
    if metric not in SCORES[:2]:
        raise ValueError(f"metric {metric!r} must be one of {', '.join(SCORES[:2])}")
    folder = find_model(model)
    pipe = Pipeline.from_pretrained(folder, device=device)
    own, config = pipe.sampling, pipe.model.config
    first, second = halves(pipe, [trained_on(folder)], real, how, cache)
    families = families if config.text_dim or (config.num_classes and config.null_class) else ()
    rows: list[dict[str, Any]] = []
    with Progress("tuning", (len(families) + 1) * (how.tuning_steps + 1) + 4, "settings") as bar:

        def measured(sampling: Sampling) -> float:
            found = first.scores(sampling, how.tuning_number, resamplings=0)[0][metric]
            bar.update()
            return found

        def add(name: str, sampling: Sampling, tuned_on: float, tried: Sequence[tuple[float, float]] = ()) -> None:
            found, intervals = second.scores(sampling, how.num_sampled)
            scored = {name: found[name] for name in SCORES if name in found}
            ends = {name: intervals[name] for name in scored if name in intervals}
            row = {"name": name, "sampling": dataclasses.asdict(sampling), "tuned_on": tuned_on, "tried": list(tried)}
            rows.append(row | {"metrics": scored, "interval": ends})
            bar.update()

        def search(name: str, make: Callable[[float], Sampling], low: float, high: float) -> None:
            best, tried = golden_section(lambda value: measured(make(value)), low, high, how.tuning_steps)
            add(name, make(best), min(value for _, value in tried), tried)

        for name, sampling in {OFF: dataclasses.replace(own, guidance_scale=1.0), OWN: own}.items():
            add(name, sampling, measured(sampling))
        for family in families:
            search(family.name, partial(family.sampling, own, pipe.model), how.guidance[0], how.guidance[1])
        best = min(rows, key=lambda row: row["tuned_on"])
        if own.temperature:
            ends = [own.temperature * times for times in TEMPERATURES]
            settings = best["sampling"]
            search(f"{best['name']}, temperature", lambda value: Sampling(**{**settings, "temperature": value}), *ends)
            best = min(rows, key=lambda row: row["tuned_on"])
    facts = {"model": model, "real": real, "metric": metric, "num_real": len(second.heldout), "version": __version__}
    facts |= {"judging": dataclasses.asdict(how), **made_by(folder)}
    return {"chosen": best["sampling"], "name": best["name"], "rows": rows, "settings": facts}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a family a row."""
    metric, rows = report["settings"]["metric"], report["rows"]
    scored = list(rows[0]["metrics"])
    lines = [
        f"| | scale | temperature | {metric}, tuned on | {' | '.join(scored)} |",
        "|---|" + "---|" * (3 + len(scored)),
    ]
    for row in rows:
        cells = []
        for name in scored:
            low, high = row["interval"].get(name, (None, None))
            cells.append(f"{row['metrics'][name]:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]"))
        mark = " **chosen**" if row["name"] == report["name"] else ""
        settings = row["sampling"]
        numbers = [f"{settings['guidance_scale']:.4g}", f"{settings['temperature']:.4g}", f"{row['tuned_on']:.4g}"]
        lines.append(f"| {row['name']}{mark} | {' | '.join([*numbers, *cells])} |")
    return "\n".join(lines)


def write_defaults(folder: Path, report: dict[str, Any]) -> None:
    """Make the chosen settings those of the model, in its `config.json`."""
    write_json(folder / CONFIG, read_config(folder) | {"sampling": report["chosen"]}, indent=2)
