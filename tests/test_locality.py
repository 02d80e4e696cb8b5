"""Mutual information between codes by offset: what it is of codes that are known, and the report of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nar.evaluation.locality import mutual_information, offsets


def test_offsets_are_one_of_each_pair_and_fit_the_grid() -> None:
    assert offsets((4, 4), 1) == [(0, 1), (1, 0)]
    assert offsets((4, 4), 2)[2:] == [(0, 2), (1, -1), (1, 1), (2, 0)]
    assert offsets((1, 3), 9) == [(0, 1), (0, 2)]
    assert len(offsets((4, 8, 8), 1)) == 3
    assert (1, 0, -1) in offsets((4, 8, 8), 2)


def test_codes_tell_what_theory_says() -> None:
    """A code that is the one to its left with probability 1/2 and else any of 4: by the distribution of pairs."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 4, (4000, 1, 12))
    for place in range(1, 12):
        same = random.random((4000, 1)) < 0.5
        rows[..., place] = np.where(same, rows[..., place - 1], rows[..., place])
    codes = torch.from_numpy(rows)

    def bits(kept: float) -> float:
        share = [kept + (1 - kept) / 4] + [(1 - kept) / 4] * 3
        return 2 + sum(one * math.log2(one) for one in share)

    for far in (1, 2, 3):
        assert mutual_information(codes, codes, (0, far)) == pytest.approx(bits(0.5**far), abs=0.005)
    columns = codes.transpose(1, 2)
    assert mutual_information(columns, columns, (1, 0)) == pytest.approx(bits(0.5), abs=0.005)
    assert mutual_information(codes, codes.roll(1, 0), (0, 1)) == pytest.approx(0, abs=0.001)


def test_diagonals_are_told_apart() -> None:
    codes = torch.randint(8, (500, 6, 6), generator=torch.Generator().manual_seed(0))
    codes[:, 1:, :-1] = codes[:, :-1, 1:]  # only the anti-diagonal neighbour tells
    assert mutual_information(codes, codes, (1, -1)) > mutual_information(codes, codes, (1, 1)) + 0.5


def test_a_model_has_a_report(toy_folder: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    random = np.random.default_rng(0)
    for name in ("pear", "plum"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "real" / name / f"{number}.png")

    command = ["eval", "locality", toy_folder, "--real", tmp_path / "real", "--distance", 2, "--json", tmp_path / "a"]
    said = run(*command)
    report = json.loads((tmp_path / "a").read_text())
    found = report["baselines"]
    assert report["settings"]["num_real"] == 20
    assert list(report)[:8] == [
        *("(0, 1)", "(1, 0)", "(0, 2)", "(1, -1)", "(1, 1)", "(2, 0)"),
        *("mean at distance 1", "mean at distance 2"),
    ]
    assert report["(0, 1)"] == pytest.approx(found["measured"]["(0, 1)"] - found["shuffled"]["(0, 1)"])
    assert found["measured"]["mean at distance 1"] == pytest.approx(
        (found["measured"]["(0, 1)"] + found["measured"]["(1, 0)"]) / 2
    )
    assert 0 < report["entropy of a code"] <= 5
    assert "| (1, -1) |" in said
    run("extract", toy_folder, "--data", tmp_path / "real", "-o", tmp_path / "codes")
    run("eval", "locality", tmp_path / "codes", "--json", tmp_path / "b")
    extracted = json.loads((tmp_path / "b").read_text())
    assert extracted["baselines"]["measured"]["(0, 1)"] == pytest.approx(found["measured"]["(0, 1)"])
    assert extracted["settings"]["tokenizer_sha256"] == report["settings"]["tokenizer_sha256"]
    for wrong in ((toy_folder,), (tmp_path / "codes", "--real", tmp_path / "real")):
        assert "give MODEL with --real R, or a folder" in run("eval", "locality", *wrong, code=2)
