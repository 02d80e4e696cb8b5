"""`nar bench` on toys: rows that add up, a table, a file, a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import make_model
from nar import ModelConfig, Sampling, bench
from nar.bench import efficiency
from nar.bench.report import PLOTS, Row, plot
from nar.cli import app
from nar.storage.presets import Preset
from nar.tokenizer import load_tokenizer

KEYS = {
    "schedule",
    "steps",
    "batch_size",
    "latency_seconds",
    "images_per_second",
    "peak_memory_bytes",
    "latency_with_pixels_seconds",
    "reading_floor_seconds",
    "arithmetic_floor_seconds",
    "floor_fraction",
}


def test_command_writes_table_file_and_plot(toy_folder: Path, tmp_path: Path) -> None:
    files = [str(tmp_path / "rows.json"), str(tmp_path / "plot.png")]
    result = CliRunner().invoke(
        app,
        f"bench {toy_folder} --batch-sizes 1,2 --repetitions 1 --device cpu --schedule raster --schedule manhattan "
        f"--clock cpu --json {files[0]} --plot {files[1]}",
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert "manhattan is" in result.stdout
    assert "ratio of steps 2.29" in result.stdout
    rows = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    assert [(row["schedule"], row["steps"], row["batch_size"]) for row in rows] == [
        ("raster", 16, 1),
        ("raster", 16, 2),
        ("manhattan", 7, 1),
        ("manhattan", 7, 2),
    ]
    for row in rows:
        assert set(row) >= KEYS
        assert row["clock"] == "cpu"
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["latency_seconds"])
        assert row["latency_with_pixels_seconds"] > row["latency_seconds"]
        assert 0 < row["floor_fraction"] < 2
    with Image.open(files[1]) as picture:
        assert picture.size[1] > 100
        assert len(picture.convert("RGB").getcolors(2**20) or ()) > 10


@pytest.mark.parametrize("suffix", PLOTS)
def test_plots_of_every_kind(tmp_path: Path, suffix: str) -> None:
    facts = {"dtype": "float32", "device": "cpu", "threads": 1, "warmups": 0, "repetitions": 1}
    rows = [
        Row("m", "sample", batch, 1.0 * batch, 1.0, schedule=schedule, steps=4, **facts)
        for schedule in ("raster", "par")
        for batch in (1, 8)
    ]
    plot(rows, tmp_path / f"plot{suffix}")
    made = (tmp_path / f"plot{suffix}").read_bytes()
    assert made[:4] in (b"\x89PNG", b"%PDF") or b"<svg" in made


def test_what_can_not_be_written_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "bench_folder", lambda *_, **__: pytest.fail("it has begun"))
    for option, path in (("--json", tmp_path), ("--plot", tmp_path / "file" / "a.png")):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="folder"):
            CliRunner().invoke(app, ["bench", "fashion", option, str(path)], catch_exceptions=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'nar-gen\[plot\]'"):
        CliRunner().invoke(app, ["bench", "fashion", "--plot", "a.png"], catch_exceptions=False)


def test_tokenizers_are_measured_in_every_dtype_and_layout(toy_folder: Path, tmp_path: Path) -> None:
    command = (
        f"bench --tokenizer {toy_folder} --batch-sizes 1,2 --repetitions 1 --device cpu --json {tmp_path / 'rows'}"
    )
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads((tmp_path / "rows").read_text())
    kinds = {(row["operation"], row["dtype"], row["layout"], row["batch_size"]) for row in rows}
    assert len(rows) == len(kinds) == 2 * 2 * 2 * 2
    for operation, batch in (("encode", 1), ("encode", 2), ("decode", 1), ("decode", 2)):
        same = [row for row in rows if (row["operation"], row["batch_size"]) == (operation, batch)]
        assert [row["latency_seconds"] for row in same if row["fastest"]] == [min(r["latency_seconds"] for r in same)]
        assert [row["change"] for row in same if (row["dtype"], row["layout"]) == ("float32", "contiguous")] == [0]
        assert all(row["change"] < (0.5 if operation == "encode" else 5) for row in same)
        assert any(row["change"] > 0 for row in same if row["dtype"] == "bfloat16") or operation == "encode"
    assert result.stdout.count("*") == 4
    tokenizer = load_tokenizer(toy_folder / "tokenizer")
    with torch.no_grad():
        next(iter(tokenizer.decoder.parameters())).fill_(3e38)
    tokenizer.save_pretrained(tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"damaged decodes to numbers that are none in .*; its weights are damaged"):
        CliRunner().invoke(app, ["bench", "--tokenizer", str(tmp_path / "damaged")], catch_exceptions=False)


def test_work_counts_the_unconditional_half_as_long_as_it_is_fed() -> None:
    model = make_model("nar")
    positions = model.layout.schedule.num_positions
    alone, half, both = (
        bench.work(model, Sampling(guidance_scale=scale, guidance_interval=interval))[1]
        for scale, interval in ((1.0, None), (2.0, positions // 2), (2.0, None))
    )
    outputs = positions * model.output.weight.numel()
    assert both - outputs == 2 * (alone - outputs)
    assert alone < half < both


@pytest.mark.parametrize(
    ("name", "steps", "gflop", "cache_megabytes", "read_gigabytes"),
    [("NAR-M", 31, 272, 39.8, 17.2), ("VAR-d16", 10, 591, 89.1, 4.32), ("PAR-B-4x", 67, 95.9, 18.9, 13.1)],
)
def test_arithmetic_of_published_sizes(
    name: str, steps: int, gflop: float, cache_megabytes: float, read_gigabytes: float
) -> None:
    """Numbers of the first two as counted by hand, in 16 bit."""
    found = efficiency.arithmetic(name, dtype="bfloat16")
    numbers = (found.operations / 1e9, found.cache_bytes / 1e6, found.read_bytes / 1e9)
    assert numbers == pytest.approx((gflop, cache_megabytes, read_gigabytes), rel=0.005)
    assert found.steps == steps


def test_models_stand_beside_those_of_the_nearest_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert efficiency.rivals("NAR-M") == ["LlamaGen-XL", "PAR-XXL-4x", "VAR-d16"]
    sizes = {"vocab_size": 16, "num_classes": 300, "dim": 16, "num_layers": 1, "num_heads": 2}
    order = {"grid": (5,), "schedule": "scales", "scales": (1, 2), "code_dim": 4, "positions": "levels"}
    tiny = {"NAR-t": {"grid": (4, 4)}, "LlamaGen-t": {"grid": (4, 4), "schedule": "raster"}}
    tiny["VAR-t"] = {**order, "modulation": "own"}
    for name, own in tiny.items():
        monkeypatch.setitem(bench.PRESETS, name, Preset(name, "nar-c2i", "none", 0, {**sizes, **own}))
    monkeypatch.setattr(efficiency, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    files = [str(tmp_path / "figure.json"), str(tmp_path / "figure.pdf"), str(tmp_path / "figure.png")]
    command = ["bench", "--efficiency", "--preset", "NAR-t", "--against", "VAR-t,LlamaGen-t", "--against", "PAR-t-4x"]
    command += ["--batch-sizes", "2", "--repetitions", "2", "--device", "cpu", "--json", files[0]]
    said = CliRunner().invoke(app, [*command, "--plot", files[1]], catch_exceptions=False).stdout
    written = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    assert [row["batch_size"] for row in written["rows"]] == [2] * 4
    for row in written["rows"]:
        assert row["latency_shortest_seconds"] <= row["latency_seconds"] <= row["latency_longest_seconds"]
    assert {each["model"]: each["steps"] for each in written["arithmetic"]} == {
        "NAR-t": 7,
        "VAR-t": 2,
        "LlamaGen-t": 16,
        "PAR-t-4x": 7,
    }
    assert "VAR-t: 2 steps" in said
    assert Path(files[1]).read_bytes()[:4] == b"%PDF"
    monkeypatch.setattr(efficiency, "bench_preset", lambda *_: pytest.fail("it is in the file"))
    said = CliRunner().invoke(app, [*command, "--plot", files[2]], catch_exceptions=False).stdout
    assert "4 rows were in" in said
    assert json.loads(Path(files[0]).read_text(encoding="utf-8")) == written
    measured = list[bench.Setup]()
    monkeypatch.setattr(efficiency, "bench_preset", lambda _, setup, __: measured.append(setup) or [_row(setup)])
    changes = [("--clock", "cpu"), ("--warmups", "1"), ("--guidance-interval", "4"), ("--dtype", "float16")]
    for change in changes:
        said = CliRunner().invoke(app, [*command, *change], catch_exceptions=False).stdout
        assert said.count("batch   2: 7.000 s") == said.count("batch   2") == 4
    assert len(measured) == 16
    rows = efficiency.known_rows(Path(files[0]))
    assert len(rows) == 20
    other = [dataclasses.replace(row, device="another") for row in rows]
    setup = bench.Setup((2,), warmups=1, repetitions=2)
    assert [row.device for row in efficiency.compare(["NAR-t"], setup, other).rows] == [rows[0].device]
    ended = efficiency.arithmetic("NAR-t", guidance_interval=4).operations
    assert ended < efficiency.arithmetic("NAR-t").operations
    Path(files[0]).write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no comparison of efficiency"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def _row(setup: bench.Setup) -> Row:
    """A row of a setup that nobody measured."""
    facts = {name: getattr(setup, name) for name in ("compiled", "guidance_scale", "guidance_interval")}
    return setup.row("", "sample", setup.batch_sizes[0], [7.0], setup.dtype, **facts)


def test_floors_are_by_the_clock_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others are busy, a floor by the wall clock is above what processor time can reach."""
    asked = list[str]()
    monkeypatch.setattr(bench, "_time", lambda run, _, clock: (run(), asked.append(clock), 1.0)[-1])
    bench._machine("float32", torch.device("cpu"), "cpu")
    monkeypatch.setattr(bench, "_machine", lambda *given: asked.append(given[2]) or (1.0, 1.0))
    bench.bench_folder("fashion", bench.Setup(warmups=0, repetitions=1, pixels=False, clock="cpu"))
    assert set(asked) == {"cpu"}


def test_published_sizes_under_every_schedule() -> None:
    config = ModelConfig(**bench.find("NAR-B").config)
    video = ModelConfig(**bench.find("NAR-video-S").config)
    assert bench.with_schedule(config, "par").regions == (2, 2)
    assert bench.with_schedule(config, "raster").num_blocks == 12
    assert bench.with_schedule(video, "par").regions == (1, 2, 2)
    assert bench.with_schedule(config, "manhattan") is config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either MODEL or --preset"),
        (["toy", "--preset", "NAR-B"], "either MODEL or --preset"),
        (["--preset", "NAR-Q"], "did you mean"),
        (["--preset", "NAR-B", "--tokenizer", "VQ-16"], "only one"),
        (["--tokenizer", "NAR-B"], "not a tokenizer"),
        (["--tokenizer", "VQ-16", "--plot", "x.png"], "leave it out"),
        (["--preset", "VQ-16", "--tokens-only"], "tokenizer"),
        (["--preset", "NAR-B", "--batch-sizes", "one"], "1,8"),
        (["--preset", "NAR-B", "--batch-sizes", "0"], "batch_sizes must be at least 1 and .*, not 0"),
        (["--preset", "NAR-B", "--batch-sizes", str(2**63)], "batch_sizes must be at least 1 and at most 1048576"),
        (["--preset", "NAR-B", "--against", "VAR-d16"], "of --efficiency"),
        (["--preset", "NAR-B", "--efficiency", "--schedule", "raster"], "no --schedule"),
        (["--preset", "NAR-video-S", "--efficiency"], "a model of clips"),
        (["--preset", "NAR-B", "--efficiency", "--dtype", "auto"], "in one format, not auto: give one of float32"),
        (["--preset", "NAR-B", "--efficiency", "--against", "PAR-Q-4x"], "did you mean LlamaGen"),
        (["--preset", "NAR-B", "--plot", "x.jpg"], "must end in .png, .pdf or .svg"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
