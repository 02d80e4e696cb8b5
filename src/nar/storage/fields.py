"""Fields of frozen dataclasses: what each may hold is declared where it stands, and checked here, whoever fills it.

    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    norm: Annotated[str, OneOf("none", "layer")] = "none"

Knows types, ranges and keys; does not know files, nor what the fields mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Schema = TypeVar("Schema")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold: `least` and `most` are among them, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Whether a number is within the bounds."""
        return all(bound is None or within(value, bound) for _, bound, within in self._bounds())

    def allowed(self) -> str:
        """The bounds in words."""
        return " and ".join(f"{words} {bound}" for words, bound, _ in self._bounds() if bound is not None)

    def _bounds(self) -> tuple[tuple[str, float | None, Callable[[Any, Any], bool]], ...]:
        return (
            ("at least", self.least, ge),
            ("above", self.above, gt),
            ("at most", self.most, le),
            ("below", self.below, lt),
        )


class OneOf:
    """The words that a field may hold."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def allows(self, value: Any) -> bool:
        """Whether a word is one of them."""
        return value in self.words

    def allowed(self) -> str:
        """The words."""
        return f"one of {', '.join(self.words)}"


Size = Annotated[int, Range(1, 2**20)]  # of a tensor's axis
Length = Annotated[int, Range(0, 2**20)]  # the same, where 0 means none
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def check(config: Any, group: str = "") -> None:
    """Check every field of a frozen dataclass, in its `__post_init__`; lists become tuples.

    `group` is what messages put before a field's name, such as "data.".

    Raises:
        ValueError: names the field, what it may hold, and what it holds.
    """
    for name, kind in _kinds(type(config)).items():
        value = getattr(config, name)
        checked = _checked(value, kind, f"{group}{name}")
        if checked is not value:
            object.__setattr__(config, name, checked)


def build(schema: type[Schema], values: Any, origin: str, *, text: bool = False) -> Schema:
    """Make a frozen dataclass of nested keys and values; groups are dataclasses themselves, and may be left out.

    With `text` every value is a word, a list of words, keys and words, or None: the field says what is meant by it.

    Raises:
        ValueError: names `origin`: an unknown key (with the nearest known one), a missing one, a value of the wrong
            type or out of range, or what the dataclass's own checks refuse.
    """
    for key in _unknown(schema, values):
        raise ValueError(f"unknown key {key!r} in {origin}{suggestion(key, names(schema))}")
    try:
        return _build(schema, values, None, "", text)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def names(schema: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of a dataclass's fields, those of its groups in place of the groups."""
    for name, kind in _kinds(schema).items():
        if (group := _group(kind)) is not None:
            yield from names(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def kind_of(schema: type, key: str) -> Any:
    """The annotation of a field, given its dotted name; None where there is no such field."""
    kind: Any = schema
    for part in key.split("."):
        group = kind if kind is schema else _group(kind)
        kind = None if group is None else _kinds(group).get(part)
    return kind


def unwrap(kind: Any) -> tuple[Any, list[Any], bool]:
    """A type without what is wrapped around it, the limits of its values, and whether None is one."""
    limits: list[Any] = []
    optional = False
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            limits += more
        elif get_origin(kind) in (Union, types.UnionType):
            inner = [part for part in get_args(kind) if part is not types.NoneType]
            optional = len(inner) < len(get_args(kind))
            if len(inner) > 1:
                return Any, limits, optional
            kind = inner[0]
        else:
            return kind, limits, optional


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _kinds(schema: Any) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _group(kind: Any) -> type | None:
    plain = unwrap(kind)[0]
    return plain if dataclasses.is_dataclass(plain) and isinstance(plain, type) else None


def _unknown(schema: type, values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        kinds = _kinds(schema)
        for key, value in values.items():
            kind = kinds.get(key)
            if kind is None:
                yield f"{prefix}{key}"
            elif (group := _group(kind)) is not None:
                yield from _unknown(group, value, f"{prefix}{key}.")


def _build(schema: type[Schema], values: Any, base: Any, prefix: str, text: bool) -> Schema:
    """`base` has the values of what is left out; None takes those of the class."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or schema.__name__} must be keys and values, not {_shown(values)}")
    found, kinds = {}, _kinds(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        kind, key = kinds[field.name], f"{prefix}{field.name}"
        group = _group(kind)
        if field.name not in values:
            if base is None and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{key} is missing")
        elif group is None or (values[field.name] is None and unwrap(kind)[2]):
            found[field.name] = _checked(values[field.name], kind, key, text)
        else:
            inner = getattr(base, field.name, None)
            if base is None and field.default_factory is not dataclasses.MISSING:
                inner = field.default_factory()
            found[field.name] = _build(group, values[field.name], inner, f"{key}.", text)
    return schema(**found) if base is None else dataclasses.replace(base, **found)


def _checked(value: Any, kind: Any, key: str, text: bool = False) -> Any:
    """A field's value in the type it is kept in; raises ValueError where it must not hold it."""
    plain, limits, optional = unwrap(kind)
    if plain is Any or (value is None and optional):
        return value
    if get_origin(plain) is tuple:
        items = get_args(plain)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key} must be a list{' or null' if optional else ''}, not {_shown(value)}")
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) != len(value):
            raise ValueError(f"{key} must be a list of {len(items)}, not {_shown(value)}")
        made = tuple(_checked(item, part, key, text) for item, part in zip(value, items, strict=True))
        return value if type(value) is tuple and all(new is old for new, old in zip(made, value, strict=True)) else made
    if get_origin(plain) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be keys and values, not {_shown(value)}")
        return value
    if plain in _WORDS:
        converted = _converted(value, plain) if text else value
        if not _fits(converted, plain):
            allowed = ", ".join([_WORDS[plain], *(limit.allowed() for limit in limits), *(["or null"] * optional)])
            raise ValueError(f"{key} must be {allowed}, not {_shown(value)}")
        value = int(converted) if plain is int and type(converted) is not int else converted
    elif isinstance(plain, type) and get_origin(plain) is None and not isinstance(value, plain):
        raise ValueError(f"{key} must be of type {plain.__name__}, not {_shown(value)}")
    for limit in limits:
        if not limit.allows(value):
            allowed = limit.allowed() + (", or null" if optional else "")
            raise ValueError(f"{key} must be {allowed}, not {_shown(value)}")
    return value


def _fits(value: Any, plain: type) -> bool:
    if isinstance(value, bool) or plain in (bool, str):
        return isinstance(value, plain) and isinstance(value, bool) == (plain is bool)
    return isinstance(value, Integral) if plain is int else isinstance(value, Real) and math.isfinite(value)


def _converted(value: Any, plain: type) -> Any:
    """A word as a number or truth, where it is one."""
    if not isinstance(value, str) or plain is str:
        return value
    if plain is bool:
        return _TRUTH.get(value.lower(), value)
    try:
        return plain(value)
    except ValueError:
        return value


def _shown(value: Any) -> str:
    """A value for a message: short, and quickly made also of lists that hold one another."""
    if isinstance(value, list | tuple | dict):
        inside = value.values() if isinstance(value, dict) else value
        if any(isinstance(item, list | tuple | dict) for item in inside):
            return f"a nested {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
