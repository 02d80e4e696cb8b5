"""The task of training a tokenizer: pictures in, pictures out, and codes in between that stay in use."""

from __future__ import annotations

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
from nar.metrics.reconstruction import code_use, psnr, squared_error, ssim
from nar.sheet import contact_sheet
from nar.tokenizer.image import ImageTokenizer
from nar.tokenizer.perceptual import EfficientNetDistance, Lpips, load_lpips
from nar.tokenizer.pixels import as_pictures, as_pixels
from nar.tokenizer.quantize import BinaryQuantizer
from nar.training.adversary import Adversary
from nar.training.codebook import Codebook
from nar.training.distributed import Workers
from nar.training.loop import Batch, share
from nar.training.recipe import Recipe, TokenizerLossConfig


class TokenizerTask:
    """Train an image tokenizer to reconstruct pictures."""

    def __init__(self, recipe: Recipe, workers: Workers) -> None:
        self.recipe, self.workers = recipe, workers
        torch.manual_seed(recipe.seed)
        self.module = ImageTokenizer(recipe.tokenizer)
        if recipe.init:
            load_state(self.module, {k: v.float() for k, v in read_weights(recipe.init).items()}, recipe.init)
        if not recipe.train_encoder:  # the codes stay what they are, for models that were trained on them
            for part in (self.module.encoder, self.module.to_code, self.module.quantizer):
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
        self.codebook = Codebook(self.module.quantizer, recipe.tokenizer_loss, workers)
        # Measured where there is a network for it, also when it is not part of the loss.
        self.distance = _distance(recipe.tokenizer_loss)
        if self.distance is not None:
            self.distance.to(workers.device)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:  # noqa: ARG002
        return ()

    def fetch(self, batch: Batch) -> Tensor:
        if self.pictures is None:
            images = np.stack(list(self._pool.map(self._decode, batch.indices, batch.uniforms)))
        else:
            images = self.pictures.images[batch.indices]
        if self.recipe.data.augment == "flip":
            mirrored = batch.uniforms[:, 3, None, None, None] < 0.5
            images = np.where(mirrored, images[:, :, ::-1], images)
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
        values = {"psnr": _psnr(error.detach()), **self.codebook.scalars()}
        if weights.perceptual:
            assert self.distance is not None
            perceptual = self.distance(pixels, made.pixels).mean()
            loss = loss + weights.perceptual * perceptual
            values["perceptual"] = perceptual.detach()
        if self.adversary is not None:
            last = self.module.decoder.conv_out.weight
            assert isinstance(last, Tensor)
            loss = loss + self.adversary.loss(pixels, made.pixels, loss, last, batch.step)
        loss = loss + weights.codebook * made.codebook_loss + weights.commitment * made.commitment_loss
        quantizer = self.module.quantizer
        if isinstance(quantizer, BinaryQuantizer) and weights.entropy:
            single, joint = quantizer.entropies(made.latents, weights.entropy_sharpness, self.workers.mean)
            loss = loss + weights.entropy * (single - weights.entropy_diversity * joint)
            values |= {"entropy_single": single.detach(), "entropy_mean": joint.detach()}
        self.codebook.see(made.latents, made.codes)
        return loss, values | {"commitment": made.commitment_loss.detach()}

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:
        if self.adversary is not None:
            self.adversary.update()
        return self.codebook.update(step, num_steps, generator)

    def state(self) -> dict[str, Tensor]:
        return self.codebook.state() | ({} if self.adversary is None else self.adversary.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.codebook.load_state(state)
        if self.adversary is not None:
            self.adversary.load_state(state)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        device, vocab_size = self.workers.device, self.recipe.tokenizer.vocab_size
        sums, codes = torch.zeros(3, device=device), torch.zeros(vocab_size, device=device)
        images = self.heldout.images[:2000]
        for rows in share(len(images), 250, self.workers):
            pixels = as_pixels(images[rows]).to(device)
            made = module(pixels)
            found = made.pixels.clamp(-1, 1)
            distance = torch.zeros(1, device=device) if self.distance is None else self.distance(pixels, found)
            error = squared_error(pixels, found)
            sums += torch.stack([error.sum(), ssim(pixels + 1, found + 1, peak=2.0).sum(), distance.sum()])
            codes += torch.bincount(made.codes.flatten(), minlength=vocab_size)
        error, similarity, distance = (self.workers.sum(sums) / len(images)).tolist()
        perceptual = {} if self.distance is None else {self.distance.name: distance}
        use = code_use(self.workers.sum(codes))
        return {"loss": error, "psnr": psnr(error, peak=2.0), "ssim": similarity, **perceptual, **use}

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        pixels = as_pixels(self.heldout.images[:16]).to(self.workers.device)
        pairs = torch.stack([pixels, module(pixels).pixels], 1).flatten(0, 1)
        return contact_sheet(as_pictures(pairs), ["real", "code"] * 16, columns=8)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, ImageTokenizer)
        module.save_pretrained(folder, training=training)


def _too_large(source: Source, size: int) -> bool:
    """Whether decoded pictures had better not all be in memory."""
    return len(source) * size * size * 3 > 2**31


def _psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of an error on the -1..1 scale."""
    return 10 * torch.log10(4 / error.square().mean())


def _distance(weights: TokenizerLossConfig) -> EfficientNetDistance | Lpips | None:
    """The network that compares pictures; None where none is asked for and there are no weights to measure with."""
    if weights.lpips:
        return load_lpips(weights.lpips)
    try:
        return EfficientNetDistance()
    except ModuleNotFoundError:
        if weights.perceptual:
            raise
        return None
