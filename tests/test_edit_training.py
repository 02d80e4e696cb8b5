"""Training of edits: pictures are blanked before they are encoded, holes are seen as holes, and old weights go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_condition, make_model
from nar import ClassCondition, PrefixCondition
from nar.data.codes import Codes
from nar.data.extract import extract
from nar.data.open import open_source
from nar.likelihood import token_losses
from nar.media.masks import FIXED, fixed_mask, random_mask
from nar.model import Transformer
from nar.pipeline.holes import blanked, touched
from nar.tokenizer import load_tokenizer
from nar.training.edits import EditConfig, Holes
from nar.training.tasks import run_recipe
from training_runs import equal, losses, nar, random_tokenizer, recipe, weights

EDIT = {"edit": {"plain": 0.25}}


@pytest.mark.parametrize("shape", [(32, 32), (8, 24), (5, 16, 16)])
def test_random_masks_are_new_and_leave_something(shape: tuple[int, ...]) -> None:
    masks = [random_mask(np.random.default_rng(seed), shape) for seed in range(200)]
    assert all(mask.shape == shape and mask.any() and not mask.all() for mask in masks)
    assert len({mask.tobytes() for mask in masks}) > 150
    assert 0.2 < np.mean([mask.mean() for mask in masks]) < 0.45


def test_fixed_masks_cover_what_they_say() -> None:
    shares = {name: fixed_mask(name, (32, 32)).mean() for name in FIXED}
    assert shares["centre"] == shares["top-left"] == 0.25
    assert shares["right"] == shares["bottom"] == 0.5
    assert all(0.25 <= fixed_mask("strokes", (32, 32), seed).mean() <= 0.5 for seed in range(50))
    assert (fixed_mask("strokes", (32, 32), 1) != fixed_mask("strokes", (32, 32), 2)).any()
    with pytest.raises(ValueError, match="mask must be one of centre, right"):
        fixed_mask("left", (32, 32))


def test_a_blanked_picture_says_nothing_of_what_was_there() -> None:
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:5, 1:7] = mask[1] = True
    other = torch.where(mask[:, None], torch.rand(2, 3, 8, 8), pixels)
    assert torch.equal(blanked(pixels, mask), blanked(other, mask))
    made = blanked(pixels, mask)
    assert torch.equal(made[0][:, ~mask[0]], pixels[0][:, ~mask[0]])
    assert torch.allclose(made[0][:, mask[0]].mean(1), pixels[0][:, ~mask[0]].mean(1), atol=1e-6)
    assert not made[1].any()


def test_the_codes_that_a_mask_touches() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 3:5, 0] = True
    assert touched(mask, (4, 4))[0].nonzero().tolist() == [[1, 0], [2, 0]]
    frames = torch.zeros(1, 5, 4, 4, dtype=torch.bool)
    frames[0, 2] = True
    assert touched(frames, (3, 2, 2))[0].any(-1).any(-1).tolist() == [False, True, False]  # 1 + 2 + 2 frames
    frames[0, 0] = True
    assert touched(frames, (3, 2, 2))[0].any(-1).any(-1).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="have no places"):
        touched(frames, (12,))


def test_a_model_sees_where_holes_are_and_not_what_lies_in_them() -> None:
    model, codes = make_model("edits"), torch.arange(12).view(2, 3, 2)
    condition = make_condition(model, 2)
    assert condition.prefix is not None
    assert condition.prefix.mask is not None
    there, given = condition.prefix.mask, condition.prefix.codes
    other = ClassCondition(condition.labels) | PrefixCondition(torch.where(there, given, (given + 5) % 24), there)
    assert torch.equal(model(codes, condition), model(codes, other))
    elsewhere = ClassCondition(condition.labels) | PrefixCondition(given, there.roll(1, -1))
    assert not torch.allclose(model(codes, condition), model(codes, elsewhere))
    wider = model.at_grid((4, 3))
    assert wider.config.prefix_grid == (4, 3)
    assert wider(torch.zeros(2, 4, 3, dtype=torch.long), make_condition(wider, 2)).shape == (2, 4, 3, 24)


def samples(folder: Path, config: EditConfig) -> Holes:
    tokenizer = random_tokenizer(folder / "tokenizer")
    source = open_source("toy", size=16).take(np.arange(64))
    codes = Codes.open(extract(tokenizer, source, folder / "codes", size=16, quiet=True))
    return Holes(config, source, codes, load_tokenizer(tokenizer))


def test_what_a_sample_is_given_and_how_its_tokens_count(tmp_path: Path) -> None:
    made = samples(tmp_path, EditConfig(outside=0.5))
    rows, mask = np.array([5, 5, 9]), np.zeros((3, 16, 16), bool)
    mask[:2, 4:12, 4:12] = mask[2] = True
    condition, weight = made.read(rows, mask, np.array([False, True, False]))
    assert condition.prefix is not None
    assert condition.prefix.mask is not None
    codes, there = condition.prefix.codes, condition.prefix.mask
    own = torch.from_numpy(made.codes.read(rows))
    hole = torch.zeros(4, 4, dtype=torch.bool)
    hole[1:3, 1:3] = True
    assert torch.equal(there, torch.stack([~hole, ~hole, torch.zeros_like(hole)]))
    assert torch.equal(codes[1][~hole], own[1][~hole])  # replaced: its own codes
    assert not torch.equal(codes[0][~hole], own[0][~hole])  # filled: those of the blanked picture
    assert torch.equal(weight[0], torch.where(hole, 1.0, 0.5))
    assert torch.equal(weight[1], hole.float())
    assert weight[2].min() == 1
    masks, replaced = made.picked(np.linspace(0, 1, 400, endpoint=False, dtype=np.float32))
    plain = masks.all((1, 2))
    assert 0.18 < plain.mean() < 0.32
    assert 0.4 < replaced[~plain].mean() < 0.6
    assert not replaced[plain].any()


def test_codes_of_other_pictures_are_refused(tmp_path: Path) -> None:
    made = samples(tmp_path, EditConfig())
    with pytest.raises(ValueError, match="edit needs every picture of toy that has codes: 64 of 32 have"):
        Holes(
            EditConfig(),
            open_source("toy", size=16).take(np.arange(32)),
            made.codes,
            load_tokenizer(tmp_path / "tokenizer"),
        )


def test_a_training_of_edits_resumes_bit_for_bit_and_fills_holes(tmp_path: Path) -> None:
    made = run_recipe(str(recipe(tmp_path, **EDIT)), [f"run={tmp_path / 'whole'}"])
    assert made is not None
    config = Transformer.from_pretrained(made).config
    assert (config.prefix_grid, config.prefix_holes, config.prefix_attention) == ((4, 4), "token", "full")
    for name in ("bits_per_token", "bits_per_token_filled", "bits_per_token_replaced"):
        assert losses(tmp_path / "whole", f"heldout_{name}")[-1] > 0
    halves = [str(recipe(tmp_path, **EDIT)), f"run={tmp_path / 'halves'}"]
    nar("train", *halves, "num_images=64", "optim.curve=constant")
    nar("train", *halves, "--override")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "halves"))


def test_a_model_without_a_prefix_learns_to_edit_from_its_own_weights(tmp_path: Path) -> None:
    begun = run_recipe(str(recipe(tmp_path)), [f"run={tmp_path / 'plain'}"])
    path = str(recipe(tmp_path, **EDIT, init=str(begun), num_images=32, optim={"learning_rate": 1e-9}))
    made = run_recipe(path, [f"run={tmp_path / 'edit'}"])
    assert begun is not None
    assert made is not None
    old, new = Transformer.from_pretrained(begun), Transformer.from_pretrained(made)
    added = new.state_dict().keys() - old.state_dict().keys()
    assert added == {"separator", "hole", "role"}
    assert all(torch.allclose(new.state_dict()[name], tensor, atol=1e-5) for name, tensor in old.state_dict().items())
    assert torch.allclose(new.separator, old.classes.weight.mean(0), atol=1e-5)
    assert (
        dataclasses.replace(new.config, prefix_grid=(), prefix_holes="hidden", prefix_attention="causal") == old.config
    )
    labels, nothing = torch.arange(4), torch.zeros(4, 4, 4, dtype=torch.long)
    condition = ClassCondition(labels) | PrefixCondition(nothing, nothing > 0)
    assert token_losses(new, nothing, condition).isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["given_frames=[1]"], "edit needs pictures to make holes in .* takes the place of given_frames"),
        (["data.codes=codes"], "edit needs pictures to make holes in"),
        (["edit.plain=1.5"], "edit.plain"),
        (["model.positions=sincos", "init=SINCOS"], "has sincos positions"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = str(recipe(tmp_path, **EDIT))
    if "init=SINCOS" in overrides:
        make_model("nar", grid=(4, 4), vocab_size=64, num_classes=4, positions="sincos").save_pretrained(
            tmp_path / "sincos", tokenizer=tmp_path / "tokenizer"
        )
        overrides = [f"init={tmp_path / 'sincos'}"]
    with pytest.raises(ValueError, match=message):
        run_recipe(path, [f"run={tmp_path / 'run'}", *overrides])
