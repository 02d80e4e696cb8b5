"""A run that stops, however, goes on to the same weights, and says in one line why it can't."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nar.training.checkpoint import Checkpoints
from nar.training.distributed import Workers
from nar.training.loop import Task
from nar.training.models import ModelTask
from nar.training.tasks import run_recipe
from training_runs import equal, losses, nar, recipe, start, tokenizer_recipe, weights

DROPOUT = {"token": 0.1, "residual": 0.1, "path": 0.1}
ADVERSARY = {"weight": 0.5, "start": 1, "channels": 8, "num_layers": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe of 40 steps with every kind of dropout and a checkpoint every other step, and its run in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    path = recipe(folder, num_images=40 * 32, dropout=DROPOUT)
    nar("train", path, f"run={folder / 'run'}")
    return path, folder / "run"


def leftovers(run: Path) -> list[Path]:
    return [path for path in run.rglob(".*") if path.name != ".metadata"]


@pytest.mark.parametrize("task", ["model", "muon", "tokenizer"])
def test_four_steps_are_two_and_a_restart_and_two(tmp_path: Path, task: str) -> None:
    if task == "model":
        path = recipe(tmp_path, dropout=DROPOUT)
    elif task == "muon":
        path = recipe(tmp_path, optim={"learning_rate": 1e-3, "muon_learning_rate": 3e-3, "curve": "cosine"})
    else:
        path = tokenizer_recipe(tmp_path, data={"source": "toy", "size": 16, "augment": "crop"}, adversary=ADVERSARY)

    def crash(_: nn.Module, __: Task) -> dict[str, float]:
        raise RuntimeError("power cut")

    straight = run_recipe(str(path), [f"run={tmp_path / 'straight'}", "preview_every=3"])
    broken = [f"run={tmp_path / 'broken'}", "preview_every=3"]
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(str(path), broken, metrics=crash)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-000000002"]
    assert run_recipe(str(path), broken) == tmp_path / "broken" / "model"
    assert straight is not None
    assert equal(weights(straight.parent), weights(tmp_path / "broken"))
    assert losses(straight.parent) == losses(tmp_path / "broken")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_any_moment(uninterrupted: tuple[Path, Path], tmp_path: Path, kills: int) -> None:
    path, reference = uninterrupted
    run = tmp_path / "run"
    rng = random.Random(kills)
    done = during_save = 0
    for kill in range(kills):
        process = start("train", path, f"run={run}", output=tmp_path / "output")
        in_save = kill % 3 == 2  # every third time while a checkpoint is being written
        moment = rng.uniform(0, 0.5)
        while process.is_alive() and not _is_time(run, done, moment, in_save):
            time.sleep(0.001)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster: begin again
            done = 0
            shutil.rmtree(run)
            continue
        during_save += bool(leftovers(run))
        done = len(losses_so_far(run))
    assert during_save or kills < 20
    nar("train", path, f"run={run}")
    assert equal(weights(run), weights(reference))
    assert losses(run) == losses(reference)
    assert not leftovers(run)


def losses_so_far(run: Path) -> list[str]:
    log = run / "metrics.jsonl"
    return re.findall(r'"gradient_norm"', log.read_text()) if log.is_file() else []


def _is_time(run: Path, done: int, moment: float, in_save: bool) -> bool:
    if in_save:
        return len(losses_so_far(run)) > done and bool(leftovers(run / "checkpoints"))
    if len(losses_so_far(run)) <= done:
        return False
    time.sleep(moment)
    return True


def test_sigterm_saves_and_exits_with_0(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = uninterrupted
    run, output = tmp_path / "run", tmp_path / "output"
    process = start("train", path, f"run={run}", "checkpoint_every=1000", output=output)
    while process.is_alive() and len(losses_so_far(run)) < 3:
        time.sleep(0.001)
    process.terminate()
    process.join()
    assert process.exitcode == 0
    assert "the same command goes on" in output.read_text()
    assert len(list((run / "checkpoints").iterdir())) == 1
    nar("train", path, f"run={run}", "checkpoint_every=1000")
    assert equal(weights(run), weights(reference))


def test_the_last_and_the_best_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, num_images=10 * 32, keep_last=2, checkpoint_every=1, preview_every=2, export="best")
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.0, 1.0])  # after 2, 4, 6, 8, 10 steps, and of what is exported
    monkeypatch.setattr(ModelTask, "evaluate", lambda *_: {"loss": next(scores)})
    run = run_recipe(str(path), [f"run={tmp_path / 'run'}"])
    assert run is not None
    kept = sorted(path.name for path in (run.parent / "checkpoints").iterdir())
    assert kept == [f"step-{step:09d}" for step in (4, 9, 10)]
    training = json.loads((run / "config.json").read_text())["training"]
    assert training["images_seen"] == 4 * 32
    assert training["heldout"] == {"loss": 1.0}


def test_other_settings_are_shown_and_need_override(tmp_path: Path) -> None:
    path = recipe(tmp_path, num_images=64)
    run_recipe(str(path), [f"run={tmp_path / 'run'}"])
    changed = [f"run={tmp_path / 'run'}", "seed=1", "optim.weight_decay=0.1"]
    with pytest.raises(ValueError, match=r"weight_decay: 0\.05 -> 0\.1; seed: 0 -> 1; use another run=DIR, or --over"):
        run_recipe(str(path), changed)
    assert run_recipe(str(path), changed, override=True)
    assert run_recipe(str(path), [changed[0], "about=other words", "keep_last=1", "log_every=7", "checkpoint_every=9"])
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved" / "model" / "config.json").unlink()
    assert run_recipe(str(path), [f"run={tmp_path / 'moved'}", "engine.workers=2", "engine.device=cpu"])


def test_a_loss_that_is_not_finite_stops_before_anything_is_overwritten(tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoint_every=1)
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the loss is .* and the gradient norm nan on rows \d+, .* is intact"
    ):
        run_recipe(str(path), [f"run={tmp_path / 'run'}", "optim.learning_rate=1e36", "optim.warmup_images=0"])
    for saved in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(map(torch.isfinite, losses_of(saved)))


def losses_of(checkpoint: Path) -> list[torch.Tensor]:
    """What the log of the checkpoint's run says up to it."""
    step = int(checkpoint.name.split("-")[1])
    return [torch.tensor(value) for value in losses(checkpoint.parent.parent)[:step]]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    run = tmp_path / "run"
    run_recipe(str(path), [f"run={run}", "num_images=64"])
    before = {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files can't be written
    try:
        with pytest.raises(OSError, match=r"checkpoint .*step-000000004 can't be written .* are intact: make room"):
            run_recipe(str(path), [f"run={run}"], override=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()}
    assert run_recipe(str(path), [f"run={run}"], override=True)


def test_another_process_may_make_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = shutil.rmtree

    def remove_and_see_it_made(path: Path, **options: bool) -> None:
        removed(path, **options)
        Path(path).mkdir()

    monkeypatch.setattr(shutil, "rmtree", remove_and_see_it_made)
    checkpoints = Checkpoints(tmp_path, 2, Workers(0, 1, torch.device("cpu")))
    checkpoints.save(3, {"a": torch.ones(2)}, {"heldout": None})
    checkpoints.wait()
    (tmp_path / "checkpoints" / ".DS_Store").write_bytes(b"of a file manager")
    found = Checkpoints(tmp_path, 2, Workers(0, 1, torch.device("cpu"))).all()
    assert [path.name for path in found] == ["step-000000003"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    run_recipe(str(path), [f"run={tmp_path / 'run'}"])
    newest = tmp_path / "run" / "checkpoints" / "step-000000004"
    (newest / "__0_0.distcp").write_bytes(b"")
    shutil.rmtree(tmp_path / "run" / "model")  # or the run would just be finished
    with pytest.raises(ValueError, match=r"step-000000004 can't be read .*; delete this folder to go on from an ear"):
        run_recipe(str(path), [f"run={tmp_path / 'run'}"])
