"""The plan of a run: how long and how it trains, and what it leaves.

Knows settings; does not know data, networks or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from nar.storage.fields import OneOf, Range, Seed, Size, check
from nar.training.distributed import Engine
from nar.training.optim import OptimConfig

LENGTHS = ("num_images", "epochs", "steps", "minutes")
# Settings that touch no weights.
_FREE = {"about", "run", "prompts", "keep_last", "log_every", "checkpoint_every", "cuda_recipe", "by_count"}
_FREE_ENGINE = {"device", "workers"}


@dataclass(frozen=True)
class Plan:
    """How long and how a run trains, and what it leaves. The `*_every` count steps.

    Attributes:
        run: the folder of the run.
        optim: rates and decays, and which optimizers.
        engine: processes, devices, number formats.
        batch_size: samples of a step, over all processes and pieces.
        num_images, epochs, steps, minutes: the length; one of them, which takes the place of what a base says. Minutes
            become steps by a short measurement when the run begins; the warm-up is then at most a fifth of them.
        images_between: the fewest and most images of `epochs` that are given with it.
        ema_decay: of the averaged weights, a step.
        seed: of everything random.
        log_every: steps between records in the log.
        preview_every: steps between measurements on held-out data, with previews.
        checkpoint_every: steps between checkpoints.
        keep_last: checkpoints that are kept, beside the best one.
        export: which averaged weights become the final model: the "last" ones, or those of the "best" checkpoint by
            held-out loss.
    """

    REPLACED: ClassVar = dict.fromkeys(LENGTHS, (*LENGTHS, "images_between"))  # see `nar.storage.config.load`

    run: str = "runs/default"
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: Engine = field(default_factory=Engine)
    batch_size: Size = 64
    num_images: Annotated[int, Range(0, 10**12)] = 0  # a hundred times what any published run saw
    epochs: Annotated[float, Range(0, 10**6)] = 0.0
    steps: Annotated[int, Range(0, 10**9)] = 0
    minutes: Annotated[float, Range(0, 10**6)] = 0.0  # two years
    images_between: tuple[int, int] = (0, 2**62)
    ema_decay: Annotated[float, Range(0, below=1)] = 0.999
    seed: Seed = 0
    log_every: Annotated[int, Range(1)] = 50
    preview_every: Annotated[int, Range(1)] = 500
    checkpoint_every: Annotated[int, Range(1)] = 500
    keep_last: Annotated[int, Range(1)] = 2
    export: Annotated[str, OneOf("last", "best")] = "last"

    def __post_init__(self) -> None:
        check(self)
        if not self.run.strip():
            raise ValueError(f"run={self.run!r} is no folder; give one, such as run=runs/mine")
        given = [name for name in LENGTHS if getattr(self, name)]
        if len(given) != 1 and given != ["steps", "minutes"]:  # minutes that have become steps; see `load`
            found = " and ".join(f"{name}={getattr(self, name):g}" for name in given) or "none"
            raise ValueError(f"one of {', '.join(LENGTHS)} says how long the run is; found {found}")
        if self.images_between[0] > self.images_between[1]:
            raise ValueError(f"images_between must be two rising numbers, not {self.images_between}")

    def num_steps(self, num_samples: int) -> int:
        """Steps of the whole training, on a set of `num_samples`."""
        if self.steps:
            return self.steps
        low, high = self.images_between
        return math.ceil((self.num_images or min(max(self.epochs * num_samples, low), high)) / self.batch_size)

    def optim_for(self, num_images: int) -> OptimConfig:
        """`optim`, with a warm-up of at most a fifth of the images that `minutes` are enough for."""
        if not self.minutes:
            return self.optim
        return replace(self.optim, warmup_images=min(self.optim.warmup_images, num_images // 5))


def of_weights(config: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that touch its weights."""
    engine = {name: value for name, value in config["engine"].items() if name not in _FREE_ENGINE}
    return {name: value for name, value in config.items() if name not in _FREE} | {"engine": engine}
