"""Models on the hub, here one on this machine: revisions, what is fetched, no network, cards."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

import nar
from hub_server import commit_of, hub, use
from nar import Pipeline, cli
from nar.storage.folder import find_model, read_config


@pytest.fixture(scope="module")
def two(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two revisions, which sample other pictures; they also load in diffusers."""
    pipe, folder = Pipeline.from_pretrained(toy_folder, device="cpu"), tmp_path_factory.mktemp("hub")
    pipe.save_pretrained(folder / "first", diffusers=True)
    pipe.sampling = nar.Sampling(guidance_scale=3.0, top_k=1)
    pipe.save_pretrained(folder / "second", diffusers=True)
    return {"v1": folder / "first", "main": folder / "second"}


def said(source: str, revision: str | None = None) -> Any:
    """The commit that is found and its files, or why none is."""
    try:
        folder = find_model(source, revision)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    guidance = read_config(folder)["sampling"]["guidance_scale"]
    return (
        folder.name,
        guidance,
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    )


def test_revisions_and_no_network(two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "config.json",
        "model.safetensors",
        "model_index.json",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
    ]
    newest, first = (commit_of("main"), 3.0, files), (commit_of("v1"), 1.5, files)
    with hub(two) as (address, paths):
        use(monkeypatch, address, tmp_path)
        assert said("me/toy") == newest
        assert said("me/toy@v1") == said("me/toy", "v1") == first
        assert said("me/toy@v9") == "no folder 'me/toy' here, and the hub has no revision 'v9' of it"
        none = "the hub has none of that name that you may read (`hf auth login`)"
        assert said("you/toy") == f"no folder 'you/toy' here, and {none}"
        assert said("me/toy@v1", "main") == "me/toy@v1 names revision 'v1', and 'main' was asked for: give one"
        assert not [path for path in paths if path.endswith((".py", ".md"))]  # no code is fetched, nor cards
        use(monkeypatch, address, tmp_path, offline=True)
        count = len(paths)
        assert (said("me/toy"), said("me/toy@v1")) == (newest, first)
        assert said("me/toy@v9") == (
            "no folder 'me/toy' here, and v9 was not downloaded before, and the hub can't be reached"
        )
        assert len(paths) == count


def test_info_of_a_hub_id(
    two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub(two) as (address, _):
        use(monkeypatch, address, tmp_path)
        monkeypatch.setattr(sys, "argv", ["nar", "info", "me/toy@v1"])
        with pytest.raises(SystemExit):
            cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["steps", "7", "for", "16", "tokens"] for line in lines)
    assert commit_of("v1") in lines[0]


def test_a_revision_of_what_is_no_hub_id(toy_folder: Path) -> None:
    for source in ("fashion", toy_folder, str(toy_folder)):
        with pytest.raises(ValueError, match="is no hub id: leave revision 'v1' out"):
            find_model(source, "v1")


def test_cards(toy_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, device="cpu")
    pipe.save_pretrained(tmp_path / "mine", license="mit")
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "mit",
        "nar",
        "unconditional-image-generation",
    )
    assert "pictures of 8x8 from class labels" in body
    assert "red apple, pear, plum" in body
    assert "diffusers" not in body
    # A card that somebody wrote stays, with its licence, and gets the metadata that it lacks.
    (tmp_path / "mine" / "README.md").write_text(
        "---\nlicense: cc0-1.0\ntags: [fruit]\n---\n\n# Fruit\n\n[how](../x)\n"
    )
    Pipeline.from_pretrained(tmp_path / "mine", device="cpu").save_pretrained(tmp_path / "again", diffusers=True)
    _, front, body = (tmp_path / "again" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["license"], data["tags"], data["library_name"]) == ("cc0-1.0", ["fruit"], "diffusers")
    assert body.strip() == "# Fruit\n\nhow"


def test_cards_tell_what_was_measured(tmp_path: Path) -> None:
    Pipeline.from_pretrained("fashion", device="cpu").save_pretrained(tmp_path / "fashion")
    card = huggingface_hub.ModelCard.load(tmp_path / "fashion" / "README.md")
    [result] = card.data.eval_results
    assert (result.dataset_type, result.metric_type) == ("fashion-mnist", "bits_per_token")
    assert result.metric_value == pytest.approx(4.54869)
    assert "What it can't do" in card.text  # the card that it comes with


def test_code_of_a_folder_is_never_run(two: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(two["v1"], folder)
    for name in ("pipeline.py", "tokenizer/loader.py"):
        (folder / name).write_text("raise SystemExit('ran')\n")
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    assert torch.equal(pipe(0, seed=1).codes, Pipeline.from_pretrained(two["v1"], device="cpu")(0, seed=1).codes)
    pipe.save_pretrained(folder)  # replaced whole: what is for diffusers goes where it is not asked for
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer",
    ]


def test_pushed(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
            calls.append((repo_id, private, exist_ok))
            return f"https://hub/{repo_id}"

        def file_exists(self, repo_id: str, filename: str) -> bool:
            return filename == "README.md" and repo_id == "me/written"

        def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str] | None, **_: str) -> None:
            calls.append((sorted(path.name for path in folder_path.iterdir()), ignore_patterns))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    pipe = Pipeline.from_pretrained(toy_folder, device="cpu")
    assert pipe.push_to_hub("me/toy", private=True, token="secret") == "https://hub/me/toy"
    files = ["README.md", "config.json", "model.safetensors", "tokenizer"]
    assert calls == ["secret", ("me/toy", True, True), (files, None)]
    assert pipe.push_to_hub("me/written", diffusers=True) == "https://hub/me/written"  # where people wrote a card
    assert calls[-1] == (sorted([*files, "model_index.json", "pipeline.py"]), ["README.md"])
