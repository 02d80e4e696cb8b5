"""Recipes: strict merging, suggestions, types."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from nar.storage.config import difference, find_recipe, load


@dataclass(frozen=True)
class Group:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Schema:
    name: str = ""
    note: str | None = "some"
    batch_size: int = 1
    words: tuple[str, ...] = ()
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
        ("batch_size=many", "recipe mine: batch_size must be a whole number, not 'many'"),
        ("batch_size=null", "recipe mine: batch_size must be a whole number, not None"),
        ("batch_size=", "batch_size must be a whole number, not None"),
        ("batch_size=[1", r"override 'batch_size=\[1' is not valid YAML"),
        ("batch_size=${oc.env:HOME}", r"batch_size must be a whole number, not '\${oc.env:HOME}'"),
        ("group=3", "group must be keys and values, not '3'"),
        ("group.rate=[1]", "group.rate must be a finite number"),
        ("words=a", "words must be a list, not 'a'"),
        ("batch_size", "must be key=value"),
    ],
)
def test_mistakes_are_named(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Schema, recipe, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1, 2", r"mine\.yaml is not valid YAML: .*line 1"),
        ("- a\n- b\n", r"mine\.yaml: .*keys and values"),
        ("name: a\nname: b", "mine.yaml is not valid YAML: key 'name' is given twice"),
        ("name: " + "[" * 5000, "mine.yaml is not valid YAML: nested too deeply"),
        ("name: !!python/name:os.system", "mine.yaml is not valid YAML: could not determine a constructor"),
        ("name: [a]", "recipe mine: name must be text, not"),
        ("base: [1]", "mine.yaml: base must be the name of a recipe, or a YAML file, not list"),
        ("base: mine.yaml", "mine.yaml: its base leads back to it"),
        ("3: a", "unknown key '3' in recipe mine"),
    ],
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


@pytest.mark.parametrize("text", ["pics #2", "2024", "[x]", "nulls", "a: b", "'x'", "", "~", "${oc.env:HOME}", "a=b"])
def test_text_is_taken_as_it_is_typed(recipe: str, text: str) -> None:
    assert load(Schema, recipe, [f"name={text}"]).name == text


def test_null_empties_what_may_be_empty(tmp_path: Path, recipe: str) -> None:
    assert load(Schema, recipe, ["name=null", "words=null"]) == Schema(group=Group(rate=0.5))
    (tmp_path / "more.yaml").write_text("base: mine.yaml\nname: null\n")
    assert load(Schema, str(tmp_path / "more.yaml")).name == ""


def test_a_key_may_replace_others(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Lengths:
        REPLACED: ClassVar = {"epochs": ("steps", "most"), "steps": ("epochs", "most")}
        epochs: float = 0.0
        steps: int = 0
        most: int = 9

    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 3\nmost: 4\n")
    (tmp_path / "more.yaml").write_text("base: mine.yaml\nsteps: 7\n")
    assert load(Lengths, str(path)) == Lengths(3.0, 0, 4)
    assert load(Lengths, str(path), ["steps=5"]) == Lengths(0.0, 5)
    assert load(Lengths, str(path), ["epochs=0", "steps=5"]) == Lengths(0.0, 5)
    assert load(Lengths, str(path), ["epochs=null", "steps=5", "most=6"]) == Lengths(0.0, 5, 6)
    assert load(Lengths, str(path), ["most=6"]) == Lengths(3.0, 0, 6)
    assert load(Lengths, str(tmp_path / "more.yaml")) == Lengths(0.0, 7)
    assert load(Lengths, str(path), ["steps=5"], layers=[{"epochs": "2"}]) == Lengths(0.0, 5)
    assert load(Lengths, str(path), layers=[{"steps": "2", "most": "1"}]) == Lengths(0.0, 2, 1)


def test_text_that_may_be_missing(recipe: str) -> None:
    assert load(Schema, recipe, ["note=null"]).note is None
    assert load(Schema, recipe, ["note='null'"]).note == "'null'"


def test_files_say_what_yaml_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: 0777\nnote: null\nwords: [no, '2024-01-01', 'null', '${oc.env:HOME}']\ngroup: {rate: 1e-3}\n"
    )
    made = load(Schema, str(path))
    assert (made.name, made.note, made.group.rate) == ("0777", None, 1e-3)
    assert made.words == ("no", "2024-01-01", "null", "${oc.env:HOME}")


@pytest.mark.parametrize("base", ["secret", "../secret", "/etc/passwd"])
def test_a_base_shows_nothing_of_other_files(tmp_path: Path, base: str) -> None:
    (tmp_path / "secret").write_text("root:x:0:0")
    (tmp_path / "mine.yaml").write_text(f"base: {base}")
    with pytest.raises(FileNotFoundError, match="no recipe") as caught:
        load(Schema, str(tmp_path / "mine.yaml"))
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize("name", ["../recipes/toy", "./toy", "/toy", ""])
def test_only_plain_names_are_those_of_the_package(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe"):
        find_recipe(name)


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe 'fashon' \(did you mean 'fashion'\?\); recipes: .*fashion"):
        find_recipe("fashon")


def test_difference() -> None:
    assert difference({"a": 1, "b": {"c": (1, 2)}}, {"a": 1, "b": {"c": [1, 3]}}) == ["b.c: [1, 2] -> [1, 3]"]
