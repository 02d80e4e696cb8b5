"""Words in, pictures out: what a prompt does, and what must not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_model
from nar import Pipeline
from nar.condition import NULL_CLASS, TextCondition
from nar.sampling import Sampling, generate
from nar.text import TextEncoder
from text_encoders import tiny_encoder

PROMPTS = ["a red apple", "the blue circle, a green square", "octopus", "cross", "", "a", "green triangle", "red , a"]


@pytest.fixture(scope="module")
def pipe(words_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(words_folder, device="cpu")


def codes_of(pipe: Pipeline, prompt: list[str] | str, **options: object) -> torch.Tensor:
    return pipe(prompt=prompt, output_type="codes", **{"seed": 4, **options}).images


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_in_a_batch_do_not_matter(pipe: Pipeline, temperature: float) -> None:
    options = {"seed": 4, "temperature": temperature, "output_type": "np"}
    together = pipe(prompt=PROMPTS, **options).images
    for batch_size in (1, 3):
        np.testing.assert_array_equal(pipe(prompt=PROMPTS, batch_size=batch_size, **options).images, together)
    others = ["the green octopus of a blue triangle", *PROMPTS[1:]]
    changed = pipe(prompt=others, **options).images
    np.testing.assert_array_equal(changed[1:], together[1:])
    assert not np.array_equal(changed[0], together[0])


def test_the_words_are_those_of_the_encoder(pipe: Pipeline, encoder_folder: Path) -> None:
    """The pipeline's codes are those of the encoder's features given to the model by hand, left-padded."""
    features, mask = TextEncoder.from_pretrained(encoder_folder, device="cpu", max_length=10).encode(PROMPTS[:4])
    assert not mask[0, 0]
    assert mask[:, -1].all()
    by_hand = generate(pipe.model, TextCondition(features, mask), Sampling(guidance_scale=2.0), seed=4)
    assert torch.equal(codes_of(pipe, PROMPTS[:4]), by_hand)


def test_an_empty_prompt_is_unconditional(pipe: Pipeline) -> None:
    null = TextCondition(torch.zeros(1, 10, 16), torch.zeros(1, 10, dtype=torch.bool)).drop(torch.tensor([True]))
    unconditional = generate(pipe.model, null, Sampling(), seed=4)
    for nothing in ("", "  \n", "\x00\x07\u200b"):
        assert torch.equal(codes_of(pipe, nothing), unconditional), repr(nothing)
        assert torch.equal(codes_of(pipe, nothing, guidance_scale=7.0), unconditional)


def test_nothing_needs_no_encoder(words_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(words_folder, device="cpu")
    pipe(prompt="")
    assert not isinstance(pipe.text, TextEncoder)
    pipe(prompt="apple")
    assert isinstance(pipe.text, TextEncoder)
    before = codes_of(pipe, "apple")
    pipe.drop_text_encoder()
    assert torch.equal(codes_of(pipe, "apple"), before)


def test_a_caption_is_encoded_once(words_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(words_folder, device="cpu")
    asked: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    options = {"negative_prompt": "cross", "num_images_per_prompt": 3, "guidance_scale": 2.0}
    once = codes_of(pipe, ["apple", "octopus"], **options)
    assert torch.equal(codes_of(pipe, ["apple", "octopus"], **options, batch_size=1), once)
    assert sorted(asked) == ["apple", "cross", "octopus"]
    monkeypatch.setattr("nar.text.captions.KEPT_CAPTIONS", 1)
    pipe.drop_text_encoder()
    assert torch.equal(codes_of(pipe, "apple"), codes_of(Pipeline.from_pretrained(words_folder, device="cpu"), "apple"))
    asked.clear()
    for prompt in ("apple", "octopus", "octopus", "apple"):
        codes_of(pipe, prompt)
    assert asked == ["octopus", "apple"], "one is kept"


def test_published_models_see_the_end_of_an_empty_caption(pipe: Pipeline) -> None:
    """Where a dropped caption keeps its own padding, an empty one has a single token: all dropped rows are the same."""
    model = make_model("text-published", grid=(4, 4), text_dim=16, text_length=10, vocab_size=32)
    published = Pipeline(model, pipe.tokenizer, text=pipe.text)
    words = published.condition(published.requests(prompt=["", "octopus"]))[0].text
    assert words is not None
    assert words.mask.sum(-1).tolist() == [1, 2]
    assert words.null is not None
    assert words.null.tolist() == [True, False]
    assert torch.isfinite(codes_of(published, ["", "octopus"], guidance_scale=3.0).float()).all()


def test_negative_prompts_take_the_place_of_null(pipe: Pipeline, encoder_folder: Path) -> None:
    features, mask = TextEncoder.from_pretrained(encoder_folder, device="cpu", max_length=10).encode(
        ["a red apple", "cross"]
    )
    positive, negative = TextCondition(features[:1], mask[:1]), TextCondition(features[1:], mask[1:])
    by_hand = generate(pipe.model, positive, Sampling(guidance_scale=3.0), negative=negative, seed=4)
    led = codes_of(pipe, "a red apple", negative_prompt="cross", guidance_scale=3.0)
    assert torch.equal(led, by_hand)
    plain = codes_of(pipe, "a red apple", guidance_scale=3.0)
    assert not torch.equal(led, plain)
    assert torch.equal(codes_of(pipe, "a red apple", negative_prompt=" ", guidance_scale=3.0), plain)
    # In one batch, each row has its own; the one without keeps the null condition.
    both = codes_of(pipe, ["a red apple", "a red apple"], negative_prompt=["cross", ""], guidance_scale=3.0, seed=4)
    assert torch.equal(both[0], led[0])
    second = generate(pipe.model, positive, Sampling(guidance_scale=3.0), seed=4, indices=[1])
    assert torch.equal(both[1], second[0])
    with pytest.raises(ValueError, match="a negative prompt needs guidance"):
        pipe(prompt="cross", negative_prompt="a", guidance_scale=1.0)


@pytest.mark.parametrize("curve", ["constant", "linear", "cosine", "power"])
def test_guidance_curves(pipe: Pipeline, curve: str) -> None:
    condition, _ = pipe.condition(pipe.requests(prompt=["octopus"]))
    by_hand = generate(pipe.model, condition, Sampling(guidance_scale=5.0, guidance_curve=curve), seed=4)
    assert torch.equal(codes_of(pipe, "octopus", guidance_scale=5.0, guidance_curve=curve), by_hand)


def test_several_pictures_of_each_prompt(pipe: Pipeline) -> None:
    out = pipe(prompt=("apple", "octopus"), num_images_per_prompt=3, seed=4, batch_size=4)
    assert out.names == ["apple"] * 3 + ["octopus"] * 3
    assert out.videos is None
    assert out.class_labels == [NULL_CLASS] * 6
    assert len(out.images) == 6
    arrays = [np.asarray(picture) for picture in out.images]
    assert not np.array_equal(arrays[0], arrays[1])


def test_strange_prompts(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match="cut"):
        long = codes_of(pipe, "red " * 25_000)
    assert long.shape == (1, 4, 4)
    assert torch.equal(codes_of(pipe, "red\x00 \x1bapple"), codes_of(pipe, "red  apple"))
    with pytest.raises(ValueError, match="a prompt must be a string, not int"):
        pipe(prompt=["red", 3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_labels": [0]}, "takes no class labels; it takes prompts"),
        ({"frames": np.zeros((2, 8, 8, 3), np.uint8), "prompt": "a"}, "takes no frames; it takes prompts"),
        ({}, "say what to make: this model takes prompts"),
        ({"prompt": []}, "nothing is asked for"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 of negative for 3 results"),
        ({"prompt": "a", "num_frames": 3}, "num_frames is for models that make clips"),
    ],
)
def test_mistakes_are_named(pipe: Pipeline, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**values)


def test_another_encoder_is_refused(words_folder: Path, tmp_path: Path) -> None:
    other = tiny_encoder(tmp_path / "other", "t5", seed=1)
    pipe = Pipeline.from_pretrained(words_folder, device="cpu", text_encoder=other)
    with pytest.raises(ValueError, match="another text encoder"):
        pipe(prompt="apple")
    none = Pipeline(pipe.model, pipe.tokenizer)
    with pytest.raises(ValueError, match=r"names no text encoder; .*--text-encoder FOLDER"):
        none(prompt="apple")
