"""Recipes: strict merging, suggestions, types."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nar.storage.config import difference, find_recipe, load


@dataclass(frozen=True)
class Group:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Schema:
    name: str = ""
    batch_size: int = 1
    group: Group = field(default_factory=Group)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ngroup: {rate: 0.5}\n")
    return str(path)


def test_overrides_win(recipe: str) -> None:
    made = load(Schema, recipe, ["batch_size=8", "group.sizes=[3,4]", "name=other"])
    assert (made.name, made.batch_size, made.group.rate, list(made.group.sizes)) == ("other", 8, 0.5, [3, 4])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=8", r"unknown key 'batchsize' in recipe mine \(did you mean 'batch_size'\?\)"),
        ("group.rat=8", r"did you mean 'group.rate'"),
        ("batch_size=many", "batch_size|many"),
        ("batch_size", "must be key=value"),
    ],
)
def test_mistakes_are_named(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Schema, recipe, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("name: [1, 2", r"mine\.yaml is not valid YAML: .*line 1"), ("- a\n- b\n", r"mine\.yaml: .*keys and values")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(Schema, str(tmp_path / "mine.yaml"))


@pytest.mark.usefixtures("recipe")
def test_a_base_lies_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.yaml").write_text("base: ../mine.yaml\nbatch_size: 9\n")
    made = load(Schema, str(tmp_path / "other" / "more.yaml"))
    assert (made.name, made.batch_size, made.group.rate) == ("mine", 9, 0.5)


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe 'fashon' \(did you mean 'fashion'\?\); recipes: .*fashion"):
        find_recipe("fashon")


def test_difference() -> None:
    assert difference({"a": 1, "b": {"c": (1, 2)}}, {"a": 1, "b": {"c": [1, 3]}}) == ["b.c: [1, 2] -> [1, 3]"]
