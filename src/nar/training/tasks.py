"""What a recipe trains: tokenizers on pictures, models on codes. Each is a `Task` for the loop."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from nar.condition import ClassCondition, Condition, drop
from nar.config import load
from nar.data.sources import Pictures, load_pictures
from nar.folder import WEIGHTS, load_state, read_weights
from nar.model import Dropout, ModelConfig, Transformer
from nar.sampling import Sampling, generate
from nar.sheet import contact_sheet
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.training.adversary import Adversary, AdversaryConfig
from nar.training.loop import train
from nar.training.optim import OptimConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from: see `nar.data.sources.load_pictures`."""

    source: str = ""
    size: int = 256
    validation: str = "test"


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the tokenizer's loss, and when unused codes are revived.

    `restart_every` steps, codes that were not used since the last time move onto random latents, until `restart_until`
    (a fraction of the training); 0 turns it off.
    """

    l1: float = 0.0
    l2: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    restart_every: int = 0
    restart_until: float = 0.6


@dataclass(frozen=True)
class Recipe:
    """A whole training run. `about` says what it makes, on which hardware, in which time, to which number."""

    about: str = ""
    task: str = "model"
    run: str = "runs/default"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    init: str = ""
    train_encoder: bool = True
    tokenizer_path: str = ""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_classes=1000))
    dropout: Dropout = field(default_factory=Dropout)
    condition_dropout: float = 0.1
    sampling: Sampling = field(default_factory=Sampling)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 64
    num_images: int = 0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    preview_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.task not in ("tokenizer", "model"):
            raise ValueError(f"task must be tokenizer or model, not {self.task!r}")
        for name in ("batch_size", "num_images", "log_every", "preview_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def run_recipe(name: str, overrides: Sequence[str] = (), *, override: bool = False) -> Path:
    """Train what a recipe describes; returns the folder of the result. Running it again resumes."""
    recipe = load(Recipe, name, overrides)
    task = TokenizerTask(recipe) if recipe.task == "tokenizer" else ModelTask(recipe)
    return train(
        task,
        run=Path(recipe.run),
        config=dataclasses.asdict(recipe),
        optim=recipe.optim,
        batch_size=recipe.batch_size,
        num_images=recipe.num_images,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
        log_every=recipe.log_every,
        preview_every=recipe.preview_every,
        checkpoint_every=recipe.checkpoint_every,
        override=override,
    )


class TokenizerTask:
    """Train an image tokenizer to reconstruct pictures."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.module = ImageTokenizer(recipe.tokenizer)
        if recipe.init:
            load_state(self.module, {k: v.float() for k, v in read_weights(recipe.init).items()}, recipe.init)
        if not recipe.train_encoder:  # the codes stay what they are, for models that were trained on them
            for part in (self.module.encoder, self.module.to_code, self.module.quantizer):
                part.requires_grad_(False)
        self.adversary = Adversary(recipe.adversary) if recipe.adversary.weight else None
        self.pictures = load_pictures(recipe.data.source, size=recipe.data.size)
        self.heldout = _validation(recipe.data)
        self.num_samples = len(self.pictures.images)
        self.used = torch.zeros(recipe.tokenizer.vocab_size, dtype=torch.bool)
        self._latents: Tensor | None = None
        self._step = 0

    def loss(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        weights = self.recipe.tokenizer_loss
        pixels = as_pixels(self.pictures.images[indices])
        made = self.module(pixels)
        error = made.pixels - pixels
        loss = weights.l1 * error.abs().mean() + weights.l2 * error.square().mean()
        if self.adversary is not None:
            last = self.module.decoder.conv_out.weight
            assert isinstance(last, Tensor)
            loss = loss + self.adversary.loss(pixels, made.pixels, loss, last, self._step)
        loss = loss + weights.codebook * made.codebook_loss + weights.commitment * made.commitment_loss
        self._latents = made.latents.detach()
        self.used[made.codes.unique().cpu()] = True
        return loss, {
            "psnr": psnr(error.detach()),
            "commitment": made.commitment_loss.detach(),
            "codes_in_batch": torch.tensor(float(made.codes.unique().numel())),
        }

    def after_step(self, step: int, generator: torch.Generator) -> None:
        if self.adversary is not None:
            self.adversary.update()
        self._step = step + 1
        every = self.recipe.tokenizer_loss.restart_every
        last = self.recipe.tokenizer_loss.restart_until * self.recipe.num_images / self.recipe.batch_size
        if step == 0 and self._latents is not None and every:  # start on the data
            self.module.quantizer.restart(self._latents, torch.ones_like(self.used), generator)
        elif every and step % every == 0 and step <= last and self._latents is not None:
            self.module.quantizer.restart(self._latents, ~self.used, generator)
            self.used.zero_()

    def state(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state(self, state: dict[str, Any]) -> None:
        self.used = state["used"]

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        squared, codes = 0.0, torch.zeros(self.recipe.tokenizer.vocab_size)
        images = self.heldout.images[:2000]
        for start in range(0, len(images), 250):
            pixels = as_pixels(images[start : start + 250])
            made = module(pixels)
            squared += float((made.pixels.clamp(-1, 1) - pixels).square().flatten(1).mean(1).sum())
            codes += torch.bincount(made.codes.flatten(), minlength=len(codes))
        shares = codes / codes.sum()
        return {
            "psnr": 10 * math.log10(4 / (squared / len(images))),
            "usage": float((codes > 0).float().mean()),
            "perplexity": float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())),
        }

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        pixels = as_pixels(self.heldout.images[:16])
        pairs = torch.stack([pixels, module(pixels).pixels], 1).flatten(0, 1)
        return contact_sheet(as_pictures(pairs), ["real", "code"] * 16, columns=8)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, ImageTokenizer)
        module.save_pretrained(folder, training=training)


def _validation(data: DataConfig) -> Pictures:
    return load_pictures(data.source, size=data.size, split=data.validation)


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float32 -1..1 (B, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """Float -1..1 (B, 3, H, W), clamped, to Pillow pictures."""
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in images]


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of an error on the -1..1 scale."""
    return 10 * torch.log10(4 / error.square().mean())


class ModelTask:
    """Train a transformer on the codes of pictures, which are extracted once, at the start of the run."""

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.tokenizer_path:
            raise ValueError("a model recipe needs tokenizer_path=FOLDER, a trained tokenizer")
        self.recipe = recipe
        self.tokenizer = ImageTokenizer.from_pretrained(recipe.tokenizer_path)
        pictures = load_pictures(recipe.data.source, size=recipe.data.size)
        heldout = _validation(recipe.data)
        self.class_names = pictures.class_names
        patch = self.tokenizer.config.patch_size
        config = dataclasses.replace(
            recipe.model,
            grid=(recipe.data.size // patch,) * 2,
            vocab_size=self.tokenizer.config.vocab_size,
            num_classes=len(self.class_names),
        )
        self.module = Transformer(config)
        cache = Path(recipe.run)
        digest = hashlib.sha256((Path(recipe.tokenizer_path) / WEIGHTS).read_bytes()).hexdigest()
        self.codes = extract(self.tokenizer, pictures, cache / "codes-train.safetensors", digest)
        self.heldout_codes = extract(self.tokenizer, heldout, cache / "codes-heldout.safetensors", digest)
        self.labels, self.heldout_labels = torch.from_numpy(pictures.labels), torch.from_numpy(heldout.labels)
        self.num_samples = len(self.codes)

    def loss(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.from_numpy(indices)
        codes = self.codes[rows].long()
        null = torch.rand(len(rows), generator=generator) < self.recipe.condition_dropout
        condition = drop(ClassCondition(self.labels[rows]), null)
        loss = token_losses(self.module, codes, condition, dropout=self.recipe.dropout).mean()
        return loss, {"bits_per_token": loss.detach() / math.log(2)}

    def after_step(self, step: int, generator: torch.Generator) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Transformer)
        total, codes = 0.0, self.heldout_codes
        for start in range(0, len(codes), 500):
            rows = slice(start, start + 500)
            losses = token_losses(module, codes[rows].long(), ClassCondition(self.heldout_labels[rows]))
            total += float(losses.mean(-1).sum())
        return {"bits_per_token": total / len(codes) / math.log(2)}

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        assert isinstance(module, Transformer)
        labels = torch.arange(min(10, len(self.class_names))).repeat_interleave(4)
        codes = generate(module, ClassCondition(labels), seed=0)
        names = [self.class_names[label] for label in labels]
        return contact_sheet(as_pictures(self.tokenizer.decode(codes)), names, columns=8)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, Transformer)
        module.save_pretrained(
            folder,
            class_names=self.class_names,
            tokenizer=Path(self.recipe.tokenizer_path),
            training=training,
            sampling=dataclasses.asdict(self.recipe.sampling),
        )


def token_losses(
    model: Transformer, codes: Tensor, condition: Condition, *, dropout: Dropout | None = None, chunk: int = 16384
) -> Tensor:
    """Cross-entropy in nats of every token, (B, N) in generation order.

    Works on `chunk` tokens at a time and computes their logits again in the backward pass, so that (B, N, V) never
    exists.
    """
    hidden = model.hidden(codes, condition, dropout=dropout)
    targets = model.in_order(codes).to(hidden.device)

    def piece(states: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(states), tokens, reduction="none")

    pieces = [
        piece(states, tokens)
        if hidden[..., 0].numel() <= chunk or not torch.is_grad_enabled()
        else checkpoint(piece, states, tokens, use_reentrant=False)
        for states, tokens in zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    ]
    return torch.cat(pieces).view_as(targets)


@torch.no_grad()
def extract(tokenizer: ImageTokenizer, pictures: Pictures, cache: Path, digest: str, batch_size: int = 250) -> Tensor:
    """Codes (N, h, w) int32 of all pictures; taken from `cache` when they were made of these by this tokenizer."""
    key = hashlib.sha256(pictures.images.tobytes()).hexdigest() + digest
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                codes: Tensor = file.get_tensor("codes")
                return codes
    starts = range(0, len(pictures.images), batch_size)
    pieces = [
        tokenizer.encode(as_pixels(pictures.images[start : start + batch_size])).int()
        for start in tqdm(starts, desc="extracting codes", unit="batch", leave=False)
    ]
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file({"codes": torch.cat(pieces)}, cache, {"key": key})
    return torch.cat(pieces)
