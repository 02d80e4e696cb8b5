"""The script that makes the clips of the bundled model."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from clip_files import level
from conftest import load_script

pa = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("prepare_clips")


def emoji(path: Path, count: int) -> Path:
    """An animated picture of `count` frames of 0.1 seconds on white."""
    pictures = []
    for number in range(count):
        picture = np.full((128, 128, 3), 255, np.uint8)
        picture[32:96, 32:96] = level(number)
        pictures.append(Image.fromarray(picture))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    return path


def test_sixteen_frames_at_equal_times_from_folders_and_archives(tmp_path: Path, script: ModuleType) -> None:
    emoji(tmp_path / "one" / "assets" / "1f44b.webp", 24)
    with tarfile.open(tmp_path / "two.tgz", "w:gz") as tar:
        tar.add(emoji(tmp_path / "raw" / "1f9a0.webp", 8), "package/assets/1f9a0.webp")
        tar.add(emoji(tmp_path / "raw" / "1f9a1.webp", 8), "package/assets/1f9a1.webp")  # not asked for
    empty = {"bytes": b"", "path": None}
    rows = [
        {"strip": empty, "caption": name, "hexcode": code, "num_source_frames": 0, "duration_ms": 0}
        for name, code in (("amoeba", "1F9A0"), ("hand", "1F44B"))
    ]
    made = script.rebuild([tmp_path / "one", tmp_path / "two.tgz"], pa.Table.from_pylist(rows)).to_pylist()
    assert [row["caption"] for row in made] == ["amoeba", "hand"]
    assert [(row["num_source_frames"], row["duration_ms"]) for row in made] == [(8, 800), (24, 2400)]
    for row, count in zip(made, (8, 24), strict=True):
        clip = np.asarray(Image.open(io.BytesIO(row["strip"]["bytes"])).convert("RGB")).reshape(16, 64, 64, 3)
        assert (clip[:, :10] > 250).all()
        wanted = [level(count * moment // 16) for moment in range(16)]
        np.testing.assert_allclose(clip[:, 24:40, 24:40].mean((1, 2, 3)), wanted, atol=3)
    missing = pa.Table.from_pylist([*rows, {**rows[0], "hexcode": "1F600"}])
    with pytest.raises(ValueError, match=r"1 of 3 clips are in none of the packages \(1F600"):
        script.rebuild([tmp_path / "one", tmp_path / "two.tgz"], missing)
