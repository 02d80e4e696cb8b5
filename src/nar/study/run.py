"""From a study to its runs: trains and judges what is missing, and keeps what is done.

A run is a folder called by its arm, seed, and a digest of all that its weights depend on: a changed arm is trained anew
and nothing is lost. What was measured is kept in `logs`, small enough for a repository; tables are made of that alone,
and what has its log needs no weights: a study goes on elsewhere. Knows folders and processes; does not know the
training loop, how models are judged, or tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from nar.data.extract import fingerprint
from nar.data.source import Source
from nar.evaluation.sets import trained_on
from nar.progress import Progress
from nar.sampling import Sampling
from nar.storage.config import leaves
from nar.storage.fields import checked, from_dict
from nar.storage.files import atomically, read_json, write_json, write_text
from nar.storage.folder import CONFIG, find_model, model_digest, read_config
from nar.study.judge import Judged, check_halves, judge
from nar.study.plan import STUDY, Judging, Study
from nar.tokenizer import load_tokenizer
from nar.training.distributed import joined
from nar.training.plan import of_weights
from nar.training.recipe import Recipe
from nar.training.samples import code_sets
from nar.training.tasks import run_recipe

CURVE = "heldout_bits_per_token"
SAME_DATA = ("source", "validation", "heldout_share", "group", "group_without", "codes", "heldout_codes")  # of all arms


@dataclass(frozen=True)
class Run:
    """A training of an arm, in its folder."""

    arm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it has left its model."""
        return (self.folder / "model" / CONFIG).is_file()


def run_study(study: Study, jobs: int = 1) -> Path | None:
    """Train and judge what is missing; returns the folder, or None when a signal stopped it: the same call goes on.

    With `jobs` so many arms are trained at a time, each in a process of its own. Under torchrun all processes train
    each arm together, and the first one judges.
    """
    if not study.run:
        raise ValueError("say where the study is kept: run=DIR")
    work = _Work(study)
    if work.tokenizer is None:
        return None
    trained = [name for name, arm in study.all_arms.items() if not arm.of]
    check_halves(len(work.sources[1]), study.judging)
    work.make_codes()
    places = itertools.product(trained, study.seeds, work.choices)
    every = {(name, seed, choice): work.run(name, seed, choice) for name, seed, choice in places}
    work.keep(every.values())  # only now: a refused study leaves nothing
    tried = {name: [every[name, study.seeds[0], choice] for choice in work.choices] for name in trained}
    decided = {name: [run for run in runs if work.judged(run)] for name, runs in tried.items()}
    if not work.train([run for name, runs in tried.items() if not decided[name] for run in runs], jobs):
        return None
    best = {
        name: work.choices[runs.index(decided[name][0]) if decided[name] else _least_loss(runs)]
        for name, runs in tried.items()
    }
    runs = {(name, seed): every[name, seed, best[name]] for name in trained for seed in study.seeds}
    work.keep(runs.values())
    if not work.train(list(runs.values()), jobs):
        return None
    if int(os.environ.get("RANK", "0")) == 0:
        for name, arm in study.all_arms.items():
            for seed in study.seeds:
                work.judge(name, runs[arm.of or name, seed], best[arm.of or name])
    return work.folder


@checked
def compare_models(
    models: Sequence[str], real: str, how: Judging, folder: Path | None = None
) -> tuple[Study, dict[str, list[Judged]]]:
    """Judge finished models on the same held-out pictures: a study of one seed, whose arms they are.

    Bits are left out where tokenizers differ, as they are of other codes. With a `folder` the logs are kept there.
    """
    names = _short_names(models)
    folders = [find_model(model) for model in models]
    study = Study(recipe="none", arms={name: {} for name in names}, seeds=(0,), judging=how)
    cache = None if folder is None else folder / "features"
    trained = {folder: trained_on(folder) for folder in folders}
    logs = dict[str, list[Judged]]()
    for name, folder_of in zip(names, folders, strict=True):
        others = [data for other, data in trained.items() if other != folder_of]
        logs[name] = [judge(folder_of, real, how, cache=cache, trained=[trained[folder_of], *others])]
    if len({log.facts["tokenizer_sha256"] for (log,) in logs.values()}) > 1:
        warnings.warn("tokenizers differ: bits are of other codes, and are left out", stacklevel=2)
        for (log,) in logs.values():
            for name in log.pictures:
                log.facts["metrics"].pop(name)
            log.pictures.clear()
    if folder is not None:
        write_json(folder / STUDY, dataclasses.asdict(study))
    for model, (name, (log,)) in zip(models, logs.items(), strict=True):
        log.facts |= {"arm": name, "seed": 0, "model": model}
        if folder is not None:
            write_log(folder / "logs" / f"{name}-0.json", log)
    return study, logs


def _short_names(models: Sequence[str]) -> list[str]:
    """What the arms are called: of each path the last parts, as few as tell all apart."""
    paths = [Path(model.rstrip("/").removesuffix("/model")).parts for model in models]
    for count in range(1, max(1, *map(len, paths)) + 1):
        names = [re.sub(r"[^\w.+-]+", "-", "-".join(parts[-count:])).strip("-") or "model" for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{', '.join(models)} must be different models")


class _Work:
    """A study at work in its folder."""

    def __init__(self, study: Study) -> None:
        self.study, self.folder = study, Path(study.run)
        self.base = study.recipe_of(next(name for name, arm in study.all_arms.items() if not arm.of))
        if not self.base.data.source:
            raise ValueError(f"recipe {study.recipe} needs pictures: data=FOLDER")
        self.choices = [*itertools.product(*([f"{k}={v}" for v in values] for k, values in study.sweep.items()))]
        for name, arm in study.all_arms.items():
            for choice in self.choices if not arm.of else ():
                self._check_data(name, study.recipe_of(name, choice))

    def _check_data(self, name: str, recipe: Recipe) -> None:
        """Raise ValueError where a recipe may learn from what all arms are judged on."""
        for key in SAME_DATA:
            own, common = getattr(recipe.data, key), getattr(self.base.data, key)
            if own != common:
                raise ValueError(
                    f"arm {name}: data.{key} is {own!r}, and must be {common!r} as in the other arms, which are judged "
                    "on the same held-out samples; set it for all of them, in the settings of the study"
                )

    @cached_property
    def tokenizer(self) -> Path | None:
        """The one tokenizer of all arms: given, or trained here; None when a signal stopped its training."""
        recipe = self.base
        if recipe.tokenizer_path or recipe.init:
            return find_model(recipe.tokenizer_path or find_model(recipe.init) / "tokenizer")
        if not recipe.tokenizer_recipe:
            raise ValueError(f"recipe {self.study.recipe} names no tokenizer: add tokenizer_path=FOLDER to settings")
        data = {key: value for key, value in leaves(dataclasses.asdict(recipe.data)) if key not in ("augment", "shift")}
        same = [f"data.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in data.items()]
        overrides = [*same, f"run={self.folder / 'tokenizer'}", *recipe.tokenizer_overrides]
        overrides += self.study.tokenizer
        return run_recipe(recipe.tokenizer_recipe, overrides)

    @cached_property
    def sources(self) -> Sequence[Source]:
        """What is learned from, and what is held out."""
        return self.base.data.open()

    @cached_property
    def contents(self) -> list[str]:
        """What tells the data from others, wherever they lie."""
        return [fingerprint(source) for source in self.sources]

    def run(self, arm: str, seed: int, choice: Sequence[str]) -> Run:
        """The run of an arm with a seed and a choice of the sweep."""
        assert self.tokenizer is not None
        fixed = [*choice, f"seed={seed}", f"tokenizer_path={self.tokenizer}"]
        overrides = [*self.study.overrides(arm, load_tokenizer(self.tokenizer)), *fixed]
        recipe = self.study.recipe_of(arm, overrides)
        begun = {"init": model_digest(find_model(recipe.init))} if recipe.init else {}  # whatever its folder is called
        digest = _digest(_settings(recipe) | begun | {"data.source": self.contents}, model_digest(self.tokenizer))
        folder = self.folder / "runs" / f"{arm}-{seed}-{digest}"
        return Run(arm, seed, self.study.recipe, (*overrides, f"run={folder}"), folder)

    def make_codes(self) -> None:
        """Make the codes that all arms learn from, once; runs link to them."""
        assert self.tokenizer is not None
        with joined(self.base.engine.device) as workers:
            code_sets(dataclasses.replace(self.base, run=str(self.folder)), self.sources, self.tokenizer, workers)

    def train(self, runs: Sequence[Run], jobs: int) -> bool:
        """Train what is neither finished nor judged; False when a signal stopped it."""
        missing = [run for run in dict.fromkeys(runs) if not run.finished and not self.judged(run)]
        for run in missing:
            recipe = self.study.recipe_of(run.arm, run.overrides)
            codes = self.folder / "codes"
            if recipe.data == self.base.data and codes.is_dir():
                run.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):  # without links each run makes its own
                    (run.folder / "codes").symlink_to(codes.resolve(), target_is_directory=True)
        if jobs > 1 and len(missing) > 1:
            return _in_processes(missing, jobs)
        with Progress("study", len(missing), "runs") as bar:
            for run in missing:
                if run_recipe(run.recipe, run.overrides) is None:
                    return False
                bar.update()
        return True

    def keep(self, runs: Iterable[Run]) -> None:
        """Write the study beside the digests of the logs that it will have of these runs: tables leave others out."""
        digests = [self.digest(name, run) for run in runs for name in self._judged_as(run)]
        write_json(self.folder / STUDY, dataclasses.asdict(self.study) | {"digests": digests})

    def _judged_as(self, run: Run) -> list[str]:
        """The arms whose model a run is: its own, and those that judge it otherwise."""
        return [name for name, arm in self.study.all_arms.items() if (arm.of or name) == run.arm]

    def digest(self, name: str, run: Run) -> str:
        """Of all that the log of a run as an arm depends on: its guidance is chosen with the first seed, and the run
        itself among the values of a sweep."""
        study, first = self.study, [self.study.seeds[0]] if self._tunes(name) else []
        swept = [study.sweep] if len(self.choices) > 1 else []
        arm, judging = dataclasses.asdict(study.all_arms[name]), dataclasses.asdict(study.judging)
        return _digest(run.folder.name, arm, judging, *first, *swept)

    def log(self, name: str, run: Run) -> Path:
        """Where an arm keeps what was measured of a run."""
        return self.folder / "logs" / f"{name}-{run.seed}.json"

    def judged(self, run: Run) -> bool:
        """Whether all that is asked of a run was measured: then its weights are not needed."""
        return all(_digest_in(self.log(name, run)) == self.digest(name, run) for name in self._judged_as(run))

    def _tunes(self, name: str) -> bool:
        """Whether the guidance of an arm is searched."""
        given = any(setting.startswith("guidance_scale=") for setting in self.study.all_arms[name].sampling)
        return bool(self.study.judging.guidance) and not given

    def judge(self, name: str, run: Run, choice: Sequence[str]) -> None:
        """Judge a run as one arm does, unless it was: writes its log."""
        study, arm = self.study, self.study.all_arms[name]
        path = self.log(name, run)
        facts = {"arm": name, "seed": run.seed, "run": run.folder.name, "chosen": [*choice]}
        facts["digest"] = self.digest(name, run)
        if _digest_in(path) == facts["digest"]:
            return
        settings = dict(given.partition("=")[::2] for given in arm.sampling)
        all_settings = dataclasses.asdict(from_dict(Sampling, settings, f"sampling of arm {name}", text=True))
        sampling = {key: all_settings[key] for key in settings}
        first = self.folder / "logs" / f"{name}-{study.seeds[0]}.json"
        scale = None
        if run.seed != study.seeds[0] and self._tunes(name):
            scale = read_json(first)["sampling"]["guidance_scale"]  # chosen once an arm
        how = study.judging if self._tunes(name) else dataclasses.replace(study.judging, guidance=())
        options: dict[str, Any] = {"heads": arm.heads, "sampling": sampling, "guidance_scale": scale}
        began = time.monotonic()
        judged = judge(run.folder / "model", self.sources[1], how, cache=self.folder / "features", **options)
        facts |= judged.facts | {"curve": _curve(run.folder), "judging_seconds": round(time.monotonic() - began, 1)}
        write_log(path, Judged(facts, judged.pictures))


def write_log(path: Path, judged: Judged) -> None:
    """Write what was measured of one model; numbers of pictures in half precision, whose rounding their means forget:
    0.002 bits a picture are 0.00002 of 5,000."""
    small = {name: values.astype(np.float16) for name, values in judged.pictures.items()}
    atomically(path.with_suffix(".npz"), partial(_save, small))
    write_text(path, json.dumps(judged.facts, indent=1) + "\n")


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What the weights depend on, where it is not the default: keys that come later do not change it."""
    default = dict(leaves(of_weights(Recipe(num_images=1).record())))
    found = dict(leaves(of_weights(recipe.record())))
    return {key: found[key] for key in sorted(found) if default.get(key) != found[key] and key != "tokenizer_path"}


def _digest_in(log: Path) -> str:
    """The digest of a log; empty where there is none."""
    return str(read_json(log).get("digest", "")) if log.is_file() else ""


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:8]


def _least_loss(runs: Sequence[Run]) -> int:
    """Which of the finished runs has the least held-out loss."""
    losses = [read_config(run.folder / "model")["training"]["heldout"]["loss"] for run in runs]
    return losses.index(min(losses))


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Images seen and held-out bits of a token, as training measured them."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["images_seen"], round(record[CURVE], 5)) for record in records if CURVE in record]


def _in_processes(runs: Sequence[Run], jobs: int) -> bool:
    """Train runs, so many at a time; a signal stops and saves all."""
    waiting, running = list(runs), dict[subprocess.Popen[bytes], Run]()
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    before = signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        with Progress("study", len(runs), "runs") as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[_started(run, threads)] = run
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    if process.returncode or not run.finished:
                        log = run.folder / "train.log"
                        last = [*log.read_text(encoding="utf-8", errors="replace").splitlines(), ""][-2:][0]
                        raise ValueError(f"arm {run.arm}, seed {run.seed} failed: {last}; all of it is in {log}")
                    bar.update()
    except KeyboardInterrupt:
        return False
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return True


def _interrupt() -> None:
    raise KeyboardInterrupt


def _started(run: Run, threads: str) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "train.log").open("ab") as log:
        command = [sys.executable, "-c", "from nar.cli import main; main()", "train", run.recipe, *run.overrides]
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
