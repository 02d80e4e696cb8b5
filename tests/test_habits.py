"""A pipeline as people expect it: moved, saved, shared by threads, shown in notebooks; names of others are answered."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nar
from nar import Pipeline, Sampling
from nar.media.clips import as_array


@pytest.fixture(scope="module")
def pipe(toy_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(toy_folder, device="cpu")


@pytest.fixture(scope="module")
def words(words_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(words_folder, device="cpu")


@pytest.fixture(scope="module")
def clips(clips_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(clips_folder, device="cpu")


def test_what_it_is(pipe: Pipeline) -> None:
    assert (pipe.device, pipe.dtype, pipe.num_steps) == (torch.device("cpu"), torch.float32, 7)
    assert pipe.config is pipe.model.config
    assert [pipe.label_name(index) for index in (1, 99, -1)] == ["pear", "99", "-1"]
    assert "pictures of 8x8 from class labels; grid 4x4, 7 steps, float32 on cpu" in repr(pipe)


def test_first_argument_is_words_where_words_are_read(pipe: Pipeline, words: Pipeline) -> None:
    expected = words(prompt=["a red apple", "cross"], seed=1, output_type="codes").codes
    assert torch.equal(words(["a red apple", "cross"], seed=1, output_type="codes").codes, expected)
    assert words("a red apple", seed=1).names == ["a red apple"]
    assert pipe("pear", seed=1).class_labels == [1]
    with pytest.raises(ValueError, match="first argument is the prompt: leave prompt= out"):
        words("a red apple", prompt="cross")
    with pytest.raises(ValueError, match="first argument is the class labels: leave class_labels= out"):
        pipe("pear", class_labels=2)
    with pytest.raises(ValueError, match="takes no class labels; it takes prompts"):
        words(3)


def test_moving_to_a_format_and_back(pipe: Pipeline, toy_folder: Path) -> None:
    own = Pipeline.from_pretrained(toy_folder, device="cpu")
    expected = pipe([0, 1, 2], seed=3).codes
    assert own.to("cpu") is own
    assert own.to(torch.bfloat16).dtype == torch.bfloat16
    assert own([0], seed=3).codes.shape == (1, 4, 4)
    assert own.to("cpu", "float16").dtype == torch.float16
    assert own.to(dtype=torch.float32).dtype == torch.float32
    assert torch.equal(own([0, 1, 2], seed=3).codes, expected)
    with pytest.raises(ValueError, match="device 'cuda' is not usable here" if not torch.cuda.is_available() else ""):
        own.to("cuda" if not torch.cuda.is_available() else "xpu")


def test_saved_and_loaded(pipe: Pipeline, clips: Pipeline, toy_folder: Path, tmp_path: Path) -> None:
    changed = Pipeline(pipe.model, pipe.tokenizer, ["a", "b", "c"], Sampling(guidance_scale=1.25))
    if any("Packed" in type(layer).__name__ for layer in pipe.model.modules()):
        with pytest.raises(ValueError, match="packed for a CPU, and was read from no folder"):
            changed.save_pretrained(tmp_path / "packed")
    plain = Pipeline(
        nar.Transformer.from_pretrained(toy_folder), pipe.tokenizer, ["a", "b", "c"], Sampling(guidance_scale=1.25)
    )
    plain.save_pretrained(tmp_path / "changed")
    loaded = Pipeline.from_pretrained(tmp_path / "changed", device="cpu")
    assert (loaded.class_names, loaded.sampling.guidance_scale) == (("a", "b", "c"), 1.25)
    assert torch.equal(loaded("b", seed=1, guidance_scale=1.5).codes, pipe(1, seed=1).codes)
    clips.save_pretrained(tmp_path / "clips")  # packed: its weights are those of the folder that it came from
    again = Pipeline.from_pretrained(tmp_path / "clips", device="cpu")
    assert (again.frame_rate, again.continuation.counts) == (5.0, (0, 1, 3))
    assert torch.equal(again("cross", seed=1).codes, clips("cross", seed=1).codes)


def test_threads_share_a_pipeline(pipe: Pipeline) -> None:
    expected = [pipe([0, 1, 2], seed=seed, output_type="codes").codes for seed in range(4)]
    found: dict[int, torch.Tensor] = {}

    def sample(seed: int) -> None:
        found[seed] = pipe([0, 1, 2], seed=seed, output_type="codes", batch_size=1).codes

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], codes) for seed, codes in enumerate(expected))


def test_a_bar(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    monkeypatch.setattr("nar.progress.Progress.update", lambda _, count=1, **__: updates.append(count))
    pipe([0, 1, 2], seed=1, progress=True, batch_size=2)
    assert sum(updates) == 3 * pipe.num_steps


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("num_inference_steps", "steps follow from the grid, one pass a front: pipe.num_steps"),
        ("height", "give size="),
        ("return_dict", "a call returns an Output"),
        ("strength", "mode='replace' of pipe.edit"),
        ("mask_image", "pipe.edit\\(image, mask=PICTURE\\)"),
        ("guidance_rescale", "guidance_curve and guidance_interval"),
        ("num_samples", "num_images_per_prompt is the number"),
        ("guidence_scale", r"did you mean 'guidance_scale'\?"),
    ],
)
def test_other_names_are_answered(pipe: Pipeline, name: str, answer: str) -> None:
    with pytest.raises(TypeError, match=f"unknown argument '{name}'.*{answer}"):
        pipe(0, **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("scheduler", "can't be set: the generation order is pipe.model.layout.schedule"),
        ("guidance_scale", "can't be set: the model's own settings are pipe.sampling"),
        ("frame_rate", r"can't be set: out.save\(FILE, frame_rate=...\) plays clips at another rate"),
        ("pixel_shape", r"can't be set: Pipeline\(model, tokenizer\) takes other parts"),
        ("model", r"can't be set: Pipeline\(model, tokenizer\) takes other parts"),
        ("tokenizer", r"can't be set: Pipeline\(model, tokenizer\) takes other parts"),
    ],
)
def test_what_would_have_no_effect_cannot_be_set(pipe: Pipeline, name: str, answer: str) -> None:
    with pytest.raises(AttributeError, match=answer):
        setattr(pipe, name, 3.0)


def test_settings_are_set_as_such(pipe: Pipeline) -> None:
    other = pipe.with_heads("mean")
    other.sampling = Sampling(temperature=0)
    assert torch.equal(other(0, seed=1).codes, pipe(0, seed=1, temperature=0, guidance_scale=1.0).codes)
    with pytest.raises(TypeError, match=r"sampling must be a nar.Sampling, not \{'temperature': 0\}"):
        other.sampling = {"temperature": 0}  # type: ignore[assignment]


def test_other_names_of_loading_and_parts(pipe: Pipeline, toy_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"'torch_dtype': give dtype, such as torch.bfloat16"):
        Pipeline.from_pretrained(toy_folder, torch_dtype=torch.float32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'device_map': give device"):
        Pipeline.from_pretrained(toy_folder, device_map="auto")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown argument 'torch_dtype' of from_pretrained; there are folder, precis"):
        nar.Transformer.from_pretrained(toy_folder, torch_dtype=torch.float32)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown argument 'strength': what a mask shows is made anew"):
        pipe.edit(Image.new("RGB", (8, 8)), box=(0, 0, 4, 4), strength=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not 'latent' \(did you mean 'codes'\?\)"):
        pipe(0, output_type="latent")
    for name, answer in {
        "enable_xformers_memory_efficient_attention": "fast without asking",
        "enable_attention_slicing": "smaller batch_size",
        "enable_model_cpu_offload": "smaller batch_size",
        "scheduler": "generation order",
        "unet": "pipe.model",
        "safety_checker": "results are not filtered",
        "set_progress_bar_config": "progress=True",
        "state_dict": "pipe.model.state_dict",
    }.items():
        with pytest.raises(AttributeError, match=f"has no '{name}': .*{answer}"):
            getattr(pipe, name)
    with pytest.raises(AttributeError, match=r"has no 'vae': a pipeline has pipe.model, pipe.tokenizer"):
        pipe.vae  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no 'nothing_like_it'$"):
        pipe.nothing_like_it  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(pipe, "__array__")
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"can't be pickled or copied.*from_pretrained"):
            copied(pipe)  # type: ignore[operator]


def test_guidance_far_above_the_own(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"guidance_scale 7.5 is far above this model's own, 1.5: .*; try 1 to 3"):
        pipe(0, guidance_scale=7.5)


def test_a_saved_card_has_no_results_of_another_grid(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    config["training"] = {"images_seen": 5, "heldout": {"bits_per_token": 1.5}}
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    own = Pipeline.from_pretrained(tmp_path / "own", device="cpu")
    for saved, there in ((own, True), (own.at_grid((5, 5)), False)):
        saved.save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved/config.json").read_text())["training"]
        assert written["images_seen"] == 5
        assert ("heldout" in written) is there is ("| held-out |" in (tmp_path / "saved/README.md").read_text())


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_pictures_are_a_list_and_saved(pipe: Pipeline, tmp_path: Path, output_type: str) -> None:
    out = pipe([0, 1], num_images_per_prompt=3, seed=1, output_type=output_type)
    assert len(out) == len(list(out)) == 6
    assert np.array_equal(np.asarray(out[2]), np.asarray(out.images[2]))
    assert torch.equal(out.codes, pipe([0, 1], num_images_per_prompt=3, seed=1, output_type="codes").images)
    assert repr(out) == "<Output: 6 pictures of red apple, pear, seed 1>"
    for name in ("sheet.png", "sheet.jpg", "sheet.webp"):
        with Image.open(out.save(tmp_path / name)) as sheet:
            assert 3 * 96 < sheet.width < 4 * 96, "a row for each class"
    out.save(tmp_path / "folder")
    pictures = [np.asarray(Image.open(tmp_path / f"folder/{index:06d}.png")) for index in range(6)]
    with np.load(out.save(tmp_path / "all.npz")) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], np.stack(pictures))
        assert arrays["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    one = pipe(1, seed=1, output_type=output_type)
    with Image.open(one.save(str(tmp_path / "one.png"))) as picture:
        assert picture.size == (8, 8), "one picture is saved as it is"
    for lower, upper in (("one.png", "ONE.PNG"), ("one.jpg", "ONE.JPG"), ("one.npz", "ONE.NPZ")):
        assert one.save(tmp_path / upper).is_file()
        assert one.save(tmp_path / lower).read_bytes() == (tmp_path / upper).read_bytes()
    for wrong in ("a.mp4", "a.gif", "a.tiff"):
        with pytest.raises(ValueError, match=r"pictures are saved as .png, .jpg, .* not '\."):
            out.save(tmp_path / wrong)


def test_clips_are_saved(clips: Pipeline, tmp_path: Path) -> None:
    out = clips("cross", seed=1)
    expected = clips("cross", seed=1, output_type="np").videos[0]
    assert out.frame_rate == 5.0
    for name in ("a.gif", "a.webp", "a.mp4", "A.GIF", "A.WEBP", "A.MP4"):
        assert as_array(out.save(tmp_path / name)).shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(as_array(tmp_path / "a.webp"), expected)
    np.testing.assert_array_equal(as_array(out.save(tmp_path / "folder") / "000000"), expected)
    with Image.open(out.save(tmp_path / "strip.png")) as strip:
        assert strip.width > 5 * 64


def test_notebooks(pipe: Pipeline, clips: Pipeline) -> None:
    out = pipe([0, 1], seed=1)
    png = out._repr_png_()
    assert png is not None
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert out._repr_html_() is None
    codes = pipe([0, 1], seed=1, output_type="codes")
    assert codes._repr_png_() is codes._repr_html_() is None
    with pytest.raises(ValueError, match=r"codes have no pixels: give them to pipe.pictures\(codes\)"):
        codes.save("x.png")
    html = clips("cross", seed=1)._repr_html_()
    assert html is not None
    assert html.startswith('<img alt="1 clip" src="data:image/webp;base64,')


def test_public_names_are_listed() -> None:
    assert set(nar.__all__) <= set(dir(nar))
    assert "Any" not in dir(nar)


def test_one_head_may_decide(pipe: Pipeline, clips: Pipeline) -> None:
    mean, *alone = (
        pipe.with_heads(heads)([0, 1, 2], seed=3).codes for heads in ("mean", "horizontal", "vertical", "mean")
    )
    assert torch.equal(mean, pipe([0, 1, 2], seed=3).codes)
    assert torch.equal(mean, alone[-1])
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(mean, alone[0])
    with pytest.raises(ValueError, match="no temporal head can decide: this model has heads horizontal, vertical"):
        pipe.with_heads("temporal")
    assert clips.with_heads("temporal")("cross", seed=1).codes.shape == clips("cross", seed=1).codes.shape


def test_one_head_goes_on_deciding(pipe: Pipeline, toy_folder: Path, tmp_path: Path) -> None:
    """Whatever else is changed: the head, the grid, the number format; and it is not lost in a folder."""
    one = pipe.with_heads("horizontal")
    for heads in ("mean", "vertical"):
        assert torch.equal(one.with_heads(heads)([0, 1], seed=3).codes, pipe.with_heads(heads)([0, 1], seed=3).codes)
    larger = one.at_grid((5, 5))
    assert larger.model.row == 0
    assert torch.equal(larger(1, seed=3).codes, pipe.at_grid((5, 5)).with_heads("horizontal")(1, seed=3).codes)
    moved = Pipeline.from_pretrained(toy_folder, device="cpu", dtype="int8").with_heads("horizontal").to("float32")
    assert torch.equal(moved([0, 1], seed=3).codes, one([0, 1], seed=3).codes)
    plain = Pipeline(nar.Transformer.from_pretrained(toy_folder), pipe.tokenizer).with_heads("vertical")
    for saved in (one, plain, plain.model):
        with pytest.raises(ValueError, match=r"one head decides .*, which a folder does not record: save "):
            saved.save_pretrained(tmp_path / "saved")
    one.with_heads("mean").save_pretrained(tmp_path / "saved")


def test_moving_leaves_alone_what_shares_the_weights(toy_folder: Path, words_folder: Path) -> None:
    """A model that is not packed is moved in place, and so is a tokenizer: that of other pipelines too."""
    model = nar.Transformer.from_pretrained(toy_folder)
    own = Pipeline(model, Pipeline.from_pretrained(toy_folder, device="cpu").tokenizer)
    one, larger = own.with_heads("horizontal"), own.at_grid((5, 5))
    expected, sampled = one([0, 1], seed=3).codes, larger([0, 1], seed=3).codes
    assert own.to("bfloat16").dtype == torch.bfloat16
    assert own([0, 1], seed=3).codes.shape == (2, 4, 4)
    assert (one.dtype, larger.dtype, model.dtype) == (torch.float32,) * 3
    assert torch.equal(one([0, 1], seed=3).codes, expected)
    assert one.to("float16").model.row == 0
    assert torch.equal(larger([0, 1], seed=3).codes, sampled)
    kept = larger.tokenizer
    del one
    gc.collect()
    assert larger.to("bfloat16").tokenizer is kept is larger.continuation.tokenizer  # nothing else has it
    words = Pipeline.from_pretrained(words_folder, device="cpu")
    encoder, other = words.text_encoder(), words.with_heads("mean")
    words.to("bfloat16")
    assert words.text_encoder() is not encoder is other.text_encoder()
    assert words("a red apple", seed=1).names == ["a red apple"]
