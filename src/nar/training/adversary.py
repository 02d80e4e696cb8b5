"""The adversary of tokenizer training: a discriminator with its own optimizer, trained beside the tokenizer.

Knows real and reconstructed pictures; does not know the tokenizer's other losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nar.training.clip_discriminator import (
    ClipDiscriminator,
    discriminator_logistic_loss,
    generator_logistic_loss,
    lecam_loss,
    noisy_labels,
)
from nar.training.distributed import Workers
from nar.training.optim import load_side_state, side_state
from nar.training.patch_discriminator import PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss


@dataclass(frozen=True)
class AdversaryConfig:
    """A PatchGAN with hinge losses, or for clips LARP's transformer with logistic ones; `weight` 0 turns it off.

    With `adaptive`, `weight` is the strength of its gradient at the decoder's last layer relative to that of the
    reconstruction loss (VQGAN); otherwise its loss is simply multiplied by `weight` (LlamaGen). It acts on the
    tokenizer from step `start` on, and is itself trained from step `learn_from` on: with the published trainers that
    is `start` too; it learns in every `every`-th step only. `clip_norm` bounds the norm of its gradient, 0 does not.

    `network` is "patch", with `num_layers` convolutions from `channels` on, or "transformer", with `num_layers` layers
    of width `channels` and `num_heads`; this one learns from noisy labels, and `lecam` is the strength of its LeCam
    regularisation, which compares logits with their means, moving with `lecam_decay`. Of clips, a patch network sees
    `frames` in a row at once, as channels: from 2 on it judges motion too. Their number of frames must be a multiple.
    """

    weight: float = 0.0
    start: int = 0
    network: str = "patch"
    num_heads: int = 8
    every: int = 1
    lecam: float = 0.0
    lecam_decay: float = 0.999
    adaptive: bool = True
    learn_from: int = 0
    channels: int = 64
    num_layers: int = 3
    frames: int = 1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.weight < 0:
            raise ValueError(f"adversary.weight must be at least 0, not {self.weight}")
        if self.network not in ("patch", "transformer"):
            raise ValueError(f"adversary.network must be patch or transformer, not {self.network!r}")
        for name in ("every", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"adversary.{name} must be at least 1, not {getattr(self, name)}")
        if self.frames > 1 and self.network != "patch":
            raise ValueError(f"adversary.frames {self.frames} is of the network patch; a transformer sees whole clips")
        if self.lecam and self.network == "patch":
            raise ValueError(f"adversary.lecam {self.lecam} is of the network transformer; with patch it must be 0")
        if self.learn_from > self.start:
            raise ValueError(
                f"adversary.learn_from {self.learn_from} is after adversary.start {self.start}: "
                "an untrained discriminator would act on the tokenizer"
            )


class Adversary:
    """Tells real pictures from reconstructed ones, and turns that into a loss for the tokenizer.

    With `half` it learns under bfloat16 autocast, as the tokenizer then does.
    """

    def __init__(self, config: AdversaryConfig, workers: Workers, *, half: bool = False) -> None:
        self.config, self._workers, self._half = config, workers, half
        self.discriminator = _network(config).to(workers.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), config.learning_rate, betas=config.betas)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._means = torch.zeros(2, device=workers.device)  # of the logits of real and of made clips
        self._losses: dict[str, Tensor] = {}

    @torch.no_grad()
    def check(self, sample: Tensor) -> None:
        """Judge a picture or clip (1, 3, ...) once, and change nothing.

        Raises:
            ValueError: the discriminator can't judge what is of this size, and would fail only when it starts to learn.
        """
        self.discriminator.eval()
        try:
            self._judge(sample)
        except (RuntimeError, ValueError) as error:
            size = "x".join(map(str, sample.shape[2:]))
            at_once = f" and frames {self.config.frames}" if self.config.frames > 1 else ""
            raise ValueError(
                f"adversary.network {self.config.network!r} with num_layers {self.config.num_layers}{at_once} can't "
                f"judge samples of {size} ({str(error).splitlines()[0]}); choose another network, fewer layers or "
                "frames, or other sizes"
            ) from error
        self.discriminator.train()

    def scalars(self) -> dict[str, Tensor]:
        """The last losses before any weighting, to be logged: "adversarial" of the tokenizer, "discriminator"."""
        return dict(self._losses)

    def loss(self, real: Tensor, fake: Tensor, reconstruction: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """The tokenizer's adversarial loss on reconstructed pictures `fake`, like `real`, already weighted.

        `reconstruction` is its reconstruction loss, and `last_layer` the weight at which the two are balanced.
        """
        if step >= self.config.learn_from and step % self.config.every == 0:
            self._seen.append((real.float(), fake.detach().float()))
        if step < self.config.start:
            return torch.zeros((), device=fake.device)
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(False)
        judged = self._judge(fake)
        adversarial = (
            generator_hinge_loss(judged) if self.config.network == "patch" else generator_logistic_loss(judged)
        )
        self._losses["adversarial"] = adversarial.detach()
        if not self.config.adaptive:
            return self.config.weight * adversarial
        (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (had,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        balance = (wanted.norm() / (had.norm() + 1e-6)).clamp(max=1e4)
        weighted: Tensor = self.config.weight * balance * adversarial
        return weighted

    def update(self, generator: torch.Generator) -> Tensor | None:
        """One step of the discriminator on the pictures seen since the last one; returns its own loss.

        None when it saw none, before it learns. `generator` is the step's, the same on every process.
        """
        if not self._seen:
            return None
        real, fake = (torch.cat(pictures) for pictures in zip(*self._seen, strict=True))
        self._seen = []
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)
        with torch.autocast(self._workers.device.type, torch.bfloat16, enabled=self._half):
            loss = self._discriminator_loss(real, fake, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                parameter.grad = self._workers.sum(parameter.grad) / self._workers.count
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self._losses["discriminator"] = loss.detach()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Weights, optimizer moments and mean logits by name."""
        means = {"adversary.mean_logits": self._means} if self.config.lecam else {}
        return side_state("adversary", self.discriminator, self.optimizer) | means

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        load_side_state("adversary", self.discriminator, self.optimizer, state)
        if self.config.lecam:
            self._means = state["adversary.mean_logits"].to(self._means.device)

    def _judge(self, pixels: Tensor) -> Tensor:
        """Logits of pictures (B, 3, H, W) or clips (B, 3, T, H, W), of which a patch network sees `frames` at once."""
        if self.config.network == "patch" and pixels.ndim == 5:
            pixels = pixels.unflatten(2, (-1, self.config.frames)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return cast(Tensor, self.discriminator(pixels))

    def _discriminator_loss(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
        judged = self._judge(real).float(), self._judge(fake).float()
        if self.config.network == "patch":
            return discriminator_hinge_loss(*judged)
        # Drawn for all processes, so that any number of them draws the same.
        noise = torch.randn(2, self._workers.count * len(real), generator=generator)
        mine = noise[:, self._workers.rank * len(real) : (self._workers.rank + 1) * len(real)].to(real.device)
        loss = discriminator_logistic_loss(*judged, *noisy_labels(mine))
        if self.config.lecam:
            loss = loss + self.config.lecam * lecam_loss(*judged, *self._means)
            means = self._workers.mean(torch.stack([logits.detach().float().mean() for logits in judged]))
            self._means = self.config.lecam_decay * self._means + (1 - self.config.lecam_decay) * means
        return loss


def _network(config: AdversaryConfig) -> nn.Module:
    if config.network == "patch":
        return PatchDiscriminator(config.channels, config.num_layers, in_channels=3 * config.frames)
    return ClipDiscriminator(config.channels, config.num_layers, config.num_heads)
