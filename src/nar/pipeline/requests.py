"""The arguments of a call as a list of requests, one for each picture or clip, and the limits of a call.

Knows what a model can be conditioned on; does not know how conditions are embedded, nor how anything is sampled.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar.condition import NULL_CLASS
from nar.media.clips import Frames, several
from nar.model import ModelConfig
from nar.order import Schedule
from nar.pipeline.habits import OUTPUT
from nar.pipeline.output import OUTPUT_TYPES
from nar.sampling import Sampling
from nar.storage.fields import holds_whole_numbers, suggestion
from nar.storage.text import shortened
from nar.text.captions import is_blank

HEADS = ("mean", "horizontal", "vertical", "temporal")  # the mean, and rows of predictions in their order
FAR = 2.0  # times a model's own guidance; `emoji`, of 1.5, is worse at 3 and confetti at 7.5
MOST_RESULTS = 100_000  # of a call, which returns all at once: pictures of 256x256 are 20 GB


@dataclass(frozen=True, eq=False)
class Given:
    """What a picture to edit gives: codes (*grid), which are `there` and no holes, and codes to keep, -1 where free."""

    codes: Tensor
    there: Tensor
    known: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """What one picture or clip is conditioned on. `frames` are context frames, float -1..1 (3, T, H, W)."""

    label: int = NULL_CLASS
    prompt: str = ""
    negative: str = ""
    frames: Tensor | None = None
    given: Given | None = None

    def named(self, label_name: Callable[[int], str]) -> str:
        """Its prompt, or else the name of its class."""
        return self.prompt or (label_name(self.label) if self.label >= 0 else "")

    @property
    def has_negative(self) -> bool:
        """Whether guidance compares with words in place of the null condition."""
        return not is_blank(self.negative)

    @property
    def is_guided(self) -> bool:
        """Whether guidance has something to compare: without class and words both sides would be the same."""
        return self.has_negative or self.label >= 0 or not is_blank(self.prompt)


@dataclass(frozen=True)
class Inputs:
    """What a model can be conditioned on. `counts` are numbers of context frames; with 0 among them it needs none."""

    config: ModelConfig
    class_names: tuple[str, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        config = self.config
        names = (("class labels", config.num_classes), ("prompts", config.text_dim), ("frames", any(self.counts)))
        return ", ".join(name for name, present in names if present)

    def label_index(self, label: str | int) -> int:
        """The number of a class, given its name (any case) or number; raises ValueError with the names.

        A string is a name where there is one like it, "10" too; an int is always the number.
        """
        count = self.config.num_classes
        if not count:
            raise ValueError(f"this model has no classes; it takes {self}")
        text = str(label).strip()
        names = [name.lower() for name in self.class_names]
        if isinstance(label, str) and text.lower() in names:
            return names.index(text.lower())
        if text.isdecimal() and int(text) < count:
            return int(text)
        listed = ", ".join(self.class_names) if 0 < len(names) <= 40 else f"numbers 0 to {count - 1}"
        raise ValueError(f"unknown class {shortened(text)!r}{suggestion(text.lower(), names)}; classes: {listed}")

    def meant(self, what: Any, class_labels: Any, prompt: Any) -> tuple[Any, Any]:
        """The class labels and prompts of a call whose first argument is `what`: prompts where the model reads words,
        all of it is text and there are no others, else class labels.

        Raises:
            ValueError: the same is given twice.
        """
        if what is None:
            return class_labels, prompt
        listed = _listed(what)
        if self.config.text_dim and all(isinstance(one, str) for one in listed):
            if prompt is None:
                return class_labels, listed
            if not self.config.num_classes:
                raise ValueError("the first argument is the prompt: leave prompt= out")
        if class_labels is not None:
            raise ValueError("the first argument is the class labels: leave class_labels= out")
        return listed, prompt

    def requests(
        self,
        class_labels: Sequence[str | int] | str | int | None,
        prompt: Sequence[str] | str | None,
        negative_prompt: Sequence[str] | str | None,
        frames: Frames | None,
        *,
        read: Callable[[Frames], Tensor],
        number: int = 1,
        nothing: bool = False,
    ) -> list[Request]:
        """`number` requests for each of what is asked for; `read` opens context frames. `nothing` need be asked for.

        Raises:
            ValueError: something that the model does not take or lacks, lists that do not go together, or more
                results than a call returns.
        """
        if not (nothing and class_labels is prompt is negative_prompt is frames is None and self.config.null_class):
            self._check_kinds(class_labels, prompt, negative_prompt, frames)
        if class_labels is None and prompt is None and frames is None:
            return [Request()] * _checked_number(1, number)  # from nothing
        columns: dict[str, list[Any]] = {}
        if class_labels is not None:
            columns["label"] = [self.label_index(label) for label in _listed(class_labels)]
        if prompt is not None:
            columns["prompt"] = _texts(prompt)
        if negative_prompt is not None:
            columns["negative"] = _texts(negative_prompt)
        if frames is not None:
            columns["frames"] = several(frames)
        count = max(map(len, columns.values()))
        if wrong := [f"{len(column)} of {name}" for name, column in columns.items() if len(column) not in {1, count}]:
            raise ValueError(f"{', '.join(wrong)} for {count} results: give one, or as many")
        if not count:
            raise ValueError("nothing is asked for: the list is empty")
        _checked_number(count, number)
        if frames is not None:
            columns["frames"] = [read(clip) for clip in columns["frames"]]
        rows = [{name: column[index % len(column)] for name, column in columns.items()} for index in range(count)]
        return [Request(**row) for row in rows for _ in range(number)]

    def _check_kinds(self, class_labels: Any, prompt: Any, negative_prompt: Any, frames: Any) -> None:
        config = self.config
        for name, value, taken in (
            ("class labels", class_labels, config.num_classes),
            ("prompts", prompt, config.text_dim),
            ("negative prompts", negative_prompt, config.text_dim),
            ("frames", frames, any(self.counts)),
        ):
            if value is not None and not taken:
                raise ValueError(f"this model takes no {name}; it takes {self}")
        nothing = class_labels is None and prompt is None and frames is None
        if nothing and (0 not in self.counts or config.num_classes or config.text_dim):
            raise ValueError(f"say what to make: this model takes {self}")
        if config.prefix_grid and frames is None and 0 not in self.counts:
            raise ValueError("this model continues clips: give it frames")
        if config.num_classes and class_labels is None and not config.null_class:
            raise ValueError("this model has no null class: give it class labels too")


def row_of(heads: str, schedule: Schedule) -> int | None:
    """The row of predictions of a head, None for the mean of all; raises ValueError where there is no such head."""
    rows, row = schedule.num_rows, HEADS.index(heads) - 1
    if row >= rows or (row >= 0 and rows == 1):
        there = f"heads {', '.join(HEADS[1 : rows + 1])}" if rows > 1 else "one prediction of each position"
        raise ValueError(f"no {heads} head can decide: this model has {there}")
    return row if row >= 0 else None


def check_call(output_type: Any, batch_size: Any, callback: Any, **truths: Any) -> None:
    """Refuse arguments of a call that are not what they must be; `truths` are those that are true or false."""
    if wrong := [name for name, value in truths.items() if not isinstance(value, bool | np.bool_)]:
        raise ValueError(f"{wrong[0]} must be true or false, not {truths[wrong[0]]!r}")
    if output_type not in OUTPUT_TYPES:
        meant = f" (did you mean {OUTPUT[output_type]!r}?)" if str(output_type) in OUTPUT else ""
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}{meant}")
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_front_end must be a function, not {type(callback).__name__}")


def check_guidance(own: Sampling, sampling: Sampling, requests: Sequence[Request]) -> None:
    """Refuse a negative prompt without guidance, and warn of guidance far above a model's `own`, which spoils."""
    usual, scale = own.guidance_scale, sampling.guidance_scale
    if scale == 1.0 and any(request.has_negative for request in requests):
        raise ValueError("a negative prompt needs guidance: set guidance_scale above 1.0")
    if usual > 1.0 and scale > FAR * usual:
        message = f"guidance_scale {scale:g} is far above this model's own, {usual:g}: results fall apart"
        warnings.warn(f"{message}; try 1 to {FAR * usual:g}", stacklevel=3)


def seeds_of(seed: Any, generator: Any, count: int) -> int | list[int]:
    """The seed of a call of `count` results, or one for each: by default a new one, of a generator its next number.

    Raises:
        ValueError: both are given, something else than generators, or another number of seeds.
    """
    if generator is not None:
        drawn = [generator] if isinstance(generator, torch.Generator) else _listed(generator)
        if seed is not None or not all(isinstance(one, torch.Generator) for one in drawn):
            raise ValueError("give either seed, or a torch.Generator for all, or a list with one for each result")
        seeds = [int(torch.randint(2**32, (), generator=one, device=one.device)) for one in drawn]
        seed = seeds[0] if isinstance(generator, torch.Generator) else seeds
    if seed is None:
        return secrets.randbits(32)
    if isinstance(seed, Integral):
        return int(seed)
    seeds = _listed(seed)
    if wrong := [value for value in seeds if not isinstance(value, Integral)]:
        raise ValueError(f"seed must be a whole number, or a list with one for each result, not {wrong[0]!r}")
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} results: give one number for all, or a list with as many")
    return [int(value) for value in seeds]


def known_codes(known: Any, count: int, grid: tuple[int, ...]) -> Tensor:
    """Codes (count, *grid) to keep, -1 where free; raises ValueError for other shapes and what is no array."""
    wanted = f"known must be whole numbers ({', '.join(map(str, (count, *grid)))}), codes to keep and -1 where free"
    if not isinstance(known, Tensor | np.ndarray | list | tuple):
        raise ValueError(f"{wanted}; not {type(known).__name__}")
    try:
        codes = torch.as_tensor(known)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}; {error}") from error
    if codes.ndim and len(codes) != count:
        raise ValueError(f"known has {len(codes)} rows for {count} results; {wanted}")
    if tuple(codes.shape) != (count, *grid) or not holds_whole_numbers(codes):
        raise ValueError(f"{wanted}; not {str(codes.dtype).removeprefix('torch.')} {tuple(codes.shape)}")
    return codes.long()


def _checked_number(count: int, number: int) -> int:
    """`number`, once `count` times as many are at least one and no more than a call returns."""
    if not isinstance(number, Integral) or number < 1:
        raise ValueError(f"num_images_per_prompt must be a whole number of at least 1, not {number!r}")
    if count * number > MOST_RESULTS:
        asked = f"{count:,} times num_images_per_prompt {number:,}"
        raise ValueError(f"{asked} are too many for one call: at most {MOST_RESULTS:,}; call again with other seeds")
    return number


def _listed(value: Any) -> list[Any]:
    """One value, or those of a list, array or iterator, as a list no longer than a call may ask for."""
    value = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    if isinstance(value, bytes | bytearray | Mapping | Set):
        raise ValueError(f"give one, or a list of them, not a {type(value).__name__}: {str(value)[:80]}")
    listed = list(islice(value, MOST_RESULTS + 1))
    if len(listed) > MOST_RESULTS:
        raise ValueError(f"more than {MOST_RESULTS:,} are asked for in one call, which returns all at once")
    return listed


def _texts(prompts: Sequence[str] | str) -> list[str]:
    listed = _listed(prompts)
    if strange := [prompt for prompt in listed if not isinstance(prompt, str)]:
        raise ValueError(f"a prompt must be a string, not {type(strange[0]).__name__}")
    return listed
