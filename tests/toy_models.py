"""Tiny tokenizers of clips, and model folders of words and of clips with the encoder that they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from nar.model import Transformer
from nar.text import TextEncoder
from nar.tokenizer.causal import CausalTokenizer, CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig


class PaintTokenizer(nn.Module):
    """Code k is a pixel of grey 4 k: nothing is lost, and every code belongs to its place."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)

    def pixel_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return grid

    def encode(self, pixels: Tensor) -> Tensor:
        return ((pixels[:, 0] + 1) * 127.5 / 4).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        return (codes[:, None].float() * 4 / 127.5 - 1).expand(-1, 3, *codes.shape[1:])


def paint(codes: Tensor) -> np.ndarray:
    """The clip (T, H, W, 3) that these codes (T, H, W) stand for."""
    return np.repeat((codes * 4).to(torch.uint8).numpy()[..., None], 3, -1)


def larp() -> VideoTokenizer:
    torch.manual_seed(2)
    tokenizer = VideoTokenizer(
        VideoTokenizerConfig(
            num_frames=6,
            image_size=8,
            patch_size=4,
            temporal_patch_size=2,
            num_tokens=12,
            grid=(3, 2, 2),
            encoder_dim=16,
            num_encoder_layers=1,
            num_encoder_heads=2,
            decoder_dim=16,
            num_decoder_layers=1,
            num_decoder_heads=2,
            vocab_size=24,
            code_dim=4,
        )
    )
    nn.init.normal_(tokenizer.to_pixels.weight)
    return tokenizer.eval()


def causal() -> CausalTokenizer:
    """1 + 2 + 2 frames of 8x8 as 3x2x2 codes of 24."""
    torch.manual_seed(3)
    tokenizer = CausalTokenizer(
        CausalTokenizerConfig(
            vocab_size=24,
            code_dim=4,
            frames_per_code=2,
            patch_size=4,
            fold=2,
            channels=8,
            num_blocks=1,
            dim=16,
            num_heads=2,
            hidden_dim=16,
            num_encoder_blocks=1,
            num_decoder_blocks=1,
        )
    )
    for layer in (tokenizer.first_out, tokenizer.group_out):
        nn.init.normal_(layer.weight, std=0.3)
    return tokenizer.eval()


def words_folder(folder: Path, model: Transformer, encoder: Path) -> Path:
    """Words to pictures of 8x8: a model of 4x4 codes of 32, with its encoder's name."""
    sizes = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    torch.manual_seed(1)
    ImageTokenizer(ImageTokenizerConfig(vocab_size=32, code_dim=4, **sizes)).save_pretrained(folder / "tokenizer")
    config = TextEncoder.from_pretrained(encoder, device="cpu", max_length=model.config.text_length).config
    model.save_pretrained(
        folder / "model",
        tokenizer=folder / "tokenizer",
        sampling={"guidance_scale": 2.0},
        text_encoder=dataclasses.asdict(config),
    )
    return folder / "model"


def clips_folder(folder: Path, model: Transformer, encoder: Path) -> Path:
    """Words and none, one or three given frames to clips of five frames of 8x8: a model of 3x2x2 codes of 24."""
    causal().save_pretrained(folder / "tokenizer")
    config = TextEncoder.from_pretrained(encoder, device="cpu", max_length=model.config.text_length).config
    model.save_pretrained(
        folder / "model",
        tokenizer=folder / "tokenizer",
        sampling={"guidance_scale": 1.5},
        text_encoder=dataclasses.asdict(config),
        given_frames=[0, 1, 3],
        frame_rate=5.0,
    )
    return folder / "model"
