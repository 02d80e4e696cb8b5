"""The task of training a transformer on codes."""

from __future__ import annotations

import copy
import dataclasses
import json
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

from nar.condition import ClassCondition, Condition, drop, map_condition
from nar.data.codes import Codes
from nar.data.extract import extract
from nar.data.sources import held_out, held_out_pairs
from nar.folder import digest
from nar.model import Dropout, Transformer
from nar.sampling import generate
from nar.sheet import contact_sheet
from nar.tokenizer import load_tokenizer
from nar.tokenizer.pixels import as_pictures
from nar.training.checkpoint import atomically
from nar.training.distributed import Workers
from nar.training.loop import Batch, share
from nar.training.recipe import Recipe
from nar.training.words import Conditions, Labels, Text, Words

TEXT = "text"  # the folder of features, in that of codes or of a run


class ModelTask:
    """Train a transformer on codes: extracted ones, or those of pictures, which are made at the start of the run."""

    def __init__(self, recipe: Recipe, workers: Workers) -> None:
        self.recipe, self.workers = recipe, workers
        if recipe.model.prefix_grid or (recipe.model.text_dim and not recipe.text_encoder.source):
            raise ValueError(
                "so far models of classes and of captions are trained: captions need text_encoder.source=NAME, and "
                "given frames are not supported (model.prefix_grid=[])"
            )
        self.train_codes, self.heldout_codes, self.tokenizer_folder = _code_sets(recipe, workers)
        self.pair_codes = None
        if recipe.data.heldout_pairs:
            self.train_codes, self.pair_codes = _without_pairs(recipe, self.train_codes)
        if workers.first and recipe.text_encoder.source:
            _record_held_out(Path(recipe.run), self.heldout_codes, self.pair_codes)
        self.tokenizer = load_tokenizer(self.tokenizer_folder).to(workers.device)
        self.text = _text(recipe, [self.train_codes, self.heldout_codes, self.pair_codes], workers)
        self.class_names = () if self.text else self.train_codes.class_names
        self.train_conditions = self._conditions(self.train_codes)
        torch.manual_seed(recipe.seed)
        self.module = _initial(
            recipe, self.train_codes.grid, self.tokenizer.config.vocab_size, len(self.class_names), self.text
        ).to(workers.device)
        self.num_samples = len(self.train_codes)

    def _conditions(self, codes: Codes) -> Conditions:
        return Labels(codes) if self.text is None else Words(self.text, codes.wordings(self.recipe.data.wording))

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, Transformer)
        return list(module.blocks)

    def fetch(self, batch: Batch) -> tuple[Tensor, Condition]:
        codes = self.train_codes.read(batch.indices, batch.uniforms[:, 1])
        return torch.from_numpy(codes), self.train_conditions.read(batch.indices, batch.uniforms[:, 2])

    def loss(self, batch: Batch, data: tuple[Tensor, Condition]) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.workers.device
        null = torch.from_numpy(batch.uniforms[:, 0] < self.recipe.condition_dropout).to(device)
        condition = drop(map_condition(data[1], lambda part: part.to(device)), null)
        loss = token_losses(self.module, data[0].to(device), condition, dropout=self.recipe.dropout).mean()
        return loss, {"bits_per_token": loss.detach() / math.log(2)}

    def after_step(self, step: int, num_steps: int, generator: torch.Generator) -> str | None:  # noqa: ARG002
        return None

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Held-out loss; with captions also without them, and on held-out pairs of group and style."""
        assert isinstance(module, Transformer)
        loss = self._heldout(module, self.heldout_codes)
        measured = {"loss": loss, "bits_per_token": loss / math.log(2)}
        if self.text is not None:
            null = self._heldout(module, self.heldout_codes, without_words=True)
            measured["bits_per_token_without_words"] = null / math.log(2)
        if self.pair_codes is not None:
            measured["bits_per_token_of_pairs"] = self._heldout(module, self.pair_codes) / math.log(2)
        return measured

    def _heldout(self, module: Transformer, codes: Codes, *, without_words: bool = False) -> float:
        """Mean loss of a token in nats, each sample with its first wording."""
        device, conditions = self.workers.device, self._conditions(codes)
        total = torch.zeros(1, device=device)
        for rows in share(len(codes), 500, self.workers):
            indices = np.arange(rows.start, rows.stop)
            condition = map_condition(conditions.read(indices), lambda part: part.to(device))
            if without_words:
                condition = drop(condition, torch.ones(len(indices), dtype=torch.bool, device=device))
            tokens = torch.from_numpy(codes.read(indices)).to(device)
            total += token_losses(module, tokens, condition).mean(-1).sum()
        return float(self.workers.sum(total)) / len(codes)

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        assert isinstance(module, Transformer)
        if self.text is None:
            labels = torch.arange(min(10, len(self.class_names))).repeat_interleave(4)
            codes = generate(module, ClassCondition(labels), seed=0)
            names = [self.class_names[label] for label in labels]
        else:
            names = [prompt for prompt in _prompts(self.recipe, self.heldout_codes) for _ in range(4)]
            condition = self.text.condition(self.text.places(names))
            codes = generate(module, condition, self.recipe.sampling, seed=0)
        pixels = self.tokenizer.decode(codes)
        return contact_sheet(as_pictures(pixels), names, columns=8 if pixels.ndim == 4 else 1)

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, Transformer)
        words: dict[str, Any] = {} if self.text is None else {"text_encoder": self.text.record()}
        (_merged(module) if self.recipe.lora_rank else module).save_pretrained(
            folder,
            class_names=self.class_names,
            tokenizer=self.tokenizer_folder,
            training=training,
            sampling=dataclasses.asdict(self.recipe.sampling),
            **words,
        )


def _initial(
    recipe: Recipe, grid: tuple[int, ...], vocab_size: int, num_classes: int, text: Text | None
) -> Transformer:
    """The model before training: new, or that of `recipe.init` at this grid and with these classes."""
    words: dict[str, Any] = {} if text is None else {"text_dim": text.dim, "text_length": text.config.max_length}
    if not recipe.init:
        return Transformer(
            dataclasses.replace(recipe.model, grid=grid, vocab_size=vocab_size, num_classes=num_classes, **words)
        )
    model = Transformer.from_pretrained(recipe.init)
    if model.config.vocab_size != vocab_size:
        raise ValueError(
            f"{recipe.init} has {model.config.vocab_size} codes but the tokenizer {vocab_size}; "
            f"use its own: tokenizer_path={Path(recipe.init) / 'tokenizer'}"
        )
    if any(getattr(model.config, name) != value for name, value in words.items()):
        raise ValueError(
            f"{recipe.init} reads {model.config.text_length} text features of width {model.config.text_dim}, the text "
            f"encoder {recipe.text_encoder.source} gives {text and text.config.max_length} of {text and text.dim}; "
            "set the text_encoder that the model was trained with"
        )
    if model.config.text_dim and text is None:
        raise ValueError(f"{recipe.init} reads captions: set text_encoder.source, as in its config.json")
    model = model.at_grid(grid)
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


def _text(recipe: Recipe, sets: Sequence[Codes | None], workers: Workers) -> Text | None:
    """The captions of all sets with their features: those beside extracted codes, or else those in the run's folder."""
    if not recipe.text_encoder.source:
        return None
    kind = recipe.data.wording
    captions = [form for codes in sets if codes is not None for forms in codes.wordings(kind) for form in forms]
    folders = [Path(recipe.data.codes) / TEXT] if recipe.data.codes else []
    return Text(
        recipe.text_encoder, [*captions, *_prompts(recipe, sets[1])], kind=recipe.data.text_features,
        folders=[*folders, Path(recipe.run) / TEXT], workers=workers,
    )  # fmt: skip


def _prompts(recipe: Recipe, heldout: Codes | None) -> list[str]:
    """What previews show: the recipe's prompts, or ten captions that are held out."""
    if recipe.prompts or heldout is None:
        return list(recipe.prompts)
    return list(dict.fromkeys(forms[0] for forms in heldout.wordings(recipe.data.wording)))[:10]


def _without_pairs(recipe: Recipe, train: Codes) -> tuple[Codes, Codes]:
    """Take the pairs of group and style out that are held out."""
    if train.styles is None:
        raise ValueError("data.heldout_pairs needs pictures with styles: a column `style`; or set it to 0")
    out = held_out_pairs(train.groups, train.styles, recipe.data.heldout_pairs)
    return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))


def _record_held_out(run: Path, heldout: Codes, pairs: Codes | None) -> None:
    """Write down what the model never sees, for whoever measures it."""
    run.mkdir(parents=True, exist_ok=True)
    pair_rows: list[tuple[str, ...]] = []
    if pairs is not None:
        pair_rows = sorted(set(zip(pairs.groups, pairs.styles or (), pairs.captions or (), strict=True)))
    record = {"groups": sorted(set(heldout.groups)), "pairs": pair_rows}
    atomically(run / "held-out.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n", "utf-8"))


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
