"""What a recipe trains: tokenizers on pictures, models on codes. Each is a `Task` for the loop."""

from __future__ import annotations

import copy
import dataclasses
import json
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
from nar.config import load, recipe_names
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
from nar.folder import CONFIG, digest, load_state, read_config, read_weights
from nar.model import Dropout, ModelConfig, Transformer
from nar.sampling import Sampling, generate
from nar.sheet import contact_sheet
from nar.tokenizer import load_tokenizer
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.training.adversary import Adversary, AdversaryConfig
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


def _open_model() -> ModelConfig:
    """A model's defaults with the sizes left open that follow from what a recipe says."""
    config = ModelConfig(num_classes=1000)
    for name, unset in {"hidden_dim": 0, "head_depths": (), "axis_heads": ()}.items():
        object.__setattr__(config, name, unset)
    return config


@dataclass(frozen=True)
class Recipe(Plan):
    """A whole training run. `about` says what it makes, on which hardware, in which time, to which number.

    A model needs a tokenizer: that in `tokenizer_path`, or the one that comes with `data.codes`, or one that is first
    trained with `tokenizer_recipe` on the same data, in the folder `tokenizer` of the run.

    `init` is a model folder to start from, with its architecture and tokenizer; the grid and the classes may be others.
    `lora_rank` above 0 trains low-rank additions to it, which the exported model has merged.
    """

    about: str = ""
    task: str = "model"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    init: str = ""
    train_encoder: bool = True
    tokenizer_path: str = ""
    tokenizer_recipe: str = ""
    lora_rank: int = 0
    model: ModelConfig = field(default_factory=_open_model)
    dropout: Dropout = field(default_factory=Dropout)
    condition_dropout: float = 0.1
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in ("tokenizer", "model"):
            raise ValueError(f"task must be tokenizer or model, not {self.task!r}")
        if self.lora_rank and not (self.init and self.task == "model"):
            raise ValueError("lora_rank needs init=FOLDER, a model to adapt")
        if self.task == "tokenizer" and self.engine.parallel == "fsdp":
            raise ValueError("tokenizers are small: they train with engine.parallel=ddp or none, not fsdp")


def run_recipe(
    name: str, overrides: Sequence[str] = (), *, override: bool = False, metrics: Metrics | None = None
) -> Path | None:
    """Train what a recipe describes; returns the folder of the result, or None when SIGTERM stopped it before.

    Running it again resumes. `metrics` is called with the averaged module whenever previews are drawn.
    """
    # The short forms of the command line: data=FOLDER, and on a GPU the larger version of a recipe where there is one.
    overrides = [f"data.source={given[5:]}" if given.startswith("data=") else given for given in overrides]
    if f"{name}-cuda" in recipe_names() and torch.cuda.is_available():
        name = f"{name}-cuda"
    recipe = load(Recipe, name, overrides)
    with joined(recipe.engine.device) as workers:
        return _run(recipe, workers, override=override, metrics=metrics)


def _run(recipe: Recipe, workers: Workers, *, override: bool, metrics: Metrics | None = None) -> Path | None:
    config = dataclasses.asdict(recipe)
    if _finished(Path(recipe.run), config):
        return Path(recipe.run) / "model"
    if recipe.init and recipe.task == "model" and not (recipe.tokenizer_path or recipe.data.codes):
        recipe = dataclasses.replace(recipe, tokenizer_path=str(Path(recipe.init) / "tokenizer"))
    if recipe.task == "model" and recipe.tokenizer_recipe and not (recipe.tokenizer_path or recipe.data.codes):
        first = load(Recipe, recipe.tokenizer_recipe, [f"run={Path(recipe.run) / 'tokenizer'}"])
        first = dataclasses.replace(
            first, seed=recipe.seed, engine=dataclasses.replace(first.engine, device=recipe.engine.device),
            data=dataclasses.replace(recipe.data, augment=first.data.augment),
        )  # fmt: skip
        folder = _run(first, workers, override=override)
        if folder is None:
            return None
        recipe = dataclasses.replace(recipe, tokenizer_path=str(folder))
    task = TokenizerTask(recipe, workers) if recipe.task == "tokenizer" else ModelTask(recipe, workers)
    return train(task, recipe, config=config, workers=workers, override=override, metrics=metrics)


def _finished(run: Path, config: dict[str, Any]) -> bool:
    """Whether the run has left its model, and with these settings."""
    if not (run / "model" / CONFIG).is_file():
        return False
    made_with = read_config(run / "model").get("training", {}).get("config")
    return bool(made_with == json.loads(json.dumps(config)))


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

    def loss(self, batch: Batch, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.recipe.tokenizer_loss
        pixels = data.to(self.workers.device)
        made = self.module(pixels)
        error = made.pixels - pixels
        loss = weights.l1 * error.abs().mean() + weights.l2 * error.square().mean()
        if self.adversary is not None:
            last = self.module.decoder.conv_out.weight
            assert isinstance(last, Tensor)
            loss = loss + self.adversary.loss(pixels, made.pixels, loss, last, batch.step)
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
        torch.manual_seed(recipe.seed)
        self.module = _initial(recipe, self.train_codes, self.tokenizer.config.vocab_size).to(workers.device)
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

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> None:
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
        (_merged(module) if self.recipe.lora_rank else module).save_pretrained(
            folder,
            class_names=self.class_names,
            tokenizer=self.tokenizer_folder,
            training=training,
            sampling=dataclasses.asdict(self.recipe.sampling),
        )


def _initial(recipe: Recipe, codes: Codes, vocab_size: int) -> Transformer:
    """The model before training: new, or that of `recipe.init` at the codes' grid and with their classes."""
    num_classes = len(codes.class_names)
    if not recipe.init:
        return Transformer(
            dataclasses.replace(recipe.model, grid=codes.grid, vocab_size=vocab_size, num_classes=num_classes)
        )
    model = Transformer.from_pretrained(recipe.init)
    if model.config.vocab_size != vocab_size:
        raise ValueError(
            f"{recipe.init} has {model.config.vocab_size} codes but the tokenizer {vocab_size}; "
            f"use its own: tokenizer_path={Path(recipe.init) / 'tokenizer'}"
        )
    model = model.at_grid(codes.grid)
    if model.config.num_classes != num_classes:  # all but the embeddings of the classes
        fresh = Transformer(dataclasses.replace(model.config, num_classes=num_classes))
        kept = {name: tensor for name, tensor in model.state_dict().items() if name != "classes.weight"}
        fresh.load_state_dict(fresh.state_dict() | kept)
        model = fresh
    model.requires_grad_(True)
    if recipe.lora_rank:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("lora_rank needs peft: pip install nar-gen[lora]") from error
        targets = ["qkv", "proj", "gate_up", "down"]
        adapter = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=targets)
        inject_adapter_in_model(adapter, model)
        model.classes.weight.requires_grad_(True)
    return model


def _merged(module: Transformer) -> Transformer:
    """A plain model with the low-rank additions of `module` added to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = copy.deepcopy(module)
    for part in adapted.modules():
        if isinstance(part, BaseTunerLayer):
            part.merge()
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in adapted.state_dict().items()
        if ".lora_" not in name
    }
    plain = Transformer(module.config)
    plain.load_state_dict(state)
    return plain


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
