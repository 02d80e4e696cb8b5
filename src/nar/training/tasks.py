"""What a recipe trains: tokenizers on pictures, models on codes. Each is a `Task` for the loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nar.condition import ClassCondition, Condition, drop
from nar.config import load
from nar.data.codes import Codes
from nar.data.extract import extract
from nar.data.sources import (
    BROKEN,
    VIEWS,
    Source,
    centre_crop,
    check_broken,
    held_out,
    load_pictures,
    open_source,
    random_crop,
)  # fmt: skip
from nar.folder import digest
from nar.model import Dropout, ModelConfig, Transformer
from nar.sampling import Sampling, generate
from nar.sheet import contact_sheet
from nar.tokenizer import load_tokenizer
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.training.distributed import Workers, joined
from nar.training.loop import Batch, Metrics, Plan, train


@dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    Attributes:
        source: pictures, see `nar.data.sources.open_source`.
        size: pixels a side.
        validation: the split that is held out; "auto" takes the source's own "test" split, or else holds out
            `heldout_share` of the pictures, by `group`.
        label, group: columns of tables; samples of one group are held out together.
        views: of each picture that a model learns codes of: "centre", "flip" or "ten-crop".
        augment: what a tokenizer sees of a picture: its centre ("none"), mirrored half of the time ("flip"), or a
            random crop, mirrored half of the time ("crop").
        codes, heldout_codes: folders that `nar extract` has made, in place of `source`; without the second, part of
            the first is held out.
    """

    source: str = ""
    size: int = 256
    validation: str = "auto"
    heldout_share: float = 0.05
    label: str = "label"
    group: str = ""
    views: str = "centre"
    augment: str = "none"
    codes: str = ""
    heldout_codes: str = ""

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"data.views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        if self.augment not in ("none", "flip", "crop"):
            raise ValueError(f"data.augment must be none, flip or crop, not {self.augment!r}")
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"data.heldout_share must be between 0 and 1, not {self.heldout_share}")

    def open(self) -> tuple[Source, Source]:
        """The pictures to learn from, and those held out."""
        if not self.source:
            raise ValueError("this recipe needs pictures: data.source=FOLDER (or a .parquet or .tar file, or a hub id)")
        train = open_source(self.source, size=self.size, label=self.label, group=self.group)
        split = "test" if self.validation == "auto" else self.validation
        try:
            return train, open_source(self.source, size=self.size, split=split, label=self.label, group=self.group)
        except FileNotFoundError:
            if self.validation != "auto":
                raise
        if len(train) < 2:
            raise ValueError(f"{self.source} has {len(train)} pictures; at least two are needed, one to be held out")
        out = held_out(train.groups or train.names, self.heldout_share)
        return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))


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
class Recipe(Plan):
    """A whole training run. `about` says what it makes, on which hardware, in which time, to which number."""

    about: str = ""
    task: str = "model"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    tokenizer_path: str = ""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_classes=1000))
    dropout: Dropout = field(default_factory=Dropout)
    condition_dropout: float = 0.1
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in ("tokenizer", "model"):
            raise ValueError(f"task must be tokenizer or model, not {self.task!r}")
        if self.task == "tokenizer" and self.engine.parallel == "fsdp":
            raise ValueError("tokenizers are small: they train with engine.parallel=ddp or none, not fsdp")


def run_recipe(
    name: str, overrides: Sequence[str] = (), *, override: bool = False, metrics: Metrics | None = None
) -> Path | None:
    """Train what a recipe describes; returns the folder of the result, or None when SIGTERM stopped it before.

    Running it again resumes. `metrics` is called with the averaged module whenever previews are drawn.
    """
    recipe = load(Recipe, name, overrides)
    with joined(recipe.engine.device) as workers:
        task = TokenizerTask(recipe, workers) if recipe.task == "tokenizer" else ModelTask(recipe, workers)
        return train(
            task, recipe, config=dataclasses.asdict(recipe), workers=workers, override=override, metrics=metrics
        )


class TokenizerTask:
    """Train an image tokenizer to reconstruct pictures."""

    def __init__(self, recipe: Recipe, workers: Workers) -> None:
        self.recipe, self.workers = recipe, workers
        torch.manual_seed(recipe.seed)
        self.module = ImageTokenizer(recipe.tokenizer).to(workers.device)
        train, heldout = recipe.data.open()
        self.source = train if recipe.data.augment == "crop" or _too_large(train, recipe.data.size) else None
        self.pictures = None if self.source else load_pictures(train, size=recipe.data.size)
        self.heldout = load_pictures(heldout.take(np.arange(min(len(heldout), 2000))), size=recipe.data.size)
        self.num_samples = len(self.source or self.pictures or ())
        self._pool = ThreadPoolExecutor(recipe.engine.workers)
        self._broken: dict[int, str] = {}
        self.used = torch.zeros(recipe.tokenizer.vocab_size, dtype=torch.bool, device=workers.device)
        self._latents: list[Tensor] = []

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

    def loss(self, batch: Batch, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        weights = self.recipe.tokenizer_loss
        pixels = data.to(self.workers.device)
        made = self.module(pixels)
        error = made.pixels - pixels
        loss = weights.l1 * error.abs().mean() + weights.l2 * error.square().mean()
        loss = loss + weights.codebook * made.codebook_loss + weights.commitment * made.commitment_loss
        self._latents.append(made.latents.detach())
        codes = made.codes.unique()
        self.used[codes] = True
        return loss, {
            "psnr": psnr(error.detach()),
            "commitment": made.commitment_loss.detach(),
            "codes_in_batch": torch.tensor(float(codes.numel()), device=self.workers.device),
        }

    def after_step(self, step: int, generator: torch.Generator) -> None:
        every = self.recipe.tokenizer_loss.restart_every
        last = self.recipe.tokenizer_loss.restart_until * self.recipe.num_images / self.recipe.batch_size
        latents, self._latents = self._latents, []
        if every and step % every == 0 and step <= last:
            # In the order of the batch, whatever number of processes and pieces computed it.
            pieces = torch.stack([self.workers.gather(piece) for piece in latents])
            used = self.workers.sum(self.used.float()) > 0
            dead = torch.ones_like(used) if step == 0 else ~used  # the first time all: a start on the data
            self.module.quantizer.restart(pieces.flatten(0, 1), dead, generator)
            self.used.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"used": self.workers.sum(self.used.float()) > 0}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.used = state["used"].to(self.workers.device)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        device, vocab_size = self.workers.device, self.recipe.tokenizer.vocab_size
        squared, codes = torch.zeros(1, device=device), torch.zeros(vocab_size, device=device)
        images = self.heldout.images[:2000]
        for rows in _share(len(images), 250, self.workers):
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
        pairs = torch.stack([pixels, module(pixels).pixels], 1).flatten(0, 1)
        return contact_sheet(as_pictures(pairs), ["real", "code"] * 16, columns=8)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, ImageTokenizer)
        module.save_pretrained(folder, training=training)


def _share(count: int, size: int, workers: Workers) -> list[slice]:
    """This process's share of `count` held-out samples, in slices of `size` at most."""
    starts = range(workers.rank * size, count, workers.count * size)
    return [slice(start, min(start + size, count)) for start in starts]


def _too_large(source: Source, size: int) -> bool:
    """Whether decoded pictures had better not all be in memory."""
    return len(source) * size * size * 3 > 2**31


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
    """Train a transformer on codes: extracted ones, or those of pictures, which are made at the start of the run."""

    def __init__(self, recipe: Recipe, workers: Workers) -> None:
        self.recipe, self.workers = recipe, workers
        if recipe.model.text_dim or recipe.model.prefix_grid:
            raise ValueError(
                "so far only class-conditional models are trained: captions need text features and clips given frames; "
                "set model.text_dim=0 and model.prefix_grid=[]"
            )
        self.train_codes, self.heldout_codes, self.tokenizer_folder = _code_sets(recipe, workers)
        self.tokenizer = load_tokenizer(self.tokenizer_folder).to(workers.device)
        self.class_names = self.train_codes.class_names
        config = dataclasses.replace(
            recipe.model,
            grid=self.train_codes.grid,
            vocab_size=self.tokenizer.config.vocab_size,
            num_classes=len(self.class_names),
        )
        torch.manual_seed(recipe.seed)
        self.module = Transformer(config).to(workers.device)
        self.num_samples = len(self.train_codes)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, Transformer)
        return list(module.blocks)

    def fetch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        codes = self.train_codes.read(batch.indices, batch.uniforms[:, 1])
        return torch.from_numpy(codes), torch.from_numpy(self.train_codes.labels[batch.indices])

    def loss(self, batch: Batch, data: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        codes, labels = (part.to(self.workers.device) for part in data)
        null = torch.from_numpy(batch.uniforms[:, 0] < self.recipe.condition_dropout).to(self.workers.device)
        condition = drop(ClassCondition(labels), null)
        loss = token_losses(self.module, codes, condition, dropout=self.recipe.dropout).mean()
        return loss, {"bits_per_token": loss.detach() / math.log(2)}

    def after_step(self, step: int, generator: torch.Generator) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Transformer)
        codes, device = self.heldout_codes, self.workers.device
        total = torch.zeros(1, device=device)
        for rows in _share(len(codes), 500, self.workers):
            labels = ClassCondition(torch.from_numpy(codes.labels[rows]).to(device))
            tokens = torch.from_numpy(codes.read(np.arange(rows.start, rows.stop))).to(device)
            total += token_losses(module, tokens, labels).mean(-1).sum()
        loss = float(self.workers.sum(total)) / len(codes)
        return {"loss": loss, "bits_per_token": loss / math.log(2)}

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        assert isinstance(module, Transformer)
        labels = torch.arange(min(10, len(self.class_names))).repeat_interleave(4)
        codes = generate(module, ClassCondition(labels), seed=0)
        names = [self.class_names[label] for label in labels]
        pixels = self.tokenizer.decode(codes)
        if pixels.ndim == 5:  # a clip's frames side by side
            pixels = pixels.movedim(2, 3).flatten(3, 4)
        return contact_sheet(as_pictures(pixels), names, columns=8)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, Transformer)
        module.save_pretrained(
            folder,
            class_names=self.class_names,
            tokenizer=self.tokenizer_folder,
            training=training,
            sampling=dataclasses.asdict(self.recipe.sampling),
        )


def _code_sets(recipe: Recipe, workers: Workers) -> tuple[Codes, Codes, Path]:
    """Codes to learn from, codes held out, and the folder of the tokenizer that made both.

    Raises:
        ValueError: the codes are of another tokenizer than the recipe's.
    """
    data = recipe.data
    if data.codes:
        train, folder = Codes.open(data.codes), Path(recipe.tokenizer_path or Path(data.codes) / "tokenizer")
        if data.heldout_codes:
            heldout = Codes.open(data.heldout_codes)
        else:
            out = held_out(train.groups, data.heldout_share)
            train, heldout = train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))
        for codes in (train, heldout):
            if codes.manifest["tokenizer"] != digest(folder):
                raise ValueError(
                    f"the codes in {codes.folder} were made by another tokenizer than {folder} "
                    f"({codes.manifest['tokenizer'][:12]}..., not {digest(folder)[:12]}...); extract them again with it"
                )
        return train, heldout, folder
    if not recipe.tokenizer_path:
        raise ValueError("a model recipe needs tokenizer_path=FOLDER, a trained tokenizer, or data.codes=FOLDER")
    made = []
    for name, source in zip(("train", "heldout"), data.open(), strict=True):
        folder = extract(
            recipe.tokenizer_path, source, Path(recipe.run) / "codes" / name, size=data.size,
            kind=data.views if name == "train" else "centre", device=workers.device, threads=recipe.engine.workers,
            rank=workers.rank, count=workers.count, wait=workers.wait,
        )  # fmt: skip
        made.append(Codes.open(folder))
    return made[0], made[1], Path(recipe.tokenizer_path)


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
