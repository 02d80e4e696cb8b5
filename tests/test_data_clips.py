"""Sources of clips, and their codes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_files import level, numbers, write
from nar.data.clips import ClipSource
from nar.data.codes import Codes
from nar.data.config import DataConfig
from nar.data.extract import extract
from nar.data.open import load_pictures, open_source
from nar.media.pixels import as_pixels
from nar.media.video import Windows
from nar.tokenizer import load_tokenizer
from nar.tokenizer.causal import CausalTokenizer, CausalTokenizerConfig

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of 9 frames and one of 4, in two class folders."""
    folder = tmp_path_factory.mktemp("clips")
    for name, count in (("run/a.mp4", 9), ("run/b.mp4", 4), ("jump/c.avi", 9)):
        write(folder / name, count, "mpeg4" if name.endswith("avi") else "libx264", size=(16, 16))
    (folder / "run" / "a.txt").write_text("someone runs\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    sizes = {"frames_per_code": 3, "patch_size": 8, "channels": 8, "num_blocks": 1, "dim": 16, "num_heads": 2}
    layers = {"hidden_dim": 16, "num_encoder_blocks": 1, "num_decoder_blocks": 1}
    CausalTokenizer(CausalTokenizerConfig(vocab_size=32, code_dim=4, **sizes, **layers)).save_pretrained(folder)
    return folder


def strip(*shown: int, side: int = 8) -> bytes:
    frames = [np.full((side, side, 3), level(number), np.uint8) for number in shown]
    data = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(data, "webp", lossless=True)
    return data.getvalue()


def test_folders_of_classes(clips: Path) -> None:
    source = open_source(clips, size=16, windows=Windows(4))
    assert isinstance(source, ClipSource)
    assert source.class_names == ("jump", "run")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.captions == ["", "someone runs", ""]
    made = load_pictures(source, size=16)
    assert made.images.shape == (3, 4, 16, 16, 3)
    assert [numbers(clip) for clip in made.images] == [[2, 3, 4, 5], [2, 3, 4, 5], [0, 1, 2, 3]]
    assert numbers(source.take(np.array([2])).array(0, 16)) == [0, 1, 2, 3]


def test_random_windows_and_crops_follow_the_numbers_that_are_drawn(clips: Path) -> None:
    source = open_source(clips, size=8, windows=Windows(4, kind="random"))
    draws = {"crop_side": 0.3, "crop_left": 0.5, "crop_top": 0.5, "mirror": 0.9, "window_start": 0.0}
    assert numbers(source.array(0, 8, draws)) == [0, 1, 2, 3]
    draws["window_start"] = 0.999
    assert numbers(source.array(0, 8, draws)) == [5, 6, 7, 8]
    assert numbers(source.array(0, 8, draws, crop=True)) == [5, 6, 7, 8]
    assert source.array(0, 8, draws, crop=True).shape == (4, 8, 8, 3)


def test_all_windows_are_samples_that_stay_together(clips: Path) -> None:
    source = open_source(clips, size=16, windows=Windows(4, kind="all"))
    assert [name.rpartition("/")[2] for name in source.names] == [
        "c.avi from frame 0",
        "c.avi from frame 4",
        "a.mp4 from frame 0",
        "a.mp4 from frame 4",
        "b.mp4 from frame 0",
    ]
    assert source.groups is not None
    assert len(set(source.groups)) == 3
    assert numbers(source.array(1, 16)) == [4, 5, 6, 7]
    few = source.take(np.array([3, 1]))
    assert [numbers(few.array(index, 16)) for index in (0, 1)] == [[4, 5, 6, 7]] * 2


def test_strips_and_files_in_tables(tmp_path: Path, clips: Path) -> None:
    import pyarrow.parquet as pq

    rows = {"strip": [strip(*range(6)), strip(*range(3, 9))], "caption": ["up", "on"], "label": [0, 1]}
    rows["hexcode"] = ["1F44B-1F3FB", "1F44B"]
    pq.write_table(pa.table(rows), tmp_path / "strips.parquet")
    whole = open_source(tmp_path / "strips.parquet", size=8, group="hexcode")
    assert [numbers(clip) for clip in load_pictures(whole, size=8).images] == [list(range(6)), list(range(3, 9))]
    assert whole.groups == ["1F44B-1F3FB", "1F44B"]
    parts = open_source(tmp_path / "strips.parquet", size=8, windows=Windows(2, stride=2, kind="all"))
    assert [numbers(parts.array(index, 8)) for index in range(len(parts))] == [[0, 2], [3, 5]]
    assert parts.captions == ["up", "on"]
    files = {"video": [(clips / "run" / "a.mp4").read_bytes()], "caption": ["someone runs"]}
    pq.write_table(pa.table(files), tmp_path / "files.parquet")
    assert numbers(open_source(tmp_path / "files.parquet", size=8, windows=Windows(3)).array(0, 8)) == [3, 4, 5]


def test_tars(tmp_path: Path, clips: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(clips / "run" / "b.mp4", "x.mp4")
        tar.add(clips / "run" / "a.txt", "x.txt")
    source = open_source(tmp_path / "a.tar", size=16, windows=Windows(4))
    assert source.captions == ["someone runs"]
    assert numbers(source.array(0, 16)) == [0, 1, 2, 3]


def test_ucf_lists_take_the_class_from_the_name_and_others_from_the_column(tmp_path: Path) -> None:
    names = ["Zumba", "Archery", "archery"]
    for name in names:
        write(tmp_path / "data" / f"v_{name}_g01_c01.avi", 3, "mpeg4", size=(16, 16))
    header = "id,path,action,label\n"
    rows = [f"{n},data/v_{name}_g01_c01.avi,wrong,{9 - n}\n" for n, name in enumerate(names)]
    (tmp_path / "ucf101_train.csv").write_text(header + "".join(rows))
    (tmp_path / "ucf101_val.csv").write_text(header + rows[1] + rows[0] + rows[2])
    source = open_source(tmp_path, size=16, windows=Windows(2))
    assert source.class_names == ("Archery", "Zumba", "archery")  # ASCII: capitals first
    assert source.labels.tolist() == [1, 0, 2]
    assert open_source(tmp_path, size=16, split="test", windows=Windows(2)).labels.tolist() == [0, 1, 2]
    (tmp_path / "k600.csv").write_text(header + "".join(f"{n},{row.split(',', 1)[1]}" for n, row in enumerate(rows)))
    other = open_source(tmp_path / "k600.csv", size=16, windows=Windows(2))
    assert other.labels.tolist() == [2, 1, 0]  # labels 9, 8, 7
    both = open_source(f"{tmp_path / 'k600.csv'}+{tmp_path / 'k600.csv'}", size=16, windows=Windows(2))
    assert len(both) == 6
    (tmp_path / "lost.csv").write_text(f"{header}1,data/lost.avi,x,1\n")
    with pytest.raises(FileNotFoundError, match=r"lost.csv names the clip data/lost.avi"):
        open_source(tmp_path / "lost.csv", size=16, windows=Windows(2))


def test_lists_mean_the_clips_beside_them_from_whichever_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list lies in two folders, whose clips differ; both hold out the same rows, from anywhere."""
    rows, splits = [f"clips/{row}.gif" for row in range(12)], []
    for name, shown in (("old", 0), ("moved", 5)):
        for row in rows:
            (tmp_path / name / row).parent.mkdir(parents=True, exist_ok=True)
            frames = [Image.new("L", (8, 8), level(shown + frame)) for frame in (0, 1)]
            frames[0].save(tmp_path / name / row, save_all=True, append_images=frames[1:], duration=100)
        (tmp_path / name / "all.csv").write_text("\n".join(["path", *rows]))
    for here, source in (
        (tmp_path / "old", "../moved/all.csv"),
        (tmp_path, "moved/all.csv"),
        (tmp_path, "old/all.csv"),
    ):
        monkeypatch.chdir(here)
        found = open_source(source, size=8, windows=Windows(2))
        assert numbers(found.array(0, 8)) == ([5, 6] if "moved" in source else [0, 1])
        splits.append([part.names for part in DataConfig(source=source, num_frames=2, heldout_share=0.2).open()])
    assert splits[0] == splits[1] == splits[2]
    assert sorted([*splits[0][0], *splits[0][1]]) == sorted(rows)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    (tmp_path / "elsewhere" / "few.csv").write_text("path,label\nclips/0.gif,1\nclips/1.gif,01\nclips/2.gif,1\n")
    few = open_source("../elsewhere/few.csv", size=8, windows=Windows(2))  # found from the working directory
    assert (few.class_names, few.labels.tolist()) == (("01", "1"), [1, 0, 1])


def test_what_is_no_source_of_clips(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pictures .* say how many frames"):
        open_source(clips, size=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clips"):
        open_source(tmp_path / "empty", size=16, windows=Windows(2))
    with pytest.raises(FileNotFoundError, match=r"a folder, a \.parquet, \.tar, \.csv or \.npz file"):
        open_source(tmp_path / "nowhere", size=16, windows=Windows(2))
    source = open_source(clips, size=16, windows=Windows(2))
    with pytest.raises(ValueError, match="clips have the views centre, flip and loop"):
        source.views(0, 16, "ten-crop")


def test_codes_of_all_windows(tmp_path: Path, clips: Path, tokenizer: Path) -> None:
    source = open_source(clips, size=16, windows=Windows(4, kind="all"))
    codes = Codes.open(extract(tokenizer, source, tmp_path / "codes", size=16, kind="flip", threads=1, quiet=True))
    assert codes.grid == (2, 2, 2)
    assert len(codes) == 5
    assert codes.manifest["num_views"] == 2
    model = load_tokenizer(tokenizer)
    assert isinstance(model, CausalTokenizer)
    with torch.inference_mode():
        wanted = model.encode(as_pixels(np.stack([source.array(row, 16) for row in range(5)])))
    np.testing.assert_array_equal(codes.read(np.arange(5)), wanted.numpy())


def test_a_broken_clip_is_listed_and_left_out(tmp_path: Path, tokenizer: Path) -> None:
    for index in range(120):
        write(tmp_path / "clips" / f"{index:03d}.mkv", 1, size=(16, 16))
    (tmp_path / "clips" / "007.mkv").write_bytes(b"broken")
    source = open_source(tmp_path / "clips", size=16, windows=Windows(1))
    with pytest.warns(UserWarning, match=r"1 of 120 clips cannot be read: 007.mkv"):
        folder = extract(tokenizer, source, tmp_path / "codes", size=16, threads=1, quiet=True)
    assert len(Codes.open(folder)) == 119
    assert "007.mkv" in (folder / "broken.txt").read_text()
