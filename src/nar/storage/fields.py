"""Fields and arguments: what each may hold is declared where it stands, and checked here, whoever fills it.

    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    norm: Annotated[str, OneOf("none", "layer")] = "none"

Knows types, ranges and keys; does not know files, nor what the fields mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from operator import ge, gt, le, lt, or_
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

Schema = TypeVar("Schema")
Given = ParamSpec("Given")
Result = TypeVar("Result")
_UNIONS, _LISTS = (Union, types.UnionType), (list, Sequence, Iterable)
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}

# How the names of dtypes begin, of arrays and tensors of such values.
_DTYPES = {int: ("int", "uint"), float: ("int", "uint", "float", "bfloat"), bool: ("bool",), str: ("<U",)}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold: `least` and `most` are among them, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Whether a number is within the bounds."""
        return all(within(value, bound) for _, within, bound in self._bounds())

    def allowed(self) -> str:
        """The bounds in words."""
        return " and ".join(f"{words} {bound}" for words, _, bound in self._bounds())

    def _bounds(self) -> Iterator[tuple[str, Callable[[Any, Any], bool], float]]:
        kinds = (("at least", ge), ("above", gt), ("at most", le), ("below", lt))
        for (words, within), bound in zip(kinds, (self.least, self.above, self.most, self.below), strict=True):
            if bound is not None:
                yield words, within, bound


class OneOf:
    """The words that a field may hold."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def allows(self, value: Any) -> bool:
        return value in self.words

    def allowed(self) -> str:
        return f"one of {', '.join(self.words)}"


Size = Annotated[int, Range(1, 2**20)]  # of a tensor's axis
Length = Annotated[int, Range(0, 2**20)]  # the same, where 0 means none
Seed = Annotated[int, Range(0, 2**64 - 1)]  # what torch and numpy both take
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def check(config: Any, group: str = "") -> None:
    """Check every field of a frozen dataclass, in its `__post_init__`; lists become tuples.

    `group` is what messages put before a field's name, such as "data.".

    Raises:
        ValueError: names the field, what it may hold, and what it holds.
    """
    for name, kind in _own_kinds(type(config)).items():
        object.__setattr__(config, name, _checked(getattr(config, name), kind, f"{group}{name}"))


def checked(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Have every call check its arguments as fields are, by the function's annotations.

    For what people call, not for what runs in every step: a call takes some microseconds longer.
    """
    signature = inspect.signature(function)
    kinds = functools.cache(lambda: get_type_hints(function, include_extras=True))
    takes_any = any(one.kind == one.VAR_KEYWORD for one in signature.parameters.values())

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if unknown := [] if takes_any else [name for name in kwargs if name not in signature.parameters]:
            names = [name for name in signature.parameters if name not in ("self", "cls")]
            listed = f"{suggestion(unknown[0], names)}; there are {', '.join(names)}"
            raise TypeError(f"unknown argument {unknown[0]!r} of {function.__name__}{listed}")
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            given.arguments[name] = _checked(value, kinds().get(name, Any), name)
        return function(*given.args, **given.kwargs)

    return call


def from_dict(schema: type[Schema], values: Any, origin: object, *, text: bool = False) -> Schema:
    """Make a frozen dataclass of nested keys and values; groups are dataclasses themselves, and may be left out.

    With `text` every value is a word, a list of words, keys and words, or None: the field says what is meant by it.

    Raises:
        ValueError: names `origin`: an unknown key (with the nearest known one), a missing one, a value of the wrong
            type or out of range, or what the dataclass's own checks refuse.
    """
    known = kinds(schema)
    for key in _unknown(known, values):
        raise ValueError(f"unknown key {key!r} in {origin}{suggestion(key, known)}")
    try:
        return _build(schema, values, None, "", text)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def kinds(schema: type, prefix: str = "") -> dict[str, Any]:
    """The annotations of a dataclass's fields by their dotted names: groups, and what is in them."""
    found = {}
    for name, kind in _own_kinds(schema).items():
        found[f"{prefix}{name}"] = kind
        if (group := _group(kind)) is not None:
            found |= kinds(group, f"{prefix}{name}.")
    return found


def filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded keys and values, with the defaults of those that came later; in groups too."""
    groups = [k for k in values if isinstance(values[k], Mapping) and isinstance(defaults.get(k), Mapping)]
    return {**defaults, **values, **{key: filled(values[key], defaults[key]) for key in groups}}


def emptied(schema: type, prefix: str = "") -> set[str]:
    """The dotted names of the fields that null empties: those that may be None, or are empty or 0 by default."""
    found = set()
    for field in dataclasses.fields(schema):
        kind = _own_kinds(schema)[field.name]
        if _may_be_empty(field) or unwrap(kind)[2]:
            found.add(f"{prefix}{field.name}")
        if (group := _group(kind)) is not None:
            found |= emptied(group, f"{prefix}{field.name}.")
    return found


def _may_be_empty(field: dataclasses.Field[Any]) -> bool:
    return isinstance(field.default, str | int | float | tuple) and not field.default and field.default is not False


def unwrap(kind: Any) -> tuple[Any, list[Any], bool]:
    """A type without what is wrapped around it, the limits of its values, and whether None is one."""
    limits: list[Any] = []
    optional = False
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            limits += more
        elif get_origin(kind) in _UNIONS:
            inner = [part for part in get_args(kind) if part is not types.NoneType]
            optional = len(inner) < len(get_args(kind))
            if len(inner) > 1:
                return functools.reduce(or_, inner), limits, optional
            kind = inner[0]
        else:
            return kind, limits, optional


def holds_whole_numbers(values: Any) -> bool:
    """Whether an array or tensor is one of integers; those of truth values and complex numbers are not."""
    return str(values.dtype).removeprefix("torch.").startswith(_DTYPES[int])


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _own_kinds(schema: Any) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _group(kind: Any) -> type | None:
    plain = unwrap(kind)[0]
    return plain if dataclasses.is_dataclass(plain) and isinstance(plain, type) else None


def _unknown(known: Mapping[str, Any], values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if (name := f"{prefix}{key}") not in known:
            yield name
        elif _group(known[name]) is not None:
            yield from _unknown(known, value, f"{name}.")


def _build(schema: type[Schema], values: Any, base: Any, prefix: str, text: bool) -> Schema:
    """`base` has the values of what is left out; None takes those of the class."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or schema.__name__} must be keys and values, not {_shown(values)}")
    found, own = {}, _own_kinds(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        kind, key = own[field.name], f"{prefix}{field.name}"
        group = _group(kind)
        if field.name not in values:
            if base is None and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{key} is missing")
        elif group is None or (values[field.name] is None and unwrap(kind)[2]):
            given = values[field.name]
            empty = text and given is None and _may_be_empty(field)
            found[field.name] = field.default if empty else _checked(given, kind, key, text)
        else:
            inner = getattr(base, field.name, None)
            if base is None and field.default_factory is not dataclasses.MISSING:
                inner = field.default_factory()
            found[field.name] = _build(group, values[field.name], inner, f"{key}.", text)
    return schema(**found) if base is None else dataclasses.replace(base, **found)


def _checked(value: Any, kind: Any, key: str, text: bool = False) -> Any:
    """A field's value in the type it is kept in; raises ValueError where it must not hold it."""
    plain, limits, optional = unwrap(kind)
    origin = get_origin(plain)
    if plain is Any or (value is None and optional):
        return value
    if origin in _UNIONS:
        return _one_of(value, get_args(plain), key, optional)
    if origin in _LISTS:
        return _listed(value, plain, key, optional)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _refusal(key, ["a list"], optional, value)
        items = get_args(plain)
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        if len(items) != len(value):
            raise _refusal(key, [f"a list of {len(items)}"], optional, value)
        return tuple(_checked(item, part, key, text) for item, part in zip(value, items, strict=True))
    plain = origin or plain
    if plain in _WORDS:
        converted = _converted(value, plain) if text else value
        if not _fits(converted, plain):
            raise _refusal(key, [_WORDS[plain], *(limit.allowed() for limit in limits)], optional, value)
        value = int(converted) if plain is int else converted
        if plain is float and not isinstance(value, int):
            value = float(value)  # a number of numpy is one of Python's from here on
    elif isinstance(plain, type) and not isinstance(value, Mapping if plain is dict else plain):
        raise _refusal(key, ["keys and values" if plain is dict else f"of type {plain.__name__}"], optional, value)
    for limit in limits:
        if not limit.allows(value):
            raise _refusal(key, [limit.allowed()], optional, value)
    return value


def _one_of(value: Any, kinds: Sequence[Any], key: str, optional: bool) -> Any:
    """A value of one of several kinds."""
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return _checked(value, kind, key)
    plain = [unwrap(kind)[0] for kind in kinds]
    names = ["a list" if get_origin(kind) in _LISTS else _WORDS.get(kind) or f"a {kind.__name__}" for kind in plain]
    raise _refusal(key, [" or ".join(names)], optional, value)


def _listed(value: Any, lists: Any, key: str, optional: bool) -> Any:
    """Values one after another: of a list each is checked, of arrays and tensors their dtype.

    Of iterators, which only an `Iterable` may be, nothing is.
    """
    kind = get_args(lists)[0]
    if str(getattr(value, "dtype", "")) == "object" and value.ndim:
        value = list(value)
    if isinstance(value, list | tuple):
        return type(value)(_checked(item, kind, f"number {number} of {key}") for number, item in enumerate(value))
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping) or getattr(value, "ndim", 1) == 0:
        raise _refusal(key, ["a list"], optional, value)
    plain, dtype, axes = unwrap(kind)[0], getattr(value, "dtype", None), getattr(value, "ndim", 1)
    kinds = get_args(plain) if get_origin(plain) in _UNIONS else (plain,)
    if dtype is not None:
        names = tuple(name for kind in kinds for name in _DTYPES.get(kind, ()))
        fits = str(dtype).removeprefix("torch.").startswith(names) and axes == 1
    else:
        fits = int in kinds if isinstance(value, range) else isinstance(value, get_origin(lists))
    if plain is not Any and not fits:
        each = " or ".join(_WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}" for kind in kinds)
        raise _refusal(key, [f"a list, each {each}"], optional, value)
    # A list is true or false, an array is neither.
    return value if dtype is None or plain is Any else value.tolist()  # type: ignore[attr-defined]


def _refusal(key: str, allowed: list[str], optional: bool, value: Any) -> ValueError:
    return ValueError(f"{key} must be {', '.join(allowed + ['or null'] * optional)}, not {_shown(value)}")


def _fits(value: Any, plain: type) -> bool:
    if isinstance(value, bool) or plain in (bool, str):
        return isinstance(value, plain) and isinstance(value, bool) == (plain is bool)
    if plain is int:
        return isinstance(value, Integral) and abs(int(value)) < 2**64  # more digits fit no tensor, and no message
    with contextlib.suppress(OverflowError):  # of whole numbers with many digits
        # Tensors do not compare with fractions.
        return isinstance(value, Real) and not isinstance(value, Fraction) and math.isfinite(value)
    return False


def _converted(value: Any, plain: type) -> Any:
    """A word as a number or truth, where it is one."""
    if isinstance(value, str) and plain is bool:
        return _TRUTH.get(value.lower(), value)
    with contextlib.suppress(ValueError):
        return plain(value) if isinstance(value, str) else value
    return value


def _shown(value: Any) -> str:
    """A value for a message: short, and quickly made also of lists that hold one another."""
    if isinstance(value, list | tuple | dict):
        inside = value.values() if isinstance(value, dict) else value
        if any(isinstance(item, list | tuple | dict) for item in inside):
            return f"a nested {type(value).__name__}"
    if getattr(value, "ndim", 0):
        return f"a {type(value).__name__} {tuple(value.shape)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
