"""The task of training a tokenizer: pictures in, pictures out, and codes in between that stay in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nar.data.sources import (
    BROKEN,
    Source,
    centre_crop,
    check_broken,
    load_pictures,
    random_crop,
)  # fmt: skip
from nar.folder import load_state, read_weights
from nar.sheet import contact_sheet
from nar.tokenizer import Tokenizer, new_tokenizer
from nar.tokenizer.pixels import as_pictures, as_pixels
from nar.training.adversary import Adversary
from nar.training.distributed import Workers
from nar.training.loop import Batch, share
from nar.training.recipe import Recipe


class TokenizerTask:
    """Train a tokenizer to reconstruct pictures or clips: of which kind it is, the recipe's config says."""

    def __init__(self, recipe: Recipe, workers: Workers) -> None:
        self.recipe, self.workers = recipe, workers
        torch.manual_seed(recipe.seed)
        self.module = new_tokenizer(recipe.tokenizer_config)
        if recipe.init:
            load_state(self.module, {k: v.float() for k, v in read_weights(recipe.init).items()}, recipe.init)
        if not recipe.train_encoder:  # the codes stay what they are, for models that were trained on them
            for part in self.module.encoder_parts():
                part.requires_grad_(False)
        self.module.to(workers.device)
        self.adversary = Adversary(recipe.adversary, workers) if recipe.adversary.weight else None
        train, heldout = recipe.data.open()
        self.source = train if recipe.data.augment == "crop" or _too_large(train, recipe.data.size) else None
        self.pictures = None if self.source else load_pictures(train, size=recipe.data.size)
        self.heldout = load_pictures(heldout.take(np.arange(min(len(heldout), 2000))), size=recipe.data.size)
        self.num_samples = len(self.source or self.pictures or ())
        self._pool = ThreadPoolExecutor(recipe.engine.workers)
        self._broken: dict[int, str] = {}
        self.used = torch.zeros(recipe.tokenizer_config.vocab_size, dtype=torch.bool, device=workers.device)
        self._latents: list[Tensor] = []

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:  # noqa: ARG002
        return ()

    def fetch(self, batch: Batch) -> Tensor:
        if self.pictures is None:
            images = np.stack(list(self._pool.map(self._decode, batch.indices, batch.uniforms)))
        else:
            images = self.pictures.images[batch.indices]
        if self.recipe.data.augment in ("flip", "loop"):
            images = np.stack([_mirrored(image, u[3]) for image, u in zip(images, batch.uniforms, strict=True)])
        if self.recipe.data.augment == "loop":
            images = np.stack([_restarted(clip, *u[:2]) for clip, u in zip(images, batch.uniforms, strict=True)])
        return as_pixels(images)

    def _decode(self, row: int, uniforms: np.ndarray) -> np.ndarray:
        """A picture (size, size, 3) of the source; for a broken one, which is listed in the run, the next."""
        assert self.source is not None
        for step in range(len(self.source)):
            index = (int(row) + step) % len(self.source)
            try:
                picture = self.source.picture(index)
            except BROKEN as error:
                self._report(index, error)
                continue
            size = self.recipe.data.size
            crop = self.recipe.data.augment == "crop"
            return np.asarray(random_crop(picture, size, uniforms.tolist()) if crop else centre_crop(picture, size))
        raise ValueError(f"no picture of {self.recipe.data.source} can be read")

    def _report(self, index: int, error: Exception) -> None:
        assert self.source is not None
        if index in self._broken:
            return
        self._broken[index] = f"{self.source.names[index]} ({error})"
        with Path(self.recipe.run, f"broken-{self.workers.rank}.txt").open("a", encoding="utf-8") as file:
            file.write(self._broken[index] + "\n")
        check_broken(list(self._broken.values()), len(self.source))

    def loss(self, batch: Batch, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.recipe.tokenizer_loss
        pixels = data.to(self.workers.device)
        made = self.module(pixels)
        error = made.pixels - pixels
        loss = weights.l1 * error.abs().mean() + weights.l2 * error.square().mean()
        if self.adversary is not None:
            loss = loss + self.adversary.loss(pixels, made.pixels, loss, self.module.last_layer, batch.step)
        loss = loss + weights.codebook * made.codebook_loss + weights.commitment * made.commitment_loss
        self._latents.append(made.latents.detach())
        codes = made.codes.unique()
        self.used[codes] = True
        return loss, {
            "psnr": psnr(error.detach()),
            "commitment": made.commitment_loss.detach(),
            "codes_in_batch": torch.tensor(float(codes.numel()), device=self.workers.device),
        }

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> None:
        if self.adversary is not None:
            self.adversary.update()
        every = self.recipe.tokenizer_loss.restart_every
        last = self.recipe.tokenizer_loss.restart_until * num_steps
        latents, self._latents = self._latents, []
        if every and step % every == 0 and step <= last:
            # In the order of the batch, whatever number of processes and pieces computed it.
            pieces = torch.stack([self.workers.gather(piece) for piece in latents])
            used = self.workers.sum(self.used.float()) > 0
            dead = torch.ones_like(used) if step == 0 else ~used  # the first time all: a start on the data
            self.module.quantizer.restart(pieces.flatten(0, 1), dead, generator)
            self.used.zero_()

    def state(self) -> dict[str, Tensor]:
        adversary = {} if self.adversary is None else self.adversary.state()
        return {"used": self.workers.sum(self.used.float()) > 0, **adversary}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.used = state["used"].to(self.workers.device)
        if self.adversary is not None:
            self.adversary.load_state(state)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        device, vocab_size = self.workers.device, self.recipe.tokenizer_config.vocab_size
        squared, codes = torch.zeros(1, device=device), torch.zeros(vocab_size, device=device)
        images = self.heldout.images[:2000]
        for rows in share(len(images), _batch_size(images), self.workers):
            pixels = as_pixels(images[rows]).to(device)
            made = module(pixels)
            squared += (made.pixels.clamp(-1, 1) - pixels).square().flatten(1).mean(1).sum()
            codes += torch.bincount(made.codes.flatten(), minlength=vocab_size)
        error = float(self.workers.sum(squared)) / len(images)
        codes = self.workers.sum(codes)
        shares = codes / codes.sum()
        return {
            "loss": error,
            "psnr": 10 * math.log10(4 / error),
            "usage": float((codes > 0).float().mean()),
            "perplexity": float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())),
        }

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        pixels = as_pixels(self.heldout.images[:16]).to(self.workers.device)
        pairs = as_pictures(torch.stack([pixels, module(pixels).pixels], 1).flatten(0, 1))
        columns = max(1, 8 * pairs[0].height // pairs[0].width)  # a clip's frames take a row
        return contact_sheet(pairs, ["real", "code"] * len(pixels), columns=columns)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, Tokenizer)
        module.save_pretrained(folder, training=training)


def _batch_size(images: np.ndarray) -> int:
    """How many to measure at once: 250 pictures of 64x64, and fewer of what is larger."""
    return max(1, min(250, 250 * 64 * 64 * 3 // images[0].size))


def _mirrored(image: np.ndarray, uniform: float) -> np.ndarray:
    """A picture or clip (..., H, W, 3), mirrored when `uniform` is under 0.5."""
    return image[..., ::-1, :] if uniform < 0.5 else image


def _restarted(clip: np.ndarray, start: float, direction: float) -> np.ndarray:
    """A clip (T, H, W, 3) that is a loop, started elsewhere and backwards when `direction` is under 0.5."""
    turned = np.roll(clip, int(start * len(clip)), axis=0)
    return turned[::-1] if direction < 0.5 else turned


def _too_large(source: Source, size: int) -> bool:
    """Whether decoded pictures had better not all be in memory."""
    return len(source) * size * size * 3 > 2**31


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of an error on the -1..1 scale."""
    return 10 * torch.log10(4 / error.square().mean())
