"""Which samples are held out, by a hash of what they belong to, or by their style.

Knows keys and codes; does not know training. Legend: `N` samples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from nar.data.codes import Codes
from nar.data.source import Source

Part = TypeVar("Part", Codes, Source)


def held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Which samples (N,) bool are held out, about `share` of them, decided by a hash of their keys.

    Samples with one key stay together, and a sample stays where it is when others come or go, as long as its key does:
    names of files do, numbers of rows need not. At least one is held out and at least one is not, where there are two
    keys; where the share alone would leave none on a side, others can change which ones those are.
    """
    digests = {key: _rank(key) / 2**64 for key in set(keys)}
    ranked = sorted(digests, key=digests.__getitem__)
    chosen = {key for key in ranked[1:-1] if digests[key] < share} | set(ranked[:1] if len(ranked) > 1 else ())
    return np.array([key in chosen for key in keys], dtype=bool)


def families(groups: Sequence[str] | None, without: str) -> list[str] | None:
    """Groups without what the regular expression `without` finds in them: what differs in nothing else is one group."""
    return None if groups is None else [re.sub(without, "", group) for group in groups]


def held_out_pairs(groups: Sequence[str], styles: Sequence[str], count: int) -> np.ndarray:
    """Which samples (N,) bool are held out as pairs of group and style: one style of each of `count` groups.

    What is asked of a model then is a thing that it knows in a style that it knows, but not together. Groups with one
    style only have no such pair. The choice is by hash, as in `held_out`.
    """
    drawn: dict[str, set[str]] = {}
    for group, style in zip(groups, styles, strict=True):
        drawn.setdefault(group, set()).add(style)
    several = sorted(
        (group for group, found in drawn.items() if len(found) > 1), key=lambda group: _rank(f"pair {group}")
    )
    if len(several) < count:
        raise ValueError(f"{count} pairs of group and style can't be held out: {len(several)} groups have two styles")
    pairs = {(group, min(drawn[group], key=lambda style: _rank(f"pair {group} {style}"))) for group in several[:count]}
    return np.array([pair in pairs for pair in zip(groups, styles, strict=True)], dtype=bool)


def without_styles(sets: Sequence[Part], styles: Sequence[str]) -> list[Part]:
    """The sets without samples of `styles`; raises ValueError for a style that no sample has."""
    known = {style for codes in sets for style in codes.styles or ()}
    if unknown := [style for style in styles if style not in known]:
        listed = ", ".join(sorted(known)) or "none"
        raise ValueError(f"data.heldout_styles: no picture has the style {unknown[0]!r}; styles: {listed}")
    kept = ([style not in styles for style in codes.styles or [""] * len(codes)] for codes in sets)
    return [codes.take(np.flatnonzero(rows)) for codes, rows in zip(sets, kept, strict=True)]


def without_pairs(codes: Part, number: int) -> tuple[Part, Part]:
    """Samples without `number` pairs of group and style, and these alone; raises ValueError for some without styles."""
    if codes.styles is None or codes.groups is None:
        raise ValueError("data.heldout_pairs needs pictures with styles: a column `style`; or set it to 0")
    out = held_out_pairs(codes.groups, codes.styles, number)
    return codes.take(np.flatnonzero(~out)), codes.take(np.flatnonzero(out))


def _rank(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
