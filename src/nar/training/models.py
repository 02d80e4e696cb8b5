"""The task of training a transformer on codes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nar.condition import ClassCondition, Condition, drop
from nar.data.codes import Codes
from nar.data.extract import extract
from nar.data.sources import (
    held_out,
)  # fmt: skip
from nar.folder import digest
from nar.model import Dropout, Transformer
from nar.sampling import generate
from nar.sheet import contact_sheet
from nar.tokenizer import load_tokenizer
from nar.tokenizer.pixels import as_pictures
from nar.training.distributed import Workers
from nar.training.loop import Batch, share
from nar.training.recipe import Recipe


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

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:  # noqa: ARG002
        return None

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Transformer)
        codes, device = self.heldout_codes, self.workers.device
        total = torch.zeros(1, device=device)
        for rows in share(len(codes), 500, self.workers):
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
