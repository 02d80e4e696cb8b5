"""Real samples that a model is measured on, without those that it learned from.

Knows sources, and what a recipe says of its data; does not know models or metrics.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nar.data.config import DataConfig, recorded
from nar.data.open import open_source
from nar.data.source import Source
from nar.media.video import Windows
from nar.storage.fields import from_dict


def open_real(
    real: str, trained: Sequence[Mapping[str, Any]], *, split: str, size: int, windows: Windows | None = None
) -> Source:
    """Open real samples for models that were `trained` on data with these settings (see `trained_on`).

    "test" is the split of that name. Where there is none, and a model learned from `real`, it is the part that its
    training held out, as one warning says; what no model learned from is taken whole.

    Raises:
        ValueError: the models held out different parts.
    """
    label = next((data["label"] for data in trained if "label" in data), "label")

    def opened(**asked: Any) -> Source:
        asked |= {"size": size, "windows": windows}
        try:  # of tables the column that the classes were learned from
            return open_source(real, label=label, **asked)
        except ValueError:
            return open_source(real, **asked)

    try:
        return opened(split=split)
    except FileNotFoundError:
        whole = opened(split=split, whole=True)
    found = [parts[1] for data in trained if (parts := _parts(real, data, size, windows)) is not None]
    if not found:
        return whole
    if any(list(part.names) != list(found[0].names) for part in found):
        raise ValueError(f"the models held out different parts of {real}: give --real samples that none learned from")
    said = (
        f"{real} is what was learned from: measured on the {len(found[0]):,} of its {len(whole):,} {whole.noun}s that "
        "training held out; the split train is all of it"
    )
    warnings.warn(said, stacklevel=3)
    return dataclasses.replace(found[0], notes=(*found[0].notes, said))


def open_learned(source: str, trained: Mapping[str, Any], *, size: int) -> Source:
    """Open training pictures: the split "train", or of what a model learned from, without splits, the part learned."""
    try:
        open_source(source, size=size, split="test")
    except FileNotFoundError:
        if (parts := _parts(source, trained, size, None)) is not None:
            return parts[0]
    return open_source(source, size=size, label=trained.get("label", "label"))


def _parts(real: str, trained: Mapping[str, Any], size: int, windows: Windows | None) -> tuple[Source, Source] | None:
    """What a training on `real` learned and held out, of the styles learned; None where it learned from other data."""
    if not _same(real, str(trained.get("source", ""))):
        return None
    known = {field.name for field in dataclasses.fields(DataConfig)}
    settings = {key: value for key, value in recorded(dict(trained)).items() if key in known}
    settings |= {"source": real, "size": size, "num_frames": windows.num_frames if windows else 0}
    try:
        parts = from_dict(DataConfig, settings, "data of the model").open()
    except (FileNotFoundError, ValueError):  # called the same, with other columns or splits
        return None
    unseen = trained.get("heldout_styles", ())
    rows = [[style not in unseen for style in part.styles or [""] * len(part)] for part in parts]
    learned, held_out = (part.take(np.flatnonzero(kept)) for part, kept in zip(parts, rows, strict=True))
    return learned, held_out


def _same(real: str, source: str) -> bool:
    """Whether `real` is the `source` that a model says it learned from; where that is not here, by its name."""
    if not source:
        return False
    here, learned = Path(real).expanduser(), Path(source).expanduser()
    if learned.exists() or not here.exists():
        return here.resolve() == learned.resolve()
    return here.name == learned.name
