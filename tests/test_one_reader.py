"""One reader: every kind of input gives one answer, through training, extraction and evaluation.

Each case is a folder or file that the test makes, beside a plain twin that it must be read as, or a refusal.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import tarfile
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_files import level, numbers, write
from nar.data.codes import Codes
from nar.data.config import DataConfig
from nar.data.extract import extract
from nar.data.open import load_pictures, open_source
from nar.data.source import Source
from nar.media import pictures, video
from nar.media.crops import centre_crop, random_crop, resized_square
from nar.media.pictures import read_picture
from nar.media.video import Windows, squared
from nar.metrics.pictures import batches
from training_runs import random_tokenizer

SIZE = 16


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """A picture (H, W, 3) of smooth noise, that is no mirror image of itself."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def save(path: Path, seed: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path, **options)
    return path


def encoded(seed: int, kind: str = "png") -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(seed)).save(data, kind)
    return data.getvalue()


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_parquet(path: Path, **columns: list[object]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def plain(folder: Path, seeds: range | list[int]) -> Path:
    for seed in seeds:
        save(folder / f"{seed:03d}.png", seed)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


def trained_on(source: Path) -> np.ndarray:
    """What a training sees: its part to learn from and its held-out part together."""
    parts = DataConfig(source=str(source), size=SIZE, heldout_share=0.3).open()
    return np.concatenate([load_pictures(part, size=SIZE).images for part in parts])


def extracted_from(source: Path, tokenizer: Path, folder: Path) -> Codes:
    return Codes.open(extract(tokenizer, open_source(source, size=SIZE), folder, size=SIZE, quiet=True))


def judged_in(source: Path) -> np.ndarray:
    return np.concatenate(list(batches(source, 7, size=SIZE)))


def as_set(images: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


# Cases that are read as a plain folder of the pictures 0, 1, 2, ...


def exif(folder: Path) -> int:
    inverse = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_270",
        7: "TRANSVERSE",
        8: "ROTATE_90",
    }
    folder.mkdir()
    seed = 0
    for kind in ("png", "webp", "tiff"):
        for orientation in range(2, 9):
            tags = Image.Exif()
            tags[0x0112] = orientation
            turned = Image.fromarray(picture(seed)).transpose(Image.Transpose[turns[inverse[orientation]]])
            options = {"lossless": True} if kind == "webp" else {}
            turned.save(folder / f"{seed:03d}.{kind}", exif=tags, **options)
            seed += 1
    return seed


def hidden(folder: Path) -> int:
    plain(folder, range(4))
    for name in (
        ".DS_Store",
        "._000.png",
        ".ipynb_checkpoints/000.png",
        ".cache/deep/x.png",
        "__MACOSX/a.png",
        "Thumbs.db",
    ):
        save(folder / name, 9, format="png")
    return 4


def mpo(folder: Path) -> int:
    plain(folder, range(1, 3))
    first, second = Image.fromarray(picture(0)), Image.fromarray(picture(7))
    first.save(folder / "000.tiff", save_all=True, append_images=[second])  # pages, as a phone's MPO has pictures
    return 3


def endings(folder: Path) -> int:
    plain(folder, range(2))
    save(folder / "002.PNG", 2)
    save(folder / "003.TIFF", 3)
    save(folder / "004.bmp", 4)
    save(folder / "005.dib", 5)
    save(folder / "006.tga", 6)
    save(folder / "007.pnm", 7, format="ppm")
    save(folder / "008.apng", 8, format="png")
    save(folder / "009.jp2", 9, irreversible=False)
    return 10


def links(folder: Path) -> int:
    plain(folder.parent / "elsewhere", range(3))
    folder.mkdir()
    (folder / "a").symlink_to(folder.parent / "elsewhere", target_is_directory=True)
    return 3


def tar_dots(folder: Path) -> int:
    make_tar(folder / "a.tar", {f"v1.5_p{seed}.png": encoded(seed) for seed in range(4)})
    return 4


def tar_hidden(folder: Path) -> int:
    members = {f"{seed}.png": encoded(seed) for seed in range(3)}
    make_tar(folder / "a.tar", members | {"._0.png": encoded(8), ".trash/1.png": encoded(9)})
    return 3


def tar_two(folder: Path) -> int:
    make_tar(folder / "a.tar", {"s0.left.png": encoded(0), "s0.right.png": encoded(1), "s1.PNG": encoded(2)})
    return 3


def cells(folder: Path) -> int:
    make_parquet(folder / "pictures.parquet", image=[encoded(seed) for seed in range(3)])
    return 3


def windows_metadata(folder: Path) -> int:
    plain(folder / "pics", range(3))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.DictWriter(file, ("file_name", "text"))
        rows.writeheader()
        rows.writerows({"file_name": f"pics\\{seed:03d}.png", "text": f"number {seed}"} for seed in range(3))
    return 3


def tar_from_above(folder: Path) -> int:
    make_tar(folder / "a.tar", {f"../x/{seed}.png": encoded(seed) for seed in range(3)})
    return 3


def paths_in_cells(folder: Path) -> int:
    plain(folder / "pics", range(3))
    make_parquet(folder / "a.parquet", image=[f"pics/{seed:03d}.png" for seed in range(3)])
    return 3


READ_AS_PLAIN = [
    exif,
    hidden,
    mpo,
    endings,
    links,
    tar_dots,
    tar_from_above,
    tar_hidden,
    tar_two,
    cells,
    paths_in_cells,
    windows_metadata,
]


@pytest.mark.parametrize("make", READ_AS_PLAIN, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_each_input_is_read_as_its_plain_twin_by_all(
    make: Callable[[Path], int], tmp_path: Path, tokenizer: Path
) -> None:
    count = make(tmp_path / "case")
    twin = plain(tmp_path / "twin", range(count))
    expected = as_set(judged_in(twin))
    assert len(expected) == count
    assert as_set(judged_in(tmp_path / "case")) == expected
    assert as_set(trained_on(tmp_path / "case")) == expected
    codes = [
        extracted_from(tmp_path / name, tokenizer, tmp_path / f"{name}-codes").read(np.arange(count))
        for name in ("case", "twin")
    ]
    assert as_set(codes[0]) == as_set(codes[1])


REFUSED = {
    "object array": (lambda path: np.savez(path.with_suffix(".npz"), arr_0=np.array([1, "a"], object)), "objects"),
    "floats": (lambda path: np.savez(path.with_suffix(".npz"), arr_0=np.zeros((3, 8, 8, 3))), "float64.*uint8"),
    "grey array": (lambda path: np.savez(path.with_suffix(".npz"), arr_0=np.zeros((3, 8, 8), np.uint8)), "uint8"),
    "another key": (lambda path: np.savez(path.with_suffix(".npz"), images=np.zeros((3, 8, 8, 3), np.uint8)), "images"),
    "statistics": (lambda path: np.savez(path.with_suffix(".npz"), mu=np.zeros(3), sigma=np.zeros((3, 3))), "statist"),
    "no npz": (lambda path: path.with_suffix(".npz").write_bytes(b"no"), "damaged"),
    "single array": (lambda path: np.save(path.with_suffix(".npy"), np.zeros((3, 8, 8, 3), np.uint8)), "np.savez"),
    "packed": (lambda path: (path.mkdir(), (path / "a.tar.gz").write_bytes(b"\x1f\x8b")), r"unpack a\.tar\.gz"),
    "packed file": (lambda path: path.with_suffix(".zip").write_bytes(b"PK"), "unpack it"),
    "packed tar": (lambda path: (path.mkdir(), (path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(600))), "compressed"),
    "animations": (
        lambda path: [
            (
                path.mkdir(exist_ok=True),
                Image.new("RGB", (8, 8), "red").save(
                    path / f"{n}.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
                ),
            )
            for n in range(3)
        ],
        "is an animation of 2 frames",
    ),
    "floats of unknown scale": (
        lambda path: [
            (path.mkdir(exist_ok=True), Image.fromarray(np.full((8, 8), 3.5, np.float32)).save(path / f"{n}.tif"))
            for n in range(3)
        ],
        "float values from 3.5 to 3.5",
    ),
    "wide integers": (
        lambda path: [
            (path.mkdir(exist_ok=True), Image.fromarray(np.full((8, 8), 70000, np.int32)).save(path / f"{n}.tif"))
            for n in range(3)
        ],
        "32-bit values from 70000 to 70000",
    ),
    "a caption that is no text": (
        lambda path: make_parquet(path.with_suffix(".parquet"), image=[encoded(0)] * 3, caption=[1, 2, 3]),
        "column `caption` holds '1'",
    ),
    "a list of what is no text": (
        lambda path: make_parquet(path.with_suffix(".parquet"), image=[encoded(0)] * 3, text=[[1.5]] * 3),
        "column `text` holds",
    ),
    "a name outside": (
        lambda path: (plain(path, range(3)), (path / "metadata.jsonl").write_text('{"file_name": "../x.png"}\n')),
        "not inside",
    ),
    "an absolute name": (
        lambda path: (plain(path, range(3)), (path / "metadata.json").write_text('[{"file_name": "/etc/hostname"}]')),
        "not inside",
    ),
    "two folders of one split": (
        lambda path: [plain(path / name, range(2)) for name in ("train", "val", "validation")],
        "two folders of one split",
    ),
    "pictures beside folders": (
        lambda path: (plain(path, range(2)), plain(path / "more", range(2))),
        "holds both pictures",
    ),
    "an array larger than its file": (lambda path: lying_array(path.with_suffix(".npz")), "would need"),
    "a tar cut off between two pictures": (
        lambda path: cut_off(make_tar(path / "a.tar", {f"{n}.png": encoded(n) for n in range(3)})),
        "damaged or cut off",
    ),
    "two tars one after another": (
        lambda path: (
            path.mkdir(),
            (path / "a.tar").write_bytes(2 * make_tar(path / "b", {"0.png": encoded(0)}).read_bytes()),
        ),
        "another tar follows",
    ),
    "text with a comma and no quotes": (
        lambda path: (
            plain(path, range(3)),
            (path / "metadata.csv").write_text("file_name,text\n000.png,a cat, grey\n"),
        ),
        "row 1 has more cells than the header",
    ),
    "labels below 0 in a csv": (
        lambda path: (plain(path, range(3)), (path / "metadata.csv").write_text("file_name,label\n000.png,-1\n")),
        "integers from 0 or strings, not '-1'",
    ),
    "links to nothing": (
        lambda path: (plain(path, range(3)), (path / "z.png").symlink_to(path / "nowhere.png")),
        "pictures cannot be read: z.png",
    ),
    "pictures without pixels": (
        lambda path: np.savez(path.with_suffix(".npz"), arr_0=np.zeros((3, 0, 8, 3), np.uint8)),
        r"uint8 \(3, 0, 8, 3\)",
    ),
    "a single array that is called .npz": (
        lambda path: path.with_suffix(".npz").write_bytes(single_array()),
        "damaged or not an .npz file",
    ),
    "labels larger than their file": (
        lambda path: lying_array(path.with_suffix(".npz"), "labels"),
        "labels .* would need",
    ),
    "two columns of one name": (
        lambda path: two_columns(path.with_suffix(".parquet")),
        "damaged or not a parquet file .*caption",
    ),
    "a class that is empty": (
        lambda path: make_tar(path / "a.tar", {"0.png": encoded(0), "0.cls": b"1", "1.png": encoded(1), "1.cls": b" "}),
        "row 1 has no label",
    ),
    "signed bytes": (
        lambda path: [(path.mkdir(exist_ok=True), (path / f"{n}.tif").write_bytes(signed_tiff())) for n in range(3)],
        "8-bit values .* whose scale",
    ),
    "labels of other pictures": (
        lambda path: np.savez(path.with_suffix(".npz"), arr_0=np.zeros((3, 8, 8, 3), np.uint8), labels=[1, 2]),
        r"labels \(2,\) for 3 pictures",
    ),
    "no text": (lambda path: (plain(path, range(2)), (path / "000.txt").write_bytes(b"caf\xe9")), "no UTF-8 text"),
}


def cut_off(tar: Path) -> None:
    """Leave the first two members, without the end that a tar has."""
    with tarfile.open(tar) as archive:
        end = archive.getmembers()[2].offset
    tar.write_bytes(tar.read_bytes()[:end])


def two_columns(path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [pa.array([encoded(0)] * 3), pa.array(["a"] * 3), pa.array(["b"] * 3)]
    pq.write_table(pa.Table.from_arrays(cells, names=["image", "caption", "caption"]), path)


def signed_tiff() -> bytes:
    data = io.BytesIO()
    Image.new("L", (8, 8), 200).save(data, "tiff", tiffinfo={339: 2})
    return data.getvalue()


def single_array() -> bytes:
    data = io.BytesIO()
    np.save(data, np.zeros((3, 8, 8, 3), np.uint8))
    return data.getvalue()


def lying_array(path: Path, name: str = "arr_0") -> None:
    """A file of some bytes whose array claims terabytes."""
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**30, 32, 32, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        if name != "arr_0":
            archive.writestr("arr_0.npy", single_array())
        archive.writestr(f"{name}.npy", header.getvalue())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_each_refusal_is_one_and_the_same(name: str, tmp_path: Path, tokenizer: Path) -> None:
    make, message = REFUSED[name]
    make(tmp_path / "case")
    source = next(path for path in tmp_path.iterdir() if path.name.startswith("case"))
    said = set()
    for reading in (trained_on, judged_in, lambda path: extracted_from(path, tokenizer, tmp_path / "codes")):
        with pytest.raises(ValueError, match=message) as refusal:
            reading(source)
        said.add(str(refusal.value))
    assert len(said) == 1 or all("pictures cannot be read" in text for text in said)  # of other counts


def test_grey_of_sixteen_bits_keeps_its_scale(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = ramp.astype(np.uint16) * 257
    for name in ("a.png", "a.tif", "a.pgm", "a.jp2"):
        options = {"irreversible": False} if name.endswith("jp2") else {}
        Image.fromarray(deep).save(tmp_path / name, **options)
        made = np.asarray(read_picture(tmp_path / name))
        np.testing.assert_array_equal(made, np.repeat(ramp[..., None], 3, -1), err_msg=name)
    big_endian = b"P5 16 16 65535\n" + deep.astype(">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(read_picture(io.BytesIO(big_endian)))[..., 0], ramp)
    rounded = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    Image.fromarray(rounded).save(tmp_path / "round.png")
    assert np.asarray(read_picture(tmp_path / "round.png"))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]
    ten_bits = b"P5 4 1 1023\n" + np.array([0, 4, 512, 1023], ">u2").tobytes()
    assert np.asarray(read_picture(io.BytesIO(ten_bits)))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(deep).save(tmp_path / "clear.png", transparency=0)
    made = np.asarray(read_picture(tmp_path / "clear.png"))[..., 0]
    assert made[0, 0] == 255  # transparent, so white
    np.testing.assert_array_equal(made.reshape(-1)[1:], ramp.reshape(-1)[1:])


def tiff(values: np.ndarray, bits: int, white_is_zero: bool) -> io.BytesIO:
    """A grey TIFF of 16-bit words, of which `bits` are stated."""
    height, width = values.shape
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, values.size * 2),
    ]
    body = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, value in entries:
        body += struct.pack("<HHII" if kind == 4 else "<HHIHxx", tag, kind, 1, value)
    return io.BytesIO(body + struct.pack("<I", 0) + values.astype("<u2").tobytes())


def test_white_may_be_zero() -> None:
    values = np.array([[0, 257, 65535]], np.uint16)
    assert np.asarray(read_picture(tiff(values, 16, False)))[0, :, 0].tolist() == [0, 1, 255]
    assert np.asarray(read_picture(tiff(values, 16, True)))[0, :, 0].tolist() == [255, 254, 0]


def test_odd_orientations_are_passed_over(tmp_path: Path) -> None:
    for orientation in (0, 9, 200):
        tags = Image.Exif()
        tags[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(picture(1)).save(path, exif=tags)
        np.testing.assert_array_equal(np.asarray(read_picture(path)), picture(1))
    path.write_bytes(encoded(1).replace(b"IDAT", b"IDAT", 1))
    save(tmp_path / "junk.jpg", 1, exif=b"Exif\0\0junk that is no tags", quality=95)
    assert read_picture(tmp_path / "junk.jpg").size == (20, 24)


def test_animations_are_upright_too(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    frames = [Image.fromarray(picture(seed)).transpose(Image.Transpose.ROTATE_90) for seed in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exif=tags)
    made = video.read_clip(tmp_path / "a.webp")
    np.testing.assert_array_equal(made, np.stack([picture(seed) for seed in range(3)]))


def test_a_thin_picture_costs_what_its_result_costs() -> None:
    thin = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30_000, 2, 3), dtype=np.uint8))
    for side in (thin, thin.transpose(Image.Transpose.ROTATE_90)):
        made = centre_crop(side, 256)
        assert made.size == (256, 256)
        draws = {"crop_side": 0.9, "crop_left": 0.5, "crop_top": 0.5, "mirror": 0.9}
        assert random_crop(side, 64, draws).size == (64, 64)
        assert squared(np.asarray(side), 128).shape == (128, 128, 3)
    # Where the whole can be resized, the square is the same but for rounding; up to 16 times its size it is that.
    long = Image.fromarray(picture(3, (40, 2000)))
    whole = np.asarray(long.resize((1600, 32), Image.Resampling.BICUBIC).crop((784, 0, 816, 32))).astype(int)
    part = np.asarray(resized_square(long, (1600, 32), (784, 0), 32, Image.Resampling.BICUBIC))
    assert np.abs(part - whole).max() <= 1
    wide = Image.fromarray(picture(3, (32, 400)))
    whole = np.asarray(wide.resize((400, 32), Image.Resampling.BICUBIC).crop((184, 0, 216, 32)))
    np.testing.assert_array_equal(np.asarray(centre_crop(wide, 32)), whole)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", 1)
    monkeypatch.setenv("NAR_MAX_PIXELS", "479")
    with pytest.raises(ValueError, match=r"a\.png has 20x24 pixels, more than 479; .*NAR_MAX_PIXELS"):
        read_picture(tmp_path / "a.png")
    frames = [Image.new("RGB", (20, 20), (n * 20, 0, 0)) for n in range(12)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert len(video.timeline(tmp_path / "a.gif").times) == 12
    monkeypatch.setenv("NAR_MAX_PIXELS", "399")
    with pytest.raises(ValueError, match=r"has 20x20 pixels, more than 399"):
        video.timeline(tmp_path / "a.gif")
    frames *= 2
    monkeypatch.setenv("NAR_MAX_PIXELS", "400")
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"has 24 frames of 20x20 pixels"):
        video.timeline(tmp_path / "b.gif")
    monkeypatch.setenv("NAR_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="NAR_MAX_PIXELS must be a whole number"):
        read_picture(tmp_path / "a.png")


# Files: splits, order, what is left out.


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val"), {"train": "train", "test": "val", "val": "val"}),
        (("Training", "Test"), {"train": "Training", "test": "Test", "t10k": "Test", "val": "Test"}),
        (("train", "validation", "test"), {"train": "train", "val": "validation", "test": "test"}),
        (("train", "valid"), {"test": "valid"}),
        (("test", "dev"), {"test": "test", "val": "dev"}),
    ],
)
def test_splits_are_found_by_their_usual_names(tmp_path: Path, names: tuple[str, ...], splits: dict[str, str]) -> None:
    for number, name in enumerate(names):
        for seed in range(number + 2):
            save(tmp_path / name / "cats" / f"{seed}.png", 10 * number + seed)
    for split, name in splits.items():
        expected = load_pictures(tmp_path / name, size=SIZE)
        found = load_pictures(tmp_path, size=SIZE, split=split)
        np.testing.assert_array_equal(found.images, expected.images)
        assert found.class_names == ("cats",)
    assert as_set(judged_in(tmp_path)) == as_set(judged_in(tmp_path / splits["test"]))


def test_a_split_that_is_missing_is_refused_with_what_may_be_given_instead(tmp_path: Path) -> None:
    plain(tmp_path / "train", range(3))
    with pytest.raises(FileNotFoundError, match=rf"no 'test'; .* such as {re.escape(str(tmp_path / 'train'))}$"):
        list(batches(tmp_path, 7, size=SIZE))
    assert as_set(judged_in(tmp_path / "train")) == as_set(trained_on(tmp_path / "train"))


def test_folders_are_classes_unless_all_are_splits(tmp_path: Path) -> None:
    for name in ("train", "car"):  # a railway's train
        save(tmp_path / name / "a.png", 1)
    found = open_source(tmp_path)
    assert found.class_names == ("car", "train")
    assert len(judged_in(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match="has no split 'test'"):
        open_source(tmp_path, split="test")


def test_training_holds_out_what_is_there_and_says_what_it_leaves(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("val", 2)):
        plain(tmp_path / "a" / name, range(count))
    train, heldout = DataConfig(source=str(tmp_path / "a"), size=SIZE).open()
    assert (len(train), len(heldout)) == (3, 2)
    plain(tmp_path / "a" / "test", range(4))
    with pytest.warns(UserWarning, match="val is not used"):
        train, heldout = DataConfig(source=str(tmp_path / "a"), size=SIZE).open()
    assert (len(train), len(heldout)) == (3, 4)
    train, heldout = DataConfig(source=str(tmp_path / "a"), size=SIZE, validation="val").open()
    assert len(heldout) == 2


def test_tars_and_tables_may_be_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        make_tar(tmp_path / "tars" / f"{split}-0000.tar", {f"{n}.png": encoded(n) for n in range(count)})
        make_parquet(tmp_path / "tables" / f"{split}-00000-of-00001.parquet", image=[encoded(0)] * count)
    for source in (tmp_path / "tars", tmp_path / "tables"):
        assert len(open_source(source)) == 3
        assert len(open_source(source, split="test")) == 2
        assert len(judged_in(source)) == 2


def test_files_are_in_natural_order_and_classes_in_that_of_text(tmp_path: Path) -> None:
    for name in ("10", "2", "1"):
        for number in (1, 10, 2):
            save(tmp_path / name / f"f{number}.png", number)
    found = open_source(tmp_path)
    assert found.class_names == ("1", "10", "2")
    assert list(found.names) == [f"{name}/f{number}.png" for name in ("1", "10", "2") for number in (1, 2, 10)]


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    plain(tmp_path / "cats", range(3))
    for name in ("cats/z.heic", "cats/b.heic", "cats/lonely.txt", "LICENSE", "cats/notes.pdf"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "cats" / "000.txt").write_text("a cat")
    left_out = (
        r"5 files are left out: 2 \.heic \(cats/b\.heic, cats/z\.heic\), 1 \.pdf \(cats/notes\.pdf\), "
        r"1 \.txt without a picture \(cats/lonely\.txt\), 1 without an ending \(LICENSE\)"
    )
    with pytest.warns(UserWarning, match=left_out):
        found = open_source(tmp_path)
    counts = found.counts()
    assert counts["num_pictures"] == 3
    assert sum(counts["left_out"].values()) == 5


def test_tars_say_what_they_leave_out(tmp_path: Path) -> None:
    members = {"a.png": encoded(0), "a.txt": b"words", "b.heic": b"x", "c.txt": b"no picture"}
    with pytest.warns(UserWarning, match=r"2 files are left out: 1 \.heic \(a\.tar:b\.heic\), 1 \.txt without a"):
        found = open_source(make_tar(tmp_path / "a.tar", members))
    assert found.captions == ["words"]


def test_words_that_are_missing_or_there_twice_are_said(tmp_path: Path) -> None:
    plain(tmp_path, range(3))
    for name in ("000.txt", "000.caption", "002.txt"):
        (tmp_path / name).write_text("" if name == "002.txt" else name)
    with pytest.warns(UserWarning, match="have no caption") as said:
        assert open_source(tmp_path).captions == ["000.txt", "", ""]
    assert [str(one.message) for one in said] == [
        "1 file is left out: 1 .caption beside a .txt (000.caption)",
        "2 of 3 pictures have no caption (001.png, 002.png)",
    ]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "001.png", "text": "one"}\n')
    (tmp_path / "metadata.csv").write_text("file_name,text\n001.png,two\n")
    with pytest.warns(UserWarning, match=r"1 \.csv \(metadata\.csv\)"):
        assert open_source(tmp_path).captions == ["one"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text,Text ,text\n001.png,one,two,three\n")
    with pytest.raises(ValueError, match=r"has the column 'text' twice in its header; leave one out"):
        open_source(tmp_path)


def test_a_name_that_comes_again_in_a_tar_is_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed in (0, 1):
            member = tarfile.TarInfo("a.png")
            member.size = len(encoded(seed))
            tar.addfile(member, io.BytesIO(encoded(seed)))
    with pytest.warns(UserWarning, match=r"1 file is left out: 1 of a name that comes again \(a\.tar:a\.png\)"):
        found = open_source(tmp_path / "a.tar")
    np.testing.assert_array_equal(np.asarray(found.picture(0)), picture(1))


def test_clips_for_a_tokenizer_of_pictures_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a\.npz holds clips and .* encodes pictures; take one of clips"):
        extract(tokenizer, open_source(tmp_path / "a.npz"), tmp_path / "codes", size=SIZE, quiet=True)


def test_a_link_to_a_class_is_said_and_takes_nothing_from_it(tmp_path: Path) -> None:
    for name in ("m", "n"):
        plain(tmp_path / name, range(2))
    for name in ("a", "z"):
        (tmp_path / name).symlink_to("m")
    with pytest.warns(UserWarning, match=r"2 that is a link to a folder that is read \(a, z\)"):
        found = open_source(tmp_path)
    assert (found.class_names, len(found)) == (("m", "n"), 4)


@pytest.mark.parametrize("name", ["#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir"])
def test_folders_of_systems_are_no_classes(tmp_path: Path, name: str) -> None:
    for folder in ("cats", "dogs", name):
        plain(tmp_path / folder, range(2))
    found = open_source(tmp_path)
    assert (found.class_names, len(found)) == (("cats", "dogs"), 4)


def test_every_listed_ending_can_be_read(tmp_path: Path) -> None:
    """By the Pillow and the PyAV that are installed, of which `make test-lowest` has the lowest."""
    for ending in sorted(pictures.ENDINGS):
        kind = {".apng": "png", ".pnm": "ppm", ".j2k": "jpeg2000"}.get(ending)
        image = Image.fromarray(picture(1))
        image = image.convert("1") if ending == ".pbm" else image.convert("L") if ending == ".pgm" else image
        image.save(tmp_path / f"a{ending}", format=kind)
        assert read_picture(tmp_path / f"a{ending}").size == (20, 24), ending
    codecs = {
        ".flv": "flv1",
        ".wmv": "wmv2",
        ".webm": "libvpx",
        ".ogv": "libvpx",
        ".3gp": "mpeg4",
        ".avi": "mpeg4",
        ".mpg": "mpeg2video",
        ".mpeg": "mpeg2video",
    }
    for ending in sorted(video.VIDEO_ENDINGS):
        path = write(tmp_path / f"a{ending}", 8, codecs.get(ending, "libx264"), size=(32, 48), rate=25)
        assert numbers(video.read_clip(path))[:6] == list(range(6)), ending


def test_broken_files_are_skipped_or_refused_as_is_asked(tmp_path: Path) -> None:
    plain(tmp_path / "set", range(150))
    (tmp_path / "set" / "zz.png").write_bytes(encoded(0)[:60])
    with pytest.warns(UserWarning, match=r"1 of 151 pictures cannot be read: zz\.png .*they are skipped"):
        assert len(judged_in(tmp_path / "set")) == 150
    with pytest.raises(ValueError, match="1 of 151 pictures cannot be read"):
        load_pictures(open_source(tmp_path / "set", broken="refuse"), size=SIZE)
    with pytest.raises(ValueError, match="broken must be one of skip, refuse"):
        open_source(tmp_path / "set", broken="ignore")


# Clips.


def test_clips_that_are_too_short_are_named(tmp_path: Path) -> None:
    for name, count in (("long0", 16), ("long1", 17), ("short0", 9), ("short1", 3)):
        write(tmp_path / f"{name}.mp4", count, size=(16, 16))
    with pytest.warns(UserWarning, match=r"2 files are left out: 2 of fewer than 16 frames \(short0.mp4, short1.mp4\)"):
        found = np.concatenate(list(batches(tmp_path, 2, num_frames=16)))
    assert len(found) == 2
    with pytest.warns(UserWarning, match=r"2 clips have fewer frames than the 16 asked for.*: short0.mp4, short1.mp4"):
        made = load_pictures(open_source(tmp_path, windows=Windows(16)), size=16)
    assert len(made) == 4
    with pytest.raises(ValueError, match="holds no clips of 20 frames; 4 files are left out"):
        list(batches(tmp_path, 2, num_frames=20))


def truncated(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_a_clip_that_ends_early_is_broken(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]
    for name in ("a.gif", "a.webp", "a.apng"):
        kind = {"format": "png"} if name == "a.apng" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **kind)
    containers = {".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx", ".wmv": "wmv2", ".ogv": "libvpx"}
    for name, codec in ((f"a{ending}", codec) for ending, codec in containers.items()):
        write(tmp_path / name, 40, codec, size=(64, 64), rate=10)
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 32
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    for path in sorted(tmp_path.iterdir()):
        assert len(video.timeline(path).times) in (12, 40), path
        truncated(path, 0.6)
        with pytest.raises(ValueError, match=path.name):
            video.read_clip(path)


def test_frames_are_clips_in_training_as_in_evaluation(tmp_path: Path) -> None:
    for clip in ("run/one", "run/two", "jump/three"):
        for number in range(12):
            path = tmp_path / "set" / clip / f"frame{number}.png"  # frame2 before frame10
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (level(number),) * 3).save(path)
    (tmp_path / "set" / "run" / "one.txt").write_text("someone runs")
    found = open_source(tmp_path / "set", windows=Windows(4, kind="start"))
    assert (found.class_names, found.labels.tolist()) == (("jump", "run"), [0, 1, 1])
    assert found.captions == ["", "someone runs", ""]
    assert [numbers(found.array(row, 16)) for row in range(3)] == [[0, 1, 2, 3]] * 3
    pieces = np.concatenate(list(batches(tmp_path / "set", 2, num_frames=6)))
    assert [numbers(piece) for piece in pieces] == [list(range(6)), list(range(6, 12))] * 3
    flat = open_source(tmp_path / "set" / "run", windows=Windows())
    assert (flat.class_names, len(flat)) == (("clip",), 2)


def test_strips_lie_down_or_stand(tmp_path: Path) -> None:
    cells = []
    for axis in (0, 1):
        data = io.BytesIO()
        parts = [np.full((8, 8, 3), level(n), np.uint8) for n in range(5)]
        Image.fromarray(np.concatenate(parts, axis=axis)).save(data, "png")
        cells.append(data.getvalue())
    table = make_parquet(tmp_path / "a.parquet", strip=cells)
    found = open_source(table, windows=Windows())
    assert [numbers(found.array(row, 8)) for row in (0, 1)] == [list(range(5))] * 2
    assert [numbers(clip) for clip in np.concatenate(list(batches(table, 2)))] == [list(range(5))] * 2


# Words.


def captions(source: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = open_source(source).captions
    assert found is not None
    return list(found)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "caption", "by file"])
def test_text_files_are_read_as_people_write_them(tmp_path: Path, kind: str, encoding: str, newline: str) -> None:
    wanted = ["a cat\u2028and\x85more", "ein Käfer \x0b\x1c", 'third, "so"']
    plain(tmp_path, range(3))
    rows = [{"file_name": f"{n:03d}.png", "text": text} for n, text in enumerate(wanted)]
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ("file_name", "text"), lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)
        files = {"metadata.csv": text.getvalue()}
    elif kind == "jsonl":
        files = {"metadata.jsonl": newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + newline}
    elif kind == "json":
        files = {"metadata.json": json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", newline)}
    elif kind == "by file":
        files = {"metadata.json": json.dumps({row["file_name"]: row["text"] for row in rows}, ensure_ascii=False)}
    else:
        files = {f"{n:03d}.{kind}": text + newline for n, text in enumerate(wanted)}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert captions(tmp_path) == [text.strip() for text in wanted]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "tar"])
def test_a_caption_may_have_several_wordings(tmp_path: Path, kind: str, tokenizer: Path) -> None:
    wordings = [["a red dog", "the dog"], ["one"], [], ["x", " ", "y"]]
    records = [{"caption": forms} for forms in wordings]
    if kind == "parquet":
        make_parquet(tmp_path / "set" / "train.parquet", image=[encoded(n) for n in range(4)], caption=wordings)
    elif kind == "tar":
        members = {}
        for n, record in enumerate(records):
            members |= {f"{n}.png": encoded(n), f"{n}.json": json.dumps(record).encode()}
        make_tar(tmp_path / "set" / "a.tar", members)
    else:
        plain(tmp_path / "set", range(4))
        rows = [{"file_name": f"{n:03d}.png", **record} for n, record in enumerate(records)]
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        (tmp_path / "set" / f"metadata.{kind}").write_text(text)
    found = open_source(tmp_path / "set")
    assert found.captions == ["a red dog", "one", "", "x"]
    codes = Codes.open(extract(tokenizer, found, tmp_path / "codes", size=SIZE, quiet=True))
    assert codes.wordings("plain") == [("a red dog", "the dog"), ("one",), ("",), ("x", "y")]
    assert codes.take(np.array([3, 0])).wordings("plain") == [("x", "y"), ("a red dog", "the dog")]
    assert {"a red dog", "the dog"} <= set(codes.wordings("varied")[0])


def test_names_are_compared_as_people_read_them(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "café")
    save(tmp_path / "a" / f"{apart}.png", 0)
    (tmp_path / "a" / "café.txt").write_text("coffee")
    assert captions(tmp_path / "a") == ["coffee"]
    save(tmp_path / "b" / f"{apart}.png", 0)
    (tmp_path / "b" / "metadata.jsonl").write_text('{"file_name": "./café.png", "text": "coffee"}\n')
    assert captions(tmp_path / "b") == ["coffee"]
    assert open_source(tmp_path / "b").picture(0).size == (20, 24)
    save(tmp_path / "c" / "train" / apart / "0.png", 0)
    save(tmp_path / "c" / "test" / "café" / "0.png", 0)
    assert open_source(tmp_path / "c").class_names == open_source(tmp_path / "c", split="test").class_names


def test_words_beside_pictures_in_tars_and_folders(tmp_path: Path) -> None:
    members = {
        "v1.5_a.png": encoded(0),
        "v1.5_a.TXT": b"\xef\xbb\xbfone\r\n",
        "s0.left.png": encoded(1),
        "s0.right.png": encoded(2),
        "s0.txt": b"both",
        "x.png": encoded(3),
        "x.json": b'{"caption": "from json"}',
        "y.png": encoded(4),
        "y.json": b'{"caption": "no"}',
        "y.caption": b"from caption",
        "z.png": encoded(5),
        "z.png.txt": b"whole name",
    }
    tar = make_tar(tmp_path / "a.tar", members)
    for name, content in members.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    wanted = {
        "v1.5_a": "one",
        "s0.left": "both",
        "s0.right": "both",
        "x": "from json",
        "y": "from caption",
        "z": "whole name",
    }
    for source, ending in ((tar, ""), (tmp_path / "folder", ".png")):
        found = open_source(source)
        names = [name.rpartition(":")[2].removesuffix(ending) for name in found.names]
        assert dict(zip(names, found.captions or (), strict=True)) == wanted


def test_classes_of_tars_are_names_or_numbers(tmp_path: Path) -> None:
    named = {}
    for n, label in enumerate(("cat\n", "dog\r\n", "cat")):
        named |= {f"{n}.png": encoded(n), f"{n}.cls": label.encode()}
    found = open_source(make_tar(tmp_path / "a.tar", named))
    assert (found.class_names, found.labels.tolist()) == (("cat", "dog"), [0, 1, 0])
    numbered = {}
    for n, label in enumerate((10, 2, 10)):
        numbered |= {f"{n}.png": encoded(n), f"{n}.cls": b"%d\n" % label}
    found = open_source(make_tar(tmp_path / "b.tar", numbered))
    assert (found.class_names, found.labels.tolist()) == (("2", "10"), [1, 0, 1])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_numbers_that_do_not_occur_make_no_class(tmp_path: Path, kind: str) -> None:
    labels = [3, 1, 2, 11]
    if kind == "parquet":
        make_parquet(tmp_path / "train.parquet", image=[encoded(n) for n in range(4)], label=labels)
    else:
        plain(tmp_path, range(4))
        rows = [{"file_name": f"{n:03d}.png", "label": label} for n, label in enumerate(labels)]
        text = "\n".join(map(json.dumps, rows))
        if kind == "csv":
            text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
        (tmp_path / f"metadata.{kind}").write_text(text)
    found = open_source(tmp_path)
    assert (found.class_names, found.labels.tolist()) == (("1", "2", "3", "11"), [2, 0, 1, 3])
    assert found.classes() == ["3", "1", "2", "11"]


def test_labels_of_arrays_are_numbers_unless_they_have_names(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images, labels=[10, 2, 0])
    assert open_source(tmp_path / "a.npz").classes() == [10, 2, 0]
    np.savez(tmp_path / "b.npz", arr_0=images, labels=[1, 0, 1], class_names=["0", "10"])
    assert open_source(tmp_path / "b.npz").classes() == ["10", "0", "10"]
    with pytest.raises(ValueError, match="names no classes"):
        open_source(plain(tmp_path / "flat", range(2))).classes()


def test_cells_of_a_csv_are_text_or_classes(tmp_path: Path) -> None:
    plain(tmp_path, range(3))
    rows = f'000.png, 42, 10\n001.png, {"long " * 40_000}, 2\n002.png, "a, b", 10\n'
    (tmp_path / "metadata.csv").write_text(f"file_name, text, label\n{rows}")
    found = open_source(tmp_path)
    assert found.captions is not None
    assert (found.captions[0], len(found.captions[1]), found.captions[2]) == ("42", 199_999, "a, b")
    assert (found.class_names, found.labels.tolist()) == (("2", "10"), [1, 0, 1])


def test_prompts_of_drawn_pictures_may_be_lists_and_captions_half_a_character(tmp_path: Path) -> None:
    plain(tmp_path / "a", range(2))
    records = [{"file": "000.png", "prompt": ["a dog", "the dog"]}, {"file": "001.png", "prompt": "\ud83d cut"}]
    (tmp_path / "a" / "samples.json").write_text(json.dumps(records))
    found = open_source(tmp_path / "a")
    assert (found.captions, found.rewordings) == (["a dog", "? cut"], [("the dog",), ()])


def test_names_of_classes_need_no_numbers(tmp_path: Path) -> None:
    found = open_source(make_parquet(tmp_path / "a.parquet", image=[encoded(0)] * 3, label_name=["b", "a", "b"]))
    assert (found.class_names, found.labels.tolist()) == (("a", "b"), [1, 0, 1])


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("train2017", "val2017"), ("Train", "eval")])
def test_usual_spellings_of_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, count in zip(names, (3, 2), strict=True):
        plain(tmp_path / "folders" / name, range(count))
        make_tar(tmp_path / "tars" / f"{name}_0000.tar", {f"{n}.png": encoded(n) for n in range(count)})
    for kind in ("folders", "tars"):
        parts = DataConfig(source=str(tmp_path / kind), size=SIZE).open()
        assert [len(part) for part in parts] == [3, 2]
        assert len(judged_in(tmp_path / kind)) == 2


def test_what_lies_beside_splits_is_said(tmp_path: Path) -> None:
    for name in ("train", "val"):
        plain(tmp_path / name, range(2))
    save(tmp_path / "lost.png", 3)
    with pytest.warns(UserWarning, match=r"1 file is left out: 1 beside the splits \(lost\.png\)"):
        assert len(open_source(tmp_path)) == 2


def test_pictures_that_a_table_names_are_not_left_out(tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path / "paths" / f"{seed}.png", seed)
        save(tmp_path / "cells" / f"{seed}.png", seed)
    make_parquet(tmp_path / "paths/data.parquet", image=["0.png", "1.png"])
    with pytest.warns(UserWarning, match=r"1 file is left out: 1 \.png \(2\.png\)"):
        assert len(open_source(tmp_path / "paths")) == 2
    cells = [{"bytes": None, "path": "0.png"}, {"bytes": encoded(9), "path": "2.png"}]  # the second is not read
    make_parquet(tmp_path / "cells/train.parquet", image=cells)
    make_parquet(tmp_path / "cells/test.parquet", image=[{"bytes": None, "path": "1.png"}])
    with pytest.warns(UserWarning, match=r"1 beside the splits \(2\.png\)"):
        found = load_pictures(open_source(tmp_path / "cells"), size=20)
    assert as_set(found.images) == as_set(
        np.stack([centre_crop(Image.fromarray(picture(seed)), 20) for seed in (0, 9)])
    )


@pytest.mark.parametrize("kind", ["json", "csv", "cls", "parquet"])
def test_labels_that_are_numbers_and_names_are_said(tmp_path: Path, kind: str) -> None:
    labels = ["cat", 5, "dog"]
    if kind == "cls":
        members = {f"{row}.png": encoded(row) for row in range(3)}
        source = make_tar(tmp_path / "a.tar", members | {f"{row}.cls": str(labels[row]).encode() for row in range(3)})
    elif kind == "parquet":  # files of one data set, each with its own type
        cells = [{"bytes": encoded(row), "path": None} for row in range(3)]
        make_parquet(tmp_path / "train-0.parquet", image=cells[::2], label=labels[::2])
        make_parquet(tmp_path / "train-1.parquet", image=cells[1:2], label=labels[1:2])
        source = tmp_path
    else:
        source = plain(tmp_path, range(3))
        rows = [{"file_name": f"{row:03d}.png", "label": label} for row, label in enumerate(labels)]
        lines = [f"{row['file_name']},{row['label']}" for row in rows]
        text = json.dumps(rows) if kind == "json" else "\n".join(["file_name,label", *lines])
        (tmp_path / f"metadata.{kind}").write_text(text)
    with pytest.warns(UserWarning, match="1 of 3 labels are numbers and the others names; all are taken as names"):
        found = open_source(source)
    assert found.class_names == ("5", "cat", "dog")
    assert len(found.counts()["notes"]) == 1


def test_frames_that_are_not_numbered_evenly_are_said(tmp_path: Path) -> None:
    for clip, rows in {"even": (0, 5, 10, 15), "gap": (8, 9, 10, 13), "one": (3,)}.items():
        for number in rows:
            save(tmp_path / clip / f"{clip}2_{number}.png", number)
    save(tmp_path / "cover/1.png", 0)
    save(tmp_path / "cover/cover.png", 1)
    with pytest.warns(UserWarning, match="frames of 2 of 4 clips are not numbered evenly") as said:
        found = open_source(tmp_path, windows=Windows())
    assert "gap (gap2_13.png after gap2_10.png)" in str(said[0].message)
    assert "cover (cover.png has no number)" in str(said[0].message)
    assert len(found) == 4


def test_frames_of_two_sizes_are_no_clip(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"a/{number}.png", number)
    Image.fromarray(picture(3)[:-2]).save(tmp_path / "a/3.png")
    with pytest.raises(ValueError, match="has frames of 20x22 and 20x24 pixels; a clip has one size"):
        load_pictures(open_source(tmp_path, windows=Windows()), size=8)


def test_a_metadata_file_says_which_pictures_it_does_not_list(tmp_path: Path) -> None:
    plain(tmp_path, range(3))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "001.png", "text": "one"}\n')
    with pytest.warns(UserWarning, match=r"2 files are left out: 2 not in metadata.jsonl \(000.png, 002.png\)"):
        assert len(open_source(tmp_path)) == 1


@pytest.mark.skipif(os.name == "nt", reason="no such links on this system")
@pytest.mark.parametrize("target", ["nowhere.csv", "/dev/null"])
def test_a_list_that_is_a_link_to_no_file_is_named(tmp_path: Path, target: str) -> None:
    (plain(tmp_path, range(3)) / "metadata.csv").symlink_to(target)
    with pytest.raises((OSError, ValueError), match=r"metadata\.csv"):
        open_source(tmp_path)


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    for name in ("pics #2", "a: b", "[x]", "2024", "null", "'q'", "ünï"):
        plain(tmp_path / name, range(2))
        assert len(open_source(tmp_path / name)) == 2
        assert isinstance(DataConfig(source=str(tmp_path / name)).open()[0], Source)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links on this system")
def test_a_loop_of_links_is_walked_once(tmp_path: Path) -> None:
    plain(tmp_path / "a", range(2))
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    assert len(judged_in(tmp_path)) == 2


def test_names_that_are_no_text_are_read_and_shown(tmp_path: Path, tokenizer: Path) -> None:
    try:
        save(tmp_path / "set" / os.fsdecode(b"caf\xe9.png"), 0)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    save(tmp_path / "set" / "b.png", 1)
    found = open_source(tmp_path / "set")
    assert sorted(found.names) == ["b.png", "caf?.png"]
    assert (
        len(extracted_from(tmp_path / "set", tokenizer, tmp_path / "codes")) == len(trained_on(tmp_path / "set")) == 2
    )


def test_a_turned_tiff_is_read_alike_from_its_path_and_its_bytes(tmp_path: Path) -> None:
    """Pillow maps uncompressed files into memory, and lays the rows of a turned one out wrongly."""
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(picture(0)).convert("L").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.tif", exif=tags)
    grey = np.asarray(Image.fromarray(picture(0)).convert("L").convert("RGB"))
    for opened in (tmp_path / "a.tif", io.BytesIO((tmp_path / "a.tif").read_bytes())):
        np.testing.assert_array_equal(np.asarray(read_picture(opened)), grey)


def test_mirrored_twins_are_not_taken_for_upright_ones() -> None:
    """The pictures of these tests are no mirror images of themselves, or turning them would show nothing."""
    image = Image.fromarray(picture(0))
    assert not np.array_equal(np.asarray(ImageOps.mirror(image)), np.asarray(image))
