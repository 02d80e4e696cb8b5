"""Likelihood of held-out pictures or clips: bits per token of one model, or of two on the same samples.

Knows models, what their samples are conditioned on, and the tokenizer whose codes are predicted; does not know how
numbers are computed (`nar.likelihood`, `independence`), nor options. Dimensions: M samples, B at a time, T frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar import __version__
from nar.condition import Condition
from nar.data.source import Source
from nar.data.wording import wordings
from nar.evaluation.independence import independence_cost
from nar.evaluation.real import open_real
from nar.evaluation.sets import class_labels, trained_on
from nar.likelihood import bits_per_token
from nar.media.pixels import as_pixels
from nar.media.video import Windows
from nar.metrics.scores import mean_interval
from nar.pipeline import Pipeline, Request
from nar.pipeline.folder import format_facts
from nar.precision import usable_device
from nar.progress import Progress, steps
from nar.storage.fields import Seed, Size, checked
from nar.storage.folder import find_model, model_digest

ROWS = {
    "bits_per_token": "held-out bits per token",
    "independence_cost": "of which at least, for sampling a front's tokens independently",
}  # of the table
COUPLED_BYTES = 2**31  # of text features that are held to measure the cost of independence
_BATCH = 100
_ENCODED = 250  # frames that the tokenizer reads at once


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples with their codes (M, *grid), and of clips (M, T, H, W, 3) uint8 the frames that are context."""

    source: Source
    codes: Tensor
    frames: np.ndarray | None

    def __len__(self) -> int:
        return len(self.codes)


@checked
def judge_likelihood(
    model: str,
    real: str,
    *,
    against: str | None = None,
    split: str = "test",
    number: Size = 10_000,
    seed: Seed = 0,
    device: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Bits per token of held-out samples, each under its own condition: class, caption, context frames.

    "bits_per_token" is that of whole samples, "bits_per_token_given_N" of what follows N frames, as training logs them.
    With `against`, another model of the same tokenizer, "against: ..." are its numbers, and "difference: ..." is paired
    by sample. What a front's independence costs is of `model`, and of the first of its numbers.

    Raises:
        ValueError: samples without the classes or captions that a model needs, or models of two tokenizers.
    """
    folders = [find_model(name) for name in (model, against) if name is not None]
    tokenizers = [model_digest(folder / "tokenizer") for folder in folders if (folder / "tokenizer").is_dir()]
    if len(set(tokenizers)) > 1:
        raise ValueError(f"{model} and {against} have different tokenizers: bits of different codes can't be compared")
    pipes = [Pipeline.from_pretrained(folder, device=usable_device(device), dtype=dtype) for folder in folders]
    heldout = held_out(pipes, [trained_on(folder) for folder in folders], real, split, number, seed)
    found: dict[str, np.ndarray] = {}
    warnings: list[str] = []
    for index, (pipe, folder) in enumerate(zip(pipes, folders, strict=True)):
        prefix = "against: " if index else ""
        samples = Samples(pipe, heldout, trained_on(folder).get("wording", "plain"))
        for count in pipe.continuation.counts:
            name = f"bits_per_token_given_{count}" if count else "bits_per_token"
            found[prefix + name] = samples.bits(count)
        if index == 0:
            if samples.text_bytes <= COUPLED_BYTES:
                found["independence_cost"] = samples.cost(pipe.continuation.counts[0], seed)
            else:
                warnings.append(
                    f"no independence_cost: the captions' features are {samples.text_bytes / 2**30:.1f} GiB, and it "
                    f"holds at most {COUPLED_BYTES / 2**30:.0f}; give fewer pictures with -n"
                )
    for name in [name for name in found if f"against: {name}" in found]:
        found[f"difference: {name}"] = found[name] - found[f"against: {name}"]
    settings: dict[str, Any] = {
        "model": model,
        "against": against,
        "num_real": len(heldout),
        "seed": seed,
        **format_facts(pipes[0].model, pipes[0].choice),
    }
    settings |= {"schedule": [pipe.model.config.schedule for pipe in pipes], "guidance_scale": 1.0}
    settings["real"] = {**heldout.source.counts(), "split": split, "codes_of": "the model's own tokenizer"}
    settings |= {"weights_sha256": [*map(model_digest, folders)], "tokenizer_sha256": tokenizers[0]}
    return {
        **{name: float(values.mean()) for name, values in found.items()},
        "interval": {name: mean_interval(values, seed=seed) for name, values in found.items()},
        "warnings": warnings,
        "settings": settings | {"versions": {"nar": __version__, "torch": torch.__version__}},
    }


class Samples:
    """Held-out samples as one model is conditioned on them: by its classes, its text encoder, its context frames."""

    def __init__(self, pipe: Pipeline, heldout: HeldOut, wording: str) -> None:
        self.pipe, self.heldout = pipe, heldout
        config, source = pipe.model.config, heldout.source
        if heldout.codes.shape[1:] != config.grid:
            raise ValueError(f"codes of {tuple(heldout.codes.shape[1:])} do not fit a model of {config.grid}")
        self.labels = np.full(len(heldout), -1)
        if config.num_classes:
            self.labels = class_labels(pipe, source)
        self.prompts: Sequence[str] = [""] * len(heldout)
        if config.text_dim:
            if source.captions is None:
                raise ValueError("this model reads words, and the held-out pictures have no captions")
            self.prompts = source.captions
            if wording == "varied":
                further = source.tags or [()] * len(heldout), source.styles or [""] * len(heldout)
                self.prompts = [wordings(*words)[0] for words in zip(self.prompts, *further, strict=True)]
        self.text_bytes = 4 * len(heldout) * config.text_length * config.text_dim

    def condition(self, rows: slice, count: int) -> tuple[Condition, Tensor | None]:
        """The condition of some samples, of clips with their first `count` frames, and what codes it decides."""
        condition = self.pipe.condition(self.requests(rows, count))[0]
        return condition, self.pipe.continuation.known(condition)

    def requests(self, rows: slice, count: int) -> list[Request]:
        """What some samples are conditioned on, of clips their first `count` frames too."""
        frames: Sequence[Tensor | None] = [None] * len(self.labels[rows])
        if count and self.heldout.frames is not None:
            frames = list(as_pixels(self.heldout.frames[rows, :count]).to(self.pipe.model.device))
        columns = zip(self.labels[rows].tolist(), self.prompts[rows], frames, strict=True)
        return [Request(label, prompt, frames=clip) for label, prompt, clip in columns]

    def bits(self, count: int) -> np.ndarray:
        """Bits per token (M,) of what follows the first `count` frames."""
        parts = []
        for start in steps(range(0, len(self.heldout), _BATCH), "likelihood", "batches"):
            rows = slice(start, start + _BATCH)
            condition, known = self.condition(rows, count)
            parts.append(bits_per_token(self.pipe.model, self.heldout.codes[rows], condition, known=known))
        return torch.cat(parts).numpy()

    def cost(self, count: int, seed: int) -> np.ndarray:
        """What the independence of a front's tokens costs (M / 2,) of what follows `count` frames."""
        condition, known = self.condition(slice(None), count)
        return independence_cost(self.pipe.model, self.heldout.codes, condition, known=known, seed=seed).numpy()


def held_out(
    pipes: Sequence[Pipeline],
    trained: Sequence[dict[str, Any]],
    real: str | Source,
    split: str,
    number: int,
    seed: int,
) -> HeldOut:
    """Pictures, or the windows of clips that were trained on, as codes of the tokenizer; at random, not by class.

    `real` is a path, of which no model sees what it was `trained` on, or what was opened already.
    """
    pipe, windows = pipes[0], None
    if pipe.makes_clips:
        kept = {name: trained[0][name] for name in ("stride", "frame_rate") if name in trained[0]}
        windows = Windows(pipe.pixel_shape[0], kind=trained[0].get("windows", "centre"), **kept)
    size = pipe.pixel_shape[-1]
    source = real if isinstance(real, Source) else open_real(real, trained, split=split, size=size, windows=windows)
    source = source.take(torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:number].numpy())
    context = max(count for one in pipes for count in one.continuation.counts)
    codes, frames, good = [], [], []
    samples, step = source.decoded(size), max(1, _ENCODED // math.prod(pipe.pixel_shape[:-2]))
    with Progress("encoding", len(source), f"{source.noun}s") as bar, torch.inference_mode():
        while batch := list(islice(samples, step)):
            pixels = as_pixels(np.stack([image for _, image in batch])).to(pipe.model.device)
            codes.append(pipe.tokenizer.encode(pixels).cpu())
            frames += [clip[:context] for _, clip in batch if context]
            good += [row for row, _ in batch]
            bar.update(len(batch))
    source = source.take(np.array(good)) if len(good) < len(source) else source
    return HeldOut(source, torch.cat(codes), np.stack(frames) if frames else None)
