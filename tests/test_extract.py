"""Pictures to codes on disk, and training from them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nar.data import extract as extraction
from nar.data.clips import ClipSource
from nar.data.codes import Codes
from nar.data.config import DataConfig
from nar.data.extract import extract
from nar.data.open import open_source
from nar.data.source import Source
from nar.data.split import held_out
from nar.media.crops import centre_crop, random_crop, views
from nar.media.video import Windows
from nar.tokenizer import load_tokenizer
from nar.tokenizer.causal import CausalTokenizer, CausalTokenizerConfig
from nar.training.distributed import Workers
from nar.training.recipe import Recipe
from nar.training.samples import code_sets
from nar.training.tasks import run_recipe
from training_runs import nar, random_tokenizer, recipe, start

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD_SIZE", 64)


def noise(folder: Path, count: int, size: int = 24, seed: int = 0) -> Path:
    """`count` pictures of noise in two class folders."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        path = folder / ("ant" if index % 2 else "bee") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


def test_the_command_writes_codes_that_datasets_opens_too(tmp_path: Path, tokenizer: Path) -> None:
    pictures = noise(tmp_path / "pictures", 10)
    said = nar(
        "extract",
        tokenizer,
        "--data",
        pictures,
        "--size",
        16,
        "--views",
        "ten-crop",
        "-o",
        tmp_path / "codes",
        processes=2,
    )
    assert "10 pictures, 10 views of 4x4 codes each, 0 broken" in said
    codes = Codes.open(tmp_path / "codes")
    assert codes.class_names == ("ant", "bee")
    assert codes.labels.tolist() == [0] * 5 + [1] * 5
    table = datasets.load_from_disk(str(tmp_path / "codes"))
    assert table.features["codes"].feature.dtype == "uint16"
    source, model = open_source(pictures, size=16), load_tokenizer(tokenizer)
    for row in (0, 7):
        expected = torch.stack(
            [
                torch.from_numpy(np.array(view)).permute(2, 0, 1).float() / 127.5 - 1
                for view in views(source.picture(row), 16, "ten-crop")
            ]
        )
        made = model.encode(expected)
        assert table[row]["codes"] == made.flatten().tolist()
        for number in (0, 9):
            read = codes.read(np.array([row]), np.array([number / 10 + 0.01]))
            np.testing.assert_array_equal(read[0], made[number])


def test_sizes_that_the_patch_does_not_divide_need_padding(tmp_path: Path, tokenizer: Path) -> None:
    pictures, codes = noise(tmp_path / "pictures", 2), tmp_path / "codes"
    command = ("extract", tokenizer, "--data", pictures, "--size", 18, "-o")
    assert "18x18 pixels are not a multiple of the patch size 4" in nar(*command, tmp_path / "refused", code=2)
    assert "views of 5x5 codes each" in nar(*command, codes, "--pad")
    source = open_source(pictures, size=18)
    centre = np.array(views(source.picture(0), 18, "centre")[0])
    padded = np.pad(centre, ((0, 2), (0, 2), (0, 0)), mode="edge")
    made = load_tokenizer(tokenizer).encode(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1)
    np.testing.assert_array_equal(Codes.open(codes).read(np.array([0]), np.array([0.0]))[0], made[0])
    with pytest.raises(ValueError, match="made with other settings: padding True instead of False"):
        extract(tokenizer, source, codes, size=18)


def test_ten_crops_are_of_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []

    def recorded(picture: Image.Image, size: int) -> Image.Image:
        cut.append(size)
        return centre_crop(picture, size)

    monkeypatch.setattr("nar.media.crops.centre_crop", recorded)
    for size in (10, 30, 70, 130, 150, 250, 256, 270):
        views(Image.new("RGB", (40, 40)), size, "ten-crop")
    assert cut == [11, 33, 77, 143, 165, 275, 281, 297]


def test_views_are_where_the_published_trainers_cut_them() -> None:
    picture = Image.fromarray((np.arange(22 * 22 * 3) % 251).astype(np.uint8).reshape(22, 22, 3))
    array = np.asarray(picture)
    made = [np.asarray(view) for view in views(picture, 20, "ten-crop")]
    for view, (top, left) in zip(made[:5], [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)], strict=True):
        np.testing.assert_array_equal(view, array[top : top + 20, left : left + 20])
    np.testing.assert_array_equal(made[9], made[4][:, ::-1])
    np.testing.assert_array_equal(made[5], made[1][:, ::-1])
    moved = [np.asarray(view) for view in views(picture, 22, "shift")]
    assert len(moved) == 9
    np.testing.assert_array_equal(moved[0], array)
    np.testing.assert_array_equal(moved[1][:-1, :-1], array[1:, 1:])
    np.testing.assert_array_equal(moved[8][1:, 1:], array[:-1, :-1])
    np.testing.assert_array_equal(moved[8][0, 1:], array[0, :-1])
    assert len({view.tobytes() for view in moved}) == 9
    centre, mirrored = (np.asarray(view) for view in views(picture, 22, "flip"))
    np.testing.assert_array_equal(mirrored, centre[:, ::-1])
    for numbers in np.random.default_rng(0).random((50, 4)):
        draws = dict(zip(("crop_side", "crop_left", "crop_top", "mirror"), numbers.tolist(), strict=True))
        assert random_crop(picture, 16, draws).size == (16, 16)


@pytest.mark.usefixtures("_small_shards")
def test_a_killed_extraction_goes_on(tmp_path: Path, tokenizer: Path) -> None:
    source = open_source("toy", size=16)
    whole = Codes.open(extract(tokenizer, source, tmp_path / "whole", size=16))
    process = start("extract", tokenizer, "--data", "toy", "--size", 16, "--batch-size", 8, "-o", tmp_path / "killed")
    while process.is_alive() and not list((tmp_path / "killed").glob("*.json")):
        time.sleep(0.001)
    process.kill()
    process.join()
    with pytest.raises(FileNotFoundError, match="holds no finished codes"):
        Codes.open(tmp_path / "killed")
    extract(tokenizer, source.take(np.arange(100)), tmp_path / "part", size=16)
    with pytest.raises(ValueError, match="made with other settings: source"):
        extract(tokenizer, source, tmp_path / "part", size=16)
    # Half of the shards, as if the other process had been killed; then all.
    extract(tokenizer, source, tmp_path / "half", size=16, rank=1, count=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "half").glob("*.arrow")}
    codes = Codes.open(extract(tokenizer, source, tmp_path / "half", size=16))
    assert len(before) == 16
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    rows = np.random.default_rng(0).permutation(len(source))
    np.testing.assert_array_equal(codes.read(rows), whole.read(rows))
    np.testing.assert_array_equal(codes.take(rows).read(np.arange(50)), whole.read(rows[:50]))
    assert not list((tmp_path / "half").glob(".*"))


def test_broken_pictures_are_counted_listed_and_limited(tmp_path: Path, tokenizer: Path) -> None:
    pictures = noise(tmp_path / "pictures", 100, size=16)
    (pictures / "ant" / "001.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 100 pictures cannot be read: ant/001.png"):
        folder = extract(tokenizer, open_source(pictures, size=16), tmp_path / "codes", size=16)
    assert (folder / "broken.txt").read_text().startswith("ant/001.png (")
    codes = Codes.open(folder)
    assert len(codes) == codes.manifest["num_samples"] == 99
    assert codes.manifest["num_broken"] == 1
    (pictures / "ant" / "003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 100 .* at most 1% may be broken"):
        extract(tokenizer, open_source(pictures, size=16), tmp_path / "others", size=16)


def test_training_takes_extracted_codes_and_refuses_those_of_another_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    codes = extract(tokenizer, open_source("toy", size=16), tmp_path / "codes", size=16, kind="flip")
    path = recipe(tmp_path, num_images=64, tokenizer_path="")
    model = run_recipe(str(path), [f"run={tmp_path / 'run'}", f"data.codes={codes}"])
    assert model is not None
    config = json.loads((model / "config.json").read_text())
    assert config["class_names"] == ["circle", "square", "triangle", "cross"]
    other = random_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"were made by another tokenizer than .*other .*; extract them again"):
        run_recipe(str(path), [f"run={tmp_path / 'run2'}", f"data.codes={codes}", f"tokenizer_path={other}"])
    shard = next(codes.glob("*.arrow"))
    whole = shard.read_bytes()
    code = Codes.open(codes).read(np.arange(1))[0].astype(np.uint16).tobytes()
    start, length = whole.index(code), 200 * len(code)
    shard.write_bytes(whole[:start] + b"\xff" * length + whole[start + length :])
    with pytest.raises(ValueError, match=r"codes is damaged: it holds the code \d+, and its tokenizer"):
        run_recipe(str(path), [f"run={tmp_path / 'run4'}", f"data.codes={codes}"])
    for at in range(1000, len(whole), 250):  # lengths of texts, say
        shard.write_bytes(whole[:at] + b"\xc0\xeb\xe9\xcb" * 8 + whole[at + 32 :])
        with suppress(ValueError):
            Codes.open(codes)
    shard.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"shard .*arrow can't be read .*; delete it and run the same"):
        run_recipe(str(path), [f"run={tmp_path / 'run3'}", f"data.codes={codes}"])
    if hasattr(os, "mkfifo"):
        shard.unlink()
        os.mkfifo(shard)
        with pytest.raises(ValueError, match=r"shard .*arrow can't be read .*is no file"):  # a pipe is not waited for
            Codes.open(codes)


def test_held_out_classes_are_those_of_the_same_name(tmp_path: Path, tokenizer: Path) -> None:
    for place in ("train/cat", "train/dog", "train/fish", "test/cat", "test/fish"):
        (tmp_path / "pets" / place).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "pets" / place / "a.png")
    data, workers = DataConfig(source=str(tmp_path / "pets"), size=16), Workers(0, 1, torch.device("cpu"))

    def labels(recipe: Recipe) -> list[list[int]]:
        return [side.labels.tolist() for side in code_sets(recipe, recipe.data.open(), tokenizer, workers)]

    recipe = Recipe(run=str(tmp_path / "run"), data=data, num_images=1)
    assert labels(recipe) == [[0, 1, 2], [0, 2]]
    folders = {"codes": str(tmp_path / "run/codes/train"), "heldout_codes": str(tmp_path / "run/codes/heldout")}
    extracted = Recipe(data=DataConfig(size=16, **folders), num_images=1)
    heldout = code_sets(extracted, (), tokenizer, workers)[1]
    assert (heldout.labels.tolist(), heldout.class_names) == ([0, 2], ("cat", "dog", "fish"))
    (tmp_path / "pets" / "test" / "fish").rename(tmp_path / "pets" / "test" / "newt")
    with pytest.raises(ValueError, match=r"held-out part has the classes newt, but .* learned are cat, dog, fish;"):
        labels(recipe)
    # Without classes to learn their names don't matter.
    assert labels(Recipe(run=str(tmp_path / "words"), data=data, num_images=1, classes=False)) == [[0, 1, 2], [0, 1]]


def test_other_frames_of_the_same_clips_are_other_codes(tmp_path: Path) -> None:
    sizes = {"frames_per_code": 3, "patch_size": 8, "channels": 8, "num_blocks": 1, "dim": 16, "num_heads": 2}
    layers = {"hidden_dim": 16, "num_encoder_blocks": 1, "num_decoder_blocks": 1}
    config = CausalTokenizerConfig(vocab_size=32, code_dim=4, **sizes, **layers)
    CausalTokenizer(config).save_pretrained(tmp_path / "tokenizer")
    strip = Image.new("RGB", (16, 16 * 9))

    def codes_of(windows: Windows) -> Path:
        clips = ClipSource(["a", "b"], np.zeros(2), ("clip",), lambda _: strip, windows=windows)
        return extract(tmp_path / "tokenizer", clips, tmp_path / "codes", size=16, threads=1, quiet=True)

    codes_of(Windows(4))
    codes_of(Windows(4))
    for other in (Windows(7), Windows(4, stride=2), Windows(4, frame_rate=5.0), Windows(4, kind="start"), Windows()):
        with pytest.raises(ValueError, match="made with other settings: source"):
            codes_of(other)


def test_what_names_a_source_stays_the_same() -> None:
    """Or nobody's extraction could be gone on with."""
    names, labels = ["a", "b"], np.array([0, 1])
    for kind in (Source, ClipSource):
        assert extraction.fingerprint(kind(names, labels, ("x", "y"), str)) == "3295c940d379fcbe"


def test_rows_without_names_are_told_apart_by_what_they_hold(tmp_path: Path, tokenizer: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def table(name: str, seed: int, captions: list[str]) -> Source:
        files = sorted(noise(tmp_path / f"pictures{seed}", 4, size=16, seed=seed).rglob("*.png"))
        columns = {"image": [{"bytes": file.read_bytes()} for file in files], "caption": captions}
        pq.write_table(pa.table(columns), tmp_path / name)
        return open_source(tmp_path / name, size=16)

    words = ["a", "b", "c", "d"]
    first, again, pictures, captions = (
        table("1.parquet", 1, words),
        table("2.parquet", 1, words),
        table("3.parquet", 2, words),
        table("4.parquet", 1, ["a", "b", "c", "e"]),
    )
    extract(tokenizer, first, tmp_path / "codes", size=16, quiet=True)
    extract(tokenizer, again, tmp_path / "codes", size=16, quiet=True)
    for other in (pictures, captions):
        with pytest.raises(ValueError, match="made with other settings: source"):
            extract(tokenizer, other, tmp_path / "codes", size=16, quiet=True)


def test_a_refused_extraction_leaves_nothing_behind(tmp_path: Path, tokenizer: Path) -> None:
    pictures = noise(tmp_path / "pictures", 4)
    for size in (18, 16):
        command = ("extract", tokenizer, "--data", pictures, "--size", size, "-o", tmp_path / "codes")
        nar(*command, code=0 if size == 16 else 2)
        assert (tmp_path / "codes").exists() == (size == 16)
    (pictures / "ant" / "001.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1 of 4 pictures cannot be read"):
        extract(tokenizer, open_source(pictures, size=16), tmp_path / "more", size=16)
    (pictures / "ant" / "001.png").unlink()
    assert len(Codes.open(extract(tokenizer, open_source(pictures, size=16), tmp_path / "more", size=16))) == 3


def test_extractions_that_an_earlier_version_began_go_on(tmp_path: Path, tokenizer: Path) -> None:
    """Files were in the order of their text then, and every number up to the largest made a class."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in (1, 2, 10):
        Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
    cells = [(tmp_path / f"{number}.png").read_bytes() for number in (1, 2, 10)]
    (tmp_path / "folder").mkdir()
    for number, cell in zip((1, 2, 10), cells, strict=True):
        (tmp_path / "folder" / f"{number}.png").write_bytes(cell)
    pq.write_table(pa.table({"image": cells, "label": [3, 1, 3]}), tmp_path / "table.parquet")
    for name, labels, order in (("folder", [0, 0, 0], [0, 2, 1]), ("table.parquet", [3, 1, 3], [0, 1, 2])):
        source = open_source(tmp_path / name, size=16)
        (before,) = source.as_before()
        begun = Codes.open(extract(tokenizer, before, tmp_path / f"{name}-codes", size=16, quiet=True))
        again = Codes.open(extract(tokenizer, source, tmp_path / f"{name}-codes", size=16, quiet=True))
        assert begun.labels.tolist() == again.labels.tolist() == labels
        assert begun.class_names == again.class_names
        fresh = Codes.open(extract(tokenizer, source, tmp_path / f"{name}-new", size=16, quiet=True))
        np.testing.assert_array_equal(again.read(np.arange(3)), fresh.read(np.array(order)))
    assert again.class_names == ("0", "1", "2", "3")
    assert fresh.class_names == ("1", "3")


def test_groups_are_held_out_together() -> None:
    keys = [f"thing {index // 3}" for index in range(3000)]
    out = held_out(keys, 0.05)
    assert 60 < out.sum() < 240
    assert all(len(set(out[start : start + 3])) == 1 for start in range(0, 3000, 3))
    np.testing.assert_array_equal(held_out(keys[:1500], 0.05)[3:1500], out[3:1500])
    assert held_out(["a", "b"], 0.01).sum() == 1


def test_captions_from_text_files_lists_and_tars(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, text in enumerate(["a red dot", "a blue dot"]):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(flat / f"{index}.png")
        (flat / f"{index}.txt").write_text(text + "\n")
    assert open_source(flat, size=8).captions == ["a red dot", "a blue dot"]

    lines = [
        {"file_name": "1.png", "text": "second", "label": "x"},
        {"file_name": "0.png", "text": "first", "label": "y"},
    ]
    (flat / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    listed = open_source(flat, size=8)
    assert listed.captions == ["second", "first"]
    assert listed.class_names == ("x", "y")
    assert listed.picture(0).getpixel((0, 0)) == (1, 0, 0)
    (flat / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"name": 3}')
    with pytest.raises(ValueError, match=r"metadata.jsonl, entry 2: needed is an object with `file_name`"):
        open_source(flat, size=8)

    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"{shard}.tar", "w") as tar:
            for index in range(3):
                value = 3 * shard + index
                data = io.BytesIO()
                Image.new("RGB", (8, 8), (value, 0, 0)).save(data, "png")
                told = {"prompt": f"number {value}", "place": "there" if shard else "here", "lot": value // 2}
                json_text = json.dumps(told).encode()
                for suffix, content in (("png", data.getvalue()), ("json", json_text), ("cls", b"%d" % (value % 2))):
                    member = tarfile.TarInfo(f"deep/{index:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    tars = open_source(shards, size=8)
    assert tars.captions == [f"number {value}" for value in range(6)]
    assert tars.labels.tolist() == [0, 1] * 3
    assert [tars.picture(index).getpixel((0, 0)) for index in (5, 0)] == [(5, 0, 0), (0, 0, 0)]
    named = open_source(shards, size=8, label="place", group="lot")
    assert named.class_names == ("here", "there")
    assert named.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert named.groups == ["0", "0", "1", "1", "2", "2"]
    with pytest.raises(ValueError, match="no column 'plcae' for label, it has label, lot, place, prompt; name one"):
        open_source(shards, size=8, label="plcae")
    (shards / "1.tar").write_bytes((shards / "1.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"shard .*1.tar can't be read"):
        open_source(shards, size=8)


def test_the_hub_is_read_without_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(data, "png")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string")}
    )
    rows = {
        "img": [{"bytes": data.getvalue(), "path": None}, {"bytes": b"broken", "path": None}],
        "label": [1, 0],
        "text": ["a dog", "a cat"],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("someone/pets", "train"): table}[name, split])
    source = open_source("someone/pets", size=8)
    assert isinstance(source, Source)
    assert (source.class_names, source.labels.tolist(), source.captions) == (("cat", "dog"), [1, 0], ["a dog", "a cat"])
    assert source.picture(0).getpixel((0, 0)) == (9, 0, 0)
    with pytest.raises(ValueError, match="no known format"):
        source.picture(1)


@pytest.mark.slow
def test_codes_are_read_fast(tmp_path: Path, tokenizer: Path) -> None:
    """At least 20,000 samples a second on one core, in batches of 256 with random views, 256 codes a view."""
    import pyarrow as pa

    folder = extract(tokenizer, open_source("toy", size=16), tmp_path / "codes", size=16, kind="ten-crop")
    manifest = json.loads((folder / "manifest.json").read_text())
    rng = np.random.default_rng(0)
    names = [f"big-{index}.arrow" for index in range(10)]
    for name in names:
        codes = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, 16384, 4096 * 2560, dtype=np.uint16)), 2560)
        texts = pa.array([""] * 4096)
        table = pa.table(
            {"codes": codes, "label": pa.array(np.zeros(4096, np.int32)), "caption": texts, "group": texts}
        )
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    manifest |= {"shards": names, "grid": [16, 16], "num_samples": 40960}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    big = Codes.open(folder)
    order = rng.permutation(len(big))
    began = time.perf_counter()
    for start_at in range(0, len(big) - 256, 256):
        big.read(order[start_at : start_at + 256], rng.random(256))
    rate = len(big) / (time.perf_counter() - began)
    print(f"{rate:,.0f} samples/s")
    assert rate > 20_000


def test_codes_of_several_shards_are_read_in_any_order(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SHARD_SIZE", 3)
    source = open_source(noise(tmp_path / "pictures", 10, size=8), size=8)
    codes = Codes.open(extraction.extract(tokenizer, source, tmp_path / "codes", size=8))
    each = [codes.read(np.array([row]))[0] for row in range(10)]
    assert len({row.tobytes() for row in each}) > 5
    picked = np.array([9, 0, 4, 4, 8, 1, 3, 9])
    np.testing.assert_array_equal(codes.read(picked), np.stack([each[row] for row in picked]))
