"""A fixed sample of what `make fuzz` tries, and what it has found: damaged files, options, outputs and arguments."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image
from safetensors.torch import load, save_file

from conftest import make_model
from nar import ClassCondition, Pipeline, Transformer, bench, cli, generate
from nar.convert import convert
from nar.data.config import DataConfig
from nar.data.extract import extract
from nar.metrics import evaluate
from nar.storage.folder import find_model
from nar.text import TextEncoder
from text_encoders import tiny_encoder
from toy_models import clips_folder

COUNT = 200
# The line, and what it must answer.
FOUND = [
    ("info {model} --presets", "leave MODEL out"),
    ("extract {model} --data toy --wording x -o {out}", "without --text-encoder does not use --wording"),
    ("extract {model} --data toy --frame-rate 3 -o {out}", "extracting pictures does not use --frame-rate"),
    ("extract {model} --data toy --group-without x -o {out}", "without --group does not use --group-without"),
    ("extract {model} --data toy --text-encoder nowhere -o {out}", "nowhere"),
    ("train toy-tokenizer --from step-3 run={out} data.size=8", "has no checkpoint 'step-3'; there are: none"),
    ("train toy-tokenizer run={out} data.size=6", "not a multiple of the patch size 4"),
    ("train toy-tokenizer run={out} optim.warmup_images=" + "9" * 400, "warmup_images must be a whole number"),
    ("convert --kind nar-c2i {model} --class-names /dev/zero -o {out}", "is no file, and goes on after 64 MB"),
    ("sample {nan} -n 1 -o {out}.png", "holds NaN or infinity in tokens"),
    ("extract {nan}/tokenizer --data toy -o {out}", "holds NaN or infinity in decoder"),
    ("train toy run={out} tokenizer_path={model}/tokenizer data.codes={codes}", "manifest.json: num_views must be"),
    ("eval --real {reference} --fake toy", "mu must be finite numbers"),
    ("eval --real {endless} --fake toy --cache {out}", "endless/1.png: is no file"),
    ("train toy run={out} tokenizer_path={model}/tokenizer text_encoder.source=nowhere", "nowhere is no text encoder"),
    (
        "convert --kind nar-c2i {numbered} -o {out}",
        "holds no weights under model, module, state_dict or ema; it holds 1",
    ),
    ("train toy run={out} tokenizer_recipe=toy", "tokenizer_recipe toy trains a model; give the recipe of a tokenizer"),
    ("train toy run={out} tokenizer_path={model}/tokenizer init=x", "no model 'x'"),
    ("train toy-tokenizer run={out} epochs=1e308", "epochs must be at least 0 and at most 1000000, not 1e+308"),
    ("extract {model} --data toy --size 8 --text-encoder minilm -o {out}", "toy has no captions for --text-encoder"),
    (
        "train toy run={out} tokenizer_path={model}/tokenizer text_encoder.source=minilm",
        "toy has no captions for text_encoder.source",
    ),
    ("eval composed {nested}", "metadata.jsonl is not valid JSON (nested too deeply)"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, limits and devices of Linux")
def test_bad_inputs_are_answered_in_one_line_and_leave_nothing(tmp_path: Path) -> None:
    # From a process that has no threads, and forks one for each input.
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), "--seed", "1", "--count", str(COUNT), "--cheap"]
    done = subprocess.run([*command, "--json", str(tmp_path / "a.json")], capture_output=True, text=True, check=False)
    assert (tmp_path / "a.json").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    findings: dict[str, str] = json.loads((tmp_path / "a.json").read_text())
    assert len(findings) == COUNT
    assert {title: wrong for title, wrong in findings.items() if wrong} == {}


@pytest.mark.parametrize(("line", "answer"), FOUND)
def test_what_was_found_is_answered(
    line: str,
    answer: str,
    toy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(toy_folder, tmp_path / "nan")
    for path in (tmp_path / "nan").rglob("model.safetensors"):
        tensors = load(path.read_bytes())  # not mapped: the file is written anew
        save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}, path)
    (tmp_path / "codes").mkdir()
    manifest = {"tokenizer": "", "views": "centre", "num_views": "1", "num_samples": 1, "grid": [4, 4], "shards": []}
    (tmp_path / "codes/manifest.json").write_text(json.dumps(manifest | {"class_names": [], "captions": False}))
    for folder in ("endless", "nested/00000/samples"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "endless/1.png").unlink()
    (tmp_path / "endless/1.png").symlink_to("/dev/zero")
    (tmp_path / "nested/00000/metadata.jsonl").write_text("[" * 200_000)
    np.savez(tmp_path / "reference.npz", mu=np.full(1280, np.nan), sigma=np.eye(1280))
    places = {name: tmp_path / name for name in ("out", "nan", "codes", "endless", "nested")}
    torch.save({1: torch.zeros(2)}, tmp_path / "numbered.pt")
    places["numbered"] = tmp_path / "numbered.pt"
    words = line.format(model=toy_folder, reference=tmp_path / "reference.npz", **places).split()
    monkeypatch.setattr(sys, "argv", ["nar", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = [text for text in capsys.readouterr().err.splitlines() if "learning rate" not in text]
    assert stopped.value.code == 2
    assert len(said) == 1, said
    assert answer in said[0]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_names_cannot_command_the_terminal(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a\x1b]0;x\x07.png"
    monkeypatch.setattr(sys, "argv", ["nar", "sample", str(toy_folder), "-n", "1", "-o", str(output)])
    with pytest.raises(SystemExit):
        cli.main()
    assert output.is_file()
    assert "\x1b" not in capsys.readouterr().out


# Every verb that takes a number with a fraction, and a line of it that is right but for that.
TAKE_FRACTIONS = {
    "sample": "fashion -n 1 -o {out}.png",
    "edit": "fashion --image {picture} --box 1,1,4,4 -o {out}.png",
    "serve": "fashion --port 0",
    "extract": "clips/tokenizer --data {picture} --size 8 --frames 5 -o {out}",
    "eval": "fashion --real toy -n 2",
    "eval edit": "fashion-edit --real toy -n 4",
    "tune": "fashion --real toy -n 8",
    "bench": "fashion --repetitions 1 --warmups 0",
    "bench serve": "http://127.0.0.1:1",
}


def _fractions(command: Any, words: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """The verbs and options of floats below a command."""
    kinds = {p: str(getattr(p, "type", "") or p.type_descriptor.annotation).lower() for p in command.params}
    own = [(" ".join(words), max(p.opts, key=len)) for p, kind in kinds.items() if "float" in kind]
    below = getattr(command, "commands", {}).items()
    return own + [found for name, inner in below for found in _fractions(inner, (*words, name))]


@pytest.mark.parametrize(("verb", "option"), _fractions(typer.main.get_command(cli.app)))
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_number_is_refused_by_every_option(
    verb: str,
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = TAKE_FRACTIONS[verb].format(out=tmp_path / "out", picture=tmp_path / "a.png").split()
    monkeypatch.setattr(sys, "argv", ["nar", *verb.split(), *words, option, value])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert option in said or option.strip("-").replace("-", "_") in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


PIXELS = np.zeros((4, 8, 8, 3), np.uint8)
TAKE_A_DEVICE: dict[str, Callable[[Any], object]] = {
    "Pipeline": lambda device: Pipeline.from_pretrained("fashion", device=device),
    "Transformer": lambda device: Transformer.from_pretrained("fashion", device=device),
    "preset_model": lambda device: bench.preset_model("NAR-B", device=device),
    "Setup": lambda device: bench.Setup(device=device),
    "TextEncoder": lambda device: TextEncoder.from_pretrained("minilm", device=device),
    "evaluate": lambda device: evaluate(PIXELS, PIXELS, device=device),
    "extract": lambda device: extract(
        find_model("fashion") / "tokenizer", DataConfig("toy", 8).part(), "nowhere", size=8, device=device
    ),
}


@pytest.mark.parametrize("name", TAKE_A_DEVICE)
@pytest.mark.parametrize("device", ["/dev/zero", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name: str, device: str) -> None:
    with pytest.raises(ValueError, match=rf"device '{device}' is not usable here \(.*\); try cpu"):
        TAKE_A_DEVICE[name](device)


def test_codes_may_be_bytes_and_lists_have_one_axis(toy_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, device="cpu")
    codes = torch.tensor([[[1, 2, 3, 4]] * 4])
    assert torch.equal(pipe.decode(codes.to(torch.uint8)), pipe.decode(codes))
    with pytest.raises(ValueError, match=r"class labels must be \(batch,\), not \(1, 4, 4\)"):
        generate(pipe.model, ClassCondition(torch.zeros(1, 4, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match="known has 0 rows for a batch of 1"):
        generate(pipe.model, ClassCondition(torch.tensor([1])), known=torch.tensor(True))
    with pytest.raises(ValueError, match=r"grid must be a list, each a whole number, or null, not a Tensor"):
        convert("nar-c2i", "nowhere", tmp_path / "m", grid=torch.ones(1, 2, 2, dtype=torch.long))


def test_a_prefix_that_is_no_part_of_the_grid_is_refused(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", "t5")
    model = make_model("words-and-frames", grid=(3, 2, 2), prefix_grid=(2, 1, 2), text_dim=16, text_length=10)
    folder = clips_folder(tmp_path / "c", model, encoder)
    with pytest.raises(ValueError, match=r"prefix_grid \(2, 1, 2\) must be frames of the model's grid \(3, 2, 2\)"):
        Pipeline.from_pretrained(folder, device="cpu")
