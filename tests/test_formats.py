"""The choice of a number format and of threads by measurement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_model
from nar import Pipeline, Transformer
from nar.cli import app
from nar.pipeline import formats
from nar.pipeline.folder import format_facts
from nar.pipeline.formats import choose_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(formats, "REMEMBERED", tmp_path / "cache" / "formats.json")
    yield
    torch.set_num_threads(threads)


def slowed(milliseconds: dict[str, float], noise: dict[str, float]) -> tuple[Callable[[str], Transformer], list[str]]:
    """Loads a toy whose formats take as long, and are as wrong, as it is said; and what was loaded."""
    loaded: list[str] = []

    def load(name: str) -> Transformer:
        if name not in milliseconds:
            raise ValueError(f"dtype {name} has no kernels here")
        loaded.append(name)
        model = make_model("nar")
        with torch.no_grad():
            model.output.weight.mul_(1 + noise.get(name, 0.0))
        model.output.register_forward_hook(lambda *_: _wait(milliseconds[name]))
        return model

    return load, loaded


def _wait(milliseconds: float) -> None:
    formats.perf_counter.now += milliseconds / 1000  # type: ignore[attr-defined]


class Clock:
    """A clock that only moves when something says that it took time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("milliseconds", "noise", "chosen"),
    [
        ({"float32": 9, "float16": 7, "int8": 5, "bfloat16": 6}, {}, "int8"),
        ({"float32": 9, "float16": 7, "int8": 5, "bfloat16": 6}, {"int8": 0.5}, "bfloat16"),
        ({"float32": 9, "float16": 7, "int8": 5, "bfloat16": 6}, {"int8": 0.5, "bfloat16": 0.5}, "float16"),
        ({"float32": 4, "float16": 7, "int8": 5, "bfloat16": 6}, {}, "float32"),
        ({"float32": 9, "bfloat16": 6}, {}, "bfloat16"),
    ],
)
def test_the_fastest_format_of_small_cost_is_taken(
    milliseconds: dict[str, float], noise: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "perf_counter", Clock())
    load, loaded = slowed(milliseconds, noise)
    model, choice = choose_of(load, "weights", CPU)
    assert choice.dtype == chosen
    assert choice.seconds == pytest.approx({name: each / 1000 for name, each in milliseconds.items()})
    for name in noise:
        assert choice.costs[name] > 0.001
        assert f"{name} {9 / milliseconds[name]:.2f} times at +" in str(choice)
    assert ("a picture may depend on its batch" in str(choice)) == (chosen == "bfloat16")
    assert isinstance(model, Transformer)
    loaded.clear()
    _, again = choose_of(load, "weights", CPU)
    assert loaded == [chosen]
    assert again == dataclasses.replace(choice, remembered=True, thread_seconds=again.thread_seconds)
    choose_of(load, "other weights", CPU)
    assert loaded[1] == "float32"


def test_threads_that_wait_for_each_other_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "perf_counter", Clock())
    for slow, wanted in ((2, 1), (1, 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        load, _ = slowed({"float32": 0}, {})

        def busy(name: str, load: Callable[[str], Transformer] = load, slow: int = slow) -> Transformer:
            model = load(name)
            model.output.register_forward_hook(lambda *_: _wait(20 if torch.get_num_threads() == slow else 1))
            return model

        _, choice = choose_of(busy, f"slow with {slow}", CPU)
        assert choice.threads == torch.get_num_threads() == wanted
        assert choice.thread_seconds == pytest.approx({slow: 0.02, wanted: 0.001})


def test_threads_are_those_of_the_format_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are the best for float32, one for what is taken."""
    monkeypatch.setattr(formats, "perf_counter", Clock())
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    def load(name: str) -> Transformer:
        if name not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {name} has no kernels here")
        model, best = make_model("nar"), 2 if name == "float32" else 1
        slow = 9 if name == "float32" else 2
        model.output.register_forward_hook(lambda *_: _wait(slow - (torch.get_num_threads() == best)))
        return model

    _, choice = choose_of(load, "either", CPU)
    assert (choice.dtype, choice.threads, torch.get_num_threads()) == ("bfloat16", 1, 1)


def test_a_damaged_memory_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "perf_counter", Clock())
    load, _ = slowed({"float32": 2, "bfloat16": 1}, {})
    formats.REMEMBERED.parent.mkdir()
    for text in ("{", "[]", '{"a": 3}'):
        formats.REMEMBERED.write_text(text)
        assert not choose_of(load, text, CPU)[1].remembered
        assert choose_of(load, text, CPU)[1].remembered


def test_a_pipeline_and_the_command_choose_and_record(toy_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, device="cpu", dtype="auto")
    assert pipe.choice is not None
    assert format_facts(pipe.model, pipe.choice)["dtype"] == pipe.choice.dtype
    assert pipe.at_grid(pipe.config.grid).choice is pipe.choice
    assert str(pipe.dtype) == f"torch.{pipe.choice.dtype}"
    pipe.to(dtype="float16" if pipe.choice.dtype == "float32" else "float32")
    assert pipe.choice is None
    assert format_facts(Pipeline.from_pretrained(toy_folder, device="cpu").model, None) == {"dtype": "float32"}
    command = ["sample", str(toy_folder), "--dtype", "auto", "-n", "1", "-o", str(tmp_path / "set"), "--device", "cpu"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "the fastest that costs less than 0.1% of the bits" in result.stderr
    record = json.loads((tmp_path / "set" / "samples.json").read_text())[0]
    assert record["dtype"] in ("float32", "float16", "int8", "bfloat16")
    assert record["dtype_choice"]["threads"] == torch.get_num_threads()


def test_a_set_in_a_measured_format_is_resumed(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed: list[dict[str, object]] = []
    monkeypatch.setattr("nar.evaluation.sets.claim", lambda _, settings, **__: claimed.append(settings))
    command = ["sample", str(toy_folder), "--dtype", "auto", "-n", "2", "--labels", "balanced", "--device", "cpu"]
    for name in ("first.npz", "second.npz"):
        CliRunner().invoke(app, [*command, "-o", str(tmp_path / name)], catch_exceptions=False)
    assert claimed[0] == claimed[-1]
    assert claimed[0]["dtype"] in ("float32", "float16", "int8", "bfloat16")
