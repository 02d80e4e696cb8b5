"""Pixels to codes and back: tokenizer folders of any kind, loaded by the kind that their config names."""

from __future__ import annotations

from pathlib import Path

from nar.storage.fields import checked
from nar.storage.folder import find_model, read_config
from nar.tokenizer.base import Reconstruction, Tokenizer
from nar.tokenizer.causal import CausalTokenizer, CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig
from nar.tokenizer.multiscale import MultiScaleTokenizer, MultiScaleTokenizerConfig

__all__ = ["KINDS", "Reconstruction", "Tokenizer", "TokenizerConfig", "load_tokenizer", "new_tokenizer"]

TokenizerConfig = ImageTokenizerConfig | VideoTokenizerConfig | CausalTokenizerConfig | MultiScaleTokenizerConfig
KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (ImageTokenizer, VideoTokenizer, CausalTokenizer, MultiScaleTokenizer)
}


def new_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of the kind that its config is of, with random weights."""
    return next(kind for kind in KINDS.values() if kind.config_class is type(config))(config)


@checked
def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer's folder, bundled name or hub id; raises ValueError when it holds something else."""
    folder = find_model(folder)
    kind = read_config(folder).get("kind")
    if kind not in KINDS:
        raise ValueError(f"{folder} holds {kind or 'something of unknown kind'!r}, not one of {', '.join(KINDS)}")
    return KINDS[kind].from_pretrained(folder)
