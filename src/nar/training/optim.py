"""Optimizer groups, and learning-rate curves: functions of images seen, so that they do not depend on batch size."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nar.storage.fields import NotNegative, OneOf, Positive, Range, Share, check
from nar.training.distributed import Workers


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon beside it, and their learning-rate curve.

    `muon_learning_rate` above 0: the matrices between embedding and output learn by Muon (Jordan et al. 2024; momentum
    0.95, updates scaled to AdamW's size), the rest by AdamW. On one CPU core the tokenizer of `clips` reached 19.9 dB
    in the time in which AdamW alone reached 18.9.

    `curve`: "constant"; "cosine" down to `final_factor`; "linear" down to it after a twentieth at full rate (VAR's);
    "multistep", multiplied by `gamma` at each of `milestones` (fractions of the whole training). Before it the rate
    rises linearly from `final_factor` over `warmup_images`.
    `decay`: "matrices" (every parameter of two or more axes, as the image recipes do) or "linear" (weights of linear
    layers only, as the video recipe does).

    Attributes:
        learning_rate: of AdamW, at its highest.
        betas, weight_decay: of AdamW; Muon has the decay too.
        clip_norm: the largest norm of a step's gradient; 0 does not bound it.
        trunk_factor: on the rate of what a model's first head alone would need, but for the output; for `to_diagonal`.
        trunk_frozen: share of the training in which that does not learn at all; FlashAR takes 0.2 of each.
    """

    learning_rate: Positive = 1e-4
    muon_learning_rate: NotNegative = 0.0
    betas: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.9, 0.95)
    weight_decay: NotNegative = 0.05
    decay: Annotated[str, OneOf("matrices", "linear")] = "matrices"
    clip_norm: NotNegative = 1.0
    curve: Annotated[str, OneOf("constant", "cosine", "linear", "multistep")] = "constant"
    warmup_images: Annotated[int, Range(0)] = 0
    final_factor: NotNegative = 0.0
    milestones: tuple[Share, ...] = (1 / 2, 2 / 3, 5 / 6)
    gamma: Positive = 0.2
    trunk_factor: NotNegative = 1.0
    trunk_frozen: Share = 0.0

    def __post_init__(self) -> None:
        check(self, "optim.")


def learning_rate_factor(config: OptimConfig, images_seen: float, num_images: float) -> float:
    """The factor on the base learning rate in a step that ends after `images_seen` of `num_images` images."""
    floor, warmup = config.final_factor, config.warmup_images
    if images_seen <= warmup and warmup:
        return floor + (1 - floor) * images_seen / warmup
    if config.curve == "multistep":
        # A step that ends at a milestone is still of the epoch before it: published schedulers step between epochs.
        return config.gamma ** sum(images_seen > round(milestone * num_images, 3) for milestone in config.milestones)
    progress = min(1.0, (images_seen - warmup) / max(1.0, num_images - warmup))
    if config.curve == "linear":
        return 1 - (1 - floor) * max(0.0, progress - 0.05) / 0.95
    if config.curve == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def parameter_groups(module: nn.Module, weight_decay: float, decay: str = "matrices") -> list[dict[str, Any]]:
    """Two AdamW groups, decayed and not, each ordered by parameter name; frozen parameters are left out."""
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for _, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 if decay == "matrices" else id(parameter) in linear
            groups[0 if decayed else 1]["params"].append(parameter)
    return groups


def build_optimizers(
    module: nn.Module, config: OptimConfig, trunk: Collection[str] = ()
) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW (eps 1e-8, fused) over the groups of `module`, and Muon where it is asked for; groups know `initial_lr`."""
    groups = parameter_groups(module, config.weight_decay, config.decay)
    matrices = [  # of linear layers, by name, without the projection to the vocabulary and what begins as zeros
        part.weight
        for name, part in sorted(module.named_modules())
        if isinstance(part, nn.Linear) and not re.search(r"(^|\.)output$|^gate\.", name) and part.weight.requires_grad
    ]
    matrices = matrices if config.muon_learning_rate else []
    if config.muon_learning_rate and not matrices:
        raise ValueError("optim.muon_learning_rate: there are no linear layers to train with Muon; set it to 0")
    if matrices and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optim.muon_learning_rate needs PyTorch 2.9 or newer, not {torch.__version__}; set it to 0")
    taken = {id(matrix) for matrix in matrices}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    by_trunk = partial(_by_trunk, module, config, trunk)
    adamw = torch.optim.AdamW(by_trunk(groups), lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)
    made: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        rate, decay = config.muon_learning_rate, config.weight_decay
        parts = by_trunk([{"params": matrices}])
        made.append(torch.optim.Muon(parts, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"] * (config.trunk_factor if group.get("trunk") else 1)
    return tuple(made)


def _by_trunk(
    module: nn.Module, config: OptimConfig, trunk: Collection[str], groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Groups in two parts, of which the second ones are of the trunk; as they are where that learns like the rest."""
    if config.trunk_factor == 1 and not config.trunk_frozen:
        return groups
    if not trunk:
        raise ValueError("optim.trunk_factor and optim.trunk_frozen are of models, not of tokenizers: leave them out")
    shared = {id(parameter) for name, parameter in module.named_parameters() if name in trunk}
    parts = [
        {**group, "params": [one for one in group["params"] if (id(one) in shared) == inside], "trunk": inside}
        for inside in (False, True)
        for group in groups
    ]
    return [part for part in parts if part["params"]]


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Side:
    """A network that is trained by Adam beside the one that the loop trains, with gradients of all processes."""

    def __init__(
        self, name: str, network: nn.Module, rate: float, betas: tuple[float, float], workers: Workers
    ) -> None:
        self._name, self._workers, self.network = name, workers, network.to(workers.device)
        self.optimizer = torch.optim.Adam(network.parameters(), rate, betas=betas)

    def step(self, *, scale: float = 1.0, clip_norm: float = 0.0) -> None:
        """One step with the gradients that are there, their mean over all processes divided by `scale`."""
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad = self._workers.mean(parameter.grad) / scale
        if clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Weights and Adam's moments by name."""
        values = {f"{self._name}.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, parameter in enumerate(self.network.parameters()):
            zeros = {name: torch.zeros_like(parameter) for name in _MOMENTS[1:]}  # what Adam starts from
            moments = self.optimizer.state.get(parameter) or {"step": torch.zeros(())} | zeros
            values |= {f"{self._name}.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return values

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.network.load_state_dict({name: state[f"{self._name}.{name}"] for name in self.network.state_dict()})
        for index, parameter in enumerate(self.network.parameters()):
            moments = {name: state[f"{self._name}.{index}.{name}"] for name in _MOMENTS}
            moments |= {name: moments[name].to(parameter.device) for name in _MOMENTS[1:]}
            self.optimizer.state[parameter] = moments | {"step": moments["step"].cpu()}
