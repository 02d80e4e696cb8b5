"""The script that builds the emoji pictures, on packages of a few icons made here."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from conftest import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("prepare_emoji")


@pytest.fixture
def packages(script: ModuleType, tmp_path: Path) -> object:
    folders = [tmp_path / name for name in ("iconify", "fluent", "emojibase")]
    for folder in folders:
        folder.mkdir()
        (folder / "package.json").write_text(json.dumps({"name": folder.name, "version": "1.0"}))
    names = {"groups": [{"order": 4, "key": "food-drink"}], "subgroups": [{"order": 33, "key": "food-fruit"}]}
    entry = {"hexcode": "1F34E", "tags": ["fruit", "red"], "group": 4, "subgroup": 33}
    (folders[2] / "en").mkdir()
    (folders[2] / "en" / "messages.json").write_text(json.dumps(names))
    (folders[2] / "en" / "data.json").write_text(json.dumps([entry]))
    (folders[1] / "assets").mkdir()
    drawing = Image.new("RGBA", (256, 128), (255, 0, 0, 255))
    drawing.paste((0, 0, 255, 0), (0, 0, 128, 128))
    drawing.save(folders[1] / "assets" / "1f34e.webp", lossless=True)
    return script.Packages(*folders)


def test_the_list_names_every_drawing_once(script: ModuleType) -> None:
    drawings = list(script.listed())
    assert len(drawings) == 10_423
    assert len({(drawing["vendor"], drawing["icon"]) for drawing in drawings}) == 10_423
    counts = Counter(drawing["vendor"] for drawing in drawings)
    assert counts["noto"] == 1778
    assert counts["streamline-emojis"] == 580
    assert set(counts) == set(script.VENDORS)
    apple = [drawing for drawing in drawings if drawing["hexcode"] == "1F34E"]
    assert {drawing["caption"] for drawing in apple} == {"red apple"}


def test_a_row_has_the_words_of_emojibase(packages: object) -> None:
    row = packages.row(  # type: ignore[attr-defined]
        {"vendor": "fluent-emoji-3d", "icon": "webp:1f34e", "hexcode": "1F34E", "caption": "red apple"}
    )
    image = row.pop("image")
    assert row == {
        "caption": "red apple",
        "tags": ["fruit", "red"],
        "vendor": "fluent-emoji-3d",
        "style": "fluent 3d",
        "hexcode": "1F34E",
        "group": "food-drink",
        "subgroup": "food-fruit",
        "licence": "MIT",
        "source": "npm fluent 1.0",
    }
    pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
    assert pixels.shape == (128, 128, 3)
    assert pixels[64, 110].tolist() == [255, 0, 0]
    assert (pixels[:30] == 255).all(), "a wide drawing lies in the middle of the square"
    assert (pixels[:, :60] == 255).all(), "what is transparent is white"


def test_aliases_mirror_their_parent(script: ModuleType) -> None:
    icons = {
        "icons": {"left": {"body": '<path fill="currentColor"/>', "width": 24}},
        "aliases": {"right": {"parent": "left", "hFlip": True}},
        "width": 16,
        "height": 16,
    }
    assert '<path fill="black"/>' in script.svg(icons, "left")
    assert 'viewBox="0 0 24 16"' in script.svg(icons, "left")
    assert '<g transform="translate(24 0) scale(-1 1)">' in script.svg(icons, "right")


def test_small_drawings_stay_exact_and_large_ones_small(script: ModuleType) -> None:
    flat = Image.new("RGB", (128, 128), (10, 20, 30))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(script.encoded(flat)))), np.asarray(flat))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    exact = io.BytesIO()
    noise.save(exact, "webp", lossless=True, method=6)
    assert len(script.encoded(noise)) < exact.tell() / 1.3
