"""Every kind of source, and what is said when one is damaged."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar.data import builtin
from nar.data.builtin import FASHION_MNIST_CLASSES
from nar.data.open import load_pictures, open_source
from nar.data.source import Pictures
from nar.data.split import held_out, held_out_pairs
from nar.storage.text import composed


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_idx(folder: Path, *, compressed: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    written = {}
    for split, count in (("train", 6), ("t10k", 4)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            data = idx_bytes(array)
            (folder / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(data) if compressed else data)
        written[split] = (images, labels)
    return written


def solid(path: Path, colour: object, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_is_padded_evenly_and_grey_becomes_three_channels(tmp_path: Path, compressed: bool) -> None:
    written = write_idx(tmp_path, compressed=compressed)
    for split in ("train", "t10k", "test"):
        images, labels = written["train" if split == "train" else "t10k"]
        pictures = load_pictures(tmp_path, size=32, split=split)
        assert isinstance(pictures, Pictures)
        assert pictures.images.dtype == np.uint8
        assert pictures.images.shape == (len(images), 32, 32, 3)
        assert pictures.labels.dtype == np.int64
        assert pictures.class_names == FASHION_MNIST_CLASSES
        np.testing.assert_array_equal(pictures.labels, labels)
        for channel in range(3):
            np.testing.assert_array_equal(pictures.images[:, 2:30, 2:30, channel], images)
        assert pictures.images.sum(dtype=np.int64) == 3 * images.sum(dtype=np.int64)


def test_idx_at_its_own_size_and_smaller(tmp_path: Path) -> None:
    images, _ = write_idx(tmp_path)["train"]
    np.testing.assert_array_equal(load_pictures(tmp_path, size=28).images[..., 0], images)
    assert load_pictures(tmp_path, size=14).images.shape == (6, 14, 14, 3)


def test_the_word_fashion_mnist_finds_the_folder_or_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtin, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.delenv("NAR_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_pictures("fashion-mnist", size=32)
    write_idx(tmp_path / "debian")
    assert len(load_pictures("fashion-mnist", size=32)) == 6
    monkeypatch.setenv("NAR_DATA", str(tmp_path / "data"))
    write_idx(tmp_path / "data" / "fashion-mnist")
    assert len(load_pictures("fashion-mnist", size=32, split="t10k")) == 4


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged"):
        load_pictures(tmp_path, size=32)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    with pytest.raises(ValueError, match="truncated"):
        load_pictures(tmp_path, size=32)
    images.write_bytes(labels.read_bytes())
    with pytest.raises(ValueError, match="not an idx file"):
        load_pictures(tmp_path, size=32)
    images.write_bytes(whole)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-labels"):
        load_pictures(tmp_path, size=32)


def test_class_folders_are_sorted_cropped_and_put_on_white(tmp_path: Path) -> None:
    solid(tmp_path / "zebra" / "a.png", (0, 0, 0))
    solid(tmp_path / "ant" / "deep" / "b.PNG", (255, 0, 0, 0), mode="RGBA")
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "ant" / "wide.png")
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    pictures = load_pictures(tmp_path, size=8)
    assert pictures.class_names == ("ant", "zebra")
    assert pictures.labels.tolist() == [0, 0, 1]
    assert (pictures.images[0] == 255).all()
    assert (pictures.images[1] == 200).all()
    assert (pictures.images[2] == 0).all()
    assert load_pictures(tmp_path, size=4).images.shape == (3, 4, 4, 3)
    assert load_pictures(tmp_path, size=13).images.shape == (3, 13, 13, 3)


def test_class_folders_may_be_named_with_any_digits(tmp_path: Path) -> None:
    names = ("１", "猫", "2", "10", "²", "٣a")
    for name in names:
        solid(tmp_path / name / "0.png", "red")
    assert set(open_source(tmp_path).class_names) == {composed(name) for name in names}
    solid(tmp_path / "10" / "9.png", "red")
    solid(tmp_path / "10" / "10.png", "red")
    shown = [name for name in open_source(tmp_path).names if name.startswith("10/")]
    assert shown == ["10/0.png", "10/9.png", "10/10.png"]


def test_a_number_with_a_zero_before_it_is_a_name(tmp_path: Path) -> None:
    for name in "abc":
        solid(tmp_path / f"{name}.png", "red")
    table = "file_name,label,scene\na.png,01,007\nb.png,1,7\nc.png,0,7\n"
    (tmp_path / "metadata.csv").write_text(table)
    source = open_source(tmp_path, group="scene")
    assert [source.class_names[label] for label in source.labels] == ["01", "1", "0"]
    assert source.groups == ["007", "7", "7"]
    (tmp_path / "metadata.csv").write_text(table.replace("01,", "10,"))
    assert open_source(tmp_path).class_names == ("0", "1", "10"), "numbers are in their order"


def test_flat_folder_is_one_class_and_splits_are_subfolders(tmp_path: Path) -> None:
    solid(tmp_path / "flat" / "a.png", 7, mode="L")
    flat = load_pictures(tmp_path / "flat", size=8)
    assert flat.class_names == ("picture",)
    assert (flat.images == 7).all()
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        load_pictures(tmp_path / "flat", size=8, split="test")
    solid(tmp_path / "split" / "train" / "x" / "a.png", (1, 1, 1))
    with pytest.raises(FileNotFoundError, match="no 'test'"):
        load_pictures(tmp_path / "split", size=8, split="test")
    solid(tmp_path / "split" / "test" / "x" / "a.png", (2, 2, 2))
    assert load_pictures(tmp_path / "split", size=8).images.max() == 1
    for split in ("test", "t10k"):
        assert load_pictures(tmp_path / "split", size=8, split=split).images.max() == 2


def test_a_few_broken_pictures_are_skipped_with_their_names(tmp_path: Path) -> None:
    for index in range(99):
        solid(tmp_path / f"{index:03d}.png", (index, 0, 0))
    (tmp_path / "050.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 100 pictures .* 050.jpg"):
        pictures = load_pictures(tmp_path, size=8)
    assert pictures.images[:, 0, 0, 0].tolist() == list(range(99))
    (tmp_path / "051.png").write_bytes((tmp_path / "051.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"2 of 100 .*at most 1%"):
        load_pictures(tmp_path, size=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "holds no pictures"),
        (lambda folder: (folder / "empty").mkdir(), "holds no pictures"),
        (lambda folder: (solid(folder / "a.png", 0), solid(folder / "x" / "b.png", 0)), "both pictures"),
    ],
)
def test_folders_that_make_no_sense_are_refused(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pictures(tmp_path, size=8)


def test_sources_and_settings_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pictures(tmp_path / "nothing", size=8)
    with pytest.raises(ValueError, match="split must be one of train, test, t10k, val, not 'validation'"):
        load_pictures(tmp_path, size=8, split="validation")
    with pytest.raises(ValueError, match="size must be at least 1"):
        load_pictures(tmp_path, size=0)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"allowed are a \.parquet, \.tar or \.npz file"):
        load_pictures(tmp_path / "a.zip", size=8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, "png")
    return buffer.getvalue()


def test_parquet_reads_bytes_paths_and_names(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    solid(tmp_path / "beside.png", (3, 3, 3))
    image = [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": "x"}, {"bytes": None, "path": "beside.png"}]
    columns = {"image": image, "label": [1, 0, 2], "label_name": ["one", "zero", "two"]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    for source in (tmp_path / "train.parquet", tmp_path):
        pictures = load_pictures(source, size=8)
        assert pictures.images[:, 0, 0, 0].tolist() == [1, 2, 3]
        assert pictures.labels.tolist() == [1, 0, 2]
        assert pictures.class_names == ("zero", "one", "two")

    schema = {"info": {"features": {"label": {"names": ["a", "b", "c", "d"]}}}}
    table = pa.table({"image": image, "label": [1, 0, 2]}).replace_schema_metadata({"huggingface": json.dumps(schema)})
    pq.write_table(table, tmp_path / "named.parquet")
    assert load_pictures(tmp_path / "named.parquet", size=8).class_names == ("a", "b", "c")

    pq.write_table(pa.table({"image": [png(4)], "label": ["cat"]}), tmp_path / "text.parquet")
    assert load_pictures(tmp_path / "text.parquet", size=8).class_names == ("cat",)
    pq.write_table(pa.table({"image": [png(4)]}), tmp_path / "plain.parquet")
    assert load_pictures(tmp_path / "plain.parquet", size=8).class_names == ("picture",)

    pq.write_table(pa.table({"picture": [png(4)]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="needed is `image`"):
        load_pictures(tmp_path / "other.parquet", size=8)
    pq.write_table(pa.table({"image": [png(4), png(5)], "label": [0, None]}), tmp_path / "hole.parquet")
    with pytest.raises(ValueError, match="row 1 has no label"):
        load_pictures(tmp_path / "hole.parquet", size=8)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a parquet file"):
        load_pictures(tmp_path / "bad.parquet", size=8)


def test_parquet_files_of_one_source_may_have_different_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    first = {"image": [png(1), png(2)], "label": [0, 1], "label_name": ["cat", "dog"]}
    second = {"image": [png(3)], "label": [1], "caption": ["a dog"], "thing": ["rex"]}
    third = {"image": [png(4)], "label": [2], "caption": ["a fish"], "tags": ["wet,blue"]}
    for number, columns in enumerate((first, second, third)):
        pq.write_table(pa.table(columns), tmp_path / f"train-{number}.parquet")
    source = open_source(tmp_path, size=8, group="thing")
    assert source.labels.tolist() == [0, 1, 1, 2]
    assert source.class_names == ("cat", "dog", "2")
    assert source.captions == ["", "", "a dog", "a fish"]
    assert source.tags == [(), (), (), ("wet", "blue")]
    assert source.groups == ["row 0", "row 1", "rex", "row 3"]
    same = open_source(tmp_path / "train-1.parquet", size=8, label="thing", group="thing")
    assert (same.labels.tolist(), same.groups) == ([0], ["rex"])
    pq.write_table(pa.table({"image": [png(5)]}), tmp_path / "train-3.parquet")
    with pytest.raises(ValueError, match="row 4 has no label"):
        open_source(tmp_path, size=8)
    pq.write_table(pa.table({"strip": [png(5)]}), tmp_path / "train-3.parquet")
    with pytest.raises(ValueError, match=r"train-3.parquet has the columns strip; .* in all files the same"):
        open_source(tmp_path, size=8)


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [png(1)], "kind": ["cat"]}), tmp_path / "a.parquet")
    for name in ("label", "group"):
        with pytest.raises(ValueError, match=f"no column 'knid' for {name}, it has image, kind; name one of these, or"):
            open_source(tmp_path / "a.parquet", size=8, **{name: "knid"})
    assert open_source(tmp_path / "a.parquet", size=8).class_names == ("picture",)
    solid(tmp_path / "classes" / "cat" / "a.png", 0)
    solid(tmp_path / "flat" / "a.png", 0)
    write_idx(tmp_path / "idx")
    for source in (tmp_path / "classes", tmp_path / "flat", tmp_path / "idx", "toy"):
        for name in ("label", "group"):
            with pytest.raises(ValueError, match=rf"no column 'kind' for {name}, it has none; give a table with it \("):
                open_source(source, size=8, **{name: "kind"})
    (tmp_path / "flat" / "metadata.jsonl").write_text('{"file_name": "a.png", "kind": "cat"}')
    listed = open_source(tmp_path / "flat", size=8, label="kind", group="kind")
    assert (listed.class_names, listed.groups) == (("cat",), ["cat"])
    with pytest.raises(ValueError, match="it has file_name, kind; name one of these"):
        open_source(tmp_path / "flat", size=8, label="knid")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install nar-gen\[train\]"):
        load_pictures(tmp_path / "a.parquet", size=8)


def test_about_the_share_is_held_out_and_stays_so_when_others_come() -> None:
    keys = [f"drawing {number}" for number in range(2000)]
    out = held_out(keys, 0.05)
    assert 60 < out.sum() < 140
    assert np.array_equal(held_out(keys[:1500], 0.05), out[:1500])


def test_pairs_are_held_out_of_every_style() -> None:
    groups, styles = [f"thing {number // 2}" for number in range(80)], ["flat", "noto"] * 40
    out = held_out_pairs(groups, styles, 20)
    assert out.sum() == 20
    assert len({group for group, is_out in zip(groups, out, strict=True) if is_out}) == 20
    assert 4 < sum(is_out and style == "flat" for style, is_out in zip(styles, out, strict=True)) < 16


def test_the_folder_of_a_run_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nar train toy run=toy`: the run has locked a folder of this name before it reads the data of this name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_source("toy")
    (tmp_path / "toy/run.lock").touch()
    assert len(open_source("toy").class_names) == 4
