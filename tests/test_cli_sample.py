"""`nar sample` with words, context frames and clips: files of every kind, and mistakes in one line."""

from __future__ import annotations

import builtins
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nar import Pipeline, Sampling
from nar.media.clips import as_array

Run = Callable[..., Any]


def test_prompts_on_a_sheet(run: Run, words_folder: Path, tmp_path: Path) -> None:
    done = run(
        "sample", words_folder, "--prompt", "a red apple", "--prompt", "octopus", "-n", 2, "-o", tmp_path / "a.png"
    )
    assert "4 pictures" in done
    assert "7 steps each" in done
    with Image.open(tmp_path / "a.png") as sheet:
        assert 2 * 96 < sheet.width < 3 * 96 < sheet.height + 96, "a row for each prompt"
    grown = run("sample", words_folder, "--prompt", "circle", "-n", 1, "-o", tmp_path / "a.gif")
    assert "1 picture in" in grown
    with Image.open(tmp_path / "a.gif") as growth:
        assert growth.n_frames > 3


def test_a_file_of_prompts(run: Run, words_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa red apple\n\n  octopus \r\n", encoding="utf-8")
    options = ("--prompts-file", tmp_path / "prompts.txt", "--prompt", "cross", "-n", 1, "--seed", 3)
    run("sample", words_folder, *options, "--negative-prompt", "blue", "-o", tmp_path / "folder")
    records = json.loads((tmp_path / "folder/samples.json").read_text())
    assert [record["label"] for record in records] == ["cross", "a red apple", "octopus"]
    assert {record["negative_prompt"] for record in records} == {"blue"}
    run("sample", words_folder, *options, "--negative-prompt", "blue", "-o", tmp_path / "a.npz", "--batch-size", 1)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["names"].tolist() == ["cross", "a red apple", "octopus"]
        assert "labels" not in arrays
        for record, row in zip(records, arrays["arr_0"], strict=True):
            with Image.open(tmp_path / "folder" / record["file"]) as picture:
                np.testing.assert_array_equal(np.asarray(picture), row)


def test_long_and_strange_prompts(run: Run, words_folder: Path, tmp_path: Path) -> None:
    prompt = "red \x07 apple\n" * 8000
    done = run("sample", words_folder, "--prompt", prompt, "-n", 1, "-o", tmp_path / "a.png")
    (warned,) = [line for line in done.splitlines() if "cut" in line]
    assert warned.startswith("nar: ")
    assert (tmp_path / "a.png").is_file()


def test_clips_in_every_form(run: Run, clips_folder: Path, tmp_path: Path) -> None:
    options = ("sample", clips_folder, "--prompt", "red circle", "-n", 1, "--seed", 2)
    expected = Pipeline.from_pretrained(clips_folder, device="cpu")(
        prompt="red circle", seed=2, output_type="np"
    ).videos
    assert "1 clip in" in run(*options, "-o", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    run(*options, "-o", tmp_path / "folder")
    np.testing.assert_array_equal(as_array(tmp_path / "folder/000000"), expected[0])
    (record,) = json.loads((tmp_path / "folder/samples.json").read_text())
    assert (record["file"], record["frame_rate"]) == ("000000", 5.0)
    assert record["prompt"] == record["label"]
    for name in ("a.gif", "a.webp", "a.mp4"):
        run(*options, "-o", tmp_path / name)
        assert as_array(tmp_path / name).shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(as_array(tmp_path / "a.webp"), expected[0])
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.info["duration"] == 200
        assert animation.info["loop"] == 0
    run(*options, "--fps", 10, "-o", tmp_path / "fast.gif")
    with Image.open(tmp_path / "fast.gif") as animation:
        assert animation.info["duration"] == 100
    run("sample", clips_folder, "--prompt", "red circle", "--prompt", "cross", "-n", 1, "-o", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:  # a row a clip
        assert sheet.width > 5 * 64
        assert 2 * 64 < sheet.height < 3 * 64
    run("sample", clips_folder, "--prompt", "red circle", "-n", 3, "-o", tmp_path / "sheet.mp4")
    assert as_array(tmp_path / "sheet.mp4").shape[2] > 3 * 96


def test_frames_are_continued(run: Run, clips_folder: Path, tmp_path: Path) -> None:
    run("sample", clips_folder, "--prompt", "cross", "-n", 1, "-o", tmp_path / "start")
    start = as_array(tmp_path / "start/000000")
    run(
        "sample",
        clips_folder,
        "--frames",
        tmp_path / "start/000000",
        "-n",
        1,
        "--num-frames",
        9,
        "-o",
        tmp_path / "next.npz",
    )
    with np.load(tmp_path / "next.npz") as arrays:
        assert arrays["arr_0"].shape == (1, 9, 8, 8, 3)
        np.testing.assert_array_equal(arrays["arr_0"][0, :5], start)


def test_geneval_layout(run: Run, words_folder: Path, clips_folder: Path, tmp_path: Path) -> None:
    lines = [{"tag": "color", "prompt": "a red apple"}, {"tag": "single", "prompt": "octopus"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("sample", words_folder, "--geneval", tmp_path / "metadata.jsonl", "-n", 3, "-o", tmp_path / "out")
    assert "3 pictures of each of 2 prompts" in run(*command)
    for index, line in enumerate(lines):
        folder = tmp_path / f"out/{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert [path.name for path in sorted((folder / "samples").iterdir())] == ["0000.png", "0001.png", "0002.png"]
    pipe = Pipeline.from_pretrained(words_folder, device="cpu")
    both = pipe(prompt=["a red apple", "octopus"], num_images_per_prompt=3, seed=0, output_type="np").images
    with Image.open(tmp_path / "out/00001/samples/0001.png") as picture:
        assert abs(np.asarray(picture).astype(int) - both[4]).max() <= 1
    stamp = (tmp_path / "out/00000").stat().st_mtime_ns
    (tmp_path / "out/00001/samples/0001.png").unlink()
    (tmp_path / "out/00001").rename(tmp_path / "out/.00001")  # as a stop leaves it
    run(*command)
    assert (tmp_path / "out/00000").stat().st_mtime_ns == stamp
    assert (tmp_path / "out/00001/samples/0001.png").is_file()
    assert "holds parts made with other settings: seed 0 instead of 1" in run(*command, "--seed", 1, code=2)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["text_encoder_sha256"] == pipe.text_encoder().digest
    assert "this model makes clips" in run("sample", clips_folder, *command[2:], code=2)
    (tmp_path / "file").touch()
    assert "must be a folder, and is a file" in run(*command[:-1], tmp_path / "file", code=2)


def test_mistakes(run: Run, words_folder: Path, clips_folder: Path, toy_folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "a.png")
    for arguments, message in (
        ((toy_folder, "--prompt", "a", *out), "takes no prompts; it takes class labels"),
        ((toy_folder, "--frames", tmp_path, *out), "takes no frames; it takes class labels"),
        ((words_folder, "--class-label", "a", *out), "takes no class labels; it takes prompts"),
        ((words_folder, *out), "say what to make: this model takes prompts"),
        ((words_folder, "--prompt", "a", "-o", tmp_path / "a.mp4"), "this model makes pictures: output"),
        ((words_folder, "--prompts-file", tmp_path / "none.txt", *out), "none.txt"),
        ((words_folder, "--prompt", "a", "--num-frames", 3, *out), "num_frames is for models that make clips"),
        ((clips_folder, *out), "say what to make: this model takes prompts, frames"),
        (
            (clips_folder, "--prompt", "a", "-o", tmp_path / "a.avi"),
            "(clips also .mp4)",
        ),
        ((clips_folder, "--prompt", "a", "--gif", *out), "--gif shows pictures growing"),
        ((clips_folder, "--frames", tmp_path / "none.gif", *out), "none.gif"),
        (
            (words_folder, "--prompt", "a", "--geneval", tmp_path / "m", *out),
            "--geneval says what is sampled: leave out --prompt",
        ),
        (
            (
                words_folder,
                "--labels",
                "prompts",
                "-n",
                4,
                "--fps",
                3,
                "--num-frames",
                9,
                "--negative-prompt",
                "b",
                *out,
            ),
            "--labels prompts says what is sampled: leave out --fps, --negative-prompt, --num-frames, -n",
        ),
        ((words_folder, "--labels", "prompts", *out), "give --prompts-file FILE"),
        (
            (words_folder, "--labels", "balanced", "--geneval", tmp_path / "m", *out),
            "--geneval says what is sampled: leave out --labels",
        ),
        ((toy_folder, "--text-encoder", tmp_path, "--prompt", "a", *out), "reads no words: leave the text encoder out"),
        ((toy_folder, "--fps", 3, *out), "--fps is for clips"),
        ((words_folder, "--text-encoder", tmp_path, "--prompt", "a", *out), "is no text encoder"),
    ):
        assert message in run("sample", *arguments, code=2), message
    (tmp_path / "broken.gif").write_bytes(b"GIF89a nothing")
    assert "broken.gif" in run("sample", clips_folder, "--frames", tmp_path / "broken.gif", *out, code=2)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "is no UTF-8 text" in run("sample", words_folder, "--prompts-file", tmp_path / "latin.txt", *out, code=2)
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompts" in run("sample", words_folder, "--prompts-file", tmp_path / "empty.txt", *out, code=2)


@pytest.mark.parametrize(("package", "extra"), [("av", "video"), ("transformers", "text")])
def test_missing_packages_are_named(
    run: Run, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    found = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("nar.cli.options.find_spec", lambda name: None if name == package else object())
    failed = run("sample", clips_folder, "--prompt", "a", "-o", tmp_path / "a.mp4", code=2)
    assert f"pip install nar-gen[{extra}]" in failed


def test_info_says_what_a_model_is_conditioned_on(run: Run, clips_folder: Path) -> None:
    facts = json.loads(run("info", clips_folder, "--json"))
    assert facts["makes"] == "clips of 5 frames of 8x8 pixels, 5 frames per second"
    assert facts["text"].startswith("10 features of width 16")
    assert facts["given frames"] == "0, 1 or 3"


def test_names_do_not_command_the_terminal(run: Run, toy_folder: Path, tmp_path: Path) -> None:
    """A class name out of a stranger's config.json may hold escape sequences; what is printed holds none."""
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["class_names"][0] = "\x1b]0;owned\x07red\x9b31m"
    (folder / "config.json").write_text(json.dumps(config))
    shown = run("info", folder), run("sample", folder, "--class-label", "nothing", "-o", tmp_path / "a.png", code=2)
    for text in shown:
        assert "red" in text
        assert not set(text) & {"\x1b", "\x07", "\x9b"}


def test_every_setting_of_sampling_is_an_option(run: Run, toy_folder: Path, tmp_path: Path) -> None:
    values = {"guidance_scale": 2.5, "guidance_interval": 3, "guidance_curve": "linear"}
    values |= {"guidance_power": 2.0, "temperature": 0.5, "top_k": 7, "top_p": 0.75}
    assert list(values) == [field.name for field in dataclasses.fields(Sampling)]
    options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    run("sample", toy_folder, *options, "-n", 1, "-o", tmp_path / "folder")
    record = json.loads((tmp_path / "folder/samples.json").read_text())[0]
    assert {name: record[name] for name in values} == values


def test_too_much_is_refused_before_any_work(run: Run, toy_folder: Path, tmp_path: Path) -> None:
    for options, message in (
        (("-n", 10**9), "'--number' / '-n'"),
        (("-n", 10**6), "too many for one call"),
        (("--grid", "3x1000000"), "3,000,000 positions; at most 65,536"),
        (("--guidance-scale", 1e308), "at least 0 and at most 1000"),
    ):
        assert message in run("sample", toy_folder, *options, "-o", tmp_path / "a.png", code=2)


def test_a_place_is_found(
    run: Run, toy_folder: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = toy_folder.name
    options = ("--class-label", "pear", "--class-label", "plum", "-n", 3)
    assert f"wrote {name}.png" in run("sample", toy_folder, *options)
    assert f"wrote {name}-2.png" in run("sample", toy_folder, *options)
    run("sample", toy_folder, *options, "-o", "sheet.jpg")
    with Image.open("sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
        assert 3 * 96 < sheet.width < 4 * 96, "a row for each class"
    assert f"wrote {clips_folder.name}.gif" in run("sample", clips_folder, "--prompt", "cross", "-n", 1)
    warned = run("sample", toy_folder, *options, "--guidance-scale", 7.5)
    assert "nar: guidance_scale 7.5 is far above this model's own, 1.5" in warned
    assert "give --output FILE.npz" in run("sample", toy_folder, "--labels", "balanced", code=2)
