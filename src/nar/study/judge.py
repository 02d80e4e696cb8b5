"""One trained model of a study, judged: bits of every held-out picture, scores of what it samples, and its speed.

Held-out pictures are in two halves, the same for every model: guidance is chosen on the first, and what is reported is
of the second. Knows models and held-out pictures; does not know arms, budgets or tables.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nar import __version__
from nar.bench import Setup, bench_folder
from nar.data.source import Source
from nar.evaluation.likelihood import COUPLED_BYTES, HeldOut, Samples, held_out
from nar.evaluation.sets import BATCH, CLIP_BATCH, Sampled, made_by, trained_on
from nar.metrics.evaluate import evaluate
from nar.metrics.tables import metric_names
from nar.pipeline import Pipeline
from nar.sampling import Sampling
from nar.storage.folder import read_config
from nar.study.plan import Judging, training_flops
from nar.training.models import num_parameters

GOLDEN = (math.sqrt(5) - 1) / 2
LEAST, LEAST_COUPLED = 4, 8  # samples, two in each half; and four, which fitting a coupling takes
SCORES = ("FD", "KID", "precision", "recall", "coverage")  # of those that are computed, what a study reports


@dataclasses.dataclass
class Judged:
    """What was measured of one model.

    Attributes:
        facts: plain data: "metrics" by name, their intervals over pictures, the settings of sampling, its training.
        pictures: numbers of every picture of the second half, by metric.
    """

    facts: dict[str, Any]
    pictures: dict[str, np.ndarray]


def judge(
    folder: Path,
    real: str | Source,
    how: Judging,
    *,
    heads: str = "mean",
    sampling: dict[str, Any] | None = None,
    guidance_scale: float | None = None,
    cache: Path | None = None,
    trained: Sequence[dict[str, Any]] = (),
) -> Judged:
    """Judge a model; where `guidance_scale` is None it is chosen as `how` says.

    `trained` says what all models were trained on that are judged on the same pictures, the own one first.
    """
    pipe = Pipeline.from_pretrained(folder)
    if heads != "mean":
        pipe = pipe.with_heads(heads)
    first, second = halves(pipe, trained or [trained_on(folder)], real, how, cache)
    chosen, tried = dataclasses.replace(pipe.sampling, **sampling or {}), list[tuple[float, float]]()
    if guidance_scale is not None:
        chosen = dataclasses.replace(chosen, guidance_scale=guidance_scale)
    elif how.guidance and how.num_sampled:

        def distance(scale: float) -> float:
            guided = dataclasses.replace(chosen, guidance_scale=scale)
            return first.scores(guided, how.tuning_number, resamplings=0)[0]["FD"]

        scale, tried = golden_section(distance, how.guidance[0], how.guidance[1], how.tuning_steps)
        chosen = dataclasses.replace(chosen, guidance_scale=scale)
    given = f"_given_{second.count}" if second.count else ""  # bits after some frames are of fewer codes
    intervals, pictures = dict[str, Any](), {f"bits_per_token{given}": second.samples.bits(second.count)}
    if how.independence and second.samples.text_bytes <= COUPLED_BYTES:
        pictures[f"independence_cost{given}"] = second.samples.cost(second.count, how.seed)
    metrics = {name: float(values.mean()) for name, values in pictures.items()}
    if how.num_sampled:
        numbers, intervals = second.scores(chosen, how.num_sampled)
        metrics |= {name: numbers[name] for name in SCORES if name in numbers}
        intervals = {name: intervals[name] for name in metrics if name in intervals}
    metrics["steps"] = float(pipe.num_steps)
    speed, timed_on = _speed(folder, str(pipe.device), chosen, how) if how.batch_sizes else ({}, "")
    metrics |= speed
    training = read_config(folder).get("training", {})
    seen, flops = training.get("images_seen", 0), training_flops(pipe.config)
    facts: dict[str, Any] = {"metrics": metrics, "interval": intervals, "sampling": dataclasses.asdict(chosen)}
    facts |= {"tried": tried, "num_real": len(second.heldout), "judging": dataclasses.asdict(how), **made_by(folder)}
    facts |= {"num_images": seen, "training_flops": seen * flops, "flops_per_image": flops}
    facts |= {"num_parameters": num_parameters(pipe.config)}
    facts |= {"hours": training.get("hours"), "timed_on": timed_on, "version": __version__}
    return Judged(facts, pictures)


def golden_section(
    measure: Callable[[float], float], low: float, high: float, steps: int
) -> tuple[float, list[tuple[float, float]]]:
    """The best of `steps` values between `low` and `high`, which close in on a minimum; and each with its measurement.

    Of several minima it finds one. Measurements have to share their random numbers, or the search follows noise.
    """
    tried: list[tuple[float, float]] = []

    def at(value: float) -> float:
        tried.append((round(value, 4), measure(round(value, 4))))
        return tried[-1][1]

    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    of_left, of_right = at(left), at(right)
    while len(tried) < steps:
        if of_left < of_right:
            high, right, of_right = right, left, of_left
            left = high - GOLDEN * (high - low)
            of_left = at(left)
        else:
            low, left, of_left = left, right, of_right
            right = low + GOLDEN * (high - low)
            of_right = at(right)
    return min(tried, key=lambda pair: pair[1])[0], tried


def halves(
    pipe: Pipeline, trained: Sequence[dict[str, Any]], real: str | Source, how: Judging, cache: Path | None
) -> tuple[Half, Half]:
    """Held-out samples in two halves, as a pipeline is conditioned on them; `trained` is what it was trained on, and
    maybe others."""
    heldout = held_out([pipe], trained, real, "test", how.number, how.seed)
    check_halves(len(heldout), how)
    first, second = (_part(heldout, half) for half in np.array_split(np.arange(len(heldout)), 2))
    wording = trained[0].get("wording", "plain")
    return Half(pipe, first, wording, how, cache), Half(pipe, second, wording, how, cache)


def check_halves(number: int, how: Judging) -> None:
    """Raise ValueError for held-out samples of which no halves can be compared."""
    least = LEAST_COUPLED if how.independence else LEAST
    if number < least:
        raise ValueError(
            f"held-out samples: {number}, and {least} are needed: settings are chosen on one half and judged on the "
            "other; give more, or hold out a larger share of a study's (data.heldout_share)"
            + (f", or measure no cost of independence (judging.independence=false), then {LEAST} do" * how.independence)
        )


class Half:
    """One half of the held-out samples, and what a model makes of the same conditions."""

    def __init__(self, pipe: Pipeline, heldout: HeldOut, wording: str, how: Judging, cache: Path | None) -> None:
        self.pipe, self.heldout, self.how, self.cache = pipe, heldout, how, cache
        self.samples, self.count = Samples(pipe, heldout, wording), pipe.continuation.counts[0]

    def scores(
        self, sampling: Sampling, number: int, resamplings: int = 1000
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Scores of `number` samples, each under the condition of a real one, against this half; by short names."""
        pipe, clips = self.pipe, self.pipe.makes_clips
        asked = self.samples.requests(slice(None), self.count)
        asked = [asked[index % len(asked)] for index in range(number)]
        batch = CLIP_BATCH if clips else BATCH
        detector = None
        if clips:
            from nar.metrics.detectors import TransNetDetector

            detector = TransNetDetector(pipe.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few pictures: all arms have as many
            report = evaluate(
                self.heldout.source,
                Sampled(pipe, asked, sampling, self.how.seed, batch),
                detector=detector,
                size=pipe.pixel_shape[-1],
                calibration=0,
                resamplings=resamplings,
                batch_size=batch,
                device=pipe.device,
                cache=self.cache,
                progress=False,
            )
        short = {name: name.partition("-")[0] for name in metric_names(report)}
        found = {short[name]: float(report[name]) for name in short}
        return found, {short[name]: ends for name, ends in report["interval"].items() if name in short}


def _part(heldout: HeldOut, rows: np.ndarray) -> HeldOut:
    frames = None if heldout.frames is None else heldout.frames[rows]
    return HeldOut(heldout.source.take(rows), heldout.codes[rows], frames)


def _speed(folder: Path, device: str, sampling: Sampling, how: Judging) -> tuple[dict[str, float], str]:
    """Seconds for the smallest batch and pictures a second of the largest, the pixel decoder included; and the name of
    the device."""
    sizes = sorted({how.batch_sizes[0], how.batch_sizes[-1]})
    setup = Setup(tuple(sizes), device=device, repetitions=how.repetitions)
    rows = bench_folder(folder, setup, sampling=sampling)
    return {
        "latency_seconds": rows[0].latency_with_pixels_seconds or rows[0].latency_seconds,
        "images_per_second": rows[-1].images_per_second_with_pixels or rows[-1].images_per_second,
    }, rows[0].device
