"""The adversarial part of tokenizer training: a discriminator of patches, and the hinge losses.

Knows pictures; does not know the tokenizer that made them, nor when it is switched on.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): pictures (B, 3, H, W) to one logit a patch, above 0 for real.

    `num_layers` convolutions halve the resolution; with the defaults it has 2,765,633 parameters and a logit sees
    70x70 pixels. Batch normalisation: a training pass updates running statistics.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, in_channels: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            target = channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(width, target, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(target),
                nn.LeakyReLU(0.2),
            ]
            width = target
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        super().__init__(*layers)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions N(0, 0.02), norms N(1, 0.02) with bias 0."""
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
