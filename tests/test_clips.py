"""Clips in files: what is written plays, and is what it was."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nar.media import clips
from nar.media.clips import as_array, save_clip, several
from nar.media.sheet import contact_sheet, film_strips, moving_sheet
from nar.media.video import Timeline, timeline


def moving(length: int = 6, height: int = 34, width: int = 46) -> np.ndarray:
    """A smooth coloured wave that moves to the right, as uint8 (T, H, W, 3)."""
    t, y, x = np.meshgrid(np.arange(length), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x - 3 * t) / 9 + shift) + np.cos(y / 11 + shift) for shift in (0.0, 0.4, 0.9)]
    return (np.stack(waves, -1) * 50 + 127).astype(np.uint8)


@pytest.mark.parametrize(("name", "allowed"), [("a.mp4", 6), ("a.gif", 8), ("a.webp", 0), ("folder", 0)])
def test_what_is_written_comes_back(tmp_path: Path, name: str, allowed: int) -> None:
    clip = moving()
    save_clip(clip, tmp_path / name, frame_rate=12.5)
    read = as_array(tmp_path / name).astype(int)
    assert read.shape == clip.shape
    assert abs(read - clip).mean() <= allowed / 2
    still = abs(clip - clip[:1].astype(int)).mean()  # were the frames in another order, it would be this far off
    assert still > 20


def test_mp4_is_h264_for_every_player(tmp_path: Path) -> None:
    save_clip(moving(height=33, width=45), tmp_path / "a.mp4", frame_rate=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams.video
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        assert (stream.height, stream.width) == (34, 46), "odd sizes are padded by a row and a column"
        assert stream.frames == 6
    read = as_array(tmp_path / "a.mp4")[:, :33, :45].astype(int)
    assert abs(read - moving(height=33, width=45)).mean() < 3


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_loop_at_their_rate(tmp_path: Path, suffix: str) -> None:
    save_clip(moving(), tmp_path / f"a{suffix}", frame_rate=10)
    with Image.open(tmp_path / f"a{suffix}") as animation:
        assert animation.n_frames == 6
        animation.seek(1)
        animation.load()
        assert animation.info["duration"] == 100
        assert animation.info["loop"] == 0


@pytest.mark.parametrize(("suffix", "most"), [(".gif", 50), (".webp", 240)])
def test_animations_have_each_frame_once_at_their_rate(tmp_path: Path, suffix: str, most: int) -> None:
    path, clip = tmp_path / f"a{suffix}", moving(16, 8, 8)
    for rate in (0.7, 5.3, *range(6, most + 1, 1 if suffix == ".gif" else 18)):
        save_clip(clip, path, frame_rate=rate)
        assert len(as_array(path, frame_rate=rate)) == 16, rate
        assert timeline(path).seconds == pytest.approx(16 / rate, abs=0.0051)
    truncated = Timeline(np.arange(16) * 0.03, 0.48)  # as they were written before
    assert truncated.steady_rows(30).tolist() == list(range(16))
    if suffix == ".gif":
        with pytest.warns(UserWarning, match=r"at most 50 frames a second: a.gif has that many, not 120; .mp4 and"):
            save_clip(clip, path, frame_rate=120)
        assert timeline(path).seconds == pytest.approx(16 / 50)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_clip(moving(), tmp_path / "long.gif", frame_rate=8)
    monkeypatch.setattr(clips, "MOST_FRAMES", 5)
    with pytest.raises(ValueError, match=r"long\.gif has 6 frames; cut out what is to be continued, at most 5"):
        as_array(tmp_path / "long.gif")
    with pytest.raises(ValueError, match=r"clips are written as \.mp4, \.gif, \.webp, or frames"):
        save_clip(moving(), tmp_path / "a.avi", frame_rate=8)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\1" * 200)
    with pytest.raises(ValueError, match=r"a\.mp4"):
        as_array(tmp_path / "a.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no frames"):
        as_array(tmp_path / "empty")


def test_one_clip_or_several() -> None:
    clip = moving()
    pictures = [Image.fromarray(frame) for frame in clip]
    for one in (clip, pictures, list(clip), "a.gif", Path("a.gif")):
        assert len(several(one)) == 1
    for two in (np.stack([clip, clip]), [clip, clip], [pictures, pictures], ["a.gif", "b.gif"], [Path("a"), clip]):
        assert len(several(two)) == 2
    np.testing.assert_array_equal(as_array(pictures), clip)
    np.testing.assert_array_equal(as_array(list(clip)), clip)


@pytest.mark.parametrize("side", [29, 58, 123])  # 28 * (29 / 28) is more than 29
def test_frames_of_any_size_are_fitted(side: int) -> None:
    assert as_array(np.zeros((2, side, side + 7, 3), np.uint8), (28, 28)).shape == (2, 28, 28, 3)


def test_sheets_of_clips() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    strips = np.asarray(film_strips([[red, blue, red], [blue]], ["first\nline", "x" * 100_000]))
    tall = 64 + 4
    assert strips.shape[1] == 3 * 64 + 8
    first, second = strips[4 + 32], strips[4 + 32 + tall + 15]
    for place, colour in ((20, (255, 0, 0)), (84, (0, 0, 255)), (148, (255, 0, 0))):
        assert tuple(first[place]) == colour
    assert tuple(second[20]) == (0, 0, 255)
    assert tuple(second[84]) == (255, 255, 255), "a shorter clip leaves its row white"
    sheets = [np.asarray(sheet) for sheet in moving_sheet([[red, blue, red], [blue]], ["a", "b"])]
    assert len(sheets) == 3
    assert [tuple(sheet[50, 50]) for sheet in sheets] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert all(tuple(sheet[50, 150]) == (0, 0, 255) for sheet in sheets), "a shorter clip stays at its last frame"
    with pytest.raises(ValueError, match="at least one picture"):
        film_strips([])
    contact_sheet([red], ["\x00\u200bnothing to see"])
