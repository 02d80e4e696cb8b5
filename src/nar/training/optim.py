"""Optimizer groups and learning-rate curves. Curves are functions of images seen, so they do not depend on batch
size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nar.storage.fields import NotNegative, OneOf, Positive, Range, Share, check


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon beside it, and their learning-rate curve.

    `muon_learning_rate` above 0: the matrices between embedding and output learn by Muon (Jordan et al. 2024; momentum
    0.95, updates scaled to AdamW's size), the rest by AdamW. On one CPU core the tokenizer of `clips` reached 19.9 dB
    in the time in which AdamW alone reached 18.9.

    `curve`: "constant"; "cosine" down to `final_factor`; "multistep", multiplied by `gamma` at each of `milestones`
    (fractions of the whole training). Before it the rate rises linearly from `final_factor` over `warmup_images`.
    `decay`: "matrices" (every parameter of two or more axes, as the image recipes do) or "linear" (weights of linear
    layers only, as the video recipe does).
    """

    learning_rate: Positive = 1e-4
    muon_learning_rate: NotNegative = 0.0
    betas: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.9, 0.95)
    weight_decay: NotNegative = 0.05
    decay: Annotated[str, OneOf("matrices", "linear")] = "matrices"
    clip_norm: NotNegative = 1.0
    curve: Annotated[str, OneOf("constant", "cosine", "multistep")] = "constant"
    warmup_images: Annotated[int, Range(0)] = 0
    final_factor: NotNegative = 0.0
    milestones: tuple[Share, ...] = (1 / 2, 2 / 3, 5 / 6)
    gamma: Positive = 0.2

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
    if config.curve == "cosine":
        progress = min(1.0, (images_seen - warmup) / max(1.0, num_images - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def parameter_groups(module: nn.Module, weight_decay: float, decay: str = "matrices") -> list[dict[str, Any]]:
    """Two AdamW groups, decayed and not, each ordered by parameter name; frozen parameters are left out."""
    linear = {
        f"{name}.weight" if name else "weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)
    }
    named = sorted((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    decayed = [p.ndim >= 2 if decay == "matrices" else name in linear for name, p in named]
    return [
        {"params": [p for (_, p), yes in zip(named, decayed, strict=True) if yes], "weight_decay": weight_decay},
        {"params": [p for (_, p), yes in zip(named, decayed, strict=True) if not yes], "weight_decay": 0.0},
    ]


def build_optimizers(module: nn.Module, config: OptimConfig) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW (eps 1e-8, fused) over the groups of `module`, and Muon where it is asked for; groups know `initial_lr`.

    Raises:
        ValueError: Muon is asked for and there is nothing for it, or this PyTorch has none.
    """
    groups = parameter_groups(module, config.weight_decay, config.decay)
    beta1, beta2 = config.betas
    matrices = _hidden_matrices(module) if config.muon_learning_rate else []
    if config.muon_learning_rate and not matrices:
        raise ValueError("optim.muon_learning_rate: there are no linear layers to train with Muon; set it to 0")
    if matrices and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optim.muon_learning_rate needs PyTorch 2.9 or newer, not {torch.__version__}; set it to 0")
    taken = {id(matrix) for matrix in matrices}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(beta1, beta2), eps=1e-8, fused=True)
    made: tuple[torch.optim.Optimizer, ...] = (adamw,)
    if matrices:
        rate, decay = config.muon_learning_rate, config.weight_decay
        made = (*made, torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def _hidden_matrices(module: nn.Module) -> list[Tensor]:
    """Weights of linear layers, by name, without the projection to the vocabulary."""
    return [
        part.weight
        for name, part in sorted(module.named_modules())
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] != "output" and part.weight.requires_grad
    ]


def side_state(prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and Adam's moments, by name, of a network that is trained beside the one that the loop trains."""
    values = {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, parameter in enumerate(module.parameters()):
        fresh = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}  # what Adam starts from
        moments = optimizer.state.get(parameter) or fresh | {"exp_avg_sq": torch.zeros_like(parameter)}
        values |= {f"{prefix}.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return values


def load_side_state(prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """The inverse of `side_state`."""
    module.load_state_dict({name: state[f"{prefix}.{name}"] for name in module.state_dict()})
    for index, parameter in enumerate(module.parameters()):
        optimizer.state[parameter] = {
            name: state[f"{prefix}.{index}.{name}"].to(parameter.device if name != "step" else "cpu")
            for name in ("step", "exp_avg", "exp_avg_sq")
        }
