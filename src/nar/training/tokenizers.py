"""The task of training a tokenizer: pictures in, pictures out, and codes in between that stay in use."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nar.convert.initial import with_larger_patches
from nar.data.builtin import TOY
from nar.data.open import load_pictures
from nar.data.source import BROKEN, Source
from nar.media.crops import restarted, shifted
from nar.media.pixels import as_pictures, as_pixels
from nar.media.sheet import contact_sheet
from nar.metrics.networks.perceptual import EfficientNetDistance, Lpips, load_lpips
from nar.metrics.reconstruction import code_use, psnr, squared_error, ssim
from nar.storage.folder import find_model, load_state, read_config, read_weights
from nar.tokenizer import Tokenizer, new_tokenizer
from nar.tokenizer.image import ImageTokenizerConfig
from nar.tokenizer.quantize import BinaryQuantizer
from nar.training.adversary import Adversary
from nar.training.batches import Batch
from nar.training.codebook import Codebook, CodebookConfig
from nar.training.distributed import Workers
from nar.training.loop import Task, share
from nar.training.prior import Prior
from nar.training.recipe import Recipe, TokenizerLossConfig
from nar.training.samples import summary

FEWEST_CODES = 8  # a side, for pictures that are more than blobs
_HELDOUT = 2000  # held-out samples that are measured
_IN_MEMORY = 2**31  # bytes of decoded samples that are kept
_OF_TRAINING = {"stochastic", "temperature"}  # of a tokenizer's settings; the others say what its codes mean


class TokenizerTask(Task):
    """Train a tokenizer to reconstruct pictures or clips: of which kind it is, the recipe's config says."""

    module: Tokenizer

    def __init__(self, recipe: Recipe, workers: Workers, sources: Sequence[Source] = ()) -> None:
        """Prepare to train on `sources`, to learn from and held out; by default those that the recipe names."""
        self.recipe, self.workers = recipe, workers
        torch.manual_seed(recipe.seed)
        self.module = new_tokenizer(recipe.tokenizer_config)
        fresh = not recipe.init or self._begin(find_model(recipe.init))
        self.module.to(workers.device)
        half = recipe.engine.precision == "bfloat16"
        self.adversary = Adversary(recipe.adversary, workers, half=half) if recipe.adversary.weight else None
        train, heldout = sources or recipe.data.open()
        self.heldout = load_pictures(heldout.take(spread_rows(len(heldout), _HELDOUT)), size=recipe.data.size)
        sample = self.heldout.images[:1]
        self.module.check_pixels(as_pixels(sample))
        if workers.first and (few := self._few_codes()):
            warnings.warn(few, stacklevel=2)
        if recipe.data.augment == "loop" and sample.ndim != 5:
            raise ValueError("data.augment loop is for clips, these are pictures; set data.augment=flip")
        if self.adversary is not None:  # it may begin to learn hours later
            self.adversary.check(as_pixels(sample).to(workers.device))
        cut = recipe.data.augment == "crop" or recipe.data.windows == "random"  # another part of it in each step
        self.source = train if cut or len(train) * sample.nbytes > _IN_MEMORY else None
        self.pictures = None if self.source else load_pictures(train, size=recipe.data.size)
        self.num_samples = len(self.source or self.pictures or ())
        self.summary = summary(train, heldout)
        config = recipe.tokenizer_config
        self.stochastic = bool(getattr(config, "stochastic", False))
        self._grid = self._code_grid() if self.stochastic or recipe.prior.weight else ()
        if not recipe.train_encoder:  # the codes stay what they are, for models that were trained on them
            for part in self.module.encoder_parts():
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    part.eval()  # a norm over the batch goes on with what it has seen
        steps, size = recipe.num_steps(self.num_samples), math.prod(self._grid)
        self.prior = Prior(recipe.prior, size, config.code_dim, steps, workers) if recipe.prior.weight else None
        self._pool = ThreadPoolExecutor(recipe.engine.workers)
        self._broken: dict[int, str] = {}
        # Codes that are to stay what they are need no care, only counting.
        care = recipe.tokenizer_loss if recipe.train_encoder else CodebookConfig(warn_usage=0.0)
        self.codebook = Codebook(self.module.quantizer, care, workers, fresh=fresh, group=recipe.tokenizer_group)
        # Measured where there is a network for it, also when it is not part of the loss.
        self.distance = _distance(recipe.tokenizer_loss)
        if self.distance is not None:
            self.distance.to(workers.device)

    def _begin(self, start: Path) -> bool:
        """Take over the weights of the tokenizer in `start`; returns whether the codebook is to be a new one."""
        larger = check_start(self.recipe, start)
        state = {name: tensor.float() for name, tensor in read_weights(start).items()}
        if "pixel_shuffle" in larger:
            state = with_larger_patches(state, *larger["pixel_shuffle"])
        if "vocab_size" in larger:
            state |= {f"quantizer.{name}": tensor for name, tensor in self.module.quantizer.state_dict().items()}
        load_state(self.module, state, start)
        return "vocab_size" in larger

    def _few_codes(self) -> str:
        """A warning where pictures are too small for this tokenizer, else nothing."""
        config, size = self.recipe.tokenizer_config, self.recipe.data.size
        side, patch = size // config.patch_size, config.patch_size
        own = self.recipe.data.source != TOY and self.recipe.tokenizer_group in ("tokenizer", "causal_tokenizer")
        if side >= FEWEST_CODES or size < FEWEST_CODES * 2 or not own:
            return ""
        advice = f"data.size={FEWEST_CODES * patch}"
        if isinstance(config, ImageTokenizerConfig):
            depths = list(config.channel_multipliers)[: size.bit_length() - FEWEST_CODES.bit_length() + 1]
            folded = config.pixel_shuffle * side // FEWEST_CODES
            halved = f"channel_multipliers={json.dumps(depths, separators=(',', ':'))}"
            begun = read_config(find_model(self.recipe.init))["tokenizer"] if self.recipe.init else {}
            if not begun or (folded and folded % begun.get("pixel_shuffle", 1) == 0):
                advice += f", or tokenizer.{f'pixel_shuffle={folded}' if folded else halved}"
        return f"pictures of {size}x{size} are only {side}x{side} codes, one for {patch}x{patch} pixels: take {advice}"

    @torch.no_grad()
    def _code_grid(self) -> tuple[int, ...]:
        """The grid of codes of a sample."""
        self.module.eval()  # looking must not change a norm over the batch
        codes = self.module.encode(as_pixels(self.heldout.images[:1]).to(self.workers.device))
        self.module.train()
        return tuple(codes.shape[1:])

    def _draws(self, batch: Batch) -> Tensor:
        """Three uniform numbers in [0, 1) for every code of every sample, (b, 3, *grid), the sample's own."""
        made = torch.empty(len(batch.indices), 3, *self._grid)
        for row, uniform in enumerate(batch.draws["codes"].tolist()):
            seed = (batch.step << 24) + int(uniform * 2**24)
            torch.rand(made[row].shape, generator=torch.Generator().manual_seed(seed), out=made[row])
        return made

    def fetch(self, batch: Batch) -> Tensor:
        if self.pictures is None:
            images = np.stack(list(self._pool.map(self._decode, batch.indices, batch.draws.samples())))
        else:
            images = self.pictures.images[batch.indices]
        draws, data = batch.draws, self.recipe.data
        if data.augment in ("flip", "loop"):
            mirrored = (draws["mirror"] < 0.5).reshape(-1, *[1] * (images.ndim - 1))
            images = np.where(mirrored, images[..., ::-1, :], images)
        if data.augment == "loop":
            images = np.stack([*map(restarted, images, draws["loop_start"], draws["loop_direction"])])
        if data.shift:
            moves = zip(images, draws["shift_down"], draws["shift_right"], strict=True)
            images = np.stack([shifted(image, data.shift, down, right) for image, down, right in moves])
        return as_pixels(images)

    def _decode(self, row: int, draws: Mapping[str, float]) -> np.ndarray:
        """A picture or clip (..., size, size, 3) of the source; for a broken one, listed in the run, the next."""
        assert self.source is not None
        data = self.recipe.data
        for step in range(len(self.source)):
            index = (int(row) + step) % len(self.source)
            try:
                return self.source.array(index, data.size, draws, crop=data.augment == "crop")
            except BROKEN as error:
                if index in self._broken:
                    continue
                self._broken[index] = f"{self.source.names[index]} ({error})"
                with Path(self.recipe.run, f"broken-{self.workers.rank}.txt").open("a", encoding="utf-8") as file:
                    file.write(self._broken[index] + "\n")
                self.source.check_broken(list(self._broken.values()))
        raise ValueError(f"no picture of {self.recipe.data.source} can be read")

    def loss(self, batch: Batch, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.recipe.tokenizer_loss
        pixels = data.to(self.workers.device, non_blocking=True)
        draws = self._draws(batch)
        made = self.module(pixels, uniforms=draws[:, 0].to(pixels.device)) if self.stochastic else self.module(pixels)
        error = made.pixels - pixels
        loss = weights.l1 * error.abs().mean() + weights.l2 * error.square().mean()
        values = {"psnr": 10 * torch.log10(4 / error.detach().square().mean()), **self.codebook.scalars()}
        if weights.perceptual and self.distance is not None:
            perceptual = self.distance(_frames(pixels), _frames(made.pixels)).mean()
            loss = loss + weights.perceptual * perceptual
            values["perceptual"] = perceptual.detach()
        if self.adversary is not None:
            loss = loss + self.adversary.loss(pixels, made.pixels, loss, self.module.last_layer, batch.step)
            values |= self.adversary.losses
        loss = loss + weights.codebook * made.codebook_loss + weights.commitment * made.commitment_loss
        quantizer = self.module.quantizer
        if self.prior is not None:
            predicted = self.prior.loss(quantizer, made, draws[:, 1:].flatten(2), batch.step)
            loss = loss + self.recipe.prior.weight * predicted
            values["prior"] = predicted.detach()
        if isinstance(quantizer, BinaryQuantizer) and weights.entropy:
            single, joint = quantizer.entropies(made.latents, weights.entropy_sharpness, self.workers.mean)
            loss = loss + weights.entropy * (single - weights.entropy_diversity * joint)
            values |= {"entropy_single": single.detach(), "entropy_mean": joint.detach()}
        self.codebook.observe(made.latents, made.codes)
        return loss, values | {"commitment": made.commitment_loss.detach()}

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:
        if self.adversary is not None:
            self.adversary.update(generator)
        if self.prior is not None:
            self.prior.update()
        return self.codebook.update(step, num_steps, generator)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for part in self._parts() for name, tensor in part.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for part in self._parts():
            part.load_state(state)

    def _parts(self) -> list[Codebook | Adversary | Prior]:
        return [self.codebook, *(part for part in (self.adversary, self.prior) if part is not None)]

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        device, vocab_size = self.workers.device, self.recipe.tokenizer_config.vocab_size
        sums, codes = torch.zeros(3, device=device), torch.zeros(vocab_size, device=device)
        images = self.heldout.images
        together = max(1, min(250, 250 * 64 * 64 * 3 // math.prod(images.shape[1:])))  # 250 of 64x64, or fewer
        for rows in share(len(images), together, self.workers):
            pixels = as_pixels(images[rows]).to(device)
            made = module(pixels)
            found = made.pixels.clamp(-1, 1)
            pair = _frames(pixels), _frames(found)
            similarity = ssim(pair[0] + 1, pair[1] + 1, peak=2.0)
            distance = torch.zeros_like(similarity) if self.distance is None else self.distance(*pair)
            means = torch.stack([squared_error(*pair), similarity, distance]).mean(1)
            sums += means * len(pixels)
            codes += torch.bincount(made.codes.flatten(), minlength=vocab_size)
        loss, similar, different = (self.workers.sum(sums) / len(images)).tolist()
        perceptual = {} if self.distance is None else {self.distance.name: different}
        use = code_use(self.workers.sum(codes))
        return {"loss": loss, "psnr": psnr(loss, peak=2.0), "ssim": similar, **perceptual, **use}

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        pixels = as_pixels(self.heldout.images[spread_rows(len(self.heldout), 16)]).to(self.workers.device)
        pairs = as_pictures(torch.stack([pixels, module(pixels).pixels], 1).flatten(0, 1))
        columns = max(1, 8 * pairs[0].height // pairs[0].width)  # a clip's frames take a row
        return contact_sheet(pairs, ["real", "code"] * len(pixels), columns=columns)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, Tokenizer)
        module.save_pretrained(folder, training=training)


def _frames(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as they are; clips (B, 3, T, H, W) as their frames (B * T, 3, H, W)."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)


def spread_rows(count: int, most: int) -> np.ndarray:
    """Rows of `count`, at most `most` of them, as far apart as can be: sets are often sorted by class."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def check_start(recipe: Recipe, start: Path) -> dict[str, tuple[int, int]]:
    """Refuse another setting than that of the tokenizer in `start`: its weights may fit, but mean something else.

    Only its patches may be larger, a multiple, and its codebook of another size, where k-means sets it. Returns these
    settings where they differ: that of `start`, and that of the recipe.
    """
    group, stated = recipe.tokenizer_group, read_config(start).get("tokenizer")
    found = {"pixel_shuffle": 1} | (stated if isinstance(stated, dict) else {})
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe.tokenizer_config)))
    names = wanted.keys() & found.keys() - _OF_TRAINING
    other = {name: (found[name], wanted[name]) for name in sorted(names) if found[name] != wanted[name]}
    clusters = recipe.tokenizer_loss.kmeans_steps > 0 and recipe.train_encoder
    free = {"vocab_size"} if clusters else set()
    folded = found["pixel_shuffle"]
    if group == "tokenizer" and isinstance(folded, int) and folded > 0 and wanted["pixel_shuffle"] % folded == 0:
        free.add("pixel_shuffle")
    for name, (old, new) in other.items():
        if name not in free:
            anew = ", set tokenizer_loss.kmeans_steps=10 for a new codebook" if name == "vocab_size" else ""
            raise ValueError(
                f"init={recipe.init} has {group}.{name}={old}, and this recipe {new}; give that{anew}, or begin from "
                "nothing with init= (tokenizer_recipe.init= where a model's command trains the tokenizer)"
            )
    return other


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
