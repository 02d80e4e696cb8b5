"""The pipeline: labels in, pictures out, the same picture however it is asked for."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nar import Pipeline, load_tokenizer
from nar.storage.folder import bundled_names, find_model


@pytest.fixture(scope="module")
def pipe(toy_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(toy_folder, device="cpu")


def test_names_and_numbers(pipe: Pipeline) -> None:
    out = pipe(["Pear", 2, "0"], num_images_per_prompt=2, seed=3)
    assert out.class_labels == [1, 1, 2, 2, 0, 0]
    assert [image.size for image in out.images] == [(8, 8)] * 6
    assert pipe("pear", seed=3).class_labels == [1]


def test_output_types(pipe: Pipeline) -> None:
    pictures = pipe([0, 1, 2], seed=3).images
    array = pipe([0, 1, 2], seed=3, output_type="np").images
    pixels = pipe([0, 1, 2], seed=3, output_type="pt").images
    codes = pipe([0, 1, 2], seed=3, output_type="codes").images
    assert array.shape == (3, 8, 8, 3)
    assert array.dtype == np.uint8
    assert all(np.array_equal(np.asarray(picture), row) for picture, row in zip(pictures, array, strict=True))
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels.abs().max() <= 1
    assert codes.shape == (3, 4, 4)
    assert np.array_equal(pipe.pictures(codes, "np"), array)


def test_batches_do_not_matter(pipe: Pipeline) -> None:
    whole = pipe([0, 1, 2], num_images_per_prompt=3, seed=8, output_type="codes").images
    for batch_size in (1, 2, 4):
        parts = pipe([0, 1, 2], num_images_per_prompt=3, seed=8, output_type="codes", batch_size=batch_size).images
        assert torch.equal(parts, whole)


def test_seeds(pipe: Pipeline) -> None:
    a = pipe([0] * 4, seed=8, output_type="codes")
    generator = torch.Generator().manual_seed(8)
    first, second = (pipe([0] * 4, generator=generator, output_type="codes") for _ in range(2))
    assert not torch.equal(first.images, second.images), "a generator goes on"
    again = pipe([0] * 4, generator=torch.Generator().manual_seed(8), output_type="codes")
    assert torch.equal(again.images, first.images)
    assert torch.equal(pipe([0] * 4, seed=first.seed, output_type="codes").images, first.images)
    for wrong in ({"generator": generator, "seed": 1}, {"generator": [generator, 1]}):
        with pytest.raises(ValueError, match="either seed, or"):
            pipe(0, **wrong)
    free = pipe([0] * 4, output_type="codes")
    assert torch.equal(pipe([0] * 4, seed=free.seed, output_type="codes").images, free.images)
    assert not torch.equal(pipe([0] * 4, seed=9, output_type="codes").images, a.images)


def test_labels_as_people_hold_them(pipe: Pipeline, toy_folder: Path) -> None:
    expected = pipe([2, 1], seed=1, output_type="codes").images
    for labels in (torch.tensor([2, 1]), np.array([2, 1]), (np.int64(2), "1")):
        assert torch.equal(pipe(labels, seed=1, output_type="codes").images, expected)
    known = pipe(0, seed=1, output_type="codes").images
    assert torch.equal(pipe(1, known=known.numpy(), seed=3, output_type="codes").images, known)
    numbered = Pipeline(pipe.model, pipe.tokenizer, class_names=["1", "10", "2"])
    assert [numbered.label_index(label) for label in (0, 1, 2, "1", "10", "2", "0")] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="reads no words"):
        Pipeline.from_pretrained(toy_folder, text_encoder="minilm")


def test_half_precision_reaches_the_decoder(pipe: Pipeline, toy_folder: Path) -> None:
    codes = pipe([0, 1, 2], seed=3, output_type="codes").images
    half = Pipeline.from_pretrained(toy_folder, device="cpu", dtype="bfloat16").decode(codes)
    assert half.dtype == torch.float32
    assert 0 < (half - pipe.decode(codes)).abs().mean() < 0.02


@pytest.mark.parametrize("codes", [torch.tensor(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 4, 4)])
def test_what_are_no_codes_are_refused(pipe: Pipeline, codes: torch.Tensor) -> None:
    for call in (pipe.decode, pipe.pictures):
        with pytest.raises(ValueError, match="codes must be"):
            call(codes)


def test_own_settings_are_the_default(pipe: Pipeline) -> None:
    assert pipe.sampling.guidance_scale == 1.5
    own = pipe([0] * 4, seed=1, output_type="codes").images
    assert torch.equal(pipe([0] * 4, seed=1, guidance_scale=1.5, output_type="codes").images, own)
    assert not torch.equal(pipe([0] * 4, seed=1, guidance_scale=1.0, output_type="codes").images, own)


def test_callback_sees_every_front(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe([0, 1], seed=1, callback_on_front_end=lambda _, front, codes: seen.append((front, int((codes >= 0).sum()))))
    assert [front for front, _ in seen] == list(range(7))
    assert [count for _, count in seen] == [2, 6, 12, 20, 26, 30, 32]
    half = torch.full((1, 4, 4), -1)
    half[0, 0] = 5
    picture = np.asarray(pipe.pictures(half)[0])
    assert (picture[2:] == 128).all(), "what is undecided is grey"


def test_known_codes(pipe: Pipeline) -> None:
    known = torch.full((2, 4, 4), -1)
    known[:, :2] = 7
    codes = pipe([0, 1], seed=1, known=known, output_type="codes").images
    assert (codes[:, :2] == 7).all()
    assert torch.equal(pipe([0, 1], seed=1, known=known.tolist(), output_type="codes").images, codes)


def test_every_picture_may_have_its_own_seed(pipe: Pipeline) -> None:
    each = pipe([0, 1, 2], seed=[5, 9, 5], output_type="codes", batch_size=2)
    assert each.seed == [5, 9, 5]
    for label, seed, codes in zip((0, 1, 2), (5, 9, 5), each.images, strict=True):
        assert torch.equal(pipe(label, seed=seed, output_type="codes").images[0], codes)
    assert torch.equal(pipe([0, 1, 2], seed=np.array([5, 9, 5]), output_type="codes").images, each.images)


def test_an_empty_number_format_is_no_default(toy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*, not ''"):
        Pipeline.from_pretrained(toy_folder, dtype="", device="cpu")


def test_what_one_call_may_ask_for(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nar.pipeline.requests.MOST_RESULTS", 6)
    assert len(pipe([0, 1], num_images_per_prompt=3).images) == 6
    with pytest.raises(ValueError, match=r"2 times num_images_per_prompt 4 are too many .* at most 6"):
        pipe([0, 1], num_images_per_prompt=4)
    with pytest.raises(ValueError, match="more than 6 are asked for"):
        pipe(itertools.repeat(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"class_labels": ["pears"]},
            r"unknown class 'pears' \(did you mean 'pear'\?\); classes: red apple, pear, plum",
        ),
        ({"class_labels": [3]}, "unknown class '3'"),
        ({"class_labels": ["-1"]}, "unknown class '-1'"),
        ({"class_labels": [0], "output_type": "jpeg"}, "output_type must be one of"),
        ({"class_labels": [0], "top_p": 2.0}, "top_p must be above 0 and at most 1"),
        ({"class_labels": [0], "num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least"),
        ({"class_labels": [0], "num_images_per_prompt": 10**9}, "1,000,000,000 are too many for one call"),
        ({"class_labels": [0], "batch_size": 0.5}, "batch_size must be a whole number of at least 1, not 0.5"),
        ({"class_labels": [0], "guidance_scale": 1e308}, "guidance_scale must be at least 0 and at most 1000"),
        ({"class_labels": [0], "top_k": math.nan}, "top_k must be a whole number, at least 0, not nan"),
        ({"class_labels": [0], "seed": [1, 2]}, "2 seeds for 1 results"),
        ({"class_labels": [0], "seed": ["1"]}, "seed must be a whole number, or a list .* not '1'"),
        ({"class_labels": [0], "known": torch.zeros(2, 4, 4).long()}, "known has 2 rows for 1 results"),
        (
            {"class_labels": [0], "known": torch.zeros(1, 4, 5).long()},
            r"known must be .* \(1, 4, 4\).* \(1, 4, 5\)",
        ),
        ({"class_labels": [0], "known": torch.zeros(1, 4, 4)}, r"known must be .*; not float32 \(1, 4, 4\)"),
        ({"class_labels": [0], "known": Image.new("RGB", (4, 4))}, "known must be .*; not Image"),
        ({"class_labels": {1, 2}}, r"give one, or a list of them, not a set: \{1, 2\}"),
        ({"class_labels": [0], "progress": torch.ones(2)}, r"progress must be true or false, not tensor"),
        ({"class_labels": [0], "seed": b"x"}, "give one, or a list of them, not a bytes: b'x'"),
        ({"class_labels": {"x": 1}}, "give one, or a list of them, not a dict"),
        ({"class_labels": [0], "seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_mistakes_are_named(pipe: Pipeline, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**values)


def test_models_are_found_or_named(toy_folder: Path, tmp_path: Path) -> None:
    assert find_model(toy_folder) == toy_folder
    with pytest.raises(FileNotFoundError, match="no model 'fashon'"):
        find_model("fashon")
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        find_model(tmp_path)
    foreign = tmp_path / "foreign"
    shutil.copytree(toy_folder, foreign)
    config = json.loads((foreign / "tokenizer/config.json").read_text())
    config["tokenizer"]["vocab_size"] = 16
    (foreign / "tokenizer/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantizer.embedding.weight is \(32, 4\), the model needs \(16, 4\)"):
        Pipeline.from_pretrained(foreign)


def test_a_device_that_is_not_there_is_named(toy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:99' is not usable here .*; try cpu"):
        Pipeline.from_pretrained(toy_folder, device="cuda:99")


def test_bundled_tokenizers_are_found_by_name() -> None:
    for name in ("fashion/tokenizer", "emoji/tokenizer", "clips/tokenizer"):
        assert load_tokenizer(name).config.vocab_size >= 1024


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_models_draw(name: str) -> None:
    pipe = Pipeline.from_pretrained(name, device="cpu")
    told = (
        {"prompt": ["a red apple", "cat face", "rocket"]} if pipe.model.config.text_dim else {"class_labels": [0, 1, 2]}
    )
    out = pipe(**told, seed=0, output_type="np")
    made = out.videos if pipe.makes_clips else out.images
    assert made.shape == (3, *pipe.pixel_shape, 3)
    assert made.std() > 20, "pictures, not a flat colour"
    if pipe.makes_clips:
        assert np.abs(np.diff(made.astype(float), axis=1)).mean() > 1, "clips that move"


def test_what_is_saved_is_checked(pipe: Pipeline, tmp_path: Path) -> None:
    for save in (pipe.save_pretrained, pipe.model.save_pretrained, pipe.tokenizer.save_pretrained):
        with pytest.raises(ValueError, match=r"dtype must be one of floating-point numbers, or null, not torch\.int8"):
            save(tmp_path / "m", dtype=torch.int8)
        with pytest.raises(ValueError, match="folder must be text or a Path, not 3"):
            save(3)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match="path must be text or a Path, not 3"):
        pipe(class_labels=0, seed=0).save(3)  # type: ignore[arg-type]
