"""Sets of pictures for evaluation, from one process or many, in one go or in two."""

from __future__ import annotations

import io
import json
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nar.cli import main
from nar.evaluation import sets as samples
from nar.evaluation.sets import paired_places, sample_set
from nar.model import ModelConfig, Transformer
from nar.pipeline import Pipeline
from training_runs import nar, random_tokenizer, start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ModelConfig(grid=(4, 4), vocab_size=64, dim=32, num_layers=1, num_heads=2, hidden_dim=64, num_classes=3)
    transformer = Transformer(config)
    torch.nn.init.normal_(transformer.output.weight)
    transformer.save_pretrained(folder / "model", tokenizer=random_tokenizer(folder / "tokenizer"))
    return folder / "model"


def test_two_processes_make_the_set_of_one(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sample", model, "-n", 510, "--labels", "balanced", "--batch-size", 100, "-o")
    assert "510 pictures, balanced labels" in nar(*command, tmp_path / "two.npz", processes=2)
    monkeypatch.setattr(samples, "CHUNK", 64)
    sample_set(Pipeline.from_pretrained(model), tmp_path / "one.npz", 510, "balanced", batch_size=7)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["arr_0"].shape == (510, 16, 16, 3)
        assert one["arr_0"].dtype == np.uint8
        # The codes are the same; the decoder rounds otherwise in batches of another size.
        assert abs(one["arr_0"].astype(int) - two["arr_0"].astype(int)).max() <= 1
        np.testing.assert_array_equal(one["labels"], two["labels"])
        assert np.bincount(one["labels"]).tolist() == [170, 170, 170]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


def test_a_stopped_set_goes_on_with_the_same_settings_only(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "CHUNK", 8)
    pipe = Pipeline.from_pretrained(model)
    sample_set(pipe, tmp_path / "whole.npz", 30, "random", seed=3)

    def power_cut() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        sample_set(pipe, tmp_path / "part.npz", 30, "random", seed=3, rank=1, num_processes=2, wait=power_cut)
    parts = sorted((tmp_path / ".part.npz.parts").glob("*.npy"))
    stamps = [path.stat().st_mtime_ns for path in parts]
    assert len(parts) == 2
    with pytest.raises(ValueError, match=r"made with other settings: seed 3 instead of 4; delete it to begin anew"):
        sample_set(pipe, tmp_path / "part.npz", 30, "random", seed=4)

    def unchanged() -> None:
        assert [path.stat().st_mtime_ns for path in parts if path.exists()] in (stamps, [])

    sample_set(pipe, tmp_path / "part.npz", 30, "random", seed=3, wait=unchanged)
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "part.npz") as part:
        np.testing.assert_array_equal(whole["arr_0"], part["arr_0"])
        assert set(part["labels"]) == {0, 1, 2}


def test_what_makes_no_sense_is_refused(model: Path, tmp_path: Path) -> None:
    for options, message in (
        (
            ["--labels", "even", "-o", "a.npz"],
            "even does not exist; give a folder",
        ),
        (["--labels", "random", "-o", "a.png"], "must end in .npz"),
        (
            ["--labels", "random", "--class-label", "0", "-o", "a.npz"],
            "--labels random says what is sampled: leave out --class-label",
        ),
    ):
        output = str(tmp_path / options.pop())
        assert message in nar("sample", model, *options, output, code=2)


def test_a_killed_set_is_resumed_by_two_processes(model: Path, tmp_path: Path) -> None:
    """Both are killed in the middle; the same command keeps what was done, finishes, and equals one process."""
    command = ("sample", model, "-n", 2000, "--labels", "random", "--batch-size", 50, "-o", tmp_path / "set.npz")
    parts = tmp_path / ".set.npz.parts"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [start(*command, rank=rank, processes=2, port=port) for rank in range(2)]
    deadline = time.monotonic() + 120
    while not list(parts.glob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in started:
        process.kill()
        process.join()
    kept = {path.name: path.read_bytes() for path in parts.glob("*.npy")}
    assert 1 <= len(kept) < 4
    nar(*command, processes=2)
    sample_set(Pipeline.from_pretrained(model), tmp_path / "one.npz", 2000, "random", batch_size=50)
    with np.load(tmp_path / "set.npz") as two, np.load(tmp_path / "one.npz") as one:
        np.testing.assert_array_equal(two["arr_0"], one["arr_0"])
        np.testing.assert_array_equal(two["labels"], one["labels"])
        for name, data in kept.items():
            first = int(name.removesuffix(".npy"))
            np.testing.assert_array_equal(np.load(io.BytesIO(data)), two["arr_0"][first : first + samples.CHUNK])
        settings = json.loads(str(two["settings"]))
    assert (settings["labels"], settings["seed"], settings["guidance_scale"]) == ("random", 0, 1.0)
    assert {"weights_sha256", "tokenizer_sha256", "ema_decay", "dtype", "grid"} <= set(settings)
    assert not parts.exists()


def test_labels_are_those_of_real_pictures_in_pairs(model: Path, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 40)
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((40, 16, 16, 3), np.uint8), arr_1=labels)
    chosen = paired_places(40, 25)
    assert chosen == sorted(random.Random(42).sample(range(40), 25))  # as the published protocol draws
    nar("sample", model, "-n", 25, "--labels", tmp_path / "real.npz", "-o", tmp_path / "few.npz")
    sample_set(Pipeline.from_pretrained(model), tmp_path / "many.npz", 60, labels.tolist())
    for name, places in (("few", chosen), ("many", np.arange(60) % 40)):
        with np.load(tmp_path / f"{name}.npz") as file:
            np.testing.assert_array_equal(file["labels"], labels[places])
            assert json.loads(str(file["settings"]))["labels"].startswith("real ")


def test_a_set_of_prompts(words_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number i of a set is number i of a call with the same prompts, in parts or not."""
    monkeypatch.setattr(samples, "CHUNK", 3)
    prompts = ["a red apple", "octopus", "", "green cross"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\nblue circle\n")
    options = ("--labels", "prompts", "--prompts-file", tmp_path / "prompts.txt", "--device", "cpu")
    done = nar("sample", words_folder, *options, "-o", tmp_path / "command.npz")
    assert "a picture of each of 4 prompts" in done, "empty lines are left out"
    pipe = Pipeline.from_pretrained(words_folder, device="cpu")
    sample_set(pipe, tmp_path / "set.npz", 4, "prompts", prompts=prompts, batch_size=2, seed=5)
    with np.load(tmp_path / "set.npz") as made:
        expected = pipe(prompt=prompts, seed=5, output_type="np").images
        assert abs(made["arr_0"].astype(int) - expected).max() <= 1
        assert made["labels"].tolist() == [-1] * 4
    with pytest.raises(ValueError, match="4 prompts for 5 pictures: give one for each"):
        sample_set(pipe, tmp_path / "set.npz", 5, "prompts", prompts=prompts)


def test_labels_are_named_when_they_are_wrong(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["nar", "sample", str(model), "--labels", "uniform", "-o", str(tmp_path / "set.npz")]
    monkeypatch.setattr(sys, "argv", [*command, "--debug"])
    with pytest.raises(ValueError, match=r"--labels is balanced, random, prompts, or real pictures; .*uniform"):
        main()


def test_words_need_a_model_that_reads_them(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model takes no prompts; it takes class labels"):
        sample_set(Pipeline.from_pretrained(model), tmp_path / "set.npz", 2, "prompts", prompts=["a red apple", "b"])


def test_a_set_of_clips(clips_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(clips_folder, device="cpu")
    sample_set(pipe, tmp_path / "set.npz", 3, "prompts", prompts=["red circle"] * 3, batch_size=2)
    with np.load(tmp_path / "set.npz") as made:
        expected = pipe(prompt="red circle", num_images_per_prompt=3, seed=0, output_type="np").videos
        assert made["arr_0"].shape == (3, 5, 8, 8, 3)
        assert abs(made["arr_0"].astype(int) - expected).max() <= 1


def test_two_calls_at_once_make_one_whole_set(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them ends, and removes the parts, while the other is in the middle of it."""
    monkeypatch.setattr(samples, "CHUNK", 8)
    pipe = Pipeline.from_pretrained(model)
    sample_set(pipe, tmp_path / "one.npz", 30, "random", seed=3)

    def other() -> None:
        sample_set(pipe, tmp_path / "set.npz", 30, "random", seed=3)

    def at_place(place: int) -> Callable[..., list[torch.Tensor]]:
        def sample(batch: Any, rows: Any, *settings: Any, **options: Any) -> list[torch.Tensor]:
            if rows[0] == place:
                monkeypatch.undo()
                monkeypatch.setattr(samples, "CHUNK", 8)
                other()
            return original(batch, rows, *settings, **options)

        original = pipe.sample
        return sample

    for place in (0, 8, 24):
        monkeypatch.setattr(pipe, "sample", at_place(place))
        sample_set(pipe, tmp_path / "set.npz", 30, "random", seed=3, batch_size=8)
        with np.load(tmp_path / "set.npz") as both, np.load(tmp_path / "one.npz") as one:
            np.testing.assert_array_equal(both["arr_0"], one["arr_0"])
            np.testing.assert_array_equal(both["labels"], one["labels"])
        (tmp_path / "set.npz").unlink()
    monkeypatch.setattr(samples, "CHUNK", 8)
    sample_set(pipe, tmp_path / "set.npz", 30, "random", seed=3, wait=other)  # when it is about to join them
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "set.npz"]


def test_links_of_others_are_not_written_through(model: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(model)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".set.npz").symlink_to(tmp_path / "victim")
    sample_set(pipe, tmp_path / "set.npz", 2, "balanced")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "set.npz").is_file()
    assert not (tmp_path / "set.npz").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / ".more.npz.parts").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match="is a link"):
        sample_set(pipe, tmp_path / "more.npz", 2, "balanced")
    assert not any((tmp_path / "folder").iterdir())


def test_labels_of_a_set_are_numbers_and_names_are_names(tmp_path: Path) -> None:
    """Classes called 0 to 11 are sorted as texts: class 2 is called 10."""
    config = ModelConfig(grid=(4, 4), vocab_size=64, dim=32, num_layers=1, num_heads=2, hidden_dim=64, num_classes=12)
    names = sorted(str(number) for number in range(12))
    tokenizer = random_tokenizer(tmp_path / "tokenizer")
    Transformer(config).save_pretrained(tmp_path / "model", class_names=names, tokenizer=tokenizer)
    turned = tmp_path / "turned"
    Transformer(config).save_pretrained(turned, class_names=names[::-1], tokenizer=tokenizer)

    def labels(model: Path, source: object, output: str) -> list[int]:
        nar("sample", model, "--labels", source, "-n", 12, "-o", tmp_path / output)
        with np.load(tmp_path / output) as file:
            assert file["class_names"].tolist() == (names if model.name == "model" else names[::-1])
            return file["labels"].tolist()

    assert labels(tmp_path / "model", "balanced", "a.npz") == list(range(12))
    assert labels(tmp_path / "model", tmp_path / "a.npz", "b.npz") == list(range(12))
    assert labels(turned, tmp_path / "a.npz", "c.npz") == list(range(12))[::-1]  # the same names
    np.savez(tmp_path / "old.npz", arr_0=np.zeros((12, 16, 16, 3), np.uint8), labels=np.arange(12))
    assert labels(turned, tmp_path / "old.npz", "d.npz") == list(range(12))
    for name in names:
        (tmp_path / "real" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "real" / name / "0.png")
    assert labels(tmp_path / "model", tmp_path / "real", "e.npz") == list(range(12))  # in their order
