"""The discriminator of clips in LARP's training: a transformer that looks at a whole clip, and its losses.

Knows clips and logits; does not know the tokenizer that made them, nor when it is switched on. Legend: `B` batch,
`T H W` frames and pixels, `C` width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar.tokenizer.larp import Bidirectional, sinusoid_grid


class ClipDiscriminator(nn.Module):
    """A transformer with a class token (LARP, Wang et al. 2024): clips (B, 3, T, H, W) to logits (B,), real above 0.

    The defaults are published: 4x8x8 patches, width 512, 12 layers of 8 heads. Positions are a fixed table of sines, so
    any size that is a multiple of the patch works.
    """

    def __init__(
        self,
        dim: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        patch: tuple[int, int, int] = (4, 8, 8),
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Conv3d(3, dim, patch, stride=patch)
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
    """Labels of real and of made clips from two rows of normal numbers `noise` (2, B), as LARP draws them.

    Real ones run from 0.7 to 1, made ones from 0 to 0.3.
    """
    spread = 0.15 * noise.abs()
    return (1 - spread[0]).clamp_min(0.7), spread[1].clamp_max(0.3)


def generator_logistic_loss(fake: Tensor) -> Tensor:
    """What the tokenizer minimises: softplus(-logit), made clips that the discriminator takes for real."""
    return F.softplus(-fake).mean()


def lecam_loss(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021): logits (B,) that leave the moving mean of the other kind cost."""
    return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()
