"""What a picture or clip is conditioned on: a class, text, codes that come before it. Plain data.

Does not know how conditions are embedded, nor what stands for a dropped one: the model owns embedders and null rows.
Legend: `B` batch, `T` text tokens, `F` feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, cast

import torch
from torch import Tensor

NULL_CLASS = -1


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Features of captions (B, T, F) with their mask (B, T) bool, True at words; padding features are zero.

    `null` (B,) bool marks samples whose words are replaced by the model's null rows; None marks none.
    """

    features: Tensor
    mask: Tensor
    null: Tensor | None = None

    def __post_init__(self) -> None:
        _check("float", self.features, "features")
        _check("bool", self.mask, "mask")
        _check("bool", self.null, "null", optional=True)
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2]:
            found = f"{tuple(self.features.shape)} and {tuple(self.mask.shape)}"
            raise ValueError(f"text features must be (B, T, F) with a mask (B, T), not {found}")


@dataclass(frozen=True, eq=False)
class PrefixCodes:
    """Codes (B, *prefix grid) int64 that precede what is generated: those of context frames, or of a picture to edit.

    `mask` of the same shape is True where a code is there; the others are holes, see `ModelConfig.prefix_holes`. None:
    all are.
    """

    codes: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        _check("integer", self.codes, "codes")
        _check("bool", self.mask, "mask", optional=True)
        if self.mask is not None and self.mask.shape != self.codes.shape:
            shapes = f"{tuple(self.codes.shape)} and their mask {tuple(self.mask.shape)}"
            raise ValueError(f"prefix codes {shapes} must have one shape")


@dataclass(frozen=True, eq=False)
class Condition:
    """The condition of a batch, of one kind or of several: `labels` (B,) int64, negative for the null class, text,
    and a prefix.

    Raises:
        ValueError: no kind is there, or the kinds have several batch sizes.
    """

    labels: Tensor | None = None
    text: TextFeatures | None = None
    prefix: PrefixCodes | None = None

    def __post_init__(self) -> None:
        _check("integer", self.labels, "labels", optional=True)
        sizes = {len(tensor) for tensor in self._tensors()}
        if not sizes:
            raise ValueError("a condition needs labels, text or a prefix")
        if len(sizes) > 1:
            raise ValueError(f"the parts of a condition must have one batch size, not {sorted(sizes)}")

    @classmethod
    def of(cls, condition: Condition | Iterable[Condition]) -> Condition:
        """Combine conditions of several kinds; one alone is returned as it is."""
        parts: list[Any] = list(condition) if isinstance(condition, list | tuple) else [condition]
        if not parts or not all(isinstance(part, Condition) for part in parts):
            raise ValueError(f"a condition is nar.ClassCondition(labels) or one of its kind, not {condition!r}")
        return cast(Condition, reduce(or_, parts))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of labels, text and prefix are there, in this order, which is that of their embeddings."""
        return tuple(name for name in ("labels", "text", "prefix") if getattr(self, name) is not None)

    @property
    def device(self) -> torch.device:
        """Where the first of its tensors is."""
        return self._tensors()[0].device

    def __len__(self) -> int:
        return len(self._tensors()[0])

    def __or__(self, other: Condition) -> Condition:
        if both := [kind for kind in self.kinds if kind in other.kinds]:
            raise ValueError(f"these conditions both have {' and '.join(both)}; combine those of different kinds")
        return replace(self, **{kind: getattr(other, kind) for kind in other.kinds})

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply `function` to every tensor (moving, slicing, repeating along the batch)."""

        def each(part: Any) -> Any:
            if part is None or isinstance(part, Tensor):
                return part if part is None else function(part)
            return type(part)(*map(each, vars(part).values()))

        return cast(Condition, each(self))

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, rows: slice | Tensor) -> Condition:
        """Take some samples."""
        return self.map(lambda tensor: tensor[rows])

    def drop(self, null: Tensor, text: Tensor | None = None) -> Condition:
        """Replace the class of the samples marked in `null` (B,) bool by the null class, and their text, or that of
        the samples marked in `text`, by null text.

        A prefix stays: guidance compares with other words, not with other context frames.
        """
        words, without = self.text, null if text is None else text
        if words is not None:
            words = replace(words, null=without if words.null is None else words.null | without)
        labels = None if self.labels is None else torch.where(null, NULL_CLASS, self.labels)
        return Condition(labels, words, self.prefix)

    def _tensors(self) -> list[Tensor]:
        """One tensor of each kind, with the batch as its first axis."""
        first = (self.labels, self.text and self.text.features, self.prefix and self.prefix.codes)
        return [tensor for tensor in first if isinstance(tensor, Tensor)]


def _check(kind: str, tensor: Any, name: str, *, optional: bool = False) -> None:
    """Raise ValueError for what is no tensor of floats, bools or integers with a row a sample."""
    if tensor is None and optional:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of {kind}s, not {type(tensor).__name__}")
    found = "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "integer"
    if found != kind or tensor.is_complex() or not tensor.ndim:
        raise ValueError(f"{name} must be {kind}s, a row a sample, not {tensor.dtype} {tuple(tensor.shape)}")


AnyCondition = Condition | Iterable[Condition]  # several, of different kinds, are combined


def ClassCondition(labels: Tensor) -> Condition:  # noqa: N802 one of the constructors of a condition
    """A condition on class labels (B,) int64; a negative one is the null class."""
    return Condition(labels=labels)


def TextCondition(features: Tensor, mask: Tensor, null: Tensor | None = None) -> Condition:  # noqa: N802
    """A condition on text; see `TextFeatures`."""
    return Condition(text=TextFeatures(features, mask, null))


def PrefixCondition(codes: Tensor, mask: Tensor | None = None) -> Condition:  # noqa: N802
    """A condition on codes that come before; see `PrefixCodes`."""
    return Condition(prefix=PrefixCodes(codes, mask))
