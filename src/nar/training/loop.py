"""The training loop: one for tokenizers and models, on one process or many, resumed by running the same command again.

Everything random in a step is a function of (seed, step, position in the batch), so that a resumed run continues bit
for bit without stored generator states, and any number of processes sees the same samples. Knows steps, optimizers and
files; a `Task` knows what is trained on what.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

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

from nar import __version__
from nar.progress import Progress
from nar.training.batches import Batch, batch_of, pieces
from nar.training.checkpoint import Checkpoints, read_record
from nar.training.distributed import Workers, spread, unsynchronised, whole
from nar.training.ema import update_average
from nar.training.log import Log, peak_memory
from nar.training.optim import build_optimizers, learning_rate_factor
from nar.training.plan import Plan


class Task:
    """What the loop trains: a module, its loss, and what becomes of it."""

    module: nn.Module  # what is optimised, already on the workers' device
    num_samples: int  # of the training set
    summary: str  # what there is to learn from, in a few words for people
    trunk: frozenset[str] = frozenset()  # names of parameters of `module` that `optim.trunk_factor` is of

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:  # noqa: ARG002
        """The repeated parts of `module`, of this task or a copy of it: they are sharded and compiled one by one."""
        return ()

    def fetch(self, batch: Batch) -> Any:
        """Read what `loss` needs of a batch; called in a thread, ahead of time."""
        raise NotImplementedError

    def loss(self, batch: Batch, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over a batch and what `fetch` gave for it, and values to log."""
        raise NotImplementedError

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:  # noqa: ARG002
        """Upkeep after an optimizer step, the same on every process; returns what to warn of, if anything."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The tensors that the task must remember between steps."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Measure `module` (with averaged weights) on held-out data, all processes together: "loss", and others."""
        raise NotImplementedError

    def preview(self, module: nn.Module) -> Image.Image:
        """A picture of what `module` makes; the same seed every time."""
        raise NotImplementedError

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        """Write `module` as a model folder; `training` says how it was made."""
        raise NotImplementedError


TRIAL_SECONDS, TRIAL_LEAST = 8.0, 4  # of steps that are tried to find their time, and their least number


Metrics = Callable[[nn.Module, Task], dict[str, float]]
"""Called with the averaged module and its task whenever previews are sampled; what it returns is logged."""


def train(
    task: Task, plan: Plan, record: dict[str, Any], workers: Workers, *, start: str = "", metrics: Metrics | None = None
) -> Path | None:
    """Train to the end of the plan; returns the folder of the final model, `run/model`.

    Returns None when SIGTERM, SIGINT or SIGHUP came: then the state is saved. `record`, with the recipe as "config" and
    what the data were as "data", is stored in checkpoints. A run goes on from its newest one, or from `start`, such as
    "step-200".

    Raises:
        ValueError: the batch can't be split, or no checkpoint can be read.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
        OSError: a checkpoint can't be written; those before it are kept.
    """
    _check(task, plan, workers)
    run = _Run(task, plan, record, workers, metrics)
    run.resume(start)
    return run.export() if run.finish() else None


def steps_within(seconds: float, task: Task, plan: Plan, workers: Workers) -> int:
    """How many steps of a plan, with their measurements, take so long here: some are tried for a few seconds.

    The task is used up.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says it
        _check(task, plan, workers)
    state, times, moment = _State(task, plan, workers), list[float](), time.monotonic()
    with ExitStack() as stack:
        for step, batches, fetched in _ahead(task, plan, workers, range(plan.num_steps(task.num_samples)), stack):
            _backward(state, plan, workers, step, batches, fetched)
            for optimizer in state.optimizers:
                optimizer.step()
            task.after_step(step, plan.steps, torch.Generator().manual_seed(_mix(plan.seed, step)))
            update_average(state.average, task.module, step, plan.ema_decay)
            before, moment = moment, time.monotonic()
            times.append(moment - before)
            spent = workers.sum(torch.tensor(sum(times), device=workers.device)) / workers.count
            if float(spent) > min(TRIAL_SECONDS, seconds / 4) and step >= TRIAL_LEAST:
                break
    averaged = state.averaged()
    task.evaluate(averaged)
    if workers.first:
        task.preview(averaged)
    measuring, stepping = time.monotonic() - moment, float(np.median(times[1:]))
    both = workers.sum(torch.tensor([stepping, measuring], device=workers.device)) / workers.count
    stepping, measuring = both.tolist()
    return max(1, int((seconds - measuring) / (stepping + measuring / plan.preview_every)))


def share(count: int, size: int, workers: Workers) -> list[slice]:
    """This process's share of `count` held-out samples, in slices of `size` at most."""
    starts = range(workers.rank * size, count, workers.count * size)
    return [slice(start, min(start + size, count)) for start in starts]


def _check(task: Task, plan: Plan, workers: Workers) -> None:
    """Refuse what can't be trained, and warn of what makes little sense."""
    if task.num_samples < 1:
        raise ValueError("the training set is empty")
    num_images = plan.num_steps(task.num_samples) * plan.batch_size
    if plan.optim_for(num_images).warmup_images > num_images and workers.first:
        warnings.warn(
            f"the learning rate rises for optim.warmup_images={plan.optim.warmup_images:,} images and the run has "
            f"{num_images:,}: it ends before it gets there; set a shorter warm-up",
            stacklevel=3,
        )
    num_pieces = workers.count * plan.engine.accumulate
    if plan.batch_size % num_pieces:
        raise ValueError(
            f"batch_size {plan.batch_size} is not a multiple of {num_pieces}, "
            f"{workers.count} processes times engine.accumulate={plan.engine.accumulate}"
        )


class _Step(NamedTuple):
    """What a step has left: means over all processes but for `values`, and whether one of them is asked to stop."""

    loss: float
    gradient_norm: float
    values: dict[str, Tensor]
    stop: bool


class _Run:
    """A run at work: its state, and what is said, saved and logged of it."""

    def __init__(
        self, task: Task, plan: Plan, record: dict[str, Any], workers: Workers, metrics: Metrics | None
    ) -> None:
        self.task, self.plan, self.workers, self.record, self.metrics = task, plan, workers, record, metrics
        self.folder = Path(plan.run)
        self.num_steps = plan.num_steps(task.num_samples)
        self._num_parameters = sum(parameter.numel() for parameter in task.module.parameters())
        self.state = _State(task, plan, workers)
        self.checkpoints = Checkpoints(self.folder, plan.keep_last, workers)
        self.first_step, self._lowest, self._heldout = 0, math.inf, dict[str, float]()
        self._started = time.monotonic()

    def resume(self, start: str) -> None:
        """Go on from a checkpoint, where there is one."""
        record = self.checkpoints.resume(self.state.load, start)
        if record is not None:
            self.first_step = record["step"]
            self._started -= record["seconds"]
            best = self.checkpoints.best()
            self._lowest = math.inf if best is None else read_record(best)["heldout"]

    def finish(self) -> bool:
        """Train to the end of the plan; False when a signal stopped it before, and the state is saved."""
        plan, total = self.plan, self.num_steps * self.plan.batch_size
        with ExitStack() as stack:
            stopping = stack.enter_context(_Stopping(at_once=self.workers.count == 1))
            quiet, done = not self.workers.first, self.first_step * plan.batch_size
            self.log = stack.enter_context(Log(self.folder, self.first_step, plan.batch_size, quiet=quiet))
            bar = stack.enter_context(Progress("training", total, "images", done=done, quiet=quiet))
            bar.say(self._introduction())
            stack.callback(self.checkpoints.close)
            self._since = (self.first_step, time.monotonic())
            ended = self._steps(stack, stopping, bar)
            self.checkpoints.wait()
        self.workers.wait()  # until the first process has renamed the last checkpoint
        return ended

    def export(self) -> Path:
        """Write the final model; returns its folder."""
        plan, step = self.plan, self.num_steps
        best = self.checkpoints.best() if plan.export == "best" else None
        if best is not None and best != self.checkpoints.all()[-1]:
            self.checkpoints.load(best, self.state.load)
            self._heldout, step = {}, read_record(best)["step"]
        averaged = self.state.averaged()
        heldout = self._heldout or self.task.evaluate(averaged)
        if self.workers.first:
            hours = round((time.monotonic() - self._started) / 3600, 3)
            training = {"version": __version__, "images_seen": step * plan.batch_size, "hours": hours}
            training |= {"heldout": {name: round(value, 5) for name, value in heldout.items()}}
            self.task.export(averaged, self.folder / "model", training | {"config": self.record["config"]})
        self.workers.wait()
        return self.folder / "model"

    def _introduction(self) -> str:
        engine, device = self.plan.engine, self.workers.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processes = f"{self.workers.count} processes, " if self.workers.count > 1 else ""
        goes_on = f", goes on after step {self.first_step:,}" if self.first_step else ""
        return (
            f"training {self.folder}: {self.task.summary}; "
            f"{self.num_steps:,} step{'s' * (self.num_steps != 1)} of {self.plan.batch_size}"
            f"{f' ({self.plan.minutes:g} minutes)' if self.plan.minutes else ''}{goes_on}"
            f"; {self._num_parameters:,} parameters; {processes}{name}, {engine.precision}"
        )

    def _steps(self, stack: ExitStack, stopping: _Stopping, bar: Progress) -> bool:
        plan = self.plan
        steps = range(self.first_step, self.num_steps)
        for step, batches, fetched in _ahead(self.task, plan, self.workers, steps, stack):
            made = self._step(step, batches, fetched, stopping)
            done = step + 1
            last = done == self.num_steps
            bar.update(plan.batch_size, loss=f"{made.loss:.4f}")
            self.checkpoints.check()
            if done % plan.log_every == 0 or last:
                self._report(done, made)
            measured = self._measure(done) if done % plan.preview_every == 0 or last else None
            lowest = measured is not None and measured < self._lowest
            if done % plan.checkpoint_every == 0 or last or made.stop or lowest:
                self._save(done, measured)
            if made.stop and not last:
                return False
        return True

    def _step(self, step: int, batches: list[Batch], fetched: list[Any], stopping: _Stopping) -> _Step:
        """One step of all optimizers, and what follows it: upkeep of the task, averages."""
        plan, task, workers = self.plan, self.task, self.workers
        total = self.num_steps * plan.batch_size
        seen, optim = (step + 1) * plan.batch_size, plan.optim_for(total)
        for group in self.state.groups():
            frozen = group.get("trunk") and seen <= optim.trunk_frozen * total
            group["lr"] = 0.0 if frozen else group["initial_lr"] * learning_rate_factor(optim, seen, total)
        loss, values = _backward(self.state, plan, workers, step, batches, fetched)
        bound = plan.optim.clip_norm if plan.optim.clip_norm > 0 else math.inf
        norm = whole(nn.utils.clip_grad_norm_(task.module.parameters(), bound))
        # One exchange a step: the mean loss, and whether any process is asked to stop.
        mean, asked = workers.sum(torch.stack([loss / workers.count, loss.new_tensor(float(stopping.asked))])).tolist()
        if not math.isfinite(mean) or not torch.isfinite(norm):
            rows = ", ".join(map(str, batches[0].indices[:8]))
            raise FloatingPointError(
                f"step {step}: the loss is {mean} and the gradient norm {float(norm)} on rows {rows}, ... of the "
                "data; stopped before the weights were touched. Lower optim.learning_rate or look at these rows; "
                f"the last checkpoint in {self.folder} is intact"
            )
        for optimizer in self.state.optimizers:
            optimizer.step()
        warning = task.after_step(step, self.num_steps, torch.Generator().manual_seed(_mix(plan.seed, step)))
        if warning and workers.first:
            warnings.warn(warning, stacklevel=2)
            self.log.record(step + 1, {"warning": warning})
        update_average(self.state.average, task.module, step, plan.ema_decay)
        return _Step(mean, float(norm), values, asked > 0)

    def _report(self, done: int, made: _Step) -> None:
        """Log what is known of a step after it."""
        names, workers = sorted(made.values), self.workers
        means = workers.sum(torch.stack([made.values[name].float() for name in names]) / workers.count)
        since, moment = self._since
        self._since = (done, time.monotonic())
        speed = (done - since) * self.plan.batch_size / (self._since[1] - moment)
        scalars = dict(zip(names, means.tolist(), strict=True))
        scalars |= {"loss": made.loss, "gradient_norm": made.gradient_norm, **self.state.rates()}
        self.log.scalars(done, scalars | {"images_per_second": speed, **peak_memory(workers.device)})

    def _measure(self, done: int) -> float:
        """Log held-out numbers of the averaged weights and a preview; returns the held-out loss."""
        averaged = self.state.averaged()
        self._heldout = self.task.evaluate(averaged)
        if self.workers.first:
            extra = self.metrics(averaged, self.task) if self.metrics else {}
            named = {f"heldout_{name}": value for name, value in self._heldout.items()}
            self.log.scalars(done, named | {f"metric_{name}": value for name, value in extra.items()})
            self.log.picture(done, self.task.preview(averaged))
        self._since = (done, time.monotonic())
        return self._heldout["loss"]

    def _save(self, done: int, measured: float | None) -> None:
        now = {"seconds": time.monotonic() - self._started, "heldout": measured, "processes": self.workers.count}
        record = self.record | now | {"version": __version__, "torch": torch.__version__}
        self.checkpoints.save(done, self.state.values(), record)
        self._lowest = self._lowest if measured is None else min(self._lowest, measured)


class _State:
    """Everything that training changes: the module, its running average, the optimizer, the task's own tensors."""

    def __init__(self, task: Task, plan: Plan, workers: Workers) -> None:
        self.task = task
        self.average = average = copy.deepcopy(task.module).eval().requires_grad_(False)  # norms use what they saw
        sharded = workers.count > 1 and plan.engine.parallel == "fsdp"
        self._plain = copy.deepcopy(average) if sharded else None
        averages = average, task.blocks(average)
        self.step = spread(_Loss(task), task.blocks(task.module), averages, plan.engine, workers)
        self.optimizers = build_optimizers(
            task.module, plan.optim, task.trunk
        )  # of parameters that were spread in place

    def values(self) -> dict[str, Any]:
        """All of it as nested dicts, by parameter name, so that any number of processes can read it."""
        return {
            "module": get_model_state_dict(self.task.module),
            "average": get_model_state_dict(self.average),
            "optimizer": get_optimizer_state_dict(self.task.module, self.optimizers),
            "task": self.task.state(),
        }

    def load(self, read: Callable[[dict[str, Any]], None]) -> None:
        """Take what `read` fills the tensors of `values` with. Rates and decays stay those of the plan."""
        values = self.values()
        groups = values["optimizer"].pop("param_groups")
        read(values)
        values["optimizer"]["param_groups"] = groups
        set_model_state_dict(self.task.module, values["module"])
        set_model_state_dict(self.average, values["average"])
        set_optimizer_state_dict(self.task.module, self.optimizers, values["optimizer"])
        self.task.load_state(values.get("task", {}))

    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def rates(self) -> dict[str, float]:
        """The learning rates that the optimizers hold, AdamW's and maybe Muon's, to be logged."""
        names = ("learning_rate", "muon_learning_rate")
        return {name: optimizer.param_groups[0]["lr"] for name, optimizer in zip(names, self.optimizers, strict=False)}

    def averaged(self) -> nn.Module:
        """The module with averaged weights, in full on every process."""
        if self._plain is None:
            return self.average
        self._plain.load_state_dict({name: whole(tensor) for name, tensor in self.average.state_dict().items()})
        return self._plain


class _Loss(nn.Module):
    """A task's loss as a forward pass, where DDP and FSDP hook in."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module, self.task = task.module, task

    def forward(self, batch: Batch, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(batch, data)


def _backward(
    state: _State, plan: Plan, workers: Workers, step: int, batches: list[Batch], fetched: list[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the gradients of a step in the parameters; returns this process's mean loss and values to log."""
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total, totals = torch.zeros((), device=workers.device), dict[str, Tensor]()
    half = torch.autocast(workers.device.type, torch.bfloat16, enabled=plan.engine.precision == "bfloat16")
    for index, (batch, data) in enumerate(zip(batches, fetched, strict=True)):
        torch.manual_seed(_mix(plan.seed, step, 1, workers.rank, index))  # dropout masks
        with unsynchronised(state.step, last=index == len(batches) - 1):
            with half:
                loss, values = state.step(batch, data)
                loss = loss / len(batches)
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

    def prepare(step: int) -> tuple[int, list[Batch], list[Any]]:
        batch = batch_of(plan.seed, step, num_samples=task.num_samples, batch_size=plan.batch_size)
        batches = pieces(batch, rank=workers.rank, count=workers.count, accumulate=plan.engine.accumulate)
        return step, batches, [workers.pinned(task.fetch(piece)) for piece in batches]

    waiting = deque(pool.submit(prepare, step) for step in steps[:1])
    for step in steps:
        ready = waiting.popleft()
        waiting.extend(pool.submit(prepare, later) for later in range(step + 1, steps.stop)[:1])
        yield ready.result()


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(2))


class _Stopping:
    """Within it, SIGTERM, SIGHUP and Ctrl-C only set `asked`: the loop stops after the step at hand.

    A second Ctrl-C ends the process at once, where `at_once`: torchrun passes on what the terminal has sent already.
    """

    def __init__(self, *, at_once: bool) -> None:
        self.asked, self._at_once = False, at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):  # the last two are not on every system
            number = getattr(signal, name, None)
            if number is None or threading.current_thread() is not threading.main_thread():
                continue
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.asked and self._at_once:
            os._exit(128 + number)
        self.asked = True
