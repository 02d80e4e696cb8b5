"""Sets of pictures for evaluation, from one process or many, in one go or in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nar import samples
from nar.model import ModelConfig, Transformer
from nar.pipeline import Pipeline
from nar.samples import sample_set
from training_runs import nar, random_tokenizer


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
    with pytest.raises(ValueError, match=r"parts of another set: seed 3 instead of 4; delete it to begin anew"):
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
            "even does not exist; classes are read from a folder",
        ),
        (["--labels", "random", "-o", "a.png"], "must end in .npz"),
        (["--labels", "random", "--class-label", "0", "-o", "a.npz"], "goes with neither --class-label nor --gif"),
    ):
        output = str(tmp_path / options.pop())
        assert message in nar("sample", model, *options, output, code=2)
