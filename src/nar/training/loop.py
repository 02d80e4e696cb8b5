"""The training loop: one for tokenizers and models, resumed by running the same command again.

Everything random in a step is a function of (seed, step), so that a resumed run continues bit for bit without stored
generator states. Knows steps, optimizer and files; a `Task` knows what is trained on what.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nar import __version__
from nar.config import difference
from nar.training.checkpoint import read_checkpoint, write_checkpoint
from nar.training.ema import average_of
from nar.training.optim import OptimConfig, build_optimizer, learning_rate_factor


class Task(Protocol):
    """What the loop trains: a module, its loss, and what becomes of it."""

    @property
    def module(self) -> nn.Module:
        """What is optimised."""
        ...

    @property
    def num_samples(self) -> int:
        """Size of the training set."""
        ...

    def loss(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, given as indices into the training set, and values to log; draws from `generator`."""
        ...

    def after_step(self, step: int, generator: torch.Generator) -> None:
        """Upkeep after an optimizer step (reviving dead codes, say)."""
        ...

    def state(self) -> dict[str, Any]:
        """What the task must remember between steps, as tensors and plain data."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Measure `module` (with averaged weights) on held-out data."""
        ...

    def preview(self, module: nn.Module) -> Image.Image:
        """A picture of what `module` makes; the same seed every time."""
        ...

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        """Write `module` as a model folder; `training` says how it was made."""
        ...


def train(
    task: Task,
    *,
    run: Path,
    config: dict[str, Any],
    optim: OptimConfig,
    batch_size: int,
    num_images: int,
    ema_decay: float,
    seed: int,
    log_every: int,
    preview_every: int,
    checkpoint_every: int,
    override: bool = False,
) -> Path:
    """Train until `num_images` have been seen; returns the folder of the final model, `run/model`.

    The `*_every` arguments count steps. `config` is stored in the checkpoint; a resumed run whose config differs is
    refused unless `override`.

    Raises:
        ValueError: the config differs from the one that the run was started with.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
    """
    run.mkdir(parents=True, exist_ok=True)
    num_steps = math.ceil(num_images / batch_size)
    if task.num_samples < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the training set, {task.num_samples} samples")
    module = task.module
    optimizer = build_optimizer(module, optim)
    average = average_of(module, ema_decay)
    first_step, seconds = 0, 0.0
    if (checkpoint := read_checkpoint(run)) is not None:
        changed = difference(checkpoint["config"], config)
        if changed and not override:
            raise ValueError(
                f"{run} was started with other settings: {'; '.join(changed)}; "
                "use another run=DIR, or --override to go on with the new ones"
            )
        module.load_state_dict(checkpoint["module"])
        average.load_state_dict(checkpoint["average"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        task.load_state(checkpoint["task"])
        first_step, seconds = checkpoint["step"], checkpoint["seconds"]
    batches = _batches(task.num_samples, batch_size, seed, first_step)
    started = time.monotonic() - seconds
    with ExitStack() as stack:
        log = _Log(run, first_step, stack)
        bar = stack.enter_context(tqdm(total=num_steps * batch_size, initial=first_step * batch_size, unit="img"))
        for step in range(first_step, num_steps):
            generator = torch.Generator().manual_seed(_mix(seed, step))
            torch.manual_seed(_mix(seed, step) + 1)  # dropout masks
            factor = learning_rate_factor(optim, (step + 1) * batch_size, num_steps * batch_size)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate * factor
            loss, values = task.loss(next(batches), generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), optim.clip_norm if optim.clip_norm > 0 else math.inf)
            if not torch.isfinite(loss) or not torch.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}: the loss is {float(loss.detach())} and the gradient norm {float(norm)}; "
                    f"stopped before the weights were touched. Lower optim.learning_rate or look at this batch's data; "
                    f"the last checkpoint in {run} is intact"
                )
            optimizer.step()
            task.after_step(step, generator)
            average.update_parameters(module)
            bar.update(batch_size)
            done = step + 1
            if done % log_every == 0 or done == num_steps:
                scalars = {name: float(value) for name, value in values.items()}
                scalars |= {
                    "loss": float(loss.detach()),
                    "gradient_norm": float(norm),
                    "learning_rate": optim.learning_rate * factor,
                }
                scalars["images_per_second"] = float(bar.format_dict["rate"] or 0.0)
                log.scalars(done, done * batch_size, scalars)
                bar.set_postfix(loss=f"{scalars['loss']:.4f}")
            if done % preview_every == 0 or done == num_steps:
                log.scalars(
                    done, done * batch_size, {f"heldout_{k}": v for k, v in task.evaluate(average.module).items()}
                )
                log.picture(done, task.preview(average.module))
            if done % checkpoint_every == 0 or done == num_steps:
                write_checkpoint(
                    run,
                    {
                        "config": config,
                        "version": __version__,
                        "step": done,
                        "seconds": time.monotonic() - started,
                        "module": module.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "task": task.state(),
                    },
                )
    training = {
        "version": __version__,
        "images_seen": num_steps * batch_size,
        "hours": round((time.monotonic() - started) / 3600, 3),
        "heldout": {name: round(value, 5) for name, value in task.evaluate(average.module).items()},
        "config": config,
    }
    task.export(average.module, run / "model", training)
    return run / "model"


def _batches(num_samples: int, batch_size: int, seed: int, first_step: int) -> Iterator[np.ndarray]:
    """Endless batches of indices: a new order each epoch, the incomplete last batch dropped."""
    per_epoch = num_samples // batch_size
    step = first_step
    while True:
        order = np.random.default_rng((seed, step // per_epoch)).permutation(num_samples)
        for position in range(step % per_epoch, per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]
            step += 1


def _mix(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(2))


class _Log:
    """`metrics.jsonl` (a line a record), TensorBoard where installed, and preview pictures, all in the run's folder."""

    def __init__(self, run: Path, first_step: int, stack: ExitStack) -> None:
        self._previews = run / "previews"
        self._previews.mkdir(exist_ok=True)
        path = run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")  # what a killed run logged too far
        self._file = stack.enter_context(path.open("a", encoding="utf-8"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
            stack.callback(self._board.close)

    def scalars(self, step: int, images_seen: int, values: dict[str, float]) -> None:
        record = {"step": step, "images_seen": images_seen, "time": round(time.time(), 1), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, images_seen)

    def picture(self, step: int, picture: Image.Image) -> None:
        picture.save(self._previews / f"{step:07d}.png")
        if self._board is not None:
            self._board.add_image("preview", np.asarray(picture), step, dataformats="HWC")
