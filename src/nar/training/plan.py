"""The plan of a run: how long and how it trains, and what it leaves.

Knows settings; does not know data, networks or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from nar.storage.fields import NotNegative, OneOf, Range, Size, check
from nar.training.distributed import Engine
from nar.training.optim import OptimConfig

# Settings that touch no weights.
_FREE = {"about", "run", "prompts", "keep_last", "log_every", "checkpoint_every", "cuda_recipe"}
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
    batch_size: Size = 64
    num_images: Annotated[int, Range(0)] = 0
    epochs: NotNegative = 0.0
    images_between: tuple[int, int] = (0, 2**62)
    ema_decay: Annotated[float, Range(0, below=1)] = 0.999
    seed: int = 0
    log_every: Annotated[int, Range(1)] = 50
    preview_every: Annotated[int, Range(1)] = 500
    checkpoint_every: Annotated[int, Range(1)] = 500
    keep_last: Annotated[int, Range(1)] = 2
    export: Annotated[str, OneOf("last", "best")] = "last"

    def __post_init__(self) -> None:
        check(self)
        if (self.num_images > 0) == (self.epochs > 0):
            both = f"num_images={self.num_images} and epochs={self.epochs}"
            raise ValueError(f"either num_images or epochs must be set, not {both}")
        if self.images_between[0] > self.images_between[1]:
            raise ValueError(f"images_between must be two rising numbers, not {self.images_between}")

    def num_steps(self, num_samples: int) -> int:
        """Steps of the whole training, on a set of `num_samples`."""
        low, high = self.images_between
        return math.ceil((self.num_images or min(max(self.epochs * num_samples, low), high)) / self.batch_size)


def of_weights(config: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that touch its weights."""
    engine = {name: value for name, value in config["engine"].items() if name not in _FREE_ENGINE}
    return {name: value for name, value in config.items() if name not in _FREE} | {"engine": engine}
