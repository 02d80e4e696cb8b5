"""Data of one's own: what is found in a folder, and that one command learns it and one samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from nar.data.look import WORDS, look
from nar.training.tasks import read_recipe
from text_encoders import tiny_encoder
from training_runs import nar

SHORT = ["tokenizer_recipe.steps=1", "steps=1", "data.size=32", "batch_size=4"]
SHORT += [
    "tokenizer_recipe.batch_size=4",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "optim.warmup_images=0",
]


def folder(path: Path, kind: str, *, classes: bool = False, captions: int = 0, count: int = 12) -> Path:
    """Plain pictures or growing clips, in two classes or none, the first `captions` of them with words."""
    for index in range(count):
        file = path / (("up", "down")[index % 2] if classes else "") / f"{index}.{'gif' if kind == 'clips' else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        frames = [Image.new("RGB", (40, 32), (20 * index, 15 * step, 90)) for step in range(17)]
        more = {"save_all": True, "append_images": frames[1:], "duration": 100, "loop": 0} if kind == "clips" else {}
        frames[0].save(file, **more)
        if index < captions:
            file.with_suffix(".txt").write_text(f"a red circle {index}")
    return path


@pytest.mark.parametrize("kind", ["pictures", "clips"])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("captions", [0, 5, 6])
def test_what_is_found(tmp_path: Path, kind: str, classes: bool, captions: int) -> None:
    found = look(str(folder(tmp_path, kind, classes=classes, captions=captions)))
    assert (found.kind, found.count, found.num_captions) == (kind, 12, captions)
    assert found.recipe == {"pictures": "my-pictures", "clips": "my-clips"}[kind]
    assert found.overrides == ((*WORDS, "classes=true")[: 3 if classes else 2] if captions == 6 else ())
    assert f"12 {kind}" in found.summary
    assert ("2 classes (down, up)" in found.summary) == classes
    assert ("too few" in found.summary) == (captions == 5)
    assert found.command("runs/a b").startswith(f"nar train {found.recipe} data={tmp_path} 'run=runs/a b'")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data=FOLDER"):
        read_recipe("my-data")
    with pytest.raises(ValueError, match="no pictures"):
        read_recipe("my-data", [f"data={tmp_path}"])


def test_captioned_pictures_in_one_command(tmp_path: Path) -> None:
    data, run = folder(tmp_path / "data", "pictures", captions=12), tmp_path / "run"
    words = f"text_encoder.source={tiny_encoder(tmp_path / 'encoder', 't5')}"
    said = nar(
        "train",
        "my-data",
        f"data={data}",
        f"run={run}",
        words,
        "tokenizer_recipe.init=",
        "tokenizer.channels=8",
        *SHORT,
    )
    assert "found 12 pictures; 12 captions such as 'a red circle 0': my-pictures text_encoder.source=minilm" in said
    config = json.loads((run / "model/config.json").read_text())
    assert config["text_encoder"]["max_length"] == 24
    nar("sample", run / "model", "--prompt", "a red circle", "-n", "1", "-o", tmp_path / "circle.png")
    assert (tmp_path / "circle.png").is_file()


def test_captioned_clips_of_classes_in_one_command(tmp_path: Path) -> None:
    """As the tutorial on clips says: one command trains on a folder of animations, one samples, one goes on."""
    data, run = folder(tmp_path / "data", "clips", classes=True, captions=12), tmp_path / "run"
    words = f"text_encoder.source={tiny_encoder(tmp_path / 'encoder', 't5')}"
    said = nar("train", "my-data", f"data={data}", f"run={run}", words, "causal_tokenizer.channels=8", *SHORT)
    assert "found 12 clips; 2 classes (down, up); 12 captions" in said
    assert json.loads((run / "model/config.json").read_text())["class_names"] == ["down", "up"]
    made = ("-n", "1", "-o", tmp_path / "clip.gif")
    nar("sample", run / "model", "--class-label", "up", "--prompt", "a red circle", *made)
    with Image.open(tmp_path / "clip.gif") as clip:
        assert clip.n_frames == 16
    nar("sample", run / "model", "--frames", data / "up/0.gif", "-n", "1", "-o", tmp_path / "next.gif")
