"""Recipes: YAML files merged strictly into frozen dataclasses, with `key=value` overrides.

Knows files and keys; does not know what the keys mean, that is up to the dataclass it fills.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

RECIPES = Path(__file__).parents[1] / "recipes"
Schema = TypeVar("Schema")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its name or a path to a YAML file; raises FileNotFoundError with the names."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    bundled = RECIPES / f"{name}.yaml"
    if bundled.is_file():
        return bundled
    raise FileNotFoundError(
        f"no recipe {name!r}{suggestion(name, recipe_names())}; "
        f"recipes: {', '.join(recipe_names())}; or give a YAML file"
    )


def load(schema: type[Schema], recipe: str, overrides: Sequence[str] = ()) -> Schema:
    """Merge a recipe and `key=value` overrides (dots reach into groups) into `schema`, a frozen dataclass.

    A recipe may name another one as its `base` (a file's path is that from the recipe), and then holds what differs.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type, or what the dataclass's
            own checks refuse.
        FileNotFoundError: no such recipe.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_recipe(recipe)
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} must be key=value, such as batch_size=64")
    try:
        given = OmegaConf.merge(_read(path), OmegaConf.from_dotlist(list(overrides)))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path.name}: {_first_line(error)}") from error
    values = OmegaConf.to_container(given, resolve=True)
    known = {key for key, _ in _leaves(dataclasses_tree(schema))}
    for key, _ in _leaves(cast(dict[str, Any], values)):
        if key not in known and not any(key.startswith(f"{other}.") for other in known):
            raise ValueError(f"unknown key {key!r} in recipe {path.stem}{suggestion(key, known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"recipe {path.stem}: {_first_line(error)}") from error


def _read(path: Path) -> Any:
    from omegaconf import OmegaConf

    values = OmegaConf.load(path)
    if not OmegaConf.is_dict(values):
        raise ValueError("a recipe must hold keys and values")
    if "base" not in values:
        return values
    base = cast(Any, values).pop("base")
    beside = path.parent / base
    return OmegaConf.merge(_read(beside if beside.is_file() else find_recipe(base)), values)


def dataclasses_tree(schema: type) -> dict[str, Any]:
    """The fields of a dataclass as nested dicts; groups (fields that are dataclasses) are dicts, leaves are None."""
    import typing

    hints = typing.get_type_hints(schema)
    return {
        field.name: next(
            (
                dataclasses_tree(kind)
                for kind in (hints[field.name], *typing.get_args(hints[field.name]))
                if dataclasses.is_dataclass(kind) and isinstance(kind, type)
            ),
            None,
        )
        for field in dataclasses.fields(schema)
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every value in which two nested dicts differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
