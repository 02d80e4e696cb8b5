"""A run that stops, however, goes on to the same weights, and says in one line why it can't."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from nar.training.checkpoint import Checkpoints
from nar.training.distributed import Workers
from nar.training.lock import locked
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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process that is sent a signal")
@pytest.mark.parametrize("number", [getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP")])
def test_a_signal_saves_and_exits_with_0(
    uninterrupted: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("these tests run under nohup, which trainings inherit")
    path, reference = uninterrupted
    run, output = tmp_path / "run", tmp_path / "output"
    process = start("train", path, f"run={run}", "checkpoint_every=1000", output=output)
    while process.is_alive() and len(losses_so_far(run)) < 3:
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    assert "stopped, and saved: the same command goes on" in output.read_text()
    assert len(list((run / "checkpoints").iterdir())) == 1
    nar("train", path, f"run={run}", "checkpoint_every=1000")
    assert equal(weights(run), weights(reference))


@contextmanager
def busy(path: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains a recipe and stays in its first preview."""
    code = (
        "import sys, time, pathlib; from nar.training.tasks import run_recipe\n"
        "def stay(*_):\n"
        "    pathlib.Path(sys.argv[2], 'staying').touch(); time.sleep(100)\n"
        "run_recipe(sys.argv[1], ['run=' + sys.argv[2], 'preview_every=1'], metrics=stay)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(run)], text=True)
    try:
        while not (run / "staying").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process that is sent a signal")
def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with busy(recipe(tmp_path), tmp_path / "run") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
        assert time.monotonic() - began < 5


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    with busy(path, run) as process:
        named = rf"run is in use by process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d .*another run=DIR"
        with pytest.raises(ValueError, match=named):
            run_recipe(str(path), [f"run={run}"])
        assert f"in use by process {process.pid}" in nar("train", path, f"run={run}", processes=2, code=2)
        assert not (run / "model").exists()
        process.kill()
        process.wait()
        assert (run / "run.lock").is_file()
        assert run_recipe(str(path), [f"run={run}"])
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize(
    ("changes", "silent", "held"),
    [
        ({}, 0, True),
        ({"boot": "another"}, 0, False),
        ({"began": "earlier"}, 0, False),  # the number of a process that ended is used again
        ({"pid": 2**22 + 1}, 0, False),
        ({"host": "elsewhere"}, 0, True),
        ({"host": "elsewhere"}, 3600, False),
        ({"host": "elsewhere", "pid": "?"}, 3600, False),
    ],
)
def test_a_lock_counts_as_long_as_its_owner_is_there(
    tmp_path: Path, changes: dict[str, object], silent: float, held: bool
) -> None:
    with locked(tmp_path):
        mine = json.loads((tmp_path / "run.lock").read_text())
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(mine | changes))
    os.utime(path, (time.time() - silent,) * 2)
    if held:
        with pytest.raises(ValueError, match=f"in use by process {mine['pid']} on "), locked(tmp_path):
            pass
        return
    with locked(tmp_path):
        assert json.loads(path.read_text())["host"] == mine["host"]
    assert not path.exists()


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


def test_a_checkpoint_is_written_where_the_loss_is_lowest_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, num_images=10 * 32, keep_last=10, checkpoint_every=1000, preview_every=2)
    scores = iter([3.0, 1.0, 2.0, 0.5, 0.7])
    monkeypatch.setattr(ModelTask, "evaluate", lambda *_: {"loss": next(scores)})
    run_recipe(str(path), [f"run={tmp_path / 'run'}"])
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:09d}" for step in (2, 4, 8, 10)]


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
    resource = pytest.importorskip("resource", reason="this system can't limit the size of files")
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


@pytest.mark.parametrize("damage", ["empty", "flipped bit", "lost", "metadata", "record", "unreadable record"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    run_recipe(str(path), [f"run={run}"])
    before = weights(run)
    newest = run / "checkpoints" / "step-000000004"
    name = {"metadata": ".metadata", "record": "run.json", "unreadable record": "run.json"}.get(damage, "__0_0.distcp")
    data = bytearray((newest / name).read_bytes())
    if damage == "record":
        data = bytearray(data.replace(b'"seconds"', b'"secants"'))
    else:
        data[len(data) // 2] ^= 4
    (newest / name).write_bytes({"empty": b"", "unreadable record": b"{"}.get(damage, bytes(data)))
    if damage == "lost":
        (newest / name).unlink()
    shutil.rmtree(run / "model")  # or the run would just be finished
    with pytest.warns(UserWarning, match=r"step-000000004.*: going on from step-000000002, and later ones are in"):
        assert run_recipe(str(path), [f"run={run}"])
    assert equal(weights(run), before)
    assert [found.name for found in (run / "checkpoints" / "aside").iterdir()] == ["step-000000004"]


@pytest.mark.parametrize("damage", [b"{", b"{}", b"[]"])
def test_a_damaged_record_of_an_older_checkpoint_stops_nothing(tmp_path: Path, damage: bytes) -> None:
    """Not the save that comes after it, which then removes what is not kept, and not the run that goes on."""
    path, run = recipe(tmp_path, keep_last=2, checkpoint_every=1, preview_every=1), tmp_path / "run"
    run_recipe(str(path), [f"run={run}", "num_images=64"])
    (run / "checkpoints" / "step-000000001" / "run.json").write_bytes(damage)
    assert run_recipe(str(path), [f"run={run}"], override=True) == run / "model"
    kept = [found.name for found in (run / "checkpoints").iterdir()]
    assert "step-000000001" not in kept
    assert {"step-000000003", "step-000000004"} <= {*kept}


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    run_recipe(str(path), [f"run={run}"])
    shutil.rmtree(run / "model")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-000000004 is damaged .*; .*step-000000002 is damaged"):
        run_recipe(str(path), [f"run={run}"])
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


def test_checkpoints_without_digests_go_on(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    run_recipe(str(path), [f"run={run}"])
    before = weights(run)
    shutil.rmtree(run / "model")
    for record in (run / "checkpoints").glob("*/run.json"):
        kept = json.loads(record.read_text())
        record.write_text(json.dumps({key: kept[key] for key in kept.keys() - {"files", "digest", "data"}}))
    (run / "checkpoints" / "step-000000004" / "__0_0.distcp").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000000004 can't be read .*: going on from step-000000002"):
        assert run_recipe(str(path), [f"run={run}"])
    assert equal(weights(run), before)


def test_a_run_goes_on_from_a_named_checkpoint(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    command = ["train", path, f"run={run}"]
    nar(*command)
    before, log = weights(run), losses(run)
    said = nar(*command, "--from", "step-2", "num_images=96", "--override")
    assert "going on from step-000000002" in said
    assert "goes on after step 2" in said
    assert losses(run) == log[:3]
    assert sorted(found.name for found in (run / "checkpoints").iterdir()) == [
        "aside",
        "step-000000002",
        "step-000000003",
    ]
    assert not equal(weights(run), before)
    assert "no checkpoint 'step-7'; there are: step-2, step-3" in nar(
        *command, "--from", "step-7", "--override", code=2
    )


class Bomb:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    workers = Workers(0, 1, torch.device("cpu"))
    for name, value in (("metadata", torch.ones(2)), ("value", Bomb(tmp_path / "ran"))):
        checkpoints = Checkpoints(tmp_path / name, 2, workers)
        checkpoints.save(3, {"a": value}, {"heldout": None})
        checkpoints.wait()
        (made,) = checkpoints.all()
        if name == "metadata":
            (made / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        (made / "run.json").write_text('{"step": 3, "heldout": null}')  # no digests
        with pytest.raises(ValueError, match=r"step-000000003 can't be read"):
            checkpoints.load(made, lambda fill: fill({"a": torch.zeros(2)}))
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    ["optim.learning_rate=1e-5", "optim.weight_decay=0.9", "optim.betas=[0.5,0.9]", "optim.muon_learning_rate=1e-5"],
)
def test_changed_rates_take_effect(tmp_path: Path, change: str) -> None:
    path = recipe(tmp_path, optim={"learning_rate": 3e-3, "muon_learning_rate": 3e-3})
    run_recipe(str(path), [f"run={tmp_path / 'run'}", "num_images=64"])
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    run_recipe(str(path), [f"run={tmp_path / 'same'}"], override=True)
    run_recipe(str(path), [f"run={tmp_path / 'run'}", change], override=True)
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "same"))
    for name in ("learning_rate", "muon_learning_rate"):
        expected = 1e-5 if change.startswith(f"optim.{name}=") else 3e-3
        assert losses(tmp_path / "run", name) == pytest.approx([3e-3, 3e-3, expected, expected])


@pytest.mark.parametrize("change", ["model.dim=64", "optim.muon_learning_rate=1e-3"])
def test_a_checkpoint_of_another_model_is_no_damage(tmp_path: Path, change: str) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    run_recipe(str(path), [f"run={run}", "num_images=64"])
    with pytest.raises(ValueError, match="step-000000002 is whole, but of another model or other optimizers"):
        run_recipe(str(path), [f"run={run}", change], override=True)
    assert (run / "checkpoints" / "step-000000002").is_dir()


@pytest.mark.parametrize("task", ["model", "tokenizer"])
@pytest.mark.parametrize("change", ["names", "labels", "words", "pictures", "number"])
def test_other_data_are_noticed(tmp_path: Path, task: str, change: str) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for index in range(20):
        place = data / ("cats" if index % 2 else "dogs") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index * 10, 0, 0)).save(place)
        place.with_suffix(".txt").write_text(f"number {index}")
    path = (recipe if task == "model" else tokenizer_recipe)(tmp_path, data={"source": str(data), "size": 16})
    run_recipe(str(path), [f"run={run}", "num_images=64"])
    (run / "model" / "config.json").unlink()
    first = data / "dogs" / "0.png"
    if change == "names":
        first.rename(data / "dogs" / "00.png")
        first.with_suffix(".txt").rename(data / "dogs" / "00.txt")
    elif change == "labels":
        (data / "dogs").rename(data / "birds")
    elif change == "words":
        first.with_suffix(".txt").write_text("another")
    elif change == "pictures":
        for place in data.rglob("*.png"):
            Image.new("RGB", (16, 16), "white").save(place)
    else:
        first.unlink()
        first.with_suffix(".txt").unlink()
    with pytest.raises(ValueError, match=rf"was started with other data: .*{change} (to learn from|held out)"):
        run_recipe(str(path), [f"run={run}", "num_images=64"])
    assert run_recipe(str(path), [f"run={run}"], override=True)


def test_a_full_disk_is_one_line_that_names_the_log(tmp_path: Path) -> None:
    """Also where TensorBoard's thread notices first, which prints what it raises."""
    code = (
        "import resource, sys; from nar.training.log import Log; from pathlib import Path\n"
        "with Log(Path(sys.argv[1]), 0, 1) as log:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n"
        "    for step in range(2000): log.scalars(step, {'loss': 1.0})"
    )
    for most in ("300", "30000"):  # metrics.jsonl is the longer of both
        made = subprocess.run([sys.executable, "-c", code, str(tmp_path), most], capture_output=True, text=True)
        assert made.returncode == 1
        assert made.stderr.count("Exception in thread") == 0
        assert re.search(r"OSError: \[Errno 27\] .*(metrics\.jsonl|tensorboard)'", made.stderr), made.stderr


def test_a_damaged_log_is_named_and_goes_on(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    run_recipe(str(path), [f"run={run}", "num_images=64"])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[0] = '{"step": 1, "loss": nonsense}'
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "lo']) + "\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged: 2 of its \d lines can't be read, .* line 1;"):
        run_recipe(str(path), [f"run={run}"], override=True)
    assert len(losses(run)) == 3


def test_a_line_cut_by_a_kill_is_no_damage(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    run_recipe(str(path), [f"run={run}", "num_images=64"])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run_recipe(str(path), [f"run={run}"], override=True)
    assert len(losses(run)) == 4
    assert not [warning for warning in recwarn if "damaged" in str(warning.message)]
