"""Training from captions: what is learned, what is held out, what the model's folder records."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nar import Pipeline, cli
from nar.condition import TextCondition
from nar.data.codes import Codes
from nar.data.extract import extract
from nar.data.split import held_out_pairs, without_styles
from nar.data.wording import with_article, wordings
from nar.likelihood import token_losses
from nar.model import Transformer
from nar.storage.config import load
from nar.storage.folder import read_config
from nar.text import TextEncoder, TextEncoderConfig, found
from nar.tokenizer import load_tokenizer
from nar.training.batches import batch_of
from nar.training.distributed import Workers
from nar.training.models import ModelTask
from nar.training.recipe import Recipe
from nar.training.samples import composed_codes
from nar.training.tasks import run_recipe
from nar.training.words import Text
from text_encoders import tiny_encoder
from training_runs import equal, losses, nar, recipe, weights

pa = pytest.importorskip("pyarrow")
ALONE = Workers(0, 1, torch.device("cpu"))
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}
SHAPES = ("square", "cross", "circle", "triangle", "octopus", "apple")


def pictures(path: Path) -> Path:
    """108 pictures: a colour on top (the word), stripes below (the style), six things to be held out as groups."""
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(0), []
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            for style, stripes in (("flat", 8), ("noto", 2), ("old", 1)):
                for _ in range(2):
                    array = np.empty((16, 16, 3))
                    array[:8] = rgb
                    array[8:] = 255 * ((np.arange(8) // stripes) % 2)[:, None, None]
                    data = io.BytesIO()
                    noisy = (array + rng.normal(0, 4, array.shape)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(noisy).save(data, "png")
                    rows.append(
                        {
                            "image": {"bytes": data.getvalue(), "path": None},
                            "caption": f"{colour} {shape}",
                            "tags": [colour, "the"],
                            "style": style,
                            "hexcode": f"{shape}-{colour}",
                        }
                    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def words_recipe(folder: Path, **values: object) -> Path:
    encoder = folder / "encoder"
    if not encoder.exists():
        tiny_encoder(encoder, "bert")
    data = {
        "source": str(pictures(folder / "pictures.parquet")),
        "size": 16,
        "group": "hexcode",
        "wording": "varied",
        "heldout_pairs": 2,
        "heldout_share": 0.15,
    }
    return recipe(folder, data=data, text_encoder={"source": str(encoder), "max_length": 12}, **values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 150 steps."""
    folder = tmp_path_factory.mktemp("words")
    run_recipe(
        str(words_recipe(folder, num_images=150 * 32, checkpoint_every=1000, log_every=10)), [f"run={folder / 'run'}"]
    )
    return folder / "run"


def test_captions_that_clean_to_nothing_are_the_null_condition(encoder_folder: Path, tmp_path: Path) -> None:
    captions = ["red", " ", "\x07", "http://example.org"]
    for clean, blank in ((False, [False, True, True, False]), (True, [False, True, True, True])):
        config = TextEncoderConfig(str(encoder_folder), 8, clean)
        text = Text(config, captions, kind="cached", folders=[tmp_path], workers=Workers(0, 1, torch.device("cpu")))
        features = text.condition(text.places(captions)).text
        assert features is not None
        assert features.null is not None
        assert features.null.tolist() == blank


def test_low_rank_additions_to_a_model_of_words(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = words_recipe(tmp_path, num_images=32)
    adapted = run_recipe(str(path), [f"run={tmp_path / 'run'}", f"init={trained / 'model'}", "lora_rank=2"])
    assert adapted is not None
    assert len(Pipeline.from_pretrained(adapted)(prompt="red", seed=0).images) == 1


def test_captions_are_learned(trained: Path) -> None:
    """Held-out codes are more likely with their captions than without, and than with those of others."""
    assert losses(trained)[-1] < 0.8 * losses(trained)[0]
    model = Transformer.from_pretrained(trained / "model")
    right = losses(trained, "heldout_bits_per_token")[-1]
    assert right < losses(trained, "heldout_bits_per_token_without_words")[-1] - 0.05
    codes = Codes.open(trained / "codes" / "heldout")
    encoder = TextEncoder(TextEncoderConfig(**read_config(trained / "model")["text_encoder"]), device="cpu")
    captions = [forms[0] for forms in codes.wordings("varied")]
    other = {"red": "green", "green": "blue", "blue": "red", "flat": "old", "noto": "flat", "old": "noto"}
    wrong = [" ".join(other.get(word, word) for word in caption.split()) for caption in captions]
    bits = []
    for words in (captions, wrong):
        with torch.no_grad():
            tokens = torch.from_numpy(codes.read(np.arange(len(codes))))
            loss = token_losses(model, tokens, TextCondition(*encoder.encode(words)))
        bits.append(float(loss.mean()) / np.log(2))
    assert bits[0] == pytest.approx(right, abs=0.01)
    assert bits[0] < bits[1] - 0.05


def test_the_model_says_which_encoder_it_reads(trained: Path) -> None:
    config = read_config(trained / "model")
    assert config["text_encoder"].keys() == {"source", "max_length", "clean", "digest"}
    assert (config["model"]["text_dim"], config["model"]["text_length"]) == (16, 12)
    assert config["model"]["num_classes"] == 0
    assert config["class_names"] == []


def test_what_is_held_out_is_written_down_and_not_learned(trained: Path) -> None:
    record = json.loads((trained / "held-out.json").read_text())
    train, heldout = (Codes.open(trained / "codes" / name) for name in ("train", "heldout"))
    assert set(heldout.groups) == set(record["groups"])
    assert not set(train.groups) & set(record["groups"])
    assert len(record["pairs"]) == 2
    out = held_out_pairs(train.groups, train.styles or (), 2)
    assert {(train.groups[row], (train.styles or ())[row]) for row in np.flatnonzero(out)} == {
        (group, style) for group, style, _ in record["pairs"]
    }
    assert out.sum() == 4, "both pictures of either pair"
    assert losses(trained, "heldout_bits_per_token_of_pairs")


def test_styles_are_held_out(tmp_path: Path) -> None:
    path = words_recipe(tmp_path)
    options = [f"run={tmp_path / 'run'}", "data.heldout_pairs=0", "num_images=32"]
    run_recipe(str(path), [*options, "data.heldout_styles=[noto]"])
    assert json.loads((tmp_path / "run" / "held-out.json").read_text())["styles"] == ["noto"]
    recipe = load(Recipe, str(path), [*options, "data.heldout_styles=[noto]"])
    codes = Codes.open(tmp_path / "run" / "codes" / "train")
    (left,) = without_styles([codes], recipe.data.heldout_styles)
    assert 0 < len(left) < len(codes)
    assert "noto" not in (left.styles or ())
    rest, less = without_styles(
        [left, codes], recipe.data.heldout_styles
    )  # it is enough that one of the sets has the style
    assert len(rest) == len(less) == len(left)
    with pytest.raises(ValueError, match=r"no picture has the style 'notto'; styles: flat, noto, old"):
        run_recipe(str(path), [*options, "data.heldout_styles=[notto]", f"run={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match=r"900 pairs of group and style can't be held out"):
        run_recipe(str(path), [*options[:1], "data.heldout_pairs=900", f"run={tmp_path / 'other'}"])
    assert not (tmp_path / "other" / "codes").exists()


def test_a_training_from_captions_resumes_bit_for_bit(tmp_path: Path) -> None:
    path = words_recipe(tmp_path, dropout={"residual": 0.1})
    run_recipe(str(path), [f"run={tmp_path / 'straight'}"])
    run_recipe(str(path), [f"run={tmp_path / 'halves'}", "num_images=64"])
    (tmp_path / "halves" / "model" / "config.json").unlink()
    run_recipe(str(path), [f"run={tmp_path / 'halves'}"], override=True)
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "halves"))


MINI = Path(__file__).parent / "data" / "emoji-mini.parquet"


def composed_recipe(folder: Path, **values: object) -> Path:
    words_recipe(folder)
    data = {
        "source": str(MINI),
        "size": 16,
        "group": "hexcode",
        "wording": "varied",
        "composed": 0.4,
        "num_composed": 30,
    }
    return recipe(folder, data=data, text_encoder={"source": str(folder / "encoder"), "max_length": 12}, **values)


def test_composed_scenes_take_their_share_of_the_samples(tmp_path: Path) -> None:
    path = composed_recipe(tmp_path, batch_size=500, seed=3)
    task = ModelTask(load(Recipe, str(path), [f"run={tmp_path / 'run'}"]), ALONE)
    batch = batch_of(3, 0, num_samples=task.num_samples, batch_size=500)
    codes, condition, _ = task.fetch(batch)
    words = condition.text
    assert words is not None
    scenes = Codes.open(tmp_path / "run" / "codes" / "composed")
    assert len(scenes) == 30
    assert scenes.captions is not None
    picked = batch.draws["scene"] < 0.4
    assert picked.mean() == pytest.approx(0.4, abs=0.07)
    all_scenes = torch.from_numpy(scenes.read(np.arange(30)))
    assert task.text is not None
    prompts = task.text.condition(task.text.places(scenes.captions)).text
    assert prompts is not None
    seen = set()
    for row in np.flatnonzero(picked)[:60]:
        number = int(batch.draws["scene"][row] / 0.4 * 30)
        seen.add(number)
        assert torch.equal(codes[row], all_scenes[number])
        assert torch.equal(words.features[row], prompts.features[number])
    assert len(seen) > 20
    own = np.flatnonzero(~picked)
    assert np.array_equal(codes[own], task.train.codes.read(batch.indices[own]))
    assert task.heldout.read(np.arange(3))[0].shape == (3, 4, 4)


def test_scenes_are_composed_of_what_is_learned_and_by_the_seed(tmp_path: Path) -> None:
    path = composed_recipe(tmp_path)
    made = load(Recipe, str(path), [f"run={tmp_path / 'run'}"])
    source, _ = made.data.open()
    folder = extract(tmp_path / "tokenizer", source, tmp_path / "codes", size=16, quiet=True)
    train = Codes.open(folder)
    assert train.captions is not None
    learned = np.array([row for row, caption in enumerate(train.captions) if caption not in ("guitar", "lemon")])
    few = composed_codes(made, source, train.take(learned), tmp_path / "tokenizer", ALONE)
    all_runs = [
        composed_codes(
            dataclasses.replace(made, run=str(tmp_path / name), seed=seed), source, train, tmp_path / "tokenizer", ALONE
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, same, other = ([*(codes.captions or ())] for codes in all_runs)
    assert any("guitar" in prompt for prompt in first)
    assert not any("guitar" in prompt or "lemon" in prompt for prompt in few.captions or ())
    assert first == same
    assert first != other
    rows = np.arange(30)
    np.testing.assert_array_equal(all_runs[0].read(rows), all_runs[1].read(rows))


def test_a_training_with_composed_scenes_resumes_bit_for_bit(tmp_path: Path) -> None:
    path = composed_recipe(tmp_path)
    run_recipe(str(path), [f"run={tmp_path / 'straight'}"])
    run_recipe(str(path), [f"run={tmp_path / 'halves'}", "num_images=64"])
    (tmp_path / "halves" / "model" / "config.json").unlink()
    run_recipe(str(path), [f"run={tmp_path / 'halves'}"], override=True)
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "halves"))
    with pytest.raises(ValueError, match=r"data\.composed needs pictures \(data\.source\) and a text_encoder"):
        run_recipe(str(path), [f"run={tmp_path / 'none'}", "text_encoder.source="])
    with pytest.raises(ValueError, match=r"data\.composed must be at least 0 and below 1, not 1\.0"):
        run_recipe(str(path), [f"run={tmp_path / 'none'}", "data.composed=1.0"])


@pytest.mark.slow
@pytest.mark.parametrize("make", [words_recipe, composed_recipe])
def test_two_processes_learn_from_captions_what_one_does(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    run_recipe(str(path), [f"run={tmp_path / 'one'}"])
    nar("train", path, f"run={tmp_path / 'two'}", processes=2)
    for name in ("loss", "heldout_loss"):
        two, one = (torch.tensor(losses(tmp_path / run, name)) for run in ("two", "one"))
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def test_features_on_the_fly_are_those_on_disk(tmp_path: Path) -> None:
    path = words_recipe(tmp_path)
    for kind in ("cached", "on-the-fly"):
        run_recipe(str(path), [f"run={tmp_path / kind}", f"data.text_features={kind}"])
    assert (tmp_path / "cached" / "text").is_dir()
    assert not (tmp_path / "on-the-fly" / "text").exists()
    cached, fly = (torch.tensor(losses(tmp_path / kind)) for kind in ("cached", "on-the-fly"))
    torch.testing.assert_close(fly, cached, rtol=1e-3, atol=0)  # float16 on disk


def test_extracted_features_stand_for_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = words_recipe(tmp_path)
    arguments = [
        "extract",
        tmp_path / "tokenizer",
        "--data",
        tmp_path / "pictures.parquet",
        "--size",
        16,
        "--group",
        "hexcode",
        "--text-encoder",
        tmp_path / "encoder",
        "--max-length",
        12,
        "--wording",
        "varied",
        "-o",
        tmp_path / "codes",
    ]
    monkeypatch.setattr(sys, "argv", ["nar", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    data = [f"data.codes={tmp_path / 'codes'}", "data.source="]
    run_recipe(str(path), [f"run={tmp_path / 'more'}", *data, "prompts=[a strange new prompt]"])
    own = found(TextEncoderConfig(str(tmp_path / "encoder"), 12), tmp_path / "more" / "text")
    assert [len(features) for features in own] == [1], "only what is new is encoded"
    (tmp_path / "encoder").rename(tmp_path / "elsewhere")
    run_recipe(str(path), [f"run={tmp_path / 'run'}", *data])
    config = read_config(tmp_path / "run" / "model")["text_encoder"]
    assert config["source"] == str(tmp_path / "encoder")
    assert TextEncoder(TextEncoderConfig(**config | {"source": str(tmp_path / "elsewhere")})).dim == 16
    with pytest.raises(FileNotFoundError, match="is no text encoder"):
        run_recipe(str(path), [f"run={tmp_path / 'other'}", *data, "text_encoder.max_length=9"])


def test_a_model_of_captions_goes_on_at_a_larger_grid(trained: Path, tmp_path: Path) -> None:
    path = words_recipe(tmp_path)
    data = json.loads(json.dumps({"size": 32}))
    run_recipe(
        str(path),
        [
            f"run={tmp_path / 'run'}",
            f"init={trained / 'model'}",
            f"data.size={data['size']}",
            f"text_encoder.source={trained.parent / 'encoder'}",
        ],
    )
    model = Transformer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.grid == (8, 8)
    assert load_tokenizer(tmp_path / "run" / "model" / "tokenizer").config.vocab_size == model.config.vocab_size
    assert torch.equal(model.null_text, Transformer.from_pretrained(trained / "model").null_text)
    with pytest.raises(ValueError, match="reads captions"):
        run_recipe(str(path), [f"run={tmp_path / 'none'}", f"init={trained / 'model'}", "text_encoder.source="])
    with pytest.raises(ValueError, match="reads 12 text features of width 16"):
        run_recipe(str(path), [f"run={tmp_path / 'long'}", f"init={trained / 'model'}", "text_encoder.max_length=9"])


def test_captions_are_needed(tmp_path: Path) -> None:
    path = words_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"toy has no captions for text_encoder\.source; leave it out"):
        run_recipe(str(path), [f"run={tmp_path / 'run'}", "data.source=toy", "data.group=", "data.heldout_pairs=0"])
    with pytest.raises(ValueError, match=r"captions need text_encoder\.source"):
        run_recipe(str(path), [f"run={tmp_path / 'run'}", "text_encoder.source=", "model.text_dim=16"])


def test_wordings_vary_with_the_style_and_say_the_caption_first() -> None:
    forms = wordings("red apple", ["apple", "fruit", "food"], "fluent 3d")
    assert forms[:3] == ("red apple, fluent 3d", "red apple", "a red apple")
    assert forms[4] in ("apple fruit, fluent 3d", "apple food, fluent 3d")
    assert forms == wordings("red apple", ["apple", "fruit", "food"], "fluent 3d"), "always the same ones"
    styled = {wordings("red apple", [], style)[3] for style in ("noto", "flat", "twemoji", "fluent", "old", "new")}
    assert len({form.replace(form.split()[-1], "") for form in styled}) > 1
    assert wordings("sun") == ("sun", "a sun")
    assert wordings("") == ("",)


@pytest.mark.parametrize(
    ("caption", "spoken"),
    [
        ("red apple", "a red apple"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("grapes", "grapes"),
        ("glass of milk", "a glass of milk"),
        ("flag of chad", "the flag of chad"),
        ("hourglass not done", "an hourglass not done"),
        ("man with horns", "a man with horns"),
        ("1st medal", "1st medal"),
    ],
)
def test_articles(caption: str, spoken: str) -> None:
    assert with_article(caption) == spoken
