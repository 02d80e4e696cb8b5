"""Fields that say what they may hold, filled from Python, JSON and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nar.storage.fields import OneOf, Range, check, checked, filled, from_dict, kinds


@dataclass(frozen=True)
class Group:
    rate: Annotated[float, Range(above=0, most=1)] = 0.1
    sizes: tuple[Annotated[int, Range(1)], ...] = (1, 2)
    pair: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self) -> None:
        check(self, "group.")


@dataclass(frozen=True)
class Settings:
    count: Annotated[int, Range(1, 2**20)]
    name: str = ""
    kind: Annotated[str, OneOf("plain", "varied")] = "plain"
    limit: Annotated[int, Range(0)] | None = None
    flag: bool = False
    note: str | None = None
    group: Group = field(default_factory=lambda: Group(rate=0.3))
    other: Group | None = None

    def __post_init__(self) -> None:
        check(self)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"count": 0}, "count must be at least 1 and at most 1048576, not 0"),
    ({"count": 10**18}, "count must be at least 1 and at most 1048576, not 1000000000000000000"),
    ({"count": 2.0}, "count must be a whole number, at least 1 and at most 1048576, not 2.0"),
    ({"count": True}, "count must be a whole number, .*, not True"),
    ({"count": "x"}, "count must be a whole number, .*, not 'x'"),
    ({"count": None}, "count must be a whole number, .*, not None"),
    ({"name": 3}, "name must be text, not 3"),
    ({"name": None}, "name must be text, not None"),
    ({"kind": "other"}, "kind must be one of plain, varied, not 'other'"),
    ({"limit": -1}, "limit must be at least 0, or null, not -1"),
    ({"limit": "x"}, "limit must be a whole number, at least 0, or null, not 'x'"),
    ({"flag": 1}, "flag must be true or false, not 1"),
    ({"group": None}, "group must be keys and values, not None"),
    ({"group": [1]}, r"group must be keys and values, not \[1\]"),
    ({"group": {"rate": math.nan}}, "group.rate must be a finite number, .*, not nan"),
    ({"group": {"rate": 0}}, "group.rate must be above 0 and at most 1, not 0"),
    ({"group": {"sizes": 3}}, "group.sizes must be a list, not 3"),
    ({"group": {"sizes": "12"}}, "group.sizes must be a list, not '12'"),
    ({"group": {"sizes": [1, 0]}}, "group.sizes must be at least 1, not 0"),
    ({"group": {"sizes": [[[]]]}}, "group.sizes must be a whole number, at least 1, not a nested list"),
    ({"group": {"pair": [1]}}, r"group.pair must be a list of 2, not \[1\]"),
    ({"other": {"rate": 2}}, "other.rate must be above 0 and at most 1, not 2"),
    ({"grup": {}}, r"unknown key 'grup' in config\.json"),
    ({"group": {"rat": 1}}, r"unknown key 'group.rat' in config\.json \(did you mean 'group.rate'\?\)"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_json_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(Settings, {"count": 1, **values}, "config.json")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"config\.json: count is missing"):
        from_dict(Settings, {}, "config.json")
    with pytest.raises(ValueError, match=r"Settings must be keys and values, not \[\]"):
        from_dict(Settings, [], "config.json")


def test_lists_that_hold_each_other_are_refused_quickly() -> None:
    value: list[Any] = ["x"]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(ValueError, match="name must be text, not a nested list"):
        from_dict(Settings, {"count": 1, "name": value}, "config.json")


def test_json_fills_groups_over_their_own_defaults() -> None:
    made = from_dict(Settings, {"count": 4, "group": {"sizes": [3]}, "other": {"sizes": [5]}}, "config.json")
    assert (made.count, made.group, made.other) == (4, Group(0.3, (3,)), Group(0.1, (5,)))
    assert from_dict(Settings, {"count": 4, "limit": None, "other": None}, "config.json") == Settings(4)


def test_words_are_read_as_their_field_says() -> None:
    words = {"count": "4", "name": "2024", "flag": "Yes", "limit": None, "note": "null", "group": {"rate": "1e-3"}}
    assert from_dict(Settings, words, "recipe", text=True) == Settings(
        4, "2024", flag=True, note="null", group=Group(1e-3)
    )
    for key, value in {"count": "4.0", "flag": "1.0", "limit": "${oc.env:HOME}"}.items():
        with pytest.raises(ValueError, match=f"recipe: {key} must be .*, not '"):
            from_dict(Settings, {"count": "1", key: value}, "recipe", text=True)


def test_python_is_checked_alike() -> None:
    made = Settings(np.int64(3), group=Group(np.float32(0.5), [1, 2]))  # type: ignore[arg-type]
    assert type(made.count) is int
    assert made.group.sizes == (1, 2)
    with pytest.raises(ValueError, match=r"^group\.sizes must be at least 1, not 0"):
        Group(sizes=(0,))
    with pytest.raises(ValueError, match=r"group must be of type Group, not \{\}"):
        Settings(1, group={})  # type: ignore[arg-type]


def test_a_record_is_filled_with_what_came_later_in_groups_too() -> None:
    defaults = {"a": 0, "b": 3, "group": {"x": 0, "y": 4}}
    assert filled({"a": 1, "group": {"x": 2}}, defaults) == {"a": 1, "b": 3, "group": {"x": 2, "y": 4}}


def test_names_are_dotted() -> None:
    assert list(kinds(Group, "group.")) == ["group.rate", "group.sizes", "group.pair"]
    assert {"other", "other.pair"} <= kinds(Settings).keys()


@checked
def called(
    name: str | Path,
    sizes: Sequence[int] = (),
    *,
    tensor: Tensor | None = None,
    made: Callable[[], int] | None = None,
    shapes: Sequence[Range] | None = None,  # noqa: ARG001 it is checked
    labels: Sequence[str | int] | None = None,  # noqa: ARG001
    rate: Annotated[float, Range(0)] = 0.0,
) -> tuple[object, ...]:
    return name, sizes, tensor, made, rate


WRONG_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"name": None}, "name must be text or a Path, not None"),
    ({"name": torch.zeros(2, 3)}, r"name must be text or a Path, not a Tensor \(2, 3\)"),
    ({"sizes": 3}, "sizes must be a list, not 3"),
    ({"sizes": "12"}, "sizes must be a list, not '12'"),
    ({"sizes": torch.tensor(3)}, r"sizes must be a list, not tensor\(3\)"),
    ({"sizes": torch.tensor([0.5])}, r"sizes must be a list, each a whole number, not a Tensor \(1,\)"),
    ({"sizes": np.array([True])}, r"sizes must be a list, each a whole number, not a ndarray \(1,\)"),
    ({"sizes": np.array([None])}, "number 0 of sizes must be a whole number, not None"),
    ({"sizes": {1, 2}}, r"sizes must be a list, each a whole number, not \{1, 2\}"),
    ({"sizes": iter([1])}, r"sizes must be a list, each a whole number, not <list_iterator"),
    ({"shapes": range(3)}, r"shapes must be a list, each a Range, or null, not range\(0, 3\)"),
    ({"shapes": torch.zeros(2)}, r"shapes must be a list, each a Range, or null, not a Tensor \(2,\)"),
    ({"shapes": [1]}, r"number 0 of shapes must be of type Range, not 1"),
    ({"labels": torch.zeros(2)}, r"labels must be a list, each text or a whole number, or null, not a Tensor \(2,\)"),
    ({"sizes": [1, None]}, "number 1 of sizes must be a whole number, not None"),
    ({"tensor": [0.5]}, r"tensor must be of type Tensor, or null, not \[0\.5\]"),
    ({"made": 3}, "made must be of type Callable, or null, not 3"),
    ({"rate": "x"}, "rate must be a finite number, at least 0, not 'x'"),
    ({"rate": torch.tensor(0.5)}, "rate must be a finite number, .*, not tensor"),
    ({"rate": 10**400}, "rate must be a finite number, .*, not a number of many digits"),
    ({"sizes": [10**5000]}, "number 0 of sizes must be a whole number, not a number of many digits"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_arguments_are_checked_as_fields_are(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        called(**{"name": "x", **arguments})


def test_arguments_that_fit_are_passed_on() -> None:
    tensor = torch.zeros(2)
    assert called(Path("x"), [np.int64(1)], tensor=tensor, made=int) == (Path("x"), [1], tensor, int, 0.0)
    assert called("x", range(3), rate=1)[1:] == (range(3), None, None, 1)
    assert called("x", np.arange(3))[1] == called("x", torch.arange(3))[1] == [0, 1, 2], "no arrays from there on"
    for rate in (np.float32(0.5), np.float64(0.5), np.int64(1)):  # Python's own from there on
        assert type(called("x", rate=rate)[-1]) in (float, np.float64)
    with pytest.raises(TypeError, match="unknown argument 'other' of"):
        called("x", other=1)
