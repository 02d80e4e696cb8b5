"""`nar eval likelihood` beside what training logs of the same held-out samples: classes, words, context frames."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar.evaluation import likelihood
from nar.evaluation.edits import judge_edits
from nar.evaluation.likelihood import judge_likelihood
from nar.study.plan import Judging
from nar.study.run import compare_models
from nar.training.tasks import run_recipe
from test_frame_training import recipe as frames_recipe
from test_text_training import words_recipe
from training_runs import losses, recipe

pa = pytest.importorskip("pyarrow")
SHORT = {"num_images": 20 * 32, "checkpoint_every": 1000, "log_every": 10}


def logged(run: Path, *names: str) -> dict[str, float]:
    """What training measured last, of held-out samples."""
    return {name: losses(run, f"heldout_{name}")[-1] for name in names}


def split(table: Path, folder: Path, held_out: int) -> Path:
    """A folder with the rows of a parquet file in a train and a test part, in which a caption is missing."""
    import pyarrow.parquet as pq

    rows = pq.read_table(table).to_pylist()
    order = np.random.default_rng(0).permutation(len(rows))
    rows[order[1]]["caption"] = ""
    folder.mkdir()
    for name, places in (("test", order[:held_out]), ("train", order[held_out:])):
        pq.write_table(pa.Table.from_pylist([rows[place] for place in places]), folder / f"{name}.parquet")
    return folder


def test_classes_have_the_bits_that_training_logs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_recipe(str(recipe(tmp_path, **SHORT)), [f"run={run}"])
    report = judge_likelihood(str(run / "model"), "toy")
    assert report["bits_per_token"] == pytest.approx(logged(run, "bits_per_token")["bits_per_token"], abs=1e-5)
    assert report["settings"]["num_real"] == 256
    assert report["settings"]["real"]["num_classes"] == 4
    assert abs(report["independence_cost"]) < report["bits_per_token"]
    low, high = report["interval"]["bits_per_token"]
    assert low < report["bits_per_token"] < high


def test_words_have_the_bits_that_training_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first wording, caption and style; without a caption under the null condition."""
    words_recipe(tmp_path)
    data = split(tmp_path / "pictures.parquet", tmp_path / "data", 40)
    path, run = words_recipe(tmp_path, **SHORT), tmp_path / "run"
    run_recipe(str(path), [f"run={run}", f"data.source={data}", "data.group=", "data.heldout_pairs=0"])
    model = str(run / "model")
    report = judge_likelihood(model, str(data))
    expected = logged(run, "bits_per_token", "bits_per_token_without_words")
    assert report["bits_per_token"] == pytest.approx(expected["bits_per_token"], abs=1e-5)
    assert abs(report["bits_per_token"] - expected["bits_per_token_without_words"]) > 1e-3
    assert report["settings"]["num_real"] == 40
    monkeypatch.setattr(likelihood, "COUPLED_BYTES", 1000)
    large = judge_likelihood(model, str(data), against=model, number=20)
    assert "independence_cost" not in large
    assert "give fewer pictures" in large["warnings"][0]
    assert large["difference: bits_per_token"] == 0
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "0.png")
    with pytest.raises(ValueError, match="reads words, and the held-out pictures have no captions"):
        judge_likelihood(model, str(plain))


@pytest.mark.parametrize(("kind", "words"), [("causal", True), ("causal", False), ("larp", False)])
def test_clips_have_the_bits_that_training_logs(tmp_path: Path, kind: str, words: bool) -> None:
    """Of whole clips, and of what follows some frames; with classes and words together, or without either."""
    path, run = frames_recipe(tmp_path, kind, words=words, **SHORT), tmp_path / "run"
    data = split(tmp_path / "clips.parquet", tmp_path / "data", 30)
    run_recipe(str(path), [f"run={run}", f"data.source={data}", "data.group="])
    report = judge_likelihood(str(run / "model"), str(data))
    names = [name for name in report if name.startswith("bits_per_token")]
    assert names == (
        ["bits_per_token_given_2"]
        if kind == "larp"
        else ["bits_per_token", "bits_per_token_given_1", "bits_per_token_given_3"]
    )
    for name, value in logged(run, *names).items():
        assert report[name] == pytest.approx(value, abs=1e-5), name
    assert math.isfinite(report["independence_cost"])
    assert report["settings"]["num_real"] == 30


@pytest.mark.parametrize("kind", ["words", "clips"])
def test_what_was_learned_is_not_measured(tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """A source without splits: the part that training held out, as it logs it, and one line says so."""
    words = kind == "words"
    path = words_recipe(tmp_path, **SHORT) if words else frames_recipe(tmp_path, **SHORT)
    run = tmp_path / "run"
    run_recipe(str(path), [f"run={run}", *(["data.heldout_styles=[flat]"] if words else [])])
    model, table = str(run / "model"), str(tmp_path / ("pictures.parquet" if words else "clips.parquet"))
    recwarn.clear()
    report = judge_likelihood(model, table)
    said = [str(found.message) for found in recwarn if "what was learned from" in str(found.message)]
    assert len(said) == 1
    assert report["settings"]["real"]["notes"] == said
    for name, value in logged(run, *(name for name in report if name.startswith("bits_per_token"))).items():
        assert report[name] == pytest.approx(value, abs=1e-5), name

    if words:  # without classes
        edits = judge_edits(model, table, number=4, train=table)
        assert math.isfinite(edits["centre: psnr_nearest"])
        assert "centre: class" not in edits

    recwarn.clear()
    whole = judge_likelihood(model, table, split="train")
    copied = tmp_path / "elsewhere.parquet"
    copied.write_bytes(Path(table).read_bytes())
    assert judge_likelihood(model, str(copied))["settings"]["num_real"] == whole["settings"]["num_real"]
    assert whole["settings"]["num_real"] > 3 * report["settings"]["num_real"]
    assert not [found for found in recwarn if "what was learned from" in str(found.message)]


def test_models_are_measured_on_what_none_learned(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for index in range(60):
        file = pictures / f"{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (4 * index, 90, 9)).save(file)
    for name, share in (("first", 0.2), ("second", 0.5)):
        data = [f"data.source={pictures}", f"data.heldout_share={share}"]
        run_recipe(str(recipe(tmp_path, num_images=32)), [f"run={tmp_path / name}", *data])
    first, second = (str(tmp_path / name / "model") for name in ("first", "second"))
    with pytest.warns(UserWarning, match=r"measured on the \d+ of its 60 pictures that training held out"):
        number = judge_likelihood(first, str(pictures), against=first)["settings"]["num_real"]
    assert 4 <= number <= 24
    with pytest.raises(ValueError, match=r"held out different parts of .*give --real samples that none"):
        judge_likelihood(first, str(pictures), against=second)
    how = Judging(number=64, num_sampled=0, independence=False, batch_sizes=())
    with pytest.raises(ValueError, match="the models held out different parts"):
        compare_models([first, second], str(pictures), how)
    with pytest.warns(UserWarning, match="that training held out"):
        report = judge_edits(first, str(pictures), number=60, train=str(pictures))
    assert report["settings"]["num_real"] == number
    assert report["centre: psnr_nearest"] < 59  # the floor's pictures are others than those judged
