"""The adversary of tokenizer training: discriminators, their losses, and their training beside the tokenizer.

Knows real and reconstructed pictures; does not know the tokenizer's other losses. Legend: `B` batch, `T H W` frames and
pixels, `C` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.storage.fields import NotNegative, OneOf, Positive, Range, Size, check
from nar.tokenizer.larp import Bidirectional, sinusoid_grid
from nar.training.distributed import Workers
from nar.training.optim import Side


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

    Attributes:
        learning_rate, betas: of its own AdamW.
    """

    weight: NotNegative = 0.0
    start: Annotated[int, Range(0)] = 0
    network: Annotated[str, OneOf("patch", "transformer")] = "patch"
    num_heads: Size = 8
    every: Size = 1
    lecam: NotNegative = 0.0
    lecam_decay: Annotated[float, Range(0, below=1)] = 0.999
    adaptive: bool = True
    learn_from: Annotated[int, Range(0)] = 0
    channels: Size = 64
    num_layers: Size = 3
    frames: Size = 1
    learning_rate: Positive = 1e-4
    betas: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.5, 0.9)
    clip_norm: NotNegative = 0.0

    def __post_init__(self) -> None:
        check(self, "adversary.")
        if self.frames > 1 and self.network != "patch":
            raise ValueError(f"adversary.frames {self.frames} is of the network patch; a transformer sees whole clips")
        if self.lecam and self.network == "patch":
            raise ValueError(f"adversary.lecam {self.lecam} is of the network transformer; with patch it must be 0")
        if self.learn_from > self.start:
            late = f"adversary.learn_from {self.learn_from} is after adversary.start {self.start}"
            raise ValueError(f"{late}: an untrained discriminator would act on the tokenizer")


class Adversary(Side):
    """Tells real pictures from reconstructed ones, and turns that into a loss for the tokenizer.

    With `half` it learns under bfloat16 autocast, as the tokenizer then does. `losses` are the last ones before any
    weighting, to be logged: "adversarial" of the tokenizer, and "discriminator".
    """

    def __init__(self, config: AdversaryConfig, workers: Workers, *, half: bool = False) -> None:
        self.config, self._half = config, half
        if config.network == "patch":
            network: nn.Module = PatchDiscriminator(config.channels, config.num_layers, in_channels=3 * config.frames)
        else:
            network = ClipDiscriminator(config.channels, config.num_layers, config.num_heads)
        super().__init__("adversary", network, config.learning_rate, config.betas, workers)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._means = torch.zeros(2, device=workers.device)  # of the logits of real and of made clips
        self.losses: dict[str, Tensor] = {}

    @torch.no_grad()
    def check(self, sample: Tensor) -> None:
        """Judge a picture or clip (1, 3, ...) once, and change nothing; raises ValueError where it can't be judged."""
        self.network.eval()
        try:
            self.judge(sample)
        except (RuntimeError, ValueError) as error:
            size = "x".join(map(str, sample.shape[2:]))
            at_once = f" and frames {self.config.frames}" if self.config.frames > 1 else ""
            raise ValueError(
                f"adversary.network {self.config.network!r} with num_layers {self.config.num_layers}{at_once} can't "
                f"judge samples of {size} ({str(error).splitlines()[0]}); choose another network, fewer layers or "
                "frames, or other sizes"
            ) from error
        self.network.train()

    def loss(self, real: Tensor, fake: Tensor, reconstruction: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """The tokenizer's adversarial loss on reconstructed pictures `fake`, like `real`, already weighted.

        `reconstruction` is its reconstruction loss, and `last_layer` the weight at which the two are balanced.
        """
        if step >= self.config.learn_from and step % self.config.every == 0:
            self._seen.append((real.float(), fake.detach().float()))
        if step < self.config.start:
            return torch.zeros((), device=fake.device)
        self.network.requires_grad_(False)
        judged = self.judge(fake)
        adversarial = generator_hinge_loss(judged) if self.config.network == "patch" else F.softplus(-judged).mean()
        self.losses["adversarial"] = adversarial.detach()
        if not self.config.adaptive:
            return self.config.weight * adversarial
        (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (had,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        # Of all processes, as if one had computed the piece; later pieces of the step are not known yet.
        wanted, had = self._workers.mean(wanted), self._workers.mean(had)
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
        self.network.requires_grad_(True)
        with torch.autocast(self._workers.device.type, torch.bfloat16, enabled=self._half):
            loss = self._discriminator_loss(real, fake, generator)
        loss.backward()
        self.step(clip_norm=self.config.clip_norm)
        self.losses["discriminator"] = loss.detach()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Weights, optimizer moments and mean logits by name."""
        means = {"adversary.mean_logits": self._means} if self.config.lecam else {}
        return super().state() | means

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        super().load_state(state)
        if self.config.lecam:
            self._means = state["adversary.mean_logits"].to(self._means.device)

    def judge(self, pixels: Tensor) -> Tensor:
        """Logits of pictures (B, 3, H, W) or clips (B, 3, T, H, W), of which a patch network sees `frames` at once."""
        if self.config.network == "patch" and pixels.ndim == 5:
            pixels = pixels.unflatten(2, (-1, self.config.frames)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return cast(Tensor, self.network(pixels))

    def _discriminator_loss(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
        judged = self.judge(real).float(), self.judge(fake).float()
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


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): pictures (B, 3, H, W) to one logit a patch, above 0 for real.

    `num_layers` convolutions halve the resolution; with the defaults it has 2,765,633 parameters and a logit sees
    70x70 pixels. Batch normalisation: a training pass updates running statistics. Weights of convolutions begin as
    N(0, 0.02), of norms as N(1, 0.02) with bias 0.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, in_channels: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            target, stride = channels * min(2**index, 8), 2 if index < num_layers else 1
            convolution = nn.Conv2d(width, target, 4, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(target), nn.LeakyReLU(0.2)]
            width = target
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        super().__init__(*layers)
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)


def discriminator_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: logits of real pictures above 1, of fake ones below -1."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_hinge_loss(fake: Tensor) -> Tensor:
    """What the tokenizer minimises: fake pictures that the discriminator takes for real."""
    return -fake.mean()


class ClipDiscriminator(nn.Module):
    """A transformer with a class token (LARP, Wang et al. 2024): clips (B, 3, T, H, W) to logits (B,), real above 0.

    The defaults are published: 4x8x8 patches, width 512, 12 layers of 8 heads. Positions are a fixed table of sines, so
    any size that is a multiple of the patch works.
    """

    patch = (4, 8, 8)

    def __init__(self, dim: int = 512, num_layers: int = 12, num_heads: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv3d(3, dim, self.patch, stride=self.patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.layers = Bidirectional(dim, num_layers, num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Judge clips; raises ValueError for pictures, and when the patch does not divide the size of clips."""
        if clips.ndim != 5:
            raise ValueError(f"clips must be (batch, 3, frames, height, width), not {tuple(clips.shape)}")
        grid = tuple(size // side for size, side in zip(clips.shape[2:], self.patch, strict=True))
        if any(size % side or not size for size, side in zip(clips.shape[2:], self.patch, strict=True)):
            raise ValueError(
                f"clips of {'x'.join(map(str, clips.shape[2:]))} frames and pixels are not a multiple of the "
                f"discriminator's patch {'x'.join(map(str, self.patch))}"
            )
        x = self.patch_embed(clips).flatten(2).transpose(1, 2)  # (B, P, C)
        x = x + sinusoid_grid(cast(tuple[int, int, int], grid), x.shape[-1]).to(x)
        x = torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return cast(Tensor, self.head(self.norm(self.layers(x)[:, 0])).squeeze(-1))


def discriminator_logistic_loss(real: Tensor, fake: Tensor, real_labels: Tensor, fake_labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B,) of real and made clips against labels (B,), which may be soft."""
    judged = F.binary_cross_entropy_with_logits
    return 0.5 * (judged(real.float(), real_labels) + judged(fake.float(), fake_labels))


def noisy_labels(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as LARP draws them, of real clips in 0.7..1 and of made ones in 0..0.3, from normal `noise` (2, B)."""
    spread = 0.15 * noise.abs()
    return (1 - spread[0]).clamp_min(0.7), spread[1].clamp_max(0.3)


def lecam_loss(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021): logits (B,) that leave the moving mean of the other kind cost."""
    return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()
