"""Real pictures with some of their tokens drawn anew: what a model that errs now and then would make of them.

Knows tokenizers and uint8 arrays; does not know models or metrics. Dimensions: B pictures or clips, T frames, H x W
pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from nar.media.pixels import as_images, as_pixels
from nar.tokenizer import Tokenizer


@torch.inference_mode()
def resample_tokens(tokenizer: Tokenizer, images: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Encode uint8 pictures (B, H, W, 3) or clips (B, T, H, W, 3), draw a share of their tokens anew, decode.

    New tokens are taken from all places of all these pictures, so they follow the marginal distribution of real tokens.
    With one seed the tokens changed at a small share are also changed at a larger one, and to the same values; share 0
    shows what the tokenizer alone costs.
    """
    place = next(tokenizer.parameters()).device
    codes = tokenizer.encode(as_pixels(images).to(place)).cpu().numpy()
    generator = np.random.default_rng(seed)
    changed = generator.random(codes.shape) < share
    drawn = codes.reshape(-1)[generator.integers(0, codes.size, codes.shape)]
    return as_images(tokenizer.decode(torch.from_numpy(np.where(changed, drawn, codes)).to(place)))
