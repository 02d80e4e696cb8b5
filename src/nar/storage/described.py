"""Keys of a frozen dataclass as people read them: type, default, and what its docstrings say of each.

Knows dataclasses and their docstrings; does not know what they are for.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

from nar.storage.fields import kinds, unwrap

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_SENTENCE = re.compile(r"(?<=[.;])\s+")


class Key(NamedTuple):
    """A key: its dotted name, the values that it takes, what it is by default, and what it means."""

    name: str
    values: str
    default: Any
    meaning: str


def described(schema: type, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a dataclass; those of a group come after the others, behind its name."""
    own = kinds(schema)
    groups = []
    for field in dataclasses.fields(schema):
        plain, limits, optional = unwrap(own[field.name])
        if isinstance(plain, type) and dataclasses.is_dataclass(plain):
            groups.append((field.name, plain))
            continue
        allowed = [_kind(plain), *(limit.allowed() for limit in limits), *(["null"] if optional else [])]
        yield Key(
            f"{prefix}{field.name}", ", ".join(filter(None, allowed)), _default(field), meaning(schema, field.name)
        )
    for name, group in groups:
        yield from described(group, f"{prefix}{name}.")


def meaning(schema: type, name: str) -> str:
    """What the docstrings of a class and its bases say of a field: its entry, or else all sentences that name it."""
    for owner in schema.__mro__:
        text = inspect.cleandoc(owner.__doc__ or "")
        prose, _, listed = text.partition("\nAttributes:\n")
        for entry in re.split(r"\n(?=    \S)", "\n" + listed):
            names, colon, said = entry.partition(":")
            if colon and name in names.replace(" ", "").strip().split(","):
                return " ".join(said.split()).rstrip(".")
        sentences = [" ".join(part.split()) for part in _SENTENCE.split(prose) if f"`{name}`" in part]
        if sentences:
            return " ".join(sentences).rstrip(".;")
    return ""


def _kind(plain: Any) -> str:
    if get_origin(plain) is tuple:
        item = unwrap(get_args(plain)[0])[0]
        return f"list of {_WORDS.get(item, 'value')}s"
    return _WORDS.get(plain, "keys and values" if get_origin(plain) is dict else "")


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return list(value) if isinstance(value, tuple) else value
