"""The training loop: one for tokenizers and models, on one process or many, resumed by running the same command again.

Everything random in a step is a function of (seed, step, position in the batch), so that a resumed run continues bit
for bit without stored generator states, and any number of processes sees the same samples. Knows steps, optimizer and
files; a `Task` knows what is trained on what.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from nar import __version__
from nar.storage.config import difference
from nar.storage.files import atomically
from nar.training.batches import Batch, batch_of, pieces
from nar.training.checkpoint import Checkpoints, read_record
from nar.training.distributed import Engine, Workers, spread, unsynchronised, whole
from nar.training.ema import update_average
from nar.training.optim import OptimConfig, build_optimizers, learning_rate_factor

_FREE = {"about", "run", "prompts", "keep_last", "log_every", "checkpoint_every"}  # settings that touch no weights
_FREE_ENGINE = {"device", "workers"}


@dataclass(frozen=True)
class Plan:
    """How long and how a run trains, and what it leaves. The `*_every` count steps.

    It ends after `num_images`, or where that is 0 after `epochs` of the data, but within `images_between`. `export` is
    which averaged weights become the final model: the "last" ones, or those of the "best" checkpoint by
    held-out loss. `keep_last` checkpoints are kept, and the best one.
    """

    run: str = "runs/default"
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: Engine = field(default_factory=Engine)
    batch_size: int = 64
    num_images: int = 0
    epochs: float = 0.0
    images_between: tuple[int, ...] = (0, 2**62)
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    preview_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    export: str = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "images_between", tuple(self.images_between))
        for name in ("batch_size", "log_every", "preview_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if (self.num_images > 0) == (self.epochs > 0):
            raise ValueError(
                f"either num_images or epochs must be set, not num_images={self.num_images} and epochs={self.epochs}"
            )
        if len(self.images_between) != 2 or self.images_between[0] > self.images_between[1]:
            raise ValueError(f"images_between must be two rising numbers, not {self.images_between}")
        if self.export not in ("last", "best"):
            raise ValueError(f"export must be last or best, not {self.export!r}")

    def num_steps(self, num_samples: int) -> int:
        """Steps of the whole training, on a set of `num_samples`."""
        low, high = self.images_between
        return math.ceil((self.num_images or min(max(self.epochs * num_samples, low), high)) / self.batch_size)


def of_weights(config: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that touch its weights."""
    engine = {name: value for name, value in config["engine"].items() if name not in _FREE_ENGINE}
    return {name: value for name, value in config.items() if name not in _FREE} | {"engine": engine}


class Task(Protocol):
    """What the loop trains: a module, its loss, and what becomes of it."""

    @property
    def module(self) -> nn.Module:
        """What is optimised, already on the workers' device."""
        ...

    @property
    def num_samples(self) -> int:
        """Size of the training set."""
        ...

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The repeated parts of `module`, of this task or a copy of it: they are sharded and compiled one by one."""
        ...

    def fetch(self, batch: Batch) -> Any:
        """Read what `loss` needs of a batch; called in a thread, ahead of time."""
        ...

    def loss(self, batch: Batch, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over a batch and what `fetch` gave for it, and values to log."""
        ...

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:
        """Upkeep after an optimizer step (reviving dead codes, say), the same on every process.

        Returns what the user should be warned of, if anything.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that the task must remember between steps."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        ...

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Measure `module` (with averaged weights) on held-out data, all processes together: "loss", and others."""
        ...

    def preview(self, module: nn.Module) -> Image.Image:
        """A picture of what `module` makes; the same seed every time."""
        ...

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        """Write `module` as a model folder; `training` says how it was made."""
        ...


Metrics = Callable[[nn.Module, Task], dict[str, float]]
"""Called with the averaged module and its task whenever previews are drawn; what it returns is logged."""


def train(
    task: Task,
    plan: Plan,
    *,
    config: dict[str, Any],
    workers: Workers,
    override: bool = False,
    metrics: Metrics | None = None,
) -> Path | None:
    """Train to the end of the plan; returns the folder of the final model, `run/model`.

    Returns None when SIGTERM came: then the state is saved. `config` is stored in the checkpoint; a resumed run whose
    config differs in what touches the weights is refused unless `override`.

    Raises:
        ValueError: the config differs from the one that the run was started with, or the batch can't be split.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
        OSError: a checkpoint can't be written; those before it are kept.
    """
    run = Path(plan.run)
    if task.num_samples < 1:
        raise ValueError("the training set is empty")
    num_steps = plan.num_steps(task.num_samples)
    if plan.optim.warmup_images > (num_images := num_steps * plan.batch_size) and workers.first:
        warnings.warn(
            f"the learning rate rises for optim.warmup_images={plan.optim.warmup_images:,} images and the run has "
            f"{num_images:,}: it ends before it gets there; set a shorter warm-up",
            stacklevel=2,
        )
    num_pieces = workers.count * plan.engine.accumulate
    if plan.batch_size % num_pieces:
        raise ValueError(
            f"batch_size {plan.batch_size} is not a multiple of {num_pieces}, "
            f"{workers.count} processes times engine.accumulate={plan.engine.accumulate}"
        )
    state = _State.of(task, plan, workers)
    checkpoints = Checkpoints(run, plan.keep_last, workers)
    first_step, seconds, lowest = 0, 0.0, math.inf
    if found := checkpoints.all():
        record = read_record(found[-1])
        changed = difference(*map(of_weights, (record["config"], config)))
        if changed and not override:
            raise ValueError(
                f"{run} was started with other settings: {'; '.join(changed)}; "
                "use another run=DIR, or --override to go on with the new ones"
            )
        state.load(checkpoints, found[-1])
        first_step, seconds = record["step"], record["seconds"]
        if (best := checkpoints.best()) is not None:
            lowest = read_record(best)["heldout"]
    started = time.monotonic() - seconds
    heldout: dict[str, float] = {}
    with ExitStack() as stack:
        stopping = stack.enter_context(_Stopping())
        log = _Log(run, first_step, plan.batch_size, stack) if workers.first else None
        bar = stack.enter_context(
            tqdm(
                total=num_steps * plan.batch_size, initial=first_step * plan.batch_size, unit="img",
                disable=None if workers.first else True,
            )
        )  # fmt: skip
        logged = (first_step, time.monotonic())
        stack.callback(checkpoints.close)
        for step, batches, fetched in _ahead(task, plan, workers, range(first_step, num_steps), stack):
            factor = learning_rate_factor(plan.optim, (step + 1) * plan.batch_size, num_steps * plan.batch_size)
            for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * factor
            loss, values = _backward(state, plan, workers, step, batches, fetched)
            norm = whole(
                nn.utils.clip_grad_norm_(
                    task.module.parameters(), plan.optim.clip_norm if plan.optim.clip_norm > 0 else math.inf
                )
            )
            # One exchange a step: the mean loss, and whether any process is asked to stop.
            sums = workers.sum(torch.stack([loss / workers.count, loss.new_tensor(float(stopping.asked))]))
            mean, stop = float(sums[0]), bool(sums[1] > 0)
            if not math.isfinite(mean) or not torch.isfinite(norm):
                rows = ", ".join(map(str, _batch(task, plan, step).indices[:8]))
                raise FloatingPointError(
                    f"step {step}: the loss is {mean} and the gradient norm {float(norm)} on rows {rows}, ... of the "
                    "data; stopped before the weights were touched. Lower optim.learning_rate or look at these rows; "
                    f"the last checkpoint in {run} is intact"
                )
            for optimizer in state.optimizers:
                optimizer.step()
            warning = task.after_step(step, num_steps, torch.Generator().manual_seed(_mix(plan.seed, step)))
            if warning and log is not None:
                warnings.warn(warning, stacklevel=2)
                log.record(step + 1, (step + 1) * plan.batch_size, {"warning": warning})
            update_average(state.average, task.module, step, plan.ema_decay)
            bar.update(plan.batch_size)
            checkpoints.check()
            done = step + 1
            last = done == num_steps
            if done % plan.log_every == 0 or last:
                names = sorted(values)
                means = workers.sum(torch.stack([values[name].float() for name in names]) / workers.count)
                scalars = dict(zip(names, means.tolist(), strict=True))
                scalars |= {
                    "loss": mean,
                    "gradient_norm": float(norm),
                    "learning_rate": plan.optim.learning_rate * factor,
                    "images_per_second": (done - logged[0]) * plan.batch_size / (time.monotonic() - logged[1]),
                    **_memory(workers.device),
                }
                logged = (done, time.monotonic())
                if log is not None:
                    log.scalars(done, done * plan.batch_size, scalars)
                bar.set_postfix(loss=f"{mean:.4f}")
            measured = None
            if done % plan.preview_every == 0 or last:
                averaged = state.averaged()
                heldout = task.evaluate(averaged)
                measured = heldout["loss"]
                if log is not None:
                    extra = {f"metric_{name}": value for name, value in (metrics or _none)(averaged, task).items()}
                    named = {f"heldout_{name}": value for name, value in heldout.items()}
                    log.scalars(done, done * plan.batch_size, named | extra)
                    log.picture(done, done * plan.batch_size, task.preview(averaged))
                logged = (done, time.monotonic())
            if done % plan.checkpoint_every == 0 or last or stop or (measured is not None and measured < lowest):
                record = {
                    "config": config,
                    "version": __version__,
                    "torch": torch.__version__,
                    "processes": workers.count,
                    "seconds": time.monotonic() - started,
                    "heldout": measured,
                }
                checkpoints.save(done, state.values(), record)
                lowest = lowest if measured is None else min(lowest, measured)
            if stop and not last:
                checkpoints.wait()
                return None
        checkpoints.wait()
    workers.wait()  # until the first process has renamed the last checkpoint
    images_seen = num_steps * plan.batch_size
    if plan.export == "best" and (best := checkpoints.best()) is not None and best != checkpoints.all()[-1]:
        state.load(checkpoints, best)
        heldout, images_seen = {}, read_record(best)["step"] * plan.batch_size
    averaged = state.averaged()
    heldout = heldout or task.evaluate(averaged)
    if workers.first:
        training = {
            "version": __version__,
            "images_seen": images_seen,
            "hours": round((time.monotonic() - started) / 3600, 3),
            "heldout": {name: round(value, 5) for name, value in heldout.items()},
            "config": config,
        }
        task.export(averaged, run / "model", training)
    workers.wait()
    return run / "model"


def share(count: int, size: int, workers: Workers) -> list[slice]:
    """This process's share of `count` held-out samples, in slices of `size` at most."""
    starts = range(workers.rank * size, count, workers.count * size)
    return [slice(start, min(start + size, count)) for start in starts]


class _State:
    """Everything that training changes: the module, its running average, the optimizer, the task's own tensors."""

    def __init__(
        self,
        task: Task,
        step: nn.Module,
        average: nn.Module,
        optimizers: tuple[torch.optim.Optimizer, ...],
        plain: nn.Module | None,
    ) -> None:
        self.task, self.step, self.average, self.optimizers, self._plain = task, step, average, optimizers, plain

    @classmethod
    def of(cls, task: Task, plan: Plan, workers: Workers) -> _State:
        average = copy.deepcopy(task.module).eval().requires_grad_(False)  # norms over a batch use what they have seen
        sharded = workers.count > 1 and plan.engine.parallel == "fsdp"
        plain = copy.deepcopy(average) if sharded else None
        step = spread(
            _Step(task), task.blocks(task.module), (average, task.blocks(average)), plan.engine, workers
        )  # in place, so the optimizer's parameters are taken afterwards
        return cls(task, step, average, build_optimizers(task.module, plan.optim), plain)

    def values(self) -> dict[str, Any]:
        """All of it as nested dicts, by parameter name, so that any number of processes can read it."""
        return {
            "module": get_model_state_dict(self.task.module),
            "average": get_model_state_dict(self.average),
            "optimizer": get_optimizer_state_dict(self.task.module, self.optimizers),
            "task": self.task.state(),
        }

    def load(self, checkpoints: Checkpoints, path: Path) -> None:
        values = self.values()
        checkpoints.load(path, values)
        set_model_state_dict(self.task.module, values["module"])
        set_model_state_dict(self.average, values["average"])
        set_optimizer_state_dict(self.task.module, self.optimizers, values["optimizer"])
        self.task.load_state(values.get("task", {}))

    def averaged(self) -> nn.Module:
        """The module with averaged weights, in full on every process."""
        if self._plain is None:
            return self.average
        full = {name: whole(tensor) for name, tensor in self.average.state_dict().items()}
        self._plain.load_state_dict(full)
        return self._plain


class _Step(nn.Module):
    """A task's loss as a forward pass, where DDP and FSDP hook in."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self.task = task

    def forward(self, batch: Batch, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(batch, data)


def _backward(
    state: _State, plan: Plan, workers: Workers, step: int, batches: list[Batch], fetched: list[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the gradients of a step in the parameters; returns this process's mean loss and values to log."""
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total, totals = torch.zeros((), device=workers.device), dict[str, Tensor]()
    for index, (batch, data) in enumerate(zip(batches, fetched, strict=True)):
        torch.manual_seed(_mix(plan.seed, step, 1, workers.rank, index))  # dropout masks
        with (
            unsynchronised(state.step, last=index == len(batches) - 1),
            torch.autocast(workers.device.type, torch.bfloat16, enabled=plan.engine.precision == "bfloat16"),
        ):
            loss, values = state.step(batch, data)
            loss = loss / len(batches)
        with unsynchronised(state.step, last=index == len(batches) - 1):
            loss.backward()
        total += loss.detach()
        for name, value in values.items():
            totals[name] = totals.get(name, torch.zeros((), device=workers.device)) + value / len(batches)
    return total, totals


def _ahead(
    task: Task, plan: Plan, workers: Workers, steps: range, stack: ExitStack
) -> Iterator[tuple[int, list[Batch], list[Any]]]:
    """Each step with this process's pieces of its batch, read while the step before is computed."""
    pool = ThreadPoolExecutor(1)
    stack.callback(pool.shutdown, cancel_futures=True)

    def prepare(step: int) -> tuple[list[Batch], list[Any]]:
        whole = _batch(task, plan, step)
        batches = pieces(whole, rank=workers.rank, count=workers.count, accumulate=plan.engine.accumulate)
        return batches, [task.fetch(batch) for batch in batches]

    future: Future[tuple[list[Batch], list[Any]]] | None = None
    for step in steps:
        ready = future or pool.submit(prepare, step)
        future = pool.submit(prepare, step + 1) if step + 1 < steps.stop else None
        batches, fetched = ready.result()
        yield step, batches, fetched


def _batch(task: Task, plan: Plan, step: int) -> Batch:
    return batch_of(plan.seed, step, num_samples=task.num_samples, batch_size=plan.batch_size)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(2))


def _none(module: nn.Module, task: Task) -> dict[str, float]:  # noqa: ARG001
    return {}


def _memory(device: torch.device) -> dict[str, float]:
    """Peak memory: of the GPU, or of this process where the system tells."""
    if device.type == "cuda":
        return {"memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    if sys.platform == "win32":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": float(peak if sys.platform == "darwin" else peak * 1024)}


class _Stopping:
    """Within it, SIGTERM only sets `asked`; the loop stops after the step at hand."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class _Log:
    """`metrics.jsonl` (a line a record), TensorBoard where installed, and preview pictures, all in the run's folder."""

    def __init__(self, run: Path, first_step: int, batch_size: int, stack: ExitStack) -> None:
        self._previews = run / "previews"
        self._previews.mkdir(exist_ok=True)
        path = run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        text = "".join(f"{line}\n" for line in kept)  # without what a killed run logged too far
        atomically(path, lambda staging: staging.write_text(text, encoding="utf-8"))
        self._file = stack.enter_context(path.open("a", encoding="utf-8"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step * batch_size + 1)
            stack.callback(self._board.close)

    def scalars(self, step: int, images_seen: int, values: dict[str, float]) -> None:
        self.record(step, images_seen, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, images_seen)

    def record(self, step: int, images_seen: int, values: Mapping[str, float | str]) -> None:
        record = {"step": step, "images_seen": images_seen, "time": round(time.time(), 1), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def picture(self, step: int, images_seen: int, picture: Image.Image) -> None:
        path = self._previews / f"{step:07d}.png"
        atomically(path, lambda staging: picture.save(staging, format="png"))
        if self._board is not None:
            self._board.add_image("preview", np.asarray(picture), images_seen, dataformats="HWC")
