"""Edits: what is outside of the mask comes back as it was, what the mask hides is not seen, and mistakes are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_model
from nar import Pipeline, cli
from nar.evaluation import edits
from nar.evaluation.edits import seam_steps
from nar.evaluation.floors import Floors
from nar.media.pixels import as_pixels
from nar.pipeline.canvas import Box, Canvas, around, blended, masked, windows
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from toy_models import causal, larp

RNG = np.random.default_rng(0)


def picture(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8x8 pixels, 4x4 codes of 32 and three classes, with a condition on holes."""
    folder = tmp_path_factory.mktemp("edits")
    torch.manual_seed(1)
    sizes = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    ImageTokenizer(ImageTokenizerConfig(vocab_size=32, code_dim=4, **sizes)).save_pretrained(folder / "tokenizer")
    model = make_model("edits", grid=(4, 4), prefix_grid=(4, 4), num_classes=3, vocab_size=32)
    names = ("red apple", "pear", "plum")
    model.save_pretrained(folder / "model", class_names=names, tokenizer=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu")


def prepared(image: np.ndarray, mask: Any, box: Any, size: tuple[int, int]) -> Canvas:
    hidden = masked(image, mask, box)
    return Canvas.of(image, hidden, around(hidden, size), size)


def box_mask(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    mask, (left, top, width, height) = np.zeros(shape, bool), box
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize("mode", ["fill", "replace"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (8, 30), (41, 33)])
def test_what_is_outside_comes_back_byte_for_byte(pipe: Pipeline, mode: str, height: int, width: int) -> None:
    given, box = picture(height, width), (2, 1, 3, 3)
    made = pipe.edit(given, box=box, class_labels="pear", mode=mode, num_images_per_prompt=3, seed=1, output_type="np")
    mask = box_mask((height, width), box)
    assert made.images.shape == (3, height, width, 3)
    assert made.names == ["pear"] * 3
    assert (made.images[:, ~mask] == given[~mask]).all()
    assert (made.images[:, mask] != given[mask]).any()
    assert (made.images[0] != made.images[1]).any()
    again = pipe.edit(given, mask=mask, class_labels="pear", mode=mode, seed=1, batch_size=1, output_type="np")
    assert (again.images[0] == made.images[0]).all()  # number 0 of a seed, whatever is beside it


@pytest.mark.parametrize("layout", ["holes", "plain"])
@pytest.mark.parametrize("size", [(8, 8), (20, 13)])
def test_what_the_mask_hides_has_no_part_in_a_filled_picture(
    pipe: Pipeline, toy_folder: Path, layout: str, size: tuple[int, int]
) -> None:
    asked = pipe if layout == "holes" else Pipeline.from_pretrained(toy_folder, device="cpu")
    given, mask = picture(*size), box_mask(size, (3, 2, 4, 3))
    other = np.where(mask[..., None], picture(*size), given)
    options: dict[str, Any] = {"mask": mask, "class_labels": 1, "seed": 0, "output_type": "np"}
    assert (asked.edit(given, **options).images == asked.edit(other, **options).images).all()
    if size == (8, 8) and layout == "holes":  # while replacing keeps codes that know of it
        kept = [asked.edit(each, mode="replace", **options).codes for each in (given, other)]
        assert not torch.equal(*kept)


def test_replacing_keeps_the_codes_outside(pipe: Pipeline) -> None:
    given = picture()
    made = pipe.edit(given, box=(2, 2, 4, 4), class_labels=0, mode="replace", seed=0)
    with torch.inference_mode():
        own = pipe.tokenizer.encode(torch.from_numpy(given).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 1:3] = True
    assert torch.equal(made.codes[0][~inside], own[~inside])


def test_a_model_that_edits_samples_from_nothing_too(pipe: Pipeline, tmp_path: Path) -> None:
    made = pipe(class_labels=["pear", "plum"], seed=0)
    assert len(made.images) == 2
    pipe.save_pretrained(tmp_path / "copy")
    again = Pipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(again(class_labels=["pear", "plum"], seed=0).codes, made.codes)
    assert len(pipe.edit(picture(), box=(0, 0, 4, 4), num_images_per_prompt=2).images) == 2  # of no class
    wide = pipe.at_grid((4, 8))
    assert wide.edit(picture(8, 16), box=(8, 0, 8, 8), seed=0).images[0].size == (16, 8)


def test_the_region_lies_around_the_mask(pipe: Pipeline) -> None:
    canvas = prepared(picture(100, 80), None, (73, 93, 5, 6), pipe.pixel_shape)
    left, top, width, height = canvas.region
    assert (width, height) == (12, 12)  # twice what is covered
    assert (left + width, top + height) == (80, 100)  # as far as the picture goes
    assert canvas.pixels.shape == (1, 3, 8, 8)
    whole = prepared(picture(8, 8), None, (0, 0, 1, 1), pipe.pixel_shape)
    assert whole.region == (0, 0, 8, 8)
    assert int(whole.hidden.sum()) == 1
    tiny = prepared(picture(64, 64), box_mask((64, 64), (10, 10, 1, 1)), None, pipe.pixel_shape)
    assert tiny.hidden.any()


def test_blending_moves_what_is_made_to_what_is_seen_at_the_edge() -> None:
    pixels, made = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)
    hidden = torch.zeros(1, 16, 16, dtype=torch.bool)
    hidden[:, :, 8:] = True
    result = blended(made, pixels, hidden)[0, 0, 5]
    assert result[8] == pytest.approx(0.1, abs=0.15)
    assert result[15] == 0.5
    assert (result[8:].diff() >= 0).all()


def masks() -> dict[str, tuple[Any, str]]:
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    return {
        "size": (Image.new("L", (9, 8), 255), "the mask is 9x8 and the picture 8x8"),
        "empty": (Image.new("L", (8, 8)), "covers nothing"),
        "full": (Image.new("1", (8, 8), 1), "covers the whole picture"),
        "alpha": (clear, "the mask has transparency"),
        "array": (np.zeros((8, 8, 3)), r"or an array \(H, W\)"),
        "array of 16 bits": (np.full((8, 8), 3000, np.uint16), "covers nothing"),
        "none": (None, "say what is to be new"),
    }


@pytest.mark.parametrize("name", masks())
def test_masks_that_do_not_fit_are_refused(pipe: Pipeline, name: str) -> None:
    mask, message = masks()[name]
    with pytest.raises(ValueError, match=message):
        pipe.edit(picture(), mask=mask, class_labels=0)


def test_files_of_masks_are_guarded_as_pictures_are(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAR_MAX_PIXELS", "60")
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    (tmp_path / "noise.png").write_bytes(b"noise")
    (tmp_path / "folder.png").mkdir()
    for name, said in (("large", "more than 60"), ("noise", "can't be read as a picture"), ("folder", "is no file")):
        with pytest.raises(ValueError, match=rf"{name}.png .*{said}"):
            pipe.edit(np.zeros((6, 6, 3), np.uint8), mask=tmp_path / f"{name}.png", class_labels=0)


def test_masks_in_every_form_say_the_same(pipe: Pipeline, tmp_path: Path) -> None:
    mask = box_mask((8, 8), (2, 2, 3, 3))
    grey = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    grey.save(tmp_path / "mask.png")
    opaque = grey.convert("RGBA")
    forms = [mask, mask.astype(np.uint8), np.where(mask, 255, 0), grey, grey.convert("P"), grey.convert("1"), opaque]
    given = picture()
    for form in (*forms, tmp_path / "mask.png"):
        assert (prepared(given, form, None, pipe.pixel_shape).mask == mask).all()


def test_masks_are_read_as_pictures_are(tmp_path: Path) -> None:
    mask, given = box_mask((8, 8), (2, 2, 3, 4)), picture()
    deep = np.where(mask, np.uint16(65535), np.uint16(3000))  # 4.6 % grey
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(mask).astype(np.uint8) * 255).save(tmp_path / "turned.png", exif=turned)
    for form in (tmp_path / "deep.png", Image.fromarray(deep), deep, deep.astype(np.int64), tmp_path / "turned.png"):
        assert (masked(given, form, None) == mask).all(), form
    Image.fromarray(deep).save(tmp_path / "clear.png", transparency=65535)
    with pytest.raises(ValueError, match=r"clear.png has transparency"):
        masked(given, tmp_path / "clear.png", None)
    stills = [Image.fromarray(np.roll(mask, step).astype(np.uint8) * 255) for step in range(3)]
    stills[0].save(tmp_path / "moving.gif", save_all=True, append_images=stills[1:])
    with pytest.raises(ValueError, match=r"moving.gif has 3 frames: give a still, .*, or an array \(T, H, W\)"):
        masked(np.stack([given] * 3), tmp_path / "moving.gif", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": (1, 2, 3)}, "box must be four whole numbers"),
        ({"box": b"\x01\x01\x04\x04"}, "box must be four whole numbers"),
        ({"box": torch.tensor(1)}, "box must be four whole numbers"),
        ({"box": 4}, "box must be four whole numbers"),
        ({"box": (20, 20, 4, 4)}, "covers nothing"),
        ({"box": (0, 0, 2, 2), "mode": "erase"}, "mode must be one of fill, replace, not 'erase'"),
        ({"box": (0, 0, 2, 2), "output_type": "codes"}, "output_type must be pil, np or pt"),
        ({"box": (0, 0, 2, 2), "class_labels": "cherry"}, "unknown class 'cherry'"),
        ({"box": (0, 0, 2, 2), "prompt": "a cherry"}, "takes no prompts"),
    ],
)
def test_mistakes_are_named(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.edit(picture(), **options)


@pytest.mark.parametrize("layout", ["holes", "plain"])
@pytest.mark.parametrize(
    ("size", "position"), [((8, 20), None), ((19, 8), (0, 11)), ((21, 17), (2, 9)), ((9, 8), None)]
)
def test_extending_keeps_what_is_given(
    pipe: Pipeline, toy_folder: Path, layout: str, size: tuple[int, int], position: tuple[int, int] | None
) -> None:
    asked = pipe if layout == "holes" else Pipeline.from_pretrained(toy_folder, device="cpu")
    given = picture()
    left, top = position or ((size[1] - 8) // 2, (size[0] - 8) // 2)
    options: dict[str, Any] = {"class_labels": "pear" if layout == "holes" else 1, "seed": 1, "output_type": "np"}
    made = asked.extend(given, size, position=position, num_images_per_prompt=2, **options).images
    assert made.shape == (2, *size, 3)
    assert (made[:, top : top + 8, left : left + 8] == given).all()
    assert (made[0] != made[1]).any()
    outside = ~box_mask(size, (left, top, 8, 8))
    assert (made[:, outside].std((0, 2)) > 0).any()
    again = asked.extend(given, size, position=position, batch_size=1, **options).images
    assert (again[0] == made[0]).all()  # number 0 of a seed, whatever is beside it


def test_pictures_of_any_size_from_nothing(pipe: Pipeline) -> None:
    whole = pipe.extend(None, (8, 8), class_labels="plum", seed=3, output_type="np")
    assert (whole.images == pipe(class_labels="plum", seed=3, output_type="np").images).all()  # one window: a call
    for size in ((5, 12), (3, 4)):
        assert pipe.extend(None, size, class_labels="plum").images[0].size == size[::-1]
    called = pipe("plum", size=(8, 13), seed=3, output_type="np")
    assert (called.images == pipe.extend(None, (8, 13), class_labels="plum", seed=3, output_type="np").images).all()
    with pytest.raises(ValueError, match="size does not go with known"):
        pipe("plum", size=(8, 13), known=np.zeros((1, 4, 4), np.int64))
    for options, message in (
        ({"particles": 8}, "particles choose among samples by what is known"),
        ({"particles": -3}, "particles must be a whole number from 1"),
        ({"progress": "x"}, "progress must be true or false, not 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("plum", size=(8, 13), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be two whole numbers"):
        pipe("plum", size=16)


@pytest.mark.parametrize("given", [Box(0, 0, 8, 8), Box(5, 3, 30, 17), Box(9, 1, 3, 17), Box(0, 0, 1, 1), None])
@pytest.mark.parametrize("shape", [(20, 35), (64, 40)])
def test_windows_cover_all_and_overlap_what_is_there(given: Box | None, shape: tuple[int, int]) -> None:
    there = np.zeros(shape, bool)
    if given is not None:
        there[given.slices] = True
    for number, window in enumerate(windows(given, shape, (8, 8))):
        part = there[window.slices]
        assert part.shape == (window.height, window.width)
        assert part.any() or (number == 0 and given is None)
        there[window.slices] = True
    assert there.all()


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((8, 7), {}, "the picture is 8x8, it can't be extended to 8x7"),
        ((8, 8), {}, "it can't be extended to 8x8"),
        ((8, 16), {"position": (9, 0)}, "left is at most 8, top 0"),
        ((8, 16), {"position": (-1, 0)}, "position must be two whole numbers of at least 0"),
        ((8, 16.5), {}, "size must be two whole numbers"),
        ("8x16", {}, "size must be two whole numbers"),
        (b"\x08\x10", {}, "size must be two whole numbers"),
        ((True, 16), {}, "size must be two whole numbers"),
        ((100_000, 100_000), {}, "size 100000x100000 is too large: at most 89,478,485 pixels, or set NAR_MAX_PIXELS"),
        ((8, 8000), {}, "8x8000 is more than 64 times the 8x8 worked on at once"),
        ((8, 16), {"class_labels": "cherry"}, "unknown class 'cherry'"),
        ((8, 16), {"output_type": "codes"}, "output_type must be pil, np or pt"),
    ],
)
def test_mistakes_in_extending_are_named(pipe: Pipeline, size: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.extend(picture(), size, **options)
    with pytest.raises(TypeError, match="unknown argument 'mask'"):
        pipe.extend(picture(), (8, 16), mask=np.ones((8, 16)))


@pytest.fixture(scope="module")
def clips_pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A model that edits clips: 5 frames of 8x8 as 3x2x2 codes of 24."""
    folder = tmp_path_factory.mktemp("clips")
    causal().save_pretrained(folder / "tokenizer")
    make_model("edits", grid=(3, 2, 2), prefix_grid=(3, 2, 2), num_classes=3).save_pretrained(
        folder / "model", tokenizer=folder / "tokenizer"
    )
    return Pipeline.from_pretrained(folder / "model", device="cpu")


@pytest.mark.parametrize("mode", ["fill", "replace"])
@pytest.mark.parametrize("size", [(8, 8), (13, 21)])
def test_clips_are_edited_under_a_mask_over_time(clips_pipe: Pipeline, mode: str, size: tuple[int, int]) -> None:
    clip, other = (RNG.integers(0, 256, (5, *size, 3), np.uint8) for _ in range(2))
    mask = np.zeros((5, *size), bool)
    mask[3:, 1:6, 2:7] = True
    options: dict[str, Any] = {"mask": mask, "class_labels": 1, "seed": 0, "output_type": "np", "mode": mode}
    made = clips_pipe.edit(clip, num_images_per_prompt=2, **options)
    assert made.images is None
    assert made.videos.shape == (2, 5, *size, 3)
    assert (made.videos[:, ~mask] == clip[~mask]).all()
    assert (made.videos[:, mask] != clip[mask]).any()
    if mode == "fill":  # what the mask hides is not seen
        changed = clips_pipe.edit(np.where(mask[..., None], other, clip), **options)
        assert (changed.videos[0] == made.videos[0]).all()
    through = clips_pipe.edit(clip, **{**options, "mask": mask[4]}).videos[0]  # one mask for all frames
    assert (through[0] != clip[0]).any()
    assert (through[:, ~mask[4]] == clip[:, ~mask[4]]).all()


def test_clips_that_can_not_be_edited(clips_pipe: Pipeline, clips_folder: Path) -> None:
    clip = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="the clip has 4 frames, this model edits clips of 5"):
        clips_pipe.edit(clip[:4], box=(0, 0, 4, 4), class_labels=1)
    with pytest.raises(ValueError, match="the mask has 3 frames, the clip 5"):
        clips_pipe.edit(clip, mask=np.ones((3, 8, 8)), class_labels=1)
    with pytest.raises(ValueError, match="it extends no pictures"):
        clips_pipe.extend(clip, (8, 16), class_labels=1)
    with pytest.raises(ValueError, match="was not trained to edit"):
        Pipeline.from_pretrained(clips_folder, device="cpu").edit(clip, box=(0, 0, 2, 2))
    whole = make_model("nar", grid=(3, 2, 2), num_classes=3)  # codes of a clip as a whole
    with pytest.raises(ValueError, match="codes have no places"):
        Pipeline(whole, larp()).edit(clip, box=(0, 0, 2, 2), class_labels=1)


def run(*arguments: object) -> int:
    import sys

    sys.argv = ["nar", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command(folder: Path, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = picture(12, 10)
    Image.fromarray(given).save(tmp_path / "in.png")
    common = ["--image", tmp_path / "in.png", "--class-label", "pear"]
    assert run("edit", folder, *common, "--box", "1,2,3,4", "-o", tmp_path / "out.png") == 0
    made = np.asarray(Image.open(tmp_path / "out.png"))
    outside = ~box_mask((12, 10), (1, 2, 3, 4))
    assert (made[outside] == given[outside]).all()
    sheet, several = tmp_path / "sheet.png", tmp_path / "several"
    assert run("edit", folder, *common, "--box", "1,2,3,4", "-n", 3, "-o", several, "--sheet", sheet) == 0
    assert len(list(several.glob("*.png"))) == 3
    assert run("edit", tmp_path / "no model", *common, "--box", "1,2,3,4", "-o", several) == 2
    assert "several must be new or empty" in capsys.readouterr().err  # before anything is sampled
    assert Image.open(sheet).width > 5 * 10
    assert "not trained to edit" not in capsys.readouterr().err
    assert run("edit", toy_folder, *common, "--box", "1,2,3,4", "-o", tmp_path / "known.png") == 0
    assert "not trained to edit" in capsys.readouterr().err
    assert run("edit", folder, *common, "--extend", "2x", "-n", 2, "-o", tmp_path / "wider", "--sheet", sheet) == 0
    assert Image.open(tmp_path / "wider" / "000001.png").size == (20, 24)
    assert run("edit", folder, *common, "--extend", "12x16", "--at", "6,0", "-o", tmp_path / "wide.png") == 0
    assert (np.asarray(Image.open(tmp_path / "wide.png"))[:, 6:] == given).all()
    capsys.readouterr()
    assert run("edit", folder, *common, "--extend", "2x", "--box", "1,2,3,4", "-o", tmp_path / "no.png") == 2
    assert "leave out --mask" in capsys.readouterr().err
    assert run("edit", folder, *common, "--extend", "wide", "-o", tmp_path / "no.png") == 2
    assert "such as 2x" in capsys.readouterr().err
    assert run("edit", folder, *common, "--box", "1,2,3", "-o", tmp_path / "no.png") == 2
    assert "--box '1,2,3' must be 4 whole numbers" in capsys.readouterr().err
    assert run("edit", folder, *common, "-o", tmp_path / "no.png") == 2
    assert "say what is to be new" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("layout", ["holes", pytest.param("plain", marks=pytest.mark.slow)])
def test_edits_are_judged(folder: Path, toy_folder: Path, tmp_path: Path, layout: str) -> None:
    real, report = tmp_path / "real", tmp_path / "report.json"
    for name in ("red apple", "pear"):
        (real / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(picture()).save(real / name / f"{index}.png")
    model = folder if layout == "holes" else toy_folder
    options = ["--train", real, "--seeds", 2] if layout == "holes" else ["--particles", 2]
    common = ["--real", real, "-n", 4, "--json", report, "--samples", tmp_path / "made"]
    assert run("eval", "edit", model, *common, *options) == 0
    found = json.loads(report.read_text())
    assert found["extended: seam_ratio_glued"] > 0
    if layout == "holes":
        assert found["centre: psnr_nearest"] == 60  # they are training pictures
        assert 0 <= found["centre: class_glued"] <= found["centre: class_true"] <= 1
        assert 0 <= found["strokes: class"] <= 1
        assert len(found["seeds"]["centre: psnr"]) == 2
    assert found["settings"]["num_real"] == 4
    assert found["centre: psnr_mean"] > found["centre: psnr"]
    assert ("right: bits_gain" in found) == (layout == "holes")
    completed = np.load(tmp_path / "made" / "centre.npz")["arr_0"]
    true = np.load(tmp_path / "made" / "real.npz")["arr_0"]
    outside = ~box_mask((8, 8), (2, 2, 4, 4))
    assert (completed[:, outside] == true[:, outside]).all()


def test_distances_are_those_of_the_completed_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is what `--samples` writes, and the true picture's reconstruction in the hole."""
    for name in ("red apple", "pear"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(picture()).save(tmp_path / name / f"{index}.png")
    compared: list[tuple[np.ndarray, np.ndarray]] = []

    def evaluate(real: np.ndarray, fake: np.ndarray, **_: Any) -> dict[str, float]:
        compared.append((real, fake))
        return {"KID-EffLite0": float(len(compared)), "FD-EffLite0": -float(len(compared))}

    monkeypatch.setattr(edits, "evaluate", evaluate)
    monkeypatch.setattr(edits, "FIXED", ("centre", "right"))
    report, made = tmp_path / "report.json", tmp_path / "made"
    options = ["--real", tmp_path, "-n", 6, "--json", report, "--samples", made, "--distances"]
    assert run("eval", "edit", folder, *options) == 0
    found = json.loads(report.read_text())
    true, reconstructed = np.load(made / "real.npz")["arr_0"], compared[0][1]
    assert all((real == true).all() for real, _ in compared)
    for row, name in ((1, "centre"), (3, "right")):
        assert (compared[row][1] == np.load(made / f"{name}.npz")["arr_0"]).all()
        assert found[f"{name}: KID-EffLite0"] == found[f"{name}: KID-EffLite0 reconstructed"] + 1 == row + 1
        assert found[f"{name}: FD-EffLite0 reconstructed"] == -row
    inside = box_mask((8, 8), (2, 2, 4, 4))
    assert (reconstructed[:, ~inside] == true[:, ~inside]).all()
    assert (reconstructed[:, inside] != true[:, inside]).any()
    assert (reconstructed[:, inside] != compared[1][1][:, inside]).any()


def test_seams_of_glued_pictures_fail_where_true_ones_pass() -> None:
    waves = np.sin(np.arange(64)[None, :, None] / 8 + RNG.uniform(0, 6, (60, 1, 1)) + np.arange(16)[None, None] / 5)
    pixels = torch.from_numpy(waves).float().transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    mask = torch.zeros(60, 16, 64, dtype=torch.bool)
    mask[:, :, 32:] = True
    other = pixels.roll(1, 0)
    glued = [torch.where(mask[:, None], each, pixels) for each in (other, blended(other, pixels, mask))]
    true, *failing = (means[0] / means[1] for means in (seam_steps(each, mask).mean(0) for each in (pixels, *glued)))
    assert true == pytest.approx(1, abs=0.1)
    assert min(failing) > 1.3  # blended or not
    blank = seam_steps(torch.cat([glued[0], -torch.ones(60, 3, 16, 64)]), mask.repeat(2, 1, 1)).mean(0)
    assert blank[0] / blank[1] == pytest.approx(failing[0])  # blank backgrounds are left out


def test_floors_find_what_is_there() -> None:
    """The nearest by what is visible is the picture itself, and a regression finds what depends on it linearly."""
    basis = RNG.normal(size=(3, 8 * 8 * 3))
    flat = 128 + 12 * RNG.normal(size=(300, 3)) @ basis
    images, labels = flat.clip(0, 255).round().astype(np.uint8).reshape(300, 8, 8, 3), np.arange(300) % 2
    floors, mask = Floors(images[:280], labels[:280]), torch.zeros(20, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    pixels = as_pixels(images[280:])
    made = floors.measured(pixels, mask, labels[280:])
    assert made["psnr_regression"].mean() > made["psnr_nearest"].mean() + 5
    hidden = pixels.masked_fill(mask[:, None], 0.3)  # has no part in it
    again = floors.regression(hidden, mask, labels[280:])
    assert torch.allclose(again, floors.regression(pixels, mask, labels[280:]))
    assert (floors.nearest(hidden, mask) == floors.nearest(pixels, mask)).all()
    two = (
        np.where(np.arange(300)[:, None, None, None] % 2, 40, 200).astype(np.uint8).repeat(64, 1).reshape(300, 8, 8, 1)
    )
    judge = Floors(two.repeat(3, -1), labels)
    assert judge.classified(as_pixels(two[:20].repeat(3, -1)), labels[:20]).all()
    assert not judge.classified(as_pixels(two[:20].repeat(3, -1)), 1 - labels[:20]).any()
    own = floors.measured(as_pixels(images[:20]), mask, labels[:20])
    assert (own["psnr_nearest"] == 60).all()


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/howto/editing.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    found: dict[str, Any] = {}
    exec(block, found)
    assert len(found["out"]) == 4
    given, box = np.asarray(found["shirt"]), box_mask((32, 32), (8, 8, 16, 16))
    assert all((np.asarray(made)[~box] == given[~box]).all() for made in found["out"].images)
    assert (tmp_path / "edited.png").is_file()
