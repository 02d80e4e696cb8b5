"""The adversary of tokenizer training: a discriminator with its own optimizer, trained beside the tokenizer.

Knows real and reconstructed pictures; does not know the tokenizer's other losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nar.tokenizer.adversarial import PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss
from nar.training.distributed import Workers


@dataclass(frozen=True)
class AdversaryConfig:
    """A PatchGAN with hinge losses; `weight` 0 turns it off.

    With `adaptive`, `weight` is the strength of its gradient at the decoder's last layer relative to that of the
    reconstruction loss (VQGAN); otherwise its loss is simply multiplied by `weight` (LlamaGen). It acts on the
    tokenizer from step `start` on, and is itself trained from step `learn_from` on: with the published trainers that
    is `start` too. `clip_norm` bounds the norm of its gradient, 0 does not.
    """

    weight: float = 0.0
    start: int = 0
    adaptive: bool = True
    learn_from: int = 0
    channels: int = 64
    num_layers: int = 3
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.weight < 0:
            raise ValueError(f"adversary.weight must be at least 0, not {self.weight}")
        if self.learn_from > self.start:
            raise ValueError(
                f"adversary.learn_from {self.learn_from} is after adversary.start {self.start}: "
                "an untrained discriminator would act on the tokenizer"
            )


class Adversary:
    """Tells real pictures from reconstructed ones, and turns that into a loss for the tokenizer."""

    def __init__(self, config: AdversaryConfig, workers: Workers) -> None:
        self.config, self._workers = config, workers
        self.discriminator = PatchDiscriminator(config.channels, config.num_layers).to(workers.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), config.learning_rate, betas=config.betas)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def loss(self, real: Tensor, fake: Tensor, reconstruction: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """The tokenizer's adversarial loss on reconstructed pictures `fake` (B, 3, H, W), already weighted.

        `reconstruction` is its reconstruction loss, and `last_layer` the weight at which the two are balanced.
        """
        if step >= self.config.learn_from:
            self._seen.append((real.float(), fake.detach().float()))
        if step < self.config.start:
            return torch.zeros((), device=fake.device)
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(False)
        adversarial = generator_hinge_loss(self.discriminator(fake))
        if not self.config.adaptive:
            return self.config.weight * adversarial
        (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (had,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        balance = (wanted.norm() / (had.norm() + 1e-6)).clamp(max=1e4)
        weighted: Tensor = self.config.weight * balance * adversarial
        return weighted

    def update(self) -> Tensor | None:
        """One step of the discriminator on the pictures seen since the last one; returns its own loss.

        None when it saw none, before it learns.
        """
        if not self._seen:
            return None
        real, fake = (torch.cat(pictures) for pictures in zip(*self._seen, strict=True))
        self._seen = []
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)
        loss = discriminator_hinge_loss(self.discriminator(real), self.discriminator(fake))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                parameter.grad = self._workers.sum(parameter.grad) / self._workers.count
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer moments by name."""
        values = {f"adversary.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
        for index, parameter in enumerate(self.discriminator.parameters()):
            fresh = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}  # what Adam starts from
            moments = self.optimizer.state.get(parameter) or fresh | {"exp_avg_sq": torch.zeros_like(parameter)}
            values |= {f"adversary.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return values

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        names = self.discriminator.state_dict().keys()
        self.discriminator.load_state_dict({name: state[f"adversary.{name}"] for name in names})
        for index, parameter in enumerate(self.discriminator.parameters()):
            moments = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {
                name: state[f"adversary.{index}.{name}"].to(parameter.device if name != "step" else "cpu")
                for name in moments
            }
