"""What a picture or clip is made from: classes, words, given frames. Plain data; the model owns embedders and null
rows.

Several compose as a tuple, in the order class, text, prefix. Legend: `B` batch, `T` text tokens, `F` feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NULL_CLASS = -1


@dataclass(frozen=True, eq=False)
class ClassCondition:
    """Class labels (B,) int64; a negative label is the null class."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where_null(self, null: Tensor) -> ClassCondition:
        """The same condition with the samples marked in `null` (B,) bool dropped."""
        return ClassCondition(torch.where(null, NULL_CLASS, self.labels))

    def map(self, function: Callable[[Tensor], Tensor]) -> ClassCondition:
        """Apply `function` to every tensor (moving, slicing, repeating along the batch)."""
        return ClassCondition(function(self.labels))


@dataclass(frozen=True, eq=False)
class TextCondition:
    """Features of words (B, T, F) with their mask (B, T) bool, True at words; padding features are zero.

    `null` (B,) bool marks samples whose words are replaced by the model's null rows.
    """

    features: Tensor
    mask: Tensor
    null: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2]:
            raise ValueError(
                f"text features must be (B, T, F) with a mask (B, T), "
                f"not {tuple(self.features.shape)} and {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return len(self.features)

    def where_null(self, null: Tensor) -> TextCondition:
        """The same condition with the samples marked in `null` (B,) bool dropped."""
        return replace(self, null=null if self.null is None else self.null | null)

    def map(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        """Apply `function` to every tensor (moving, slicing, repeating along the batch)."""
        return TextCondition(
            function(self.features), function(self.mask), None if self.null is None else function(self.null)
        )


@dataclass(frozen=True, eq=False)
class PrefixCondition:
    """Codes (B, *prefix grid) int64 that precede what is generated: the tokens of given frames.

    `mask` of the same shape is True where a code is given; no token sees the others. None: all are given.
    """

    codes: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.codes.shape:
            raise ValueError(
                f"given codes {tuple(self.codes.shape)} and their mask {tuple(self.mask.shape)} must have one shape"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def where_null(self, null: Tensor) -> PrefixCondition:  # noqa: ARG002 the same call for every kind
        """Given frames are never dropped: guidance leads away from other words, not from other frames."""
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> PrefixCondition:
        """Apply `function` to every tensor (moving, slicing, repeating along the batch)."""
        return PrefixCondition(function(self.codes), None if self.mask is None else function(self.mask))


Part = ClassCondition | TextCondition | PrefixCondition
Condition = Part | tuple[Part, ...]


def parts(condition: Condition) -> tuple[Part, ...]:
    """The parts of a condition, all of one batch size; raises ValueError when the sizes differ."""
    found = condition if isinstance(condition, tuple) else (condition,)
    sizes = {len(part) for part in found}
    if len(sizes) != 1:
        raise ValueError(f"the parts of a condition must have one batch size, not {sorted(sizes)}")
    return found


def map_condition(condition: Condition, function: Callable[[Tensor], Tensor]) -> tuple[Part, ...]:
    """Apply `function` to every tensor of every part."""
    return tuple(part.map(function) for part in parts(condition))


def drop(condition: Condition, null: Tensor) -> tuple[Part, ...]:
    """Replace the samples marked in `null` (B,) bool by the null condition."""
    return tuple(part.where_null(null) for part in parts(condition))
