"""The image tokenizer and its quantiser: shapes, round trips, codebook upkeep, refused pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nar import load_tokenizer
from nar.media.crops import shifted
from nar.media.pixels import pad_to_multiple
from nar.storage.config import load
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.quantize import VectorQuantizer
from nar.training.distributed import Workers
from nar.training.recipe import Recipe
from nar.training.tasks import run_recipe
from nar.training.tokenizers import TokenizerTask, spread_rows
from training_runs import tokenizer_recipe


def small(**changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "code_dim": 4, "channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1}
    return ImageTokenizer(ImageTokenizerConfig(**{**sizes, "latent_channels": 8, "norm_groups": 4, **changes})).eval()


@torch.no_grad()
def test_any_multiple_of_the_patch_works() -> None:
    tokenizer = small()
    for height, width in ((2, 2), (8, 8), (6, 14)):
        codes = tokenizer.encode(torch.rand(3, 3, height, width) * 2 - 1)
        assert codes.shape == (3, height // 2, width // 2)
        assert codes.dtype == torch.int64
        assert tokenizer.decode(codes).shape == (3, 3, height, width)


@torch.no_grad()
def test_forward_is_encode_then_decode() -> None:
    tokenizer, pixels = small(), torch.rand(2, 3, 8, 8) * 2 - 1
    made = tokenizer(pixels)
    assert torch.equal(made.codes, tokenizer.encode(pixels))
    torch.testing.assert_close(made.pixels, tokenizer.decode(made.codes))


def test_gradient_passes_straight_through() -> None:
    tokenizer = small()
    made = tokenizer(torch.rand(2, 3, 8, 8) * 2 - 1)
    (made.pixels.square().mean() + made.codebook_loss + made.commitment_loss).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tokenizer.encoder.parameters())
    assert tokenizer.quantizer.embedding.weight.grad.any()


@pytest.mark.parametrize("l2_norm", [True, False])
def test_quantiser_takes_the_nearest_entry(l2_norm: bool) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, l2_norm=l2_norm)
    torch.nn.init.normal_(quantizer.embedding.weight)
    latents = torch.randn(2, 3, 5, 4)
    points, entries = latents.movedim(1, -1), quantizer.embedding.weight
    if l2_norm:
        points, entries = F.normalize(points, dim=-1), F.normalize(entries, dim=-1)
    expected = torch.cdist(points.flatten(0, -2), entries).argmin(-1).view(2, 5, 4)
    assert torch.equal(quantizer.encode(latents), expected)
    assert torch.equal(quantizer(latents).codes, expected)
    torch.testing.assert_close(quantizer.decode(expected).movedim(1, -1), entries[expected])


def test_restart_moves_only_dead_entries() -> None:
    quantizer = VectorQuantizer(8, 4)
    before = quantizer.embedding.weight.detach().clone()
    dead = torch.arange(8) % 2 == 0
    latents = torch.randn(3, 4, 2, 2)
    quantizer.restart(latents, dead, torch.Generator().manual_seed(0))
    after = quantizer.embedding.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    points = F.normalize(latents.movedim(1, -1).reshape(-1, 4), dim=-1)
    assert torch.cdist(after[dead], points).amin(1).max() < 1e-3


def test_folder_round_trip(tmp_path: Path) -> None:
    tokenizer = small()
    tokenizer.save_pretrained(tmp_path / "tokenizer", training={"hours": 1})
    again = load_tokenizer(tmp_path / "tokenizer")
    codes = torch.randint(32, (1, 4, 4))
    with torch.no_grad():
        assert torch.equal(again.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 8, 7), "8x7 pixels are not a multiple of the patch size 2"),
        (torch.zeros(1, 1, 8, 8), r"\(batch, 3, height, width\), not \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), "not \\(3, 8, 8\\)"),
        (torch.full((1, 3, 8, 8), 200.0), "from 200 to 200, not -1..1"),
        (torch.full((1, 3, 8, 8), math.nan), "nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be float in -1..1, not torch.uint8"),
        (Image.new("RGB", (8, 8)), r"a float tensor \(batch, 3, height, width\) in -1\.\.1, not Image; nar\.media"),
    ],
)
def test_nonsense_is_refused(pixels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().encode(pixels)


@torch.no_grad()
def test_tiles_are_blended_and_exact_where_the_decoder_sees_nothing_else() -> None:
    tokenizer, codes = small(), torch.randint(32, (2, 9, 14))
    assert torch.equal(tokenizer.decode(codes, tile=14), tokenizer.decode(codes))
    tiled = tokenizer.decode(codes, tile=6, overlap=3)
    assert tiled.shape == (2, 3, 18, 28)
    # A decoder that looks at single codes gives the same in tiles, whatever they are blended with.
    tokenizer.decoder = torch.nn.Sequential(torch.nn.Conv2d(8, 3, 1), torch.nn.Upsample(scale_factor=2))
    whole = tokenizer.decode(codes)
    for tile, overlap in ((6, 3), (5, 0), (4, 3), (1, 0)):
        torch.testing.assert_close(tokenizer.decode(codes, tile=tile, overlap=overlap), whole)
    with pytest.raises(ValueError, match="overlap must be from 0 to less than the tile of 4 codes, not 4"):
        tokenizer.decode(codes, tile=4, overlap=4)


@torch.no_grad()
def test_padding_repeats_edges_and_is_cut_off_again() -> None:
    pixels = torch.rand(2, 3, 5, 6) * 2 - 1
    padded = pad_to_multiple(pixels, 4)
    assert padded.shape == (2, 3, 8, 8)
    assert torch.equal(padded[..., :5, :6], pixels)
    assert torch.equal(padded[..., 5:, 2], pixels[..., 4:, 2].expand(-1, -1, 3))
    assert torch.equal(padded[..., 3, 6:], pixels[..., 3, 5:].expand(-1, -1, 2))
    assert pad_to_multiple(padded, 4).shape == padded.shape
    clips = torch.rand(1, 3, 2, 5, 6)
    assert torch.equal(pad_to_multiple(clips, 4)[:, :, 1], pad_to_multiple(clips[:, :, 1], 4))
    assert small().decode(small().encode(pad_to_multiple(pixels, 2)))[..., :5, :6].shape == pixels.shape


def test_foreign_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes run from 0 to 32, this tokenizer has 0\.\.31"):
        small().decode(torch.tensor([[[0, 32]]]))
    with pytest.raises(ValueError, match="batch, height, width"):
        small().decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="not a multiple of norm_groups"):
        small(norm_groups=3)


def test_measured_rows_are_spread_over_all() -> None:
    assert spread_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert (spread_rows(1999, 2000) == np.arange(1999)).all()
    rows = spread_rows(10_000, 2000)
    assert (len(set(rows.tolist())), rows[0], rows[-1]) == (2000, 0, 9999)
    assert set(np.diff(rows)) == {5, 6} or set(np.diff(rows)) == {5}


def test_what_is_held_out_is_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(24):
        path = tmp_path / "data" / ("test" if index % 2 else "train") / f"{'ab'[index // 12]}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * index, 0, 0)).save(path)
    monkeypatch.setattr("nar.training.tokenizers._HELDOUT", 4)
    loaded = load(Recipe, str(tokenizer_recipe(tmp_path)), [f"data.source={tmp_path / 'data'}"])
    task = TokenizerTask(loaded, Workers(0, 1, torch.device("cpu")))
    assert task.heldout.labels.tolist() == [0, 0, 1, 1]


def test_pictures_have_no_frames_to_start_anywhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.augment loop is for clips, these are pictures"):
        run_recipe(str(tokenizer_recipe(tmp_path)), [f"run={tmp_path / 'run'}", "data.augment=loop"])


def test_moved_pictures_repeat_their_edges() -> None:
    picture = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)  # a clip of two frames
    assert np.array_equal(shifted(picture, 1, 0.5, 0.5), picture)
    down_right = shifted(picture, 1, 0.99, 0.99)
    assert np.array_equal(down_right[:, :3, :4], picture[:, 1:, 1:])
    assert np.array_equal(down_right[:, 3], down_right[:, 2])
    assert np.array_equal(down_right[:, :, 4], down_right[:, :, 3])
    places = {shifted(picture, 1, u, 0.5)[0, 1, 0, 0] for u in np.linspace(0, 0.999, 30)}
    assert len(places) == 3  # each of -1, 0, 1
