"""Choice of a number format and of threads by measurement: the fastest format whose cost in bits is small.

Knows formats, threads, clocks, and the file that remembers; does not know pixels or what is asked of a model. Legend:
`B` batch, `N` positions, `V` vocabulary.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nar.condition import Condition, PrefixCodes, TextFeatures
from nar.model import ModelConfig, Transformer
from nar.precision import PRECISIONS
from nar.progress import Progress
from nar.sampling import generate
from nar.storage.files import read_json, write_json
from nar.storage.folder import model_digest

AUTO = "auto"
REMEMBERED = Path("~/.cache/nar/formats.json")
LARGEST_COST = 0.001  # of the bits per token
BATCHES = (1, 8)  # one choice serves both: a format that is fastest at one may be slow at the other
_STEPS, _REPETITIONS, _SAMPLES = 2, 5, 2


@dataclass(frozen=True)
class Choice:
    """A number format and threads, and the measurements that decided.

    Attributes:
        seconds: of some steps in each format, the geometric mean of `BATCHES`, at the time of the measurement.
        costs: the share by which each format that was fast enough lengthens the code of the model's own samples.
        thread_seconds: of these steps at batch 1 in the chosen format, for each number of threads, now.
        remembered: whether `seconds` and `costs` are of an earlier measurement on this machine.
    """

    dtype: str
    threads: int
    seconds: dict[str, float]
    costs: dict[str, float]
    thread_seconds: dict[int, float]
    remembered: bool = False

    def __str__(self) -> str:
        parts = []
        for name in sorted(self.seconds, key=self.seconds.__getitem__):
            cost = f" at {self.costs[name]:+.3%} bits" if name in self.costs and name != "float32" else ""
            parts.append(f"{name} {self.seconds['float32'] / self.seconds[name]:.2f} times{cost}")
        when = "measured before on this machine" if self.remembered else "measured now"
        threads = ", ".join(f"{count}: {1000 * each:.1f} ms" for count, each in self.thread_seconds.items())
        depends = "; in bfloat16 a picture may depend on its batch" if self.dtype == "bfloat16" else ""
        return (
            f"dtype {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}: the fastest that costs less than "
            f"{LARGEST_COST:.1%} of the bits (as fast as float32: {', '.join(parts)}; {when}; threads now {threads})"
            f"{depends}"
        )


def choose(folder: Path, device: torch.device) -> tuple[Transformer, Choice]:
    """Load a model in the fastest format whose cost in bits is at most 0.1 %, and set PyTorch's number of threads.

    The cost is measured on the model's own samples: how much longer their code is by the format's distributions than by
    float32's. It and the speeds are remembered in `REMEMBERED` for this machine and these weights; threads are
    measured each time, because two of them may be 20 times slower than one where others keep a core busy.
    """

    def load(name: str) -> Transformer:
        return Transformer.from_pretrained(folder, name, device)

    return choose_of(load, model_digest(folder), device)


def choose_of(load: Callable[[str], Transformer], digest: str, device: torch.device) -> tuple[Transformer, Choice]:
    """`choose` of a model that `load` makes in a format; `digest` names its weights."""
    path, key = REMEMBERED.expanduser(), f"{_machine(device)}, {digest}"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # a damaged file is measured anew, and written whole
        known = read_json(path)
    with Progress("choosing a number format", None, "formats") as progress:
        found = known.get(key)
        if isinstance(found, dict) and found.get("dtype") in PRECISIONS:
            model = load(found["dtype"])
            threads = _best_threads(model)
            choice = Choice(found["dtype"], torch.get_num_threads(), found["seconds"], found["costs"], threads, True)
        else:
            model, choice = _measured(load, device, progress)
            record = {name: getattr(choice, name) for name in ("dtype", "seconds", "costs")}
            try:
                write_json(path, {**known, key: record})
            except OSError as error:
                progress.say(f"not remembered: {error}")
        progress.say(str(choice))
    return model, choice


def any_condition(config: ModelConfig, batch: int) -> Condition:
    """A condition of every kind that a model takes, for measurements: classes in turn, random words, zeros."""
    labels = torch.arange(batch) % config.num_classes if config.num_classes else None
    mask = torch.ones(batch, config.text_length, dtype=torch.bool)
    features = torch.randn(*mask.shape, config.text_dim, generator=torch.Generator().manual_seed(0))
    text = TextFeatures(features, mask) if config.text_dim else None
    given = PrefixCodes(torch.zeros(batch, *config.prefix_grid, dtype=torch.long)) if config.prefix_grid else None
    return Condition(labels, text, given)


@torch.no_grad()
def _measured(
    load: Callable[[str], Transformer], device: torch.device, progress: Progress
) -> tuple[Transformer, Choice]:
    best = load("float32")
    _best_threads(best)
    seconds, costs = {"float32": _seconds(best)}, {"float32": 0.0}
    progress.update()
    condition = any_condition(best.config, _SAMPLES).to(device)
    codes = generate(best, condition)
    exact = best(codes, condition).log_softmax(-1)  # (B, *grid, V)
    entropy = -(exact.exp() * exact).sum(-1).mean()
    chosen = "float32"
    for name in (name for name in PRECISIONS if name != "float32"):
        try:
            model = load(name)
        except ValueError:  # no kernels for it here
            continue
        seconds[name] = _seconds(model)
        progress.update()
        if seconds[name] < seconds[chosen]:
            other = model(codes, condition).log_softmax(-1)
            costs[name] = float((exact.exp() * (exact - other)).sum(-1).mean() / entropy)
            if costs[name] <= LARGEST_COST:
                best, chosen = model, name
    threads = _best_threads(best)
    return best, Choice(chosen, torch.get_num_threads(), seconds, costs, threads)


def _best_threads(model: Transformer) -> dict[int, float]:
    """Set the number of threads of the least time at batch 1: all cores (or OMP_NUM_THREADS), or halves of them."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = int(asked) if asked.isdecimal() else os.cpu_count() or 1
    found: dict[int, float] = {}
    if model.device.type == "cpu":
        while most >= 1:
            torch.set_num_threads(most)
            found[most] = _step_seconds(model, 1, statistics.median)
            most //= 2
        torch.set_num_threads(min(found, key=found.__getitem__))
    return found


def _seconds(model: Transformer) -> float:
    return statistics.geometric_mean(_step_seconds(model, batch, min) for batch in BATCHES)


@torch.inference_mode()
def _step_seconds(model: Transformer, batch: int, of: Callable[[list[float]], float]) -> float:
    """Seconds of a few steps in the middle of a generation with guidance, of which `of` takes one of all runs."""
    condition = any_condition(model.config, 2 * batch).to(model.device)
    embedded, key_mask = model.embed(condition)
    schedule, cache = model.layout.schedule, model.new_cache(2 * batch)
    tokens = torch.zeros(2 * batch, schedule.num_positions, dtype=torch.long, device=model.device)
    middle = max(0, min(schedule.num_steps // 2, schedule.num_steps - 1 - _STEPS))
    hidden = model.prefill(embedded, key_mask, cache)
    if middle:
        model.decode(tokens[:, : schedule.front(middle - 1).stop], range(middle), cache)
    length = cache.length

    def run(hidden: Tensor = hidden) -> None:
        cache.length = length
        for front in range(middle, min(middle + _STEPS, schedule.num_steps - 1)):
            hidden = model.decode(tokens[:, : schedule.front(front).stop], range(front, front + 1), cache)
        model.logits(hidden[:batch]).sum().item()  # waits

    times = []
    for _ in range(_REPETITIONS + 1):
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return of(times[1:])


def _machine(device: torch.device) -> str:
    """What decides which format is fast."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
