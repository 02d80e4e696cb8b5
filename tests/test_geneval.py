"""GenEval: the published prompts, the judgement of hand-made detections for every task, and the networks end to end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nar.metrics.geneval.judge import (
    Found,
    Mask2FormerJudge,
    Rules,
    judge_folder,
    judge_picture,
    kept,
    overlap,
    relations,
    summary,
)
from nar.metrics.geneval.prompts import (
    GENEVAL_COLOURS,
    TASKS,
    add_s,
    checked,
    composition,
    composition_prompts,
    plural_of,
    write_prompts,
)
from nar.metrics.tables import as_table

PICTURE = Image.new("RGB", (100, 100), "white")
LEFT, RIGHT, TOP, BOTTOM = (5, 40, 25, 60), (75, 40, 95, 60), (40, 5, 60, 25), (40, 75, 60, 95)


def lay_out(folder: Path, prompts: Sequence[dict[str, Any]]) -> None:
    for index, wanted in enumerate(prompts):
        (folder / f"{index:05d}" / "samples").mkdir(parents=True)
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(wanted))


class HandMade:
    """Detections as they are given; the colour of an object is given by its score's place in `painted`."""

    def __init__(self, objects: Mapping[str, Sequence[Found]], painted: Mapping[str, Sequence[str]]) -> None:
        self.rules = Rules()
        self.settings: dict[str, Any] = {"judge": "by hand"}
        self.objects = objects
        self.painted = painted

    def find(self, picture: Image.Image) -> Mapping[str, Sequence[Found]]:  # noqa: ARG002
        return self.objects

    def colours(self, picture: Image.Image, name: str, found: Sequence[Found]) -> list[str]:  # noqa: ARG002
        return list(self.painted[name][: len(found)])


def right(wanted: dict[str, Any], objects: Mapping[str, Sequence[Found]], **painted: Sequence[str]) -> bool:
    answer, fault = judge_picture(HandMade(objects, painted), PICTURE, wanted)
    assert answer == (fault == "")
    return answer


def some(*scores: float) -> list[Found]:
    return [Found((10.0 * i, 0, 10.0 * i + 8, 8), score) for i, score in enumerate(scores)]


def test_the_published_prompts() -> None:
    prompts = composition_prompts(plural=add_s)
    counts = {task: sum(wanted["tag"] == task for wanted in prompts) for task in TASKS}
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    texts = [wanted["prompt"] for wanted in prompts]
    assert texts[:2] == ["a photo of a bench", "a photo of a cow"]
    assert texts[81] == "a photo of a toothbrush and a snowboard"
    for published in (  # from evaluations that list what they drew
        "a photo of four benchs",
        "a photo of three buses",
        "a photo of a tv remote left of an umbrella",
        "a photo of an orange traffic light and a white toilet",
        "a photo of a yellow tv remote",
    ):
        assert published in texts
    assert not any("person" in text for text in texts if any(colour in text for colour in GENEVAL_COLOURS))
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "4de60dfc3c29f9d3"


def test_prompts_say_what_is_judged(tmp_path: Path) -> None:
    assert composition("position", ["cat", "owl"], relation="left of") == {
        "tag": "position",
        "include": [{"class": "owl", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a cat left of an owl",
    }
    assert composition("counting", ["berry"], count=3) == {
        "tag": "counting",
        "include": [{"class": "berry", "count": 3}],
        "exclude": [{"class": "berry", "count": 4}],
        "prompt": "three berries",
    }
    painted = composition("color_attr", ["apple", "cat"], colours=["orange", "blue"])
    assert painted["prompt"] == "an orange apple and a blue cat"
    assert [need["color"] for need in painted["include"]] == ["orange", "blue"]
    assert [plural_of(name) for name in ("bus", "fish", "light bulb", "brush")] == [
        "buses",
        "fish",
        "light bulbs",
        "brushes",
    ]
    write_prompts(tmp_path / "deep" / "prompts.jsonl", [painted])
    assert checked((tmp_path / "deep" / "prompts.jsonl").read_text(), "prompts") == painted
    with pytest.raises(ValueError, match="line 1 lacks include, prompt"):
        checked('{"tag": "colors"}', "line 1")


def test_single_object() -> None:
    wanted = composition("single_object", ["cat"])
    assert right(wanted, {"cat": some(0.31)})
    assert not right(wanted, {"cat": some(0.3)})  # above, not at, the threshold
    assert not right(wanted, {"dog": some(0.99)})


def test_two_objects() -> None:
    wanted = composition("two_object", ["cat", "dog"])
    assert right(wanted, {"cat": some(0.5), "dog": some(0.4)})
    assert not right(wanted, {"cat": some(0.9, 0.9)})


def test_counting_is_exact_and_strict() -> None:
    wanted = composition("counting", ["cat"], count=3)
    assert right(wanted, {"cat": some(0.95, 0.95, 0.95, 0.89)})  # the fourth is not sure enough to count
    assert not right(wanted, {"cat": some(0.95, 0.95, 0.89)})
    assert not right(wanted, {"cat": some(0.95, 0.95, 0.95, 0.95)})


def test_colours_are_of_the_surest_object() -> None:
    wanted = composition("colors", ["cat"], colours=["red"])
    assert right(wanted, {"cat": some(0.9, 0.5)}, cat=["red", "blue"])
    assert not right(wanted, {"cat": some(0.9, 0.5)}, cat=["blue", "red"])


def test_both_objects_have_their_colour() -> None:
    wanted = composition("color_attr", ["cat", "dog"], colours=["red", "blue"])
    objects = {"cat": some(0.9), "dog": some(0.9)}
    assert right(wanted, objects, cat=["red"], dog=["blue"])
    assert not right(wanted, objects, cat=["blue"], dog=["red"])
    assert not right(wanted, {"cat": some(0.9)}, cat=["red"])


@pytest.mark.parametrize(
    ("relation", "a", "b"),
    [("left of", LEFT, RIGHT), ("right of", RIGHT, LEFT), ("above", TOP, BOTTOM), ("below", BOTTOM, TOP)],
)
def test_positions(relation: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    wanted = composition("position", ["cat", "dog"], relation=relation)
    assert right(wanted, {"cat": [Found(a, 0.9)], "dog": [Found(b, 0.9)]})
    assert not right(wanted, {"cat": [Found(b, 0.9)], "dog": [Found(a, 0.9)]})
    assert not right(wanted, {"cat": [Found(a, 0.9)], "dog": [Found(a, 0.9)]})  # at the same place
    assert not right(wanted, {"cat": [Found(a, 0.9)]})  # nothing to be beside


def test_relations_by_hand() -> None:
    # Centres 20 apart, sizes 10 and 10: 20 - 0.1 * 20 = 18 of 20 remain, more than half.
    assert relations((0, 0, 10, 10), (20, 0, 30, 10), 0.1) == {"left of"}
    # Diagonal: 18 / 28.3 = 0.64 along both axes.
    assert relations((0, 0, 10, 10), (20, 20, 30, 30), 0.1) == {"left of", "above"}
    # 2 apart along x: inside the margin.
    assert relations((0, 0, 10, 10), (2, 0, 12, 10), 0.1) == set()


def test_what_is_kept() -> None:
    many = some(*np.linspace(0.4, 0.9, 20))
    chosen = kept(many, 0.3, Rules())
    assert len(chosen) == 16
    assert chosen[0].score == pytest.approx(0.9)
    twice = [Found((0, 0, 9, 9), 0.9), Found((0, 0, 9, 9), 0.8), Found((0, 5, 9, 14), 0.7)]
    assert len(kept(twice, 0.3, Rules())) == 3  # as published: overlaps stay
    assert [found.score for found in kept(twice, 0.3, Rules(max_overlap=0.5))] == [0.9, 0.7]
    assert overlap((0, 0, 9, 9), (0, 5, 9, 14)) == pytest.approx(50 / 150)


def test_summary_by_hand() -> None:
    rows = [
        {"tag": "colors", "place": "0", "right": True},
        {"tag": "colors", "place": "0", "right": False},
        {"tag": "counting", "place": "1", "right": True},
        {"tag": "counting", "place": "2", "right": False},
        {"tag": "counting", "place": "3", "right": False},
        {"tag": "counting", "place": "4", "right": False},
    ]
    report = summary(rows)
    assert (report["colors"], report["counting"], report["score"]) == (0.5, 0.25, 0.375)  # tasks weigh the same
    assert report["prompts"] == 2 / 5
    low, high = report["interval"]["counting"]
    assert low == 0 < 0.25 < high < 1
    assert "| counting | 0.25 |" in as_table(report, "share right")


def test_a_folder(tmp_path: Path) -> None:
    lay_out(tmp_path, [composition("single_object", [name]) for name in ("cat", "dog")])
    with pytest.raises(ValueError, match=r"2 of 2 prompts have no picture in samples/ \(00000, 00001\)"):
        judge_folder(tmp_path, HandMade({}, {}))
    for place in ("00000", "00001"):
        for name in ("0000.png", "0001.png"):
            PICTURE.save(tmp_path / place / "samples" / name)
        PICTURE.save(tmp_path / place / "grid.png")  # not a sample
    report = judge_folder(tmp_path, HandMade({"cat": some(0.9)}, {}), progress=False)
    assert report["single_object"] == report["prompts"] == 0.5
    assert report["settings"]["num_pictures"] == 4
    assert report["settings"]["rules"]["counting_threshold"] == 0.9
    assert report["pictures"][-1]["fault"] == "0 dog, 1 wanted"
    assert json.loads(json.dumps(report)) == report
    (tmp_path / "00001" / "samples" / "0001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0001\.png can't be read"):
        judge_folder(tmp_path, HandMade({}, {}), progress=False)
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        judge_folder(tmp_path / "00000", HandMade({}, {}))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny Mask2Former of COCO's 80 classes and a tiny CLIP, both of random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        num_labels=80,
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    save_tiny_clip(folder / "clip")
    return folder / "detector", folder / "clip"


def save_tiny_clip(folder: Path) -> None:
    """A CLIP model of random weights with a tokenizer of single characters."""
    import transformers
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(97, 123)] + list("-,")
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    end = len(words) - 1
    torch.manual_seed(1)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)


def test_networks_end_to_end(networks: tuple[Path, Path], tmp_path: Path) -> None:
    judge = Mask2FormerJudge(*networks, rules=Rules(threshold=0.0, counting_threshold=0.0))
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    objects = judge.find(picture)
    assert objects
    assert set(objects) <= set(judge.names)
    assert judge.names[64] == "computer mouse"
    for found in (one for some in objects.values() for one in some):
        assert found.mask is not None
        assert found.mask.shape == (40, 60)
        left, top, right, bottom = found.box
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        assert found.mask[int(top) : int(bottom), int(left) : int(right)].sum() == found.mask.sum()
        assert 0 < found.score < 1
    name, some = next(iter(objects.items()))
    colours = judge.colours(picture, name, some)
    assert len(colours) == len(some)
    assert set(colours) <= set(GENEVAL_COLOURS)

    lay_out(tmp_path, [composition("single_object", [name]), composition("colors", [name], colours=[colours[0]])])
    for place in ("00000", "00001"):
        picture.save(tmp_path / place / "samples" / "0000.png")
    report = judge_folder(tmp_path, judge, progress=False)
    assert report["score"] == 1.0
    assert len(report["settings"]["detector_sha256"]) == 64


def test_wrong_folders_are_named(networks: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Mask2FormerJudge(tmp_path, networks[1])
    with pytest.raises(ValueError, match="type 'clip'; Mask2FormerForUniversalSegmentation is needed"):
        Mask2FormerJudge(networks[1], networks[1])
