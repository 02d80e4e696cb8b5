"""Pixels to codes and back: tokenizer folders of any kind, loaded by the kind that their config names."""

from __future__ import annotations

from pathlib import Path

from nar.folder import read_config
from nar.tokenizer.image import ImageTokenizer
from nar.tokenizer.video import VideoTokenizer

Tokenizer = ImageTokenizer | VideoTokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer folder; raises ValueError when it holds something else."""
    kind = read_config(folder).get("kind")
    if kind == "image-tokenizer":
        return ImageTokenizer.from_pretrained(folder)
    if kind == "video-tokenizer":
        return VideoTokenizer.from_pretrained(folder)
    raise ValueError(f"{folder} holds a {kind or 'folder of unknown kind'}, not an image-tokenizer or video-tokenizer")
