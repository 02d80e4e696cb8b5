"""Recipes: YAML files merged strictly into frozen dataclasses, with `key=value` overrides.

Knows files and keys; does not know what the keys mean, that is up to the dataclass it fills.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from nar.storage.fields import checked, emptied, from_dict, kinds, suggestion, unwrap

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
    known = recipe_names()
    if name in known:
        return RECIPES / f"{name}.yaml"
    hint = f"{suggestion(name, known)}; recipes: {', '.join(known)}"
    raise FileNotFoundError(f"no recipe {name!r}{hint}; or give a YAML file")


def about(recipe: str) -> str:
    """What a recipe's file says of itself; nothing where it leaves that to its base."""
    with find_recipe(recipe).open("rb") as file:
        return " ".join(str(_parse(file, recipe).get("about", "")).split())


def keys_of(recipe: str) -> list[str]:
    """The dotted keys that a recipe's own file holds, without those of its base."""
    with find_recipe(recipe).open("rb") as file:
        return [key for key, _ in leaves(_parse(file, recipe))]


@checked
def load(
    schema: type[Schema], recipe: str, overrides: Sequence[str] = (), *, layers: Sequence[Mapping[str, Any]] = ()
) -> Schema:
    """Merge a recipe and `key=value` overrides (dots reach into groups) into `schema`, a frozen dataclass.

    A recipe may name another one as its `base` (a file's path is that from the recipe), and then holds what differs.
    The value of an override is taken as it is typed where the key holds text, and is read as YAML elsewhere; null
    empties a key that may be empty. `layers` are nested settings between recipe and overrides. Where the schema has
    `REPLACED`, a key that is given takes the place of those named there for it, of everything before.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type, what the dataclass's own
            checks refuse, or two keys that take each other's place.
        FileNotFoundError: no such recipe.
    """
    path = find_recipe(recipe)
    replaced: Mapping[str, Sequence[str]] = getattr(schema, "REPLACED", {})
    values, given = _read(path, (), replaced), dict[str, Any]()
    known, empty = kinds(schema), emptied(schema)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must be key=value, such as batch_size=64")
        if key not in known:
            raise ValueError(f"unknown key {key!r} in recipe {path.stem}{suggestion(key, known)}")
        literal = unwrap(known[key])[0] is str and not (value == "null" and key in empty)
        nested: Any = value if literal else _parse(value, f"override {override!r}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        given = _merged(given, nested)
    for above in (*layers, given):
        values = _over(values, above, replaced)
    loaded = from_dict(schema, values, f"recipe {path.stem}", text=True)
    if len(rivals := _given(values, replaced)) > 1:
        found = " and ".join(f"{key}={values[key]}" for key in rivals)
        raise ValueError(f"recipe {path.stem}: of {found} each takes the place of the others; give one of them")
    return loaded


def _read(path: Path, readers: tuple[Path, ...], replaced: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A recipe with its bases below it; `readers` are the recipes that it is the base of."""
    if path.resolve() in readers:
        raise ValueError(f"{path.name}: its base leads back to it")
    with path.open("rb") as file:
        values = _parse(file, path.name)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: a recipe must hold keys and values")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path.name}: base must be the name of a recipe, or a YAML file, not {type(base).__name__}")
    beside = path.parent / base
    below = beside if beside.suffix in {".yaml", ".yml"} and beside.is_file() else find_recipe(base)
    inherited = _read(below, (*readers, path.resolve()), replaced)
    for key in ("cuda_recipe", "by_count"):  # they speak of the base itself
        inherited.pop(key, None)
    return _over(inherited, values, replaced)


def _parse(text: Any, origin: str) -> Any:
    """YAML with every scalar as it is written but null: what a word means is said by the field that it fills."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar = {
            first: [rule for rule in rules if rule[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = [key.value for key, _ in node.value]
            if twice := [key for key in found if isinstance(key, str) and key != "<<" and found.count(key) > 1]:
                raise yaml.constructor.ConstructorError(problem=f"key {twice[0]!r} is given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{origin} is not valid YAML: {reason}") from None


def _over(below: dict[str, Any], above: Mapping[str, Any], replaced: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Settings over earlier ones, some of which they take the place of."""
    gone = {name for key in _given(above, replaced) for name in replaced[key]}
    return _merged({key: value for key, value in below.items() if key not in gone}, above)


def _given(settings: Mapping[str, Any], replaced: Mapping[str, Sequence[str]]) -> list[str]:
    """Keys among settings, not 0 or null, that take the place of others."""
    return [key for key in settings if key in replaced and str(settings[key]).strip("0.") not in ("", "None")]


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` before those of `below`."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every value in which two nested dicts differ."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The values of nested keys by their dotted names; tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
