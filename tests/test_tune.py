"""Tuning of guidance and temperature: what is searched, on which half, and what is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import make_model
from nar import Sampling, cli
from nar.pipeline import Pipeline
from nar.sampling import last_guided
from nar.study.judge import Half
from nar.study.plan import Judging
from nar.study.tune import FAMILIES, Family, chosen_families, table, tune

HOW = Judging(24, 12, (1.0, 3.0), 5, 8, independence=False, batch_sizes=())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures of the toy model's three classes."""
    folder, random = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for name in ("red apple", "pear", "plum"):
        (folder / name).mkdir()
        for number in range(20):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


def mean_guidance(sampling: Sampling) -> float:
    """Over the sixteen tokens of the toy model."""
    schedule = make_model("nar", num_classes=3).layout.schedule
    last = last_guided(sampling, schedule)
    scales = [sampling.guidance_at(front, schedule) if front <= last else 1.0 for front in range(schedule.num_steps)]
    return sum(count * scale for count, scale in zip(schedule.fronts, scales, strict=True)) / schedule.num_positions


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Half, Sampling, int]]:
    """Scores that are best at a mean guidance of 1.8, a temperature of 0.9, and early guidance; and who asked."""
    asked: list[tuple[Half, Sampling, int]] = []

    def scores(self: Half, sampling: Sampling, number: int, resamplings: int = 1000) -> tuple[dict, dict]:
        asked.append((self, sampling, number))
        value = (
            abs(mean_guidance(sampling) - 1.8)
            + abs(sampling.temperature - 0.9)
            + (0.5 if sampling.guidance_interval is None else 0.0)
        )
        return {"KID": value, "FD": 9 - value}, {"KID": [value - 0.1, value + 0.1]} if resamplings else {}

    monkeypatch.setattr(Half, "scores", scores)
    return asked


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_of_one_strength_guide_a_token_alike(family: Family) -> None:
    model = make_model("nar", num_classes=3, grid=(4, 4))
    for strength in (1.0, 1.3, 4.0):
        assert mean_guidance(family.sampling(Sampling(), model, strength)) == pytest.approx(strength, abs=1e-3)
    assert chosen_families([family.name]) == [family]
    assert family.sampling(Sampling(), model, 0.0).guidance_scale >= 0  # as low as scales go


def test_the_best_of_one_half_is_reported_on_the_other(
    toy_folder: Path, real: Path, scored: list[tuple[Half, Sampling, int]]
) -> None:
    families = [Family(), Family("cosine-tokens", 2.75), Family(first_half=True)]
    report = tune(str(toy_folder), str(real), HOW, families)
    names = [row["name"] for row in report["rows"]]
    assert names == ["no guidance", "the model's own", *(each.name for each in families), "constant-half, temperature"]
    assert report["name"] == names[-1]
    chosen = Sampling(**report["chosen"])
    assert chosen.guidance_interval == 8
    assert mean_guidance(chosen) == pytest.approx(1.8, abs=0.2)
    assert chosen.temperature == pytest.approx(0.9, abs=0.05)
    halves = {id(half): half for half, _, _ in scored}
    first, second = halves.values()
    assert not {*first.heldout.source.names} & {*second.heldout.source.names}
    assert {number for half, _, number in scored if half is first} == {8}
    assert [number for half, _, number in scored if half is second] == [12] * 6
    assert len(scored) == 2 + 4 * 5 + 6
    assert "| constant-half, temperature **chosen** |" in table(report)
    assert report["rows"][2]["tuned_on"] == min(value for _, value in report["rows"][2]["tried"])


def test_what_is_chosen_is_written_where_it_is_asked(
    toy_folder: Path,
    real: Path,
    scored: list[tuple[Half, Sampling, int]],  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    before = (folder / "config.json").read_text()

    def run(*further: object, model: object = folder) -> tuple[int, str]:
        arguments = ["tune", model, "--real", real, "-n", 24, "--tuned", 8, "--sampled", 8, "--family", "constant"]
        monkeypatch.setattr(sys, "argv", ["nar", *map(str, [*arguments, *further])])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(str(stopped.value.code)), out + err

    code, said = run("--json", tmp_path / "report.json")
    assert (code, (folder / "config.json").read_text()) == (0, before), said
    code, said = run("--write")
    assert code == 0, said
    chosen = json.loads((tmp_path / "report.json").read_text())["chosen"]
    assert json.loads((folder / "config.json").read_text()) == {**json.loads(before), "sampling": chosen}
    assert Pipeline.from_pretrained(folder).sampling == Sampling(**chosen)
    for further, message in (
        (("--family", "cosine"), "no family 'cosine'"),
        (("--metric", "FID"), "metric 'FID' must be one of FD, KID"),
        (("--least", 3), "two rising scales"),
    ):
        code, said = run(*further)
        assert code == 2
        assert message in said
        assert said.count("\n") == 1
    code, said = run("--write", model="fashion")
    assert "fashion is not a folder of yours" in said
    assert (code, said.count("\n")) == (2, 1)


def test_models_without_a_null_condition_have_their_temperature_tuned(
    tmp_path: Path,
    toy_folder: Path,
    real: Path,
    scored: list[tuple[Half, Sampling, int]],  # noqa: ARG001
) -> None:
    model = make_model("nar", num_classes=3, vocab_size=32, null_class=False, grid=(4, 4))
    names = ("red apple", "pear", "plum")
    model.save_pretrained(tmp_path / "model", class_names=names, tokenizer=toy_folder / "tokenizer")
    report = tune(str(tmp_path / "model"), str(real), HOW)
    assert [row["name"] for row in report["rows"]] == ["no guidance", "the model's own", "no guidance, temperature"]
