"""The sets that a model learns from and is measured on: codes, and what each sample is made from.

Knows pictures, codes, captions and given frames; does not know losses or steps. Legend: `b` samples, `t h w` axes of
codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar.condition import Condition
from nar.data.clips import ClipSource
from nar.data.codes import Codes
from nar.data.extract import extract, fingerprint, given_folder
from nar.data.source import Source
from nar.data.split import held_out, held_out_pairs
from nar.metrics.geneval.scenes import composed_source
from nar.pipeline.continuation import Continuation
from nar.storage import files
from nar.storage.files import atomically
from nar.storage.folder import model_digest
from nar.training.distributed import Workers
from nar.training.recipe import Recipe
from nar.training.words import Conditions, Labels, Text, Words


class Samples:
    """Codes with what each is made from: class, words, given frames, or several of them.

    `composed` are more samples, of which a draw takes one in place of a sample of its own; see `read`.
    """

    def __init__(
        self,
        codes: Codes,
        *,
        classes: bool,
        text: Text | None,
        wording: str,
        continuation: Continuation | None = None,
        composed: Codes | None = None,
        composed_share: float = 0.0,
    ) -> None:
        self.codes, self._composed, self._share = codes, composed, composed_share
        self._conditions: list[Conditions] = []
        if classes:
            labels = [codes.labels, *([] if composed is None else [composed.labels])]
            self._conditions.append(Labels(np.concatenate(labels)))
        if text is not None:
            scenes = [] if composed is None else composed.wordings("plain")
            self._conditions.append(Words(text, [*codes.wordings(wording), *scenes]))
        self._continuation = continuation
        self._given: dict[int, Codes] = {}
        if continuation is not None and not continuation.causal:
            self._given = {
                count: codes.beside(codes.folder / given_folder(count)) for count in continuation.counts if count
            }

    def __len__(self) -> int:
        return len(self.codes)

    def read(
        self,
        rows: np.ndarray,
        *,
        views: np.ndarray | None = None,
        wordings: np.ndarray | None = None,
        counts: np.ndarray | None = None,
        composed: np.ndarray | None = None,
    ) -> tuple[Tensor, Condition]:
        """Codes (b, *grid) of samples, and their condition on the CPU or a text encoder's device.

        `views`, `wordings` and `composed` (b,) are numbers in [0, 1) that pick a view, a wording and perhaps a composed
        scene in place of the sample; None takes the first, and no scene. `counts` (b,) are those of given frames.
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
        parts = [conditions.read(conditioned, wordings) for conditions in self._conditions]
        if self._continuation is not None and counts is not None:
            parts.append(self._prefix(self._continuation, codes, rows, views, counts))
        return torch.from_numpy(codes), Condition.of(parts)

    def _prefix(
        self,
        continuation: Continuation,
        codes: np.ndarray,
        rows: np.ndarray,
        views: np.ndarray | None,
        counts: np.ndarray,
    ) -> Condition:
        given = codes[:, : continuation.prefix[0]] if continuation.causal else np.zeros_like(codes)
        for count, frozen in self._given.items():
            taken = counts == count
            given[taken] = frozen.read(rows[taken], None if views is None else views[taken])
        return continuation.masked(torch.from_numpy(given), counts.tolist())


def code_sets(recipe: Recipe, sources: Sequence[Source], tokenizer: Path, workers: Workers) -> tuple[Codes, Codes]:
    """Codes to learn from and codes held out, made of two `sources`; of none, those that the recipe names.

    Where classes are learned, the labels of both index the class names of the first.

    Raises:
        ValueError: the codes are of another tokenizer than the recipe's, or those held out of classes that are not
            learned.
    """
    data = recipe.data
    if sources:
        if recipe.learns_classes:  # before the work
            _labels_in(sources[0].class_names, sources[1])
        made = [_extract(recipe, source, name, tokenizer, workers) for name, source in zip(_SETS, sources, strict=True)]
        return made[0], _renumbered(recipe, *made)
    train = Codes.open(data.codes)
    if data.heldout_codes:
        heldout = Codes.open(data.heldout_codes)
    else:
        out = held_out(train.groups, data.heldout_share)
        train, heldout = train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))
    for codes in (train, heldout):
        if codes.manifest["tokenizer"] != model_digest(tokenizer):
            raise ValueError(
                f"the codes in {codes.folder} were made by another tokenizer than {tokenizer} "
                f"({codes.manifest['tokenizer'][:12]}..., not {model_digest(tokenizer)[:12]}...); extract them "
                "again with it"
            )
    return train, _renumbered(recipe, train, heldout)


def _labels_in(class_names: Sequence[str], samples: Source | Codes) -> np.ndarray:
    """The labels (N,) of samples as indices of other `class_names`, found by name: each split numbers its own.

    Raises:
        ValueError: samples are of classes that have no such name.
    """
    own, known = samples.class_names, {name: number for number, name in enumerate(class_names)}
    if own == tuple(class_names):
        return samples.labels
    if unknown := [own[label] for label in np.unique(samples.labels) if own[label] not in known]:
        raise ValueError(
            f"the held-out part has the classes {_few(unknown)}, but those that are learned are {_few(class_names)}; "
            "name them alike, or leave these samples out"
        )
    return np.take([known.get(name, -1) for name in own], samples.labels)


def _renumbered(recipe: Recipe, train: Codes, heldout: Codes) -> Codes:
    if not recipe.learns_classes:
        return heldout
    manifest = heldout.manifest | {"class_names": list(train.class_names)}
    return dataclasses.replace(heldout, labels=_labels_in(train.class_names, heldout), manifest=manifest)


def _few(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
    groups, styles = source.groups or source.names, source.styles or [""] * len(source)
    rows = [row for row, key in enumerate(zip(groups, styles, strict=True)) if key in learned]
    scenes = composed_source(
        source.take(np.array(rows, np.int64)), seed=recipe.seed, number=recipe.data.num_composed, size=recipe.data.size
    )
    return _extract(recipe, scenes, "composed", tokenizer, workers)


def without_styles(recipe: Recipe, *sets: Codes) -> list[Codes]:
    """Leave the styles out that are held out, each of which some sample has to have."""
    out, known = recipe.data.heldout_styles, {style for codes in sets for style in codes.styles or ()}
    if unknown := [style for style in out if style not in known]:
        listed = ", ".join(sorted(known)) or "none"
        raise ValueError(f"data.heldout_styles: no picture has the style {unknown[0]!r}; styles: {listed}")
    kept = ([style not in out for style in codes.styles or [""] * len(codes)] for codes in sets)
    return [codes.take(np.flatnonzero(rows)) for codes, rows in zip(sets, kept, strict=True)]


def without_pairs(recipe: Recipe, train: Codes) -> tuple[Codes, Codes]:
    """Take the pairs of group and style out that are held out."""
    if train.styles is None:
        raise ValueError("data.heldout_pairs needs pictures with styles: a column `style`; or set it to 0")
    out = held_out_pairs(train.groups, train.styles, recipe.data.heldout_pairs)
    return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))


def facts(recipe: Recipe, sources: Sequence[Source]) -> dict[str, str]:
    """What must stay the same of the data for a run to go on: digests by what they are of."""
    if not sources:
        folders = {"data.codes": Path(recipe.data.codes), "data.heldout_codes": Path(recipe.data.heldout_codes or "?")}
        listed = {key: sorted(folder.glob("*.json")) for key, folder in folders.items()}
        return {key: files.digest(folders[key], paths)[:16] for key, paths in listed.items() if paths}
    found: dict[str, str] = {}
    for part, source in zip(("to learn from", "held out"), sources, strict=True):
        words = [source.captions, source.tags, source.styles]
        values = {
            "number": len(source),
            "names": list(source.names),
            "classes": source.class_names,
            "labels": source.labels.tolist(),
            "words": words,
            "groups": source.groups,
        }
        found |= {f"{name} {part}": _short(value) for name, value in values.items()}
        found[f"pictures {part}"] = fingerprint(source)
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 16 else hashlib.sha256(text.encode()).hexdigest()[:16]


def summary(train: Source | Codes, heldout: Source | Codes) -> str:
    """How much there is to learn from, and of what, for people."""
    kind = (
        "clips" if isinstance(train, ClipSource) or (isinstance(train, Codes) and len(train.grid) == 3) else "pictures"
    )
    classes = f" of {len(train.class_names)} classes" if len(train.class_names) > 1 else ""
    captions = " with captions" if train.captions is not None else ""
    return f"{len(train):,} {kind}{classes}{captions}, {len(heldout):,} held out"


def record_held_out(recipe: Recipe, heldout: Codes, pairs: Codes | None) -> None:
    """Write down what the model never sees, for whoever measures it."""
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    pair_rows: list[tuple[str, ...]] = []
    if pairs is not None:
        pair_rows = sorted(set(zip(pairs.groups, pairs.styles or (), pairs.captions or (), strict=True)))
    record = {"groups": sorted(set(heldout.groups)), "pairs": pair_rows, "styles": list(recipe.data.heldout_styles)}
    atomically(run / "held-out.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n", "utf-8"))


_SETS = ("train", "heldout")


def _extract(
    recipe: Recipe, source: Source, name: str, tokenizer: Path, workers: Workers, *, views_of: str = ""
) -> Codes:
    """Encode a source into the run's folder; the training set, and what goes with it, in the recipe's views."""
    folder = extract(
        tokenizer,
        source,
        Path(recipe.run) / "codes" / name,
        size=recipe.data.size,
        kind=recipe.data.views if (views_of or name) == "train" else "centre",
        device=workers.device,
        threads=recipe.engine.workers,
        rank=workers.rank,
        count=workers.count,
        wait=workers.wait,
    )
    return Codes.open(folder)
