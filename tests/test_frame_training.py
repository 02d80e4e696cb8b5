"""Training of frame prediction: what given frames teach, with words and classes or alone, with tokenizers of both
kinds; and that the model's folder continues clips."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nar import Pipeline, cli
from nar.condition import NULL_CLASS, ClassCondition, PrefixCondition, TextCondition
from nar.data.clips import ClipSource
from nar.data.codes import Codes
from nar.data.extract import extract
from nar.data.open import open_source
from nar.likelihood import token_losses
from nar.media.crops import views
from nar.media.video import Windows
from nar.model import ModelConfig, Transformer
from nar.pipeline.continuation import Continuation, prefix_grid
from nar.storage.config import load
from nar.storage.folder import read_config
from nar.tokenizer import load_tokenizer
from nar.training.batches import Batch, batch_of
from nar.training.distributed import Workers
from nar.training.models import ModelTask
from nar.training.recipe import Recipe
from nar.training.tasks import run_recipe
from nar.training.words import dropped
from text_encoders import tiny_encoder
from toy_models import causal, larp
from training_runs import equal, losses, nar, weights

pa = pytest.importorskip("pyarrow")
ALONE = Workers(0, 1, torch.device("cpu"))
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}
LENGTHS = {"causal": 5, "larp": 6}
GIVEN = {"causal": [0, 1, 3], "larp": [2]}


def moving_squares(path: Path, length: int, count: int = 300) -> Path:
    """Clips of 8x8 pixels in which a square moves on a ring: to the left or right (the class), in a colour (the word).

    They are loops, and where the square is after some frames follows from the first two.
    """
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        colour, step = ("red", "green", "blue")[number % 3], (-1, 1)[number // 3 % 2]
        frames, first = np.full((length, 8, 8, 3), 255, np.uint8), rng.integers(8)
        for time, frame in enumerate(frames):
            frame[2:6, (first + step * time + np.arange(4)) % 8] = COLOURS[colour]
        data = io.BytesIO()
        Image.fromarray(frames.reshape(-1, 8, 3)).save(data, "png")
        rows.append(
            {
                "strip": {"bytes": data.getvalue(), "path": None},
                "caption": f"{colour} square",
                "kind": "left" if step < 0 else "right",
                "hexcode": str(number),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def recipe(folder: Path, kind: str = "causal", *, words: bool = True, **values: Any) -> Path:
    length = LENGTHS[kind]
    tokenizer, encoder = folder / kind, folder / "encoder"
    if not tokenizer.exists():
        (causal() if kind == "causal" else larp()).save_pretrained(tokenizer)
        moving_squares(folder / "clips.parquet", length)
    if words and not encoder.exists():
        tiny_encoder(encoder, "bert")
    data = {
        "source": str(folder / "clips.parquet"),
        "size": 8,
        "group": "hexcode",
        "label": "kind",
        "heldout_share": 0.2,
        "frame_rate": 5.0,
    }
    told = {"text_encoder": {"source": str(encoder), "max_length": 12}, "classes": True, "frame_dropout": 0.1}
    settings = {
        "task": "model",
        "data": data,
        "tokenizer_path": str(tokenizer),
        "given_frames": GIVEN[kind],
        "model": {"dim": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 64},
        "optim": {"learning_rate": 3e-3, "warmup_images": 64},
        "batch_size": 32,
        "num_images": 128,
        "log_every": 1,
        "preview_every": 100,
        "checkpoint_every": 2,
        **(told if words else {}),
        **values,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 150 steps on classes, words, and none, one or three frames."""
    folder = tmp_path_factory.mktemp("frames")
    path = recipe(folder, num_images=150 * 32, checkpoint_every=1000, preview_every=150, log_every=10)
    run_recipe(str(path), [f"run={folder / 'run'}"])
    return folder / "run"


def bits(model: Transformer, continuation: Continuation, codes: torch.Tensor, given: torch.Tensor, count: int) -> float:
    """Bits of a held-out token that is not given, told nothing but `count` frames of `given`."""
    size, config = len(codes), model.config
    last = torch.arange(config.text_length) == config.text_length - 1
    null = torch.ones(size, dtype=torch.bool)
    condition = (
        ClassCondition(torch.full((size,), NULL_CLASS))
        | TextCondition(torch.zeros(size, config.text_length, config.text_dim), last.expand(size, -1), null)
        | continuation.masked(given[:, : config.prefix_grid[0]], [count] * size)
    )
    with torch.no_grad():
        found = token_losses(model, codes, condition)
    places = torch.arange(config.grid[0])[:, None, None].expand(config.grid).flatten()[model.layout.order]
    return float(found[:, places >= 1 + (count - 1) // 2].mean()) / np.log(2)


def test_given_frames_tell_what_follows(trained: Path) -> None:
    """The loss falls, and what follows is more likely after the right frames than after those of another clip."""
    assert losses(trained)[-1] < 0.6 * losses(trained)[0]
    model = Transformer.from_pretrained(trained / "model")
    continuation = Continuation(model, load_tokenizer(trained / "model" / "tokenizer"), GIVEN["causal"])
    heldout = Codes.open(trained / "codes" / "heldout")
    codes = torch.from_numpy(heldout.read(np.arange(len(heldout))))
    for count in (1, 3):
        right, wrong = (bits(model, continuation, codes, given, count) for given in (codes, codes.roll(1, 0)))
        assert right < wrong - 0.05, f"{count} frames"
    logged = {
        name: losses(trained, f"heldout_{name}")[-1]
        for name in (
            "loss",
            "bits_per_token",
            "bits_per_token_given_1",
            "bits_per_token_given_3",
            "bits_per_token_without_words",
        )
    }
    given = [logged[name] for name in ("bits_per_token", "bits_per_token_given_1", "bits_per_token_given_3")]
    assert logged["loss"] == pytest.approx(np.mean(given) * np.log(2), rel=1e-4)
    assert logged["bits_per_token_without_words"] > logged["bits_per_token"]


def test_the_folder_continues_clips(trained: Path) -> None:
    config = read_config(trained / "model")
    assert config["given_frames"] == [0, 1, 3]
    assert config["frame_rate"] == 5.0
    assert config["class_names"] == ["left", "right"]
    assert config["model"]["prefix_grid"] == [2, 2, 2]
    pipe = Pipeline.from_pretrained(trained / "model", device="cpu")
    source = open_source(trained.parent / "clips.parquet", size=8, windows=Windows())
    clip = source.array(1, 8)
    for count in (1, 3):
        video = pipe(frames=clip[:count], prompt="green square", seed=0, output_type="np").videos[0]
        np.testing.assert_array_equal(video[:count], clip[:count])
        assert len(video) == 5
    assert len(pipe("left", prompt="red square", seed=0).videos[0]) == 5
    sheet = Image.open(trained / "previews" / "0000150.png")
    assert sheet.height > 8 * 64, "a row of frames for each prompt and each continued clip"


@pytest.mark.parametrize("kind", ["causal", "larp"])
def test_a_training_of_frames_resumes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    path = recipe(tmp_path, kind, words=False, dropout={"residual": 0.1})
    run_recipe(str(path), [f"run={tmp_path / 'straight'}"])
    run_recipe(str(path), [f"run={tmp_path / 'halves'}", "num_images=64"])
    (tmp_path / "halves" / "model" / "config.json").unlink()
    run_recipe(str(path), [f"run={tmp_path / 'halves'}"], override=True)
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "halves"))


@pytest.mark.slow
def test_two_processes_learn_from_frames_what_one_does(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    run_recipe(str(path), [f"run={tmp_path / 'one'}"])
    nar("train", path, f"run={tmp_path / 'two'}", processes=2)
    for name in ("loss", "heldout_loss"):
        two, one = (torch.tensor(losses(tmp_path / run, name)) for run in ("two", "one"))
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def task(path: Path, *overrides: str) -> ModelTask:
    return ModelTask(load(Recipe, str(path), overrides), ALONE)


def first_batch(made: ModelTask) -> Batch:
    return batch_of(made.recipe.seed, 0, num_samples=made.num_samples, batch_size=made.recipe.batch_size)


def test_given_frames_are_drawn_by_sample_and_not_part_of_the_loss(tmp_path: Path) -> None:
    path = recipe(tmp_path, words=False, batch_size=256, classes=True)
    made = task(path, f"run={tmp_path / 'run'}", "frame_dropout=0.4")
    batch = first_batch(made)
    codes, condition, _ = made.fetch(batch)
    assert condition.kinds == ("labels", "prefix")
    prefix = condition.prefix
    assert prefix is not None
    assert prefix.mask is not None
    assert torch.equal(prefix.codes, codes[:, :2])
    steps = prefix.mask[:, :, 0, 0].sum(1)
    shares = [float((steps == number).float().mean()) for number in range(3)]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.08)  # 0.4, and a third of the rest
    again = made.fetch(batch)[1].prefix
    assert again is not None
    assert torch.equal(again.mask, prefix.mask)
    per_token = torch.rand(256, 12, generator=torch.Generator().manual_seed(0))
    per_sample = made.of_samples(per_token, condition)
    in_raster = torch.empty_like(per_token)
    in_raster[:, made.module.layout.order] = per_token
    for row in (*range(20),):
        torch.testing.assert_close(per_sample[row], in_raster[row, 4 * int(steps[row]) :].mean())
    loss, _ = made.loss(batch, (codes, condition, None))
    assert loss.item() == pytest.approx(np.log(24), abs=1e-3), "a new model knows nothing"


def test_a_tokenizer_of_whole_clips_is_given_frames_that_stand_still(tmp_path: Path) -> None:
    """As published: the condition is the codes of the given frames, the last of them repeated; all codes are drawn."""
    path = recipe(
        tmp_path,
        "larp",
        words=False,
        data={
            "source": str(tmp_path / "clips.parquet"),
            "size": 8,
            "heldout_share": 0.2,
            "views": "flip",
        },
    )
    made = task(path, f"run={tmp_path / 'run'}")
    assert made.class_names == ()
    assert made.module.config.prefix_grid == made.module.config.grid == (3, 2, 2)
    batch = first_batch(made)
    condition = made.fetch(batch)[1]
    prefix = condition.prefix
    assert condition.kinds == ("prefix",)
    assert prefix is not None
    assert prefix.mask is None
    assert made.continuation is not None
    source = made.recipe.data.open()[0]
    for row, index in enumerate(batch.indices[:6]):
        mirrored = int(batch.draws["view"][row] * 2)
        clip = torch.from_numpy(source.views(int(index), 8, "flip")[mirrored].copy()).permute(3, 0, 1, 2)
        expected = made.continuation.condition([clip[:, :2].float() / 127.5 - 1]).prefix
        assert expected is not None
        assert torch.equal(prefix.codes[row], expected.codes[0])


def test_frames_of_whole_clips_are_extracted_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, "larp", words=False)
    arguments = [
        "extract",
        tmp_path / "larp",
        "--data",
        tmp_path / "clips.parquet",
        "--size",
        8,
        "--frames",
        6,
        "--group",
        "hexcode",
        "--label",
        "kind",
        "-o",
        tmp_path / "codes",
    ]

    def run(*further: object) -> None:
        monkeypatch.setattr(sys, "argv", ["nar", *map(str, (*arguments, *further))])
        with pytest.raises(SystemExit, match="0"):
            cli.main()

    run()
    data = [f"data.codes={tmp_path / 'codes'}", "data.source="]
    with pytest.raises(FileNotFoundError, match="given-2 holds no finished codes"):
        task(path, f"run={tmp_path / 'run'}", *data)
    run("--given-frames", 2)
    made = run_recipe(str(path), [f"run={tmp_path / 'run'}", *data])
    assert made is not None
    pipe = Pipeline.from_pretrained(made, device="cpu")
    clip = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    video = pipe(frames=clip, seed=0, output_type="np").videos[0]
    np.testing.assert_array_equal(video[:2], clip)
    assert len(video) == 6
    for name in ("c2v-LP-script", "f2v-LP"):  # the published protocols, with tiny sizes
        tiny = [
            f"run={tmp_path / name}",
            f"data.codes={tmp_path / 'codes'}",
            "model.grid=[3,2,2]",
            "model.dim=16",
            "model.num_layers=1",
            "model.num_heads=2",
            "engine.compile=false",
            "batch_size=4",
            "epochs=0",
            "num_images=8",
        ]
        tiny += ["model.prefix_grid=[3,2,2]", "given_frames=[2]"] if name == "f2v-LP" else []
        assert run_recipe(name, tiny) is not None
    assert losses(tmp_path / "f2v-LP", "heldout_bits_per_token_given_2")
    whole = Codes.open(tmp_path / "codes")
    part = whole.take(np.array([5, 3]))
    stills = Codes.open(tmp_path / "codes" / "given-2")
    beside = part.beside(tmp_path / "codes" / "given-2")
    np.testing.assert_array_equal(beside.read(np.array([0, 1])), stills.read(np.array([5, 3])))
    assert not np.array_equal(beside.read(np.array([0, 1])), part.read(np.array([0, 1])))
    few = open_source(tmp_path / "clips.parquet", size=8, label="kind", windows=Windows(6)).take(np.arange(9))
    with pytest.raises(ValueError, match="does not hold the samples"):
        whole.beside(extract(tmp_path / "larp", few, tmp_path / "few", size=8, quiet=True))


def test_class_and_words_are_dropped_together_and_alone() -> None:
    count = 3000
    draws = (torch.arange(count) + 0.5) / count
    words = TextCondition(torch.ones(count, 2, 3), torch.ones(count, 2, dtype=torch.bool))
    labels = ClassCondition(torch.ones(count).long())
    both = dropped(labels | words, draws, 0.1)
    assert both.labels is not None
    assert both.text is not None
    assert both.text.null is not None
    no_class, no_words = both.labels < 0, both.text.null
    assert [
        float((a & b).float().mean())
        for a, b in ((no_class, no_words), (no_class, ~no_words), (~no_class, no_words), (~no_class, ~no_words))
    ] == pytest.approx([0.1, 0.45, 0.1125, 0.3375], abs=2e-3)
    alone = dropped(labels, draws, 0.1).labels
    assert alone is not None
    assert torch.equal(alone < 0, draws < 0.1)
    frames = PrefixCondition(torch.ones(count, 1).long())
    assert dropped(frames, draws, 0.1).prefix is frames.prefix, "context frames are never dropped"


def test_loops_begin_anywhere(tmp_path: Path) -> None:
    source = open_source(moving_squares(tmp_path / "clips.parquet", 8), size=8, windows=Windows())
    assert isinstance(source, ClipSource)
    clip, made = source.array(4, 8), source.views(4, 8, "loop")
    assert made.shape == (16, 8, 8, 8, 3)
    for start in range(8):
        np.testing.assert_array_equal(made[2 * start], np.roll(clip, -start, 0))
        np.testing.assert_array_equal(made[2 * start + 1], np.roll(clip, -start, 0)[:, :, ::-1])
    still = dataclasses.replace(source, given=3)
    np.testing.assert_array_equal(still.array(4, 8), clip[[0, 1, 2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(still.views(4, 8, "loop")[2], np.roll(clip, -1, 0)[[0, 1, 2, 2, 2, 2, 2, 2]])
    folder = tmp_path / "tokenizer"
    causal().save_pretrained(folder)
    odd = open_source(moving_squares(tmp_path / "odd.parquet", 5, 20), size=8, windows=Windows())
    codes = Codes.open(extract(folder, odd, tmp_path / "codes", size=8, kind="loop", batch_size=3, quiet=True))
    assert codes.manifest["num_views"] == 16
    pixels = torch.from_numpy(odd.views(7, 8, "loop").copy()).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    expected = load_tokenizer(folder).encode(pixels)
    np.testing.assert_array_equal(codes.read(np.array([7, 7]), np.array([0.0, 0.99])), expected[[0, 15]])
    with pytest.raises(ValueError, match="pictures have the views centre, flip, shift and ten-crop"):
        views(Image.new("RGB", (8, 8)), 8, "loop")


def test_grids_of_given_frames() -> None:
    assert prefix_grid(causal(), (3, 2, 2), (0, 1, 3)) == (2, 2, 2)
    assert prefix_grid(causal(), (3, 2, 2), (1,)) == (1, 2, 2)
    assert prefix_grid(larp(), (3, 2, 2), (5, 2)) == (3, 2, 2)
    for tokenizer, counts in ((causal(), (0, 2)), (causal(), (5,)), (larp(), (6,)), (larp(), (0,)), (larp(), (2, 2))):
        with pytest.raises(ValueError, match=r"given_frames .* must be different ones of 0, 1"):
            prefix_grid(tokenizer, (3, 2, 2), counts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["given_frames=[]", "model.prefix_grid=[2,2,2]"], r"model\.prefix_grid needs given_frames"),
        (["model.prefix_grid=[1,2,2]"], r"are codes of \(2, 2, 2\), but model\.prefix_grid is \(1, 2, 2\)"),
        (["given_frames=[1,3]", "frame_dropout=0.1"], "frame_dropout 0.1 needs 0 among given_frames"),
        (["condition_dropout=1.5"], r"condition_dropout must be at least 0 and at most 1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(recipe(tmp_path, words=False), f"run={tmp_path / 'run'}", *overrides)


def test_a_start_from_a_model_with_other_frames_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, words=False)
    config = ModelConfig(
        grid=(3, 2, 2), vocab_size=24, dim=32, num_layers=1, num_heads=2, hidden_dim=32, prefix_grid=(1, 2, 2)
    )
    Transformer(config).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"reads given codes of \(1, 2, 2\)"):
        task(path, f"run={tmp_path / 'run'}", f"init={tmp_path / 'one'}")
    made = task(path, f"run={tmp_path / 'run'}", f"init={tmp_path / 'one'}", "given_frames=[1]")
    assert len(made.fetch(first_batch(made))[1].kinds) == 1
