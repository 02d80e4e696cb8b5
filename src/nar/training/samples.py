"""The sets that a model learns from and is measured on: codes, and what each sample is made from.

Knows pictures, codes, captions and given frames; does not know losses or steps. Legend: `b` samples, `t h w` axes of
codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar.condition import ClassCondition, Condition
from nar.data.clips import ClipSource
from nar.data.codes import Codes
from nar.data.extract import extract, fingerprint, given_folder
from nar.data.source import Source
from nar.data.split import held_out
from nar.metrics.geneval.scenes import composed_source
from nar.pipeline.continuation import Continuation
from nar.storage import files
from nar.storage.folder import model_digest
from nar.training.distributed import Workers
from nar.training.recipe import Recipe
from nar.training.words import Text, Words

_SETS = ("train", "heldout")


class Samples:
    """Codes with what each is made from: class, words, given frames, or several of them.

    `composed` are more samples, of which a draw takes one in place of a sample of its own; see `read`.
    """

    def __init__(
        self,
        codes: Codes,
        classes: bool,
        text: Text | None,
        wording: str,
        continuation: Continuation,
        vocab_size: int,
        *,
        composed: Codes | None = None,
        composed_share: float = 0.0,
    ) -> None:
        self.codes, self._composed, self._share, self._vocab_size = codes, composed, composed_share, vocab_size
        labels = [codes.labels, *([] if composed is None else [composed.labels])]
        self._labels = np.concatenate(labels) if classes else None
        scenes = [] if composed is None else composed.wordings("plain")
        self._words = None if text is None else Words(text, [*codes.wordings(wording), *scenes])
        self._continuation, counts = continuation, () if continuation.causal else filter(None, continuation.counts)
        self._given = {count: codes.beside(codes.folder / given_folder(count)) for count in counts}

    def __len__(self) -> int:
        return len(self.codes)

    def read(
        self,
        rows: np.ndarray,
        counts: np.ndarray | None = None,
        *,
        prefix: Condition | None = None,
        views: np.ndarray | None = None,
        wordings: np.ndarray | None = None,
        composed: np.ndarray | None = None,
    ) -> tuple[Tensor, Condition]:
        """Codes (b, *grid) of samples, and their condition on the CPU or a text encoder's device.

        `views`, `wordings` and `composed` (b,) are numbers in [0, 1) that pick a view, a wording and perhaps a composed
        scene in place of the sample; None takes the first, and no scene. `counts` (b,) are those of given frames, in
        whose place a `prefix` may be given.

        Raises:
            ValueError: a code that the tokenizer does not have.
        """
        codes = self.codes.read(rows, views)
        conditioned = rows
        if composed is not None and self._composed is not None:
            taken = composed < self._share
            scenes = (composed[taken] / self._share * len(self._composed)).astype(np.int64)
            scenes = scenes.clip(max=len(self._composed) - 1)
            codes[taken] = self._composed.read(scenes)
            conditioned = rows.copy()
            conditioned[taken] = len(self.codes) + scenes
        if (largest := int(codes.max())) >= self._vocab_size:
            raise ValueError(
                f"{self.codes.folder} is damaged: it holds the code {largest}, and its tokenizer has "
                f"{self._vocab_size}; delete its shards and run the same command again"
            )
        parts = []
        if self._labels is not None:
            parts.append(ClassCondition(torch.from_numpy(self._labels[conditioned])))
        if self._words is not None:
            parts.append(self._words.read(conditioned, wordings))
        if prefix is not None:
            parts.append(prefix)
        elif (grid := self._continuation.prefix) and counts is not None:
            given = codes[:, : grid[0]] if self._continuation.causal else np.zeros_like(codes)
            for count, still in self._given.items():
                taken = counts == count
                given[taken] = still.read(rows[taken], None if views is None else views[taken])
            parts.append(self._continuation.masked(torch.from_numpy(given), counts.tolist()))
        return torch.from_numpy(codes), Condition.of(parts)


def code_sets(recipe: Recipe, sources: Sequence[Source], tokenizer: Path, workers: Workers) -> tuple[Codes, Codes]:
    """Codes to learn from and codes held out, made of two `sources`; of none, those that the recipe names.

    Where classes are learned, the labels of both index the class names of the first.

    Raises:
        ValueError: the codes are of another tokenizer, or those held out of classes that are not learned.
    """
    data = recipe.data
    if sources:
        if recipe.learns_classes:  # before the work
            _labels_in(sources[0].class_names, sources[1])
        heldout = _extract(recipe, sources[1], _SETS[1], tokenizer, workers)  # small: soon refused
        try:
            train = _extract(recipe, sources[0], _SETS[0], tokenizer, workers)
        except ValueError:
            if workers.first and not any(Path(recipe.run, "codes", _SETS[0]).glob("*")):
                shutil.rmtree(heldout.folder)  # it would refuse the same command with other pictures
            raise
    elif data.heldout_codes:
        train, heldout = Codes.open(data.codes), Codes.open(data.heldout_codes)
    else:
        train = Codes.open(data.codes)
        out = held_out(train.groups, data.heldout_share)
        train, heldout = train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))
    for codes in () if sources else (train, heldout):
        if codes.manifest["tokenizer"] != model_digest(tokenizer):
            raise ValueError(
                f"the codes in {codes.folder} were made by another tokenizer than {tokenizer} "
                f"({codes.manifest['tokenizer'][:12]}..., not {model_digest(tokenizer)[:12]}...); extract them again"
            )
    if recipe.learns_classes:
        manifest = heldout.manifest | {"class_names": list(train.class_names)}
        labels = _labels_in(train.class_names, heldout)
        heldout = dataclasses.replace(heldout, labels=labels, manifest=manifest)
    return train, heldout


def _labels_in(class_names: Sequence[str], samples: Source | Codes) -> np.ndarray:
    """The labels (N,) of samples as indices of other `class_names`, found by name; raises ValueError without one."""
    own, known = samples.class_names, {name: number for number, name in enumerate(class_names)}
    if own == tuple(class_names):
        return samples.labels
    if unknown := [own[label] for label in np.unique(samples.labels) if own[label] not in known]:
        raise ValueError(
            f"the held-out part has the classes {', '.join(unknown[:10])}, but those that are learned are "
            f"{', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}; name them alike"
        )
    return np.take([known.get(name, -1) for name in own], samples.labels)


def extract_given(
    recipe: Recipe, sources: Sequence[Source], counts: Sequence[int], tokenizer: Path, workers: Workers
) -> None:
    """Make the codes of the first frames alone, for a tokenizer whose codes depend on the whole clip."""
    for name, source in zip(_SETS, sources, strict=True) if sources else ():
        for count in filter(None, counts):
            if not isinstance(source, ClipSource):
                raise ValueError("given_frames are for clips: say how many frames they have, data.num_frames")
            still = dataclasses.replace(source, given=count)
            _extract(recipe, still, f"{name}/{given_folder(count)}", tokenizer, workers, views_of=name)


def composed_codes(recipe: Recipe, source: Source, train: Codes, tokenizer: Path, workers: Workers) -> Codes:
    """Scenes composed of drawings in `train`, which was made of `source`, with their prompts as captions."""
    learned = set(zip(train.groups, train.styles or [""] * len(train), strict=True))
    keys = zip(source.groups or source.names, source.styles or [""] * len(source), strict=True)
    known, data = source.take(np.flatnonzero([key in learned for key in keys])), recipe.data
    scenes = composed_source(known, seed=recipe.seed, number=data.num_composed, size=data.size)
    return _extract(recipe, scenes, "composed", tokenizer, workers)


def facts(recipe: Recipe, sources: Sequence[Source]) -> dict[str, str]:
    """What must stay the same of the data for a run to go on: digests by what they are of."""
    if not sources:
        folders = {"data.codes": Path(recipe.data.codes), "data.heldout_codes": Path(recipe.data.heldout_codes or "?")}
        listed = {key: sorted(folder.glob("*.json")) for key, folder in folders.items()}
        return {key: files.digest(folders[key], paths)[:16] for key, paths in listed.items() if paths}
    found: dict[str, str] = {}
    for part, source in zip(("to learn from", "held out"), sources, strict=True):
        values: dict[str, Any] = {"number": len(source), "names": list(source.names), "classes": source.class_names}
        values |= {"labels": source.labels.tolist(), "words": [source.captions, source.tags, source.styles]}
        for name, value in (values | {"groups": source.groups}).items():
            text = json.dumps(value)
            found[f"{name} {part}"] = text if len(text) <= 16 else hashlib.sha256(text.encode()).hexdigest()[:16]
        found[f"pictures {part}"] = fingerprint(source)
    return found


def summary(train: Source | Codes, heldout: Source | Codes) -> str:
    """How much there is to learn from, and of what, for people."""
    clips = len(train.grid) == 3 if isinstance(train, Codes) else isinstance(train, ClipSource)
    classes = f" of {len(train.class_names)} classes" if len(train.class_names) > 1 else ""
    captions = " with captions" if train.captions is not None else ""
    return f"{len(train):,} {'clips' if clips else 'pictures'}{classes}{captions}, {len(heldout):,} held out"


def record_held_out(recipe: Recipe, heldout: Codes, pairs: Codes | None) -> None:
    """Write down what the model never sees, for whoever measures it."""
    rows = () if pairs is None else set(zip(pairs.groups, pairs.styles or (), pairs.captions or (), strict=True))
    record = {"groups": sorted(set(heldout.groups)), "pairs": sorted(rows), "styles": recipe.data.heldout_styles}
    files.write_json(Path(recipe.run) / "held-out.json", record)


def _extract(
    recipe: Recipe, source: Source, name: str, tokenizer: Path, workers: Workers, *, views_of: str = ""
) -> Codes:
    """Encode a source into the run's folder; the training set, and what goes with it, in the recipe's views."""
    folder, kind = Path(recipe.run) / "codes" / name, recipe.data.views if (views_of or name) == "train" else "centre"
    place: dict[str, Any] = {"device": workers.device, "rank": workers.rank, "count": workers.count}
    threads, size = recipe.engine.workers, recipe.data.size
    return Codes.open(
        extract(tokenizer, source, folder, size=size, kind=kind, threads=threads, wait=workers.wait, **place)
    )
