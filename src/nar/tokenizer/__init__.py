"""Pixels to codes and back: tokenizer folders of any kind, loaded by the kind that their config names."""

from __future__ import annotations

from pathlib import Path

from nar.storage.folder import find_model, read_config
from nar.tokenizer.causal import CausalTokenizer, CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig

Tokenizer = ImageTokenizer | VideoTokenizer | CausalTokenizer
TokenizerConfig = ImageTokenizerConfig | VideoTokenizerConfig | CausalTokenizerConfig


def new_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of the kind that its config is of, with random weights."""
    if isinstance(config, ImageTokenizerConfig):
        return ImageTokenizer(config)
    if isinstance(config, VideoTokenizerConfig):
        return VideoTokenizer(config)
    return CausalTokenizer(config)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer's folder, bundled name or hub id; raises ValueError when it holds something else."""
    folder = find_model(folder)
    kind = read_config(folder).get("kind")
    if kind == "image-tokenizer":
        return ImageTokenizer.from_pretrained(folder)
    if kind == "video-tokenizer":
        return VideoTokenizer.from_pretrained(folder)
    if kind == "causal-tokenizer":
        return CausalTokenizer.from_pretrained(folder)
    raise ValueError(
        f"{folder} holds a {kind or 'folder of unknown kind'}, not an image-tokenizer, video-tokenizer or "
        "causal-tokenizer"
    )
