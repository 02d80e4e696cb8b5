"""The features of prompts for one model: the encoder opened when it is needed, the last features kept.

Knows strings and encoders; does not know the model, but for the size of its features. Legend: `B` prompts, `T` text
tokens, `F` feature width.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from nar.text.encoder import TextEncoder, TextEncoderConfig

KEPT_CAPTIONS = 128  # whose features are not computed again: of flan-t5-xl a MB each


class Captions:
    """Prompts to features (B, length, dim) on a device.

    Attributes:
        encoder: an open one (or anything with its `encode`, `blank` and `close`), the config of one that is opened at
            the first prompt that says something, or None.
    """

    def __init__(
        self, encoder: TextEncoderConfig | TextEncoder | None, *, length: int, dim: int, device: torch.device
    ) -> None:
        self.encoder = encoder
        self.length, self.dim, self.device = length, dim, device
        self._kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._lock = threading.Lock()  # threads of a server ask at once

    def open(self) -> TextEncoder:
        """Open the encoder, unless it is.

        Raises:
            ValueError: the model names none and none was given, or it is another one than the model was trained with.
            ModuleNotFoundError: a package is missing.
        """
        if self.encoder is not None and not isinstance(self.encoder, TextEncoderConfig):
            return self.encoder
        if self.encoder is None or not self.encoder.source:
            raise ValueError(
                "this model's folder names no text encoder; give the one that it was trained with: --text-encoder "
                "FOLDER, or text_encoder=FOLDER (published NAR and LlamaGen text models: google/flan-t5-xl)"
            )
        encoder = TextEncoder(self.encoder, device=self.device)
        if encoder.dim != self.dim:
            widths = f"width {encoder.dim}, the model takes {self.dim}; use the one that it was trained with"
            raise ValueError(f"text encoder {self.encoder.source} has {widths}")
        self.encoder = encoder
        return encoder

    def close(self) -> None:
        """Free the memory of the encoder and of kept features; the next prompt takes it again."""
        self._kept = {}
        if self.encoder is not None and not isinstance(self.encoder, TextEncoderConfig):
            self.encoder.close()

    def moved(self, device: torch.device) -> Captions:
        """The same on another device, whose encoder reads its weights at its first prompt."""
        encoder = self.encoder
        if isinstance(encoder, TextEncoder):
            encoder = copy.copy(encoder)
            encoder.close()
            encoder.device = device
        return Captions(encoder, length=self.length, dim=self.dim, device=device)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, T, F), their mask (B, T), and which prompts (B,) say nothing.

        Each is encoded alone, so that its features do not depend on the others.
        """
        with self._lock:
            columns = zip(*map(self._features, prompts), strict=True)
        features, mask, blank = (torch.cat(column).to(self.device) for column in columns)
        return features, mask, blank

    def _features(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        if is_blank(prompt):  # no encoder is needed for nothing
            last = torch.arange(self.length, device=self.device) == self.length - 1  # where the text ends
            features = torch.zeros(1, self.length, self.dim, device=self.device)
            return features, last[None], torch.ones(1, dtype=torch.bool, device=self.device)
        encoder = self.open()
        if prompt not in self._kept:
            while len(self._kept) >= KEPT_CAPTIONS:
                del self._kept[next(iter(self._kept))]
            features, mask = encoder.encode([prompt])
            self._kept[prompt] = features, mask, encoder.blank([prompt])
        return self._kept[prompt]


def is_blank(prompt: str) -> bool:
    """Whether nothing is left of a prompt without spaces and control characters."""
    return not any(character.isprintable() and not character.isspace() for character in prompt)
