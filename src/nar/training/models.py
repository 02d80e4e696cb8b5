"""The task of training a transformer on codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nar.condition import NULL_CLASS, ClassCondition, Condition
from nar.convert.initial import merged, to_diagonal, trunk, with_gate, with_holes, with_lora
from nar.data.clips import ClipSource
from nar.data.codes import Codes
from nar.data.source import Source
from nar.data.split import without_pairs, without_styles
from nar.likelihood import sample_losses, token_losses
from nar.media.pixels import as_images, as_pictures
from nar.media.sheet import contact_sheet, film_strips
from nar.model import ModelConfig, Transformer
from nar.pipeline.continuation import Continuation, prefix_grid
from nar.sampling import generate
from nar.storage.folder import find_model, without_weights
from nar.text import TextEncoder, found
from nar.tokenizer import load_tokenizer
from nar.tokenizer.multiscale import MultiScaleTokenizer
from nar.training.batches import Batch
from nar.training.distributed import Workers
from nar.training.edits import Holes
from nar.training.loop import Task, share
from nar.training.recipe import Recipe
from nar.training.samples import Samples, code_sets, composed_codes, extract_given, record_held_out, summary
from nar.training.words import Text, dropped

TEXT = "text"  # the folder of features, in that of codes or of a run


class ModelTask(Task):
    """Train a transformer on codes: extracted ones, or those of pictures, which are made at the start of the run."""

    module: Transformer

    def __init__(self, recipe: Recipe, workers: Workers, sources: Sequence[Source] = ()) -> None:
        """Prepare to train on codes of `sources`, to learn from and held out; by default those the recipe names."""
        self.recipe, self.workers = recipe, workers
        together = recipe.batch_size // (workers.count * recipe.engine.accumulate)
        if recipe.mixed_context and together < 2:
            raise ValueError(
                "mixed_context mixes the samples that are computed together, and batch_size / (processes * "
                f"engine.accumulate) is {together}; take a larger batch_size, or mixed_context=0"
            )
        if recipe.model.text_dim and not recipe.text_encoder.source:
            raise ValueError("captions need text_encoder.source=NAME, which says what reads them")
        if recipe.model.prefix_grid and not (recipe.given_frames or recipe.edit):
            raise ValueError(
                "model.prefix_grid needs given_frames=[N], numbers of frames that a clip's condition holds, or edit"
            )
        if not (recipe.data.codes or recipe.tokenizer_path):
            raise ValueError("a model recipe needs tokenizer_path=FOLDER, a trained tokenizer, or data.codes=FOLDER")
        self.tokenizer_folder = find_model(recipe.tokenizer_path or Path(recipe.data.codes) / "tokenizer")
        if recipe.init:
            find_model(recipe.init)  # before codes are made
        sources = () if recipe.data.codes else sources or recipe.data.open()
        words = recipe.text_encoder
        if words.source and not any(found(words, folder) for folder in _feature_folders(recipe)):
            TextEncoder(words, device="cpu")  # says what is wrong with it before codes are made
            if any(source.captions is None for source in sources):
                raise ValueError(
                    f"{recipe.data.source} has no captions for text_encoder.source; leave it out, or add some"
                )
        if sources:  # what can't be held out is said before codes are made
            kept = without_styles(sources, recipe.data.heldout_styles)[0]
            if recipe.data.heldout_pairs:
                without_pairs(kept, recipe.data.heldout_pairs)
        if recipe.data.composed and not (sources and words.source and not isinstance(sources[0], ClipSource)):
            raise ValueError("data.composed needs pictures (data.source) and a text_encoder: scenes have prompts")
        train, heldout = code_sets(recipe, sources, self.tokenizer_folder, workers)
        self.tokenizer = load_tokenizer(self.tokenizer_folder).to(workers.device)
        pairs = composed = None
        if recipe.data.heldout_styles:
            train, heldout = without_styles((train, heldout), recipe.data.heldout_styles)
        if recipe.data.heldout_pairs:
            train, pairs = without_pairs(train, recipe.data.heldout_pairs)
        if recipe.data.composed:
            composed = composed_codes(recipe, sources[0], train, self.tokenizer_folder, workers)
        self.text = _text(recipe, train, heldout, pairs, composed, workers)
        if workers.first and recipe.text_encoder.source:
            record_held_out(recipe, heldout, pairs)
        classes = recipe.learns_classes
        self.class_names = train.class_names if classes else ()
        sizes = self._sizes(train)
        if sizes.get("prefix_grid") == train.grid:
            extract_given(recipe, sources, recipe.given_frames, self.tokenizer_folder, workers)
        torch.manual_seed(recipe.seed)
        self.module = _initial(recipe, sizes, self.text).to(workers.device)
        if self.module.config.scales:
            if not isinstance(self.tokenizer, MultiScaleTokenizer):
                raise ValueError("model.schedule=scales needs the tokenizer_path of a multi-scale tokenizer")
            self.module.sums.load_state_dict(self.tokenizer.quantizer.sums.state_dict())
        self.trunk = trunk(self.module)
        self.continuation = Continuation(self.module, self.tokenizer, recipe.given_frames)
        self.holes = None
        if recipe.edit:
            places = zip(sources, (train, heldout), strict=True)
            self.holes = [Holes(recipe.edit, source, codes, self.tokenizer) for source, codes in places]
        kind = classes, self.text, recipe.data.wording, self.continuation, sizes["vocab_size"]
        self.train = Samples(train, *kind, composed=composed, composed_share=recipe.data.composed)
        self.heldout = Samples(heldout, *kind)
        self.pairs = None if pairs is None else Samples(pairs, *kind)
        self.num_samples = len(train)
        self.summary = summary(train, heldout)

    def _sizes(self, codes: Codes) -> dict[str, Any]:
        """The sizes of the model that follow from data, tokenizer and text encoder."""
        vocab_size = self.tokenizer.config.vocab_size
        sizes: dict[str, Any] = {"grid": codes.grid, "vocab_size": vocab_size, "num_classes": len(self.class_names)}
        if self.text is not None:
            sizes |= {"text_dim": self.text.dim, "text_length": self.text.config.max_length}
        if self.recipe.edit:
            sizes |= {"prefix_grid": codes.grid, "prefix_holes": "token", "prefix_attention": "full"}
            sizes["condition_rotation"] = "identity"  # else a code would not know the places of those given
        if given := self.recipe.given_frames:
            sizes["prefix_grid"] = prefix_grid(self.tokenizer, codes.grid, given)
            if (stated := self.recipe.model.prefix_grid) not in ((), sizes["prefix_grid"]):
                raise ValueError(
                    f"given_frames {list(given)} are codes of {sizes['prefix_grid']}, but model.prefix_grid is "
                    f"{stated}; leave it out"
                )
        return sizes

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, Transformer)
        return list(module.blocks)

    def fetch(self, batch: Batch) -> tuple[Tensor, Condition, Tensor | None]:
        """Codes, their condition, and the weight of each token where not all count the same."""
        draws, choice = batch.draws, np.array(self.continuation.counts)
        if self.holes:
            picked = self.holes[0].picked(draws["hole"])
            prefix, weight = self.holes[0].read(batch.indices, *picked, draws["view"])
            views, wordings = draws["view"], draws["wording"]
            return *self.train.read(batch.indices, prefix=prefix, views=views, wordings=wordings), weight
        counts = choice[(draws["given_frames"] * len(choice)).astype(np.int64).clip(max=len(choice) - 1)]
        counts = np.where(draws["frame_dropout"] < self.recipe.frame_dropout, 0, counts)
        composed = draws["scene"]
        read = self.train.read(batch.indices, counts, views=draws["view"], wordings=draws["wording"], composed=composed)
        return *read, None

    def loss(self, batch: Batch, data: tuple[Tensor, Condition, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.workers.device
        draws = torch.from_numpy(batch.draws["condition_dropout"]).to(device)
        if data[1].labels is not None:
            self.module.check_labels(data[1].labels)
        moved = data[1].map(lambda tensor: tensor.to(device, non_blocking=True))
        condition = dropped(moved, draws, self.recipe.condition_dropout)
        codes = data[0].to(device, non_blocking=True)
        seen = mixed(codes, self.recipe.mixed_context) if self.recipe.mixed_context else codes
        losses = token_losses(self.module, codes, condition, seen=seen, dropout=self.recipe.dropout)
        loss = self.of_samples(losses, condition, data[2]).mean()
        return loss, {"bits_per_token": loss.detach() / math.log(2)}

    def of_samples(self, losses: Tensor, condition: Condition, weight: Tensor | None = None) -> Tensor:
        """The mean loss (b,) of each sample's tokens, of (b, N), without those that its given frames decide; else
        weighted by `weight` (b, *grid)."""
        known = self.continuation.known(condition)
        return sample_losses(self.module, losses, weight if known is None else known < 0)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Held-out loss; with captions also without them, and on held-out pairs of group and style.

        "bits_per_token_given_N" is that of what follows N given frames, "bits_per_token_filled" that of all codes given
        those of the blanked picture, "bits_per_token_replaced" that of codes in a hole amid a picture's own; "loss" is
        the mean over all these.
        """
        assert isinstance(module, Transformer)
        counts, bits = self.continuation.counts, self._heldout_bits
        found = {f"_given_{count}" if count else "": bits(module, self.heldout, count) for count in counts}
        if self.holes:
            found |= {f"_{mode}": bits(module, self.heldout, mode=mode) for mode in ("filled", "replaced")}
        measured = {"loss": sum(found.values()) / len(found) * math.log(2)}
        measured |= {f"bits_per_token{kind}": value for kind, value in found.items()}
        if self.text is not None:
            measured["bits_per_token_without_words"] = bits(module, self.heldout, counts[0], without_words=True)
        if self.pairs is not None:
            measured["bits_per_token_of_pairs"] = bits(module, self.pairs, counts[0])
        return measured

    def _heldout_bits(
        self, module: Transformer, samples: Samples, count: int = 0, *, without_words: bool = False, mode: str = ""
    ) -> float:
        """Mean loss of a token in bits, each sample with its first wording and `count` given frames, or in a `mode`
        with a hole."""
        device = self.workers.device
        total = torch.zeros(1, device=device)
        for rows in share(len(samples), 100 if self.continuation.prefix else 500, self.workers):
            indices, weight = np.arange(rows.start, rows.stop), None
            if mode and self.holes:
                prefix, weight = self.holes[1].fixed(indices, mode)
                codes, condition = samples.read(indices, prefix=prefix)
            else:
                codes, condition = samples.read(indices, np.full(len(indices), count))
            condition = condition.to(device)
            if without_words:
                condition = condition.drop(torch.ones(len(indices), dtype=torch.bool, device=device))
            losses = token_losses(module, codes.to(device), condition)
            total += self.of_samples(losses, condition, weight).sum()
        return float(self.workers.sum(total)) / len(samples) / math.log(2)

    @torch.no_grad()
    def preview(self, module: nn.Module) -> Image.Image:
        """Pictures, four of each prompt or class; or clips, one of each, and some that go on from given frames."""
        assert isinstance(module, Transformer)
        clips = len(self.train.codes.grid) == 3
        shown = [*self._asked(1 if clips else 4), *self._continued(), *self._filled()]
        made = []
        for _, condition in shown:
            condition = condition.to(self.workers.device)
            known = self.continuation.known(condition)
            made.append(generate(module, condition, self.recipe.sampling, seed=0, known=known))
        names = [name for labels, _ in shown for name in labels]
        pixels = torch.cat([self.tokenizer.decode(part) for codes in made for part in codes.split(16)])
        if not clips:
            return contact_sheet(as_pictures(pixels), names, columns=8)
        return film_strips([[Image.fromarray(frame) for frame in clip] for clip in as_images(pixels)], names)

    def _asked(self, each: int) -> Iterator[tuple[list[str], Condition]]:
        """Names of the pictures that previews show, and their condition."""
        if self.continuation.counts[0]:
            return
        if self.text is not None:
            names = [prompt for prompt in _prompts(self.recipe, self.heldout.codes) for _ in range(each)]
            labels = torch.full((len(names),), NULL_CLASS)
        else:
            labels = torch.arange(min(10, len(self.class_names))).repeat_interleave(each)
            names = [self.class_names[label] for label in labels]
        parts = [ClassCondition(labels)] if self.class_names else []
        if self.text is not None:
            parts.append(self.text.condition(self.text.places(names)))
        if self.continuation.prefix:
            nothing = torch.zeros(len(names), *self.continuation.prefix, dtype=torch.long)
            parts.append(self.continuation.masked(nothing, [0] * len(names)))
        if names:
            yield names, Condition.of(parts)

    def _continued(self) -> Iterator[tuple[list[str], Condition]]:
        """Held-out clips to go on with, four of each number of given frames."""
        rows, captions = np.arange(min(4, len(self.heldout))), self.heldout.codes.captions
        for count in filter(None, self.continuation.counts):
            names = [f"{count} given" + (f": {captions[row]}" if captions else "") for row in rows]
            yield names, self.heldout.read(rows, np.full(len(rows), count))[1]

    def _filled(self) -> Iterator[tuple[list[str], Condition]]:
        """Held-out pictures with holes that are to be filled."""
        if self.holes:
            rows = np.arange(min(8, len(self.heldout)))
            yield ["filled"] * len(rows), self.heldout.read(rows, prefix=self.holes[1].fixed(rows, "filled")[0])[1]

    def export(self, module: nn.Module, folder: Path, training: dict[str, Any]) -> None:
        assert isinstance(module, Transformer)
        data, further = self.recipe.data, dict[str, Any]()
        if self.text is not None:
            further["text_encoder"] = dataclasses.asdict(self.text.config)
        if any(self.continuation.counts):
            further["given_frames"] = list(self.continuation.counts)
        if data.frame_rate:
            further["frame_rate"] = data.frame_rate / data.stride
        further |= {"training": training, "sampling": dataclasses.asdict(self.recipe.sampling)}
        module = merged(module) if self.recipe.lora_rank else module
        module.save_pretrained(folder, class_names=self.class_names, tokenizer=self.tokenizer_folder, **further)


def _initial(recipe: Recipe, sizes: dict[str, Any], text: Text | None) -> Transformer:
    """The model before training: new, or that of `recipe.init` at this grid and with these classes."""
    if not recipe.init:
        return Transformer(equal_to_nar(dataclasses.replace(recipe.model, **sizes), recipe.equal))
    model = Transformer.from_pretrained(find_model(recipe.init))
    model = to_diagonal(model) if recipe.to_diagonal else model
    if model.config.vocab_size != sizes["vocab_size"]:
        counts = f"{model.config.vocab_size} codes but the tokenizer {sizes['vocab_size']}"
        raise ValueError(f"{recipe.init} has {counts}; use its own: tokenizer_path={Path(recipe.init) / 'tokenizer'}")
    if text and (model.config.text_dim, model.config.text_length) != (text.dim, text.config.max_length):
        raise ValueError(
            f"{recipe.init} reads {model.config.text_length} text features of width {model.config.text_dim}, the text "
            f"encoder {recipe.text_encoder.source} gives {text.config.max_length} of {text.dim}; "
            "set the text_encoder that the model was trained with"
        )
    if model.config.text_dim and text is None:
        raise ValueError(f"{recipe.init} reads captions: set text_encoder.source, as in its config.json")
    if recipe.model.schedule not in (ModelConfig.schedule, model.config.schedule):
        raise ValueError(
            f"{recipe.init} has the schedule {model.config.schedule} and keeps it; set model.schedule so, or "
            "to_diagonal=true, which makes a raster model decode neighbours"
        )
    recipe.check_null_class(model.config)
    model = model.at_grid(sizes["grid"])
    if recipe.edit and not model.config.prefix_grid:
        model = with_holes(model, sizes)
    if recipe.model.gate and not model.config.gate:
        model = with_gate(model)
    if model.config.prefix_grid != sizes.get("prefix_grid", ()):
        raise ValueError(
            f"{recipe.init} reads given codes of {model.config.prefix_grid}, and this recipe's (given_frames "
            f"{list(recipe.given_frames)}, edit) are {sizes.get('prefix_grid', ())}; set those that it was trained with"
        )
    if model.config.num_classes != sizes["num_classes"]:  # all but the embeddings of the classes
        kept = {name: tensor for name, tensor in model.state_dict().items() if name != "classes.weight"}
        model = Transformer(dataclasses.replace(model.config, num_classes=sizes["num_classes"]))
        model.load_state_dict(model.state_dict() | kept)
    model.requires_grad_(True)
    if recipe.lora_rank:
        with_lora(model, recipe.lora_rank, heads=recipe.to_diagonal)
    return model


def equal_to_nar(config: ModelConfig, equal: str) -> ModelConfig:
    """A model of another order as deep as NAR's of its sizes ("depth"), or also of as many parameters ("parameters").

    NAR has a block and an output more for each further axis. They are made up for by layers, and by wider feed-forward
    layers; what is left is less than one unit of width in each.
    """
    if not equal:
        return config
    ours = dataclasses.replace(config, schedule="manhattan", regions=(), head_depths=(), axis_heads=())
    missing = ours.num_blocks - config.num_blocks
    deep = dataclasses.replace(config, num_layers=config.num_layers + missing).complete()
    if equal == "depth":
        return deep
    unit = 3 * deep.dim * deep.num_blocks
    return dataclasses.replace(deep, hidden_dim=deep.hidden_dim + (num_parameters(ours) - num_parameters(deep)) // unit)


def num_parameters(config: ModelConfig) -> int:
    """All of a model's parameters; one that is ready to sample keeps some of them packed, elsewhere."""
    with without_weights():
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def _text(
    recipe: Recipe, train: Codes, heldout: Codes, pairs: Codes | None, composed: Codes | None, workers: Workers
) -> Text | None:
    """The captions of all sets with their features: those beside extracted codes, or else those in the run's folder."""
    if not recipe.text_encoder.source:
        return None
    data = recipe.data
    said = [forms for codes in (train, heldout, pairs) if codes is not None for forms in codes.wordings(data.wording)]
    said += [tuple(_prompts(recipe, heldout)), *([] if composed is None else composed.wordings("plain"))]
    captions = [form for forms in said for form in forms]
    folders = _feature_folders(recipe)
    return Text(recipe.text_encoder, captions, kind=data.text_features, folders=folders, workers=workers)


def _feature_folders(recipe: Recipe) -> list[Path]:
    data = recipe.data
    return [Path(folder) / TEXT for folder in (data.codes, data.heldout_codes, recipe.run) if folder]


def _prompts(recipe: Recipe, heldout: Codes) -> list[str]:
    """What previews show: the recipe's prompts, or ten captions that are held out."""
    captions = () if recipe.prompts else heldout.wordings(recipe.data.wording)
    return list(recipe.prompts) or list(dict.fromkeys(forms[0] for forms in captions))[:10]


def mixed(codes: Tensor, most: float) -> Tensor:
    """Codes (B, *grid) of which a share, uniform in [0, most] for each sample, is that of the sample before it.

    A model that only ever sees pictures of the training set knows one by its first codes and need not read the words,
    and never meets a wrong code, as there are among those that it samples itself. Shown these it has to ask the words
    (compare noisy context learning, arXiv 2502.20388).
    """
    share = torch.rand(len(codes), *(1,) * (codes.ndim - 1), device=codes.device) * most
    return torch.where(torch.rand(codes.shape, device=codes.device) < share, codes.roll(1, 0), codes)
