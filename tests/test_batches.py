"""Which samples make a batch, and the numbers that are drawn for each: by name, and independent of one another."""

from __future__ import annotations

import io
import itertools
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nar.storage.config import load
from nar.training.batches import DRAWS, Batch, Draws, batch_of, pieces
from nar.training.distributed import Workers
from nar.training.recipe import Recipe
from nar.training.tokenizers import TokenizerTask
from training_runs import TOKENIZER

ALONE = Workers(0, 1, torch.device("cpu"))
pa = pytest.importorskip("pyarrow")


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 4), (3, 2)])
def test_pieces_of_all_processes_make_the_batch_of_one(processes: int, accumulate: int) -> None:
    whole = batch_of(0, 5, num_samples=100, batch_size=24)
    parts = [
        piece for rank in range(processes) for piece in pieces(whole, rank=rank, count=processes, accumulate=accumulate)
    ]
    assert len(parts) == processes * accumulate
    rows = np.concatenate([piece.indices for piece in parts])
    assert sorted(rows) == sorted(whole.indices)
    for name in DRAWS:
        by_row = dict(zip(whole.indices, whole.draws[name], strict=True))
        drawn = np.concatenate([piece.draws[name] for piece in parts])
        assert [by_row[row] for row in rows] == drawn.tolist()


def test_an_epoch_sees_every_sample_once_and_a_small_set_is_repeated() -> None:
    epochs = [
        np.concatenate([batch_of(0, step, num_samples=35, batch_size=8).indices for step in range(start, start + 4)])
        for start in (0, 4, 8)
    ]
    assert [len(set(seen)) for seen in epochs] == [32, 32, 32]
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(epochs, 2))
    few = batch_of(0, 0, num_samples=3, batch_size=8).indices
    assert len(few) == 8
    assert set(few) == {0, 1, 2}


def test_draws_differ_between_steps_and_seeds() -> None:
    first, later, other = (
        batch_of(seed, step, num_samples=9, batch_size=9).draws for seed, step in ((0, 0), (0, 1), (1, 0))
    )
    for name in DRAWS:
        assert not set(first[name]) & set(later[name])
        assert not set(first[name]) & set(other[name])


class Recording(Draws):
    """Draws that remember by which names they are asked."""

    asked: set[str]

    def __getitem__(self, name: str) -> np.ndarray:
        self.asked.add(name)
        return super().__getitem__(name)

    def samples(self) -> Iterator[dict[str, float]]:
        return (_Sample(sample, self.asked) for sample in super().samples())  # type: ignore[misc]


class _Sample(UserDict[str, float]):
    def __init__(self, values: dict[str, float], asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __getitem__(self, name: str) -> float:
        self.asked.add(name)
        return super().__getitem__(name)


def tokenizer_task(folder: Path, picture: np.ndarray, **data: Any) -> TokenizerTask:
    """A task on eight times the same `picture` (H, W, 3), or strip of frames where `num_frames` is given."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    column = "strip" if "num_frames" in data else "image"
    pq.write_table(pa.table({column: [file.getvalue()] * 8}), folder / "train.parquet")
    values = {
        "task": "tokenizer",
        "tokenizer": TOKENIZER,
        "batch_size": 8,
        "num_images": 8,
        "data": {"source": str(folder / "train.parquet"), "size": 16, "heldout_share": 0.2, **data},
    }
    if "num_frames" in data:
        del values["tokenizer"]
        values["causal_tokenizer"] = {
            "vocab_size": 16,
            "code_dim": 4,
            "frames_per_code": 3,
            "channels": 8,
            "num_blocks": 1,
            "dim": 16,
            "num_heads": 1,
            "hidden_dim": 16,
            "num_encoder_blocks": 1,
            "num_decoder_blocks": 1,
        }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return TokenizerTask(load(Recipe, str(folder / "tiny.yaml"), [f"run={folder / 'run'}"]), ALONE)


def strip(num_frames: int = 32) -> np.ndarray:
    """Frames of 16x16 whose red says which frame it is, green which column, and blue which row."""
    frame, row, column = np.mgrid[:num_frames, :16, :16]
    return np.stack((frame * 8, column * 16, row * 16), -1).reshape(-1, 16, 3).astype(np.uint8)


def draws(count: int) -> Draws:
    return batch_of(7, 0, num_samples=count, batch_size=count).draws


@pytest.mark.parametrize(
    "data",
    [
        {"augment": "crop"},
        {"augment": "crop", "num_frames": 4, "windows": "random"},
        {"augment": "flip", "shift": 4, "num_frames": 4, "windows": "random"},
        {"augment": "loop", "shift": 4, "num_frames": 4, "windows": "random"},
    ],
)
def test_no_two_numbers_that_a_sample_needs_correlate(tmp_path: Path, data: dict[str, Any]) -> None:
    task = tokenizer_task(tmp_path, strip(), **data)
    recording = Recording(draws(4).values)
    object.__setattr__(recording, "asked", set())
    task.fetch(Batch(np.zeros(4, np.int64), recording, 0))
    names = sorted(recording.asked | {"codes"})  # these are asked for by the loss
    assert len(names) > 4
    many = draws(4000)
    for first, second in itertools.combinations(names, 2):
        assert abs(np.corrcoef(many[first], many[second])[0, 1]) < 0.05, (first, second)


def test_no_two_numbers_of_a_model_s_sample_correlate() -> None:
    many = draws(4000)
    names = ("condition_dropout", "view", "wording", "given_frames", "frame_dropout", "scene")
    for first, second in itertools.combinations(names, 2):
        assert abs(np.corrcoef(many[first], many[second])[0, 1]) < 0.05, (first, second)


def test_random_windows_begin_anywhere_wherever_a_clip_is_moved_to(tmp_path: Path) -> None:
    task = tokenizer_task(tmp_path, strip(), augment="flip", shift=4, num_frames=4, windows="random")
    clips = task.fetch(Batch(np.zeros(800, np.int64), draws(800), 0))
    red, green, blue = (((clips[:, channel, 0] + 1) * 127.5).round() for channel in range(3))
    mirrored = green[:, 8, 8] < green[:, 8, 7]
    right = torch.where(mirrored, 15 - green[:, 8, 8] / 16, green[:, 8, 8] / 16) - 8
    found = {"window": red[:, 8, 8] / 8, "right": right, "down": blue[:, 8, 8] / 16 - 8, "mirrored": mirrored}
    assert found["window"].unique().tolist() == list(range(29))
    assert found["right"].unique().tolist() == found["down"].unique().tolist() == list(range(-4, 5))
    for first, second in itertools.combinations(found, 2):
        assert abs(np.corrcoef(found[first], found[second])[0, 1]) < 0.1, (first, second)


def test_a_crop_is_mirrored_independently_of_its_place_and_size(tmp_path: Path) -> None:
    row, column = np.mgrid[:48, :48]
    picture = np.stack((column * 5, row * 5, 0 * row), -1).astype(np.uint8)
    task = tokenizer_task(tmp_path, picture, augment="crop")
    crops = task.fetch(Batch(np.zeros(2000, np.int64), draws(2000), 0))
    mirrored = crops[:, 0, 8, 0] > crops[:, 0, 8, -1]
    found = {
        "left": torch.minimum(crops[:, 0, 8, 0], crops[:, 0, 8, -1]),
        "top": crops[:, 1, 0, 8],
        "side": (crops[:, 0, 8, 0] - crops[:, 0, 8, -1]).abs(),
    }
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.05)
    for name, values in found.items():
        assert len(values.unique()) >= 4
        assert abs(np.corrcoef(values, mirrored)[0, 1]) < 0.06, name
