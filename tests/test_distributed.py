"""Two processes learn what one learns, and go on from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nar.training.tasks import run_recipe
from training_runs import TOKENIZER, losses, nar, recipe, tokenizer_recipe, weights

# Held-out evaluation runs too, since processes share it.
STEPS = {"num_images": 4 * 32, "preview_every": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and its run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    path = recipe(folder, **STEPS)
    nar("train", path, f"run={folder / 'run'}")
    return path, folder / "run"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(alone: tuple[Path, Path], tmp_path: Path, parallel: str) -> None:
    path, reference = alone
    run = tmp_path / "run"
    nar("train", path, f"run={run}", f"engine.parallel={parallel}", "engine.accumulate=2", processes=2)
    for name in ("loss", "gradient_norm", "heldout_loss"):
        torch.testing.assert_close(
            torch.tensor(losses(run, name)), torch.tensor(losses(reference, name)), rtol=1e-5, atol=0
        )
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tokenizer_loss": {"kmeans_steps": 2, "codebook_decay": 0.9, "restart_every": 3}},
        {"tokenizer": {**TOKENIZER, "quantizer": "bsq", "code_dim": 6}, "tokenizer_loss": {"entropy": 0.1}},
    ],
    ids=["restart", "kmeans", "bsq"],
)
def test_two_processes_train_a_tokenizer_as_one_does(tmp_path: Path, values: dict[str, object]) -> None:
    path = tokenizer_recipe(tmp_path, data={"source": "toy", "size": 16, "augment": "flip"}, preview_every=4, **values)
    run_recipe(str(path), [f"run={tmp_path / 'one'}"])
    nar("train", path, f"run={tmp_path / 'two'}", processes=2)
    for name in ("loss", "usage", "perplexity", "heldout_loss", "heldout_usage"):
        two, one = (torch.tensor(losses(tmp_path / run, name)) for run in ("two", "one"))
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def test_tokenizers_are_not_sharded(tmp_path: Path) -> None:
    path = tokenizer_recipe(tmp_path)
    assert "not fsdp" in nar("train", path, f"run={tmp_path / 'fsdp'}", "engine.parallel=fsdp", code=2)


@pytest.mark.parametrize(("first", "second"), [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp"))])
def test_a_checkpoint_goes_on_at_another_number_of_processes(
    alone: tuple[Path, Path], tmp_path: Path, first: tuple[int, str], second: tuple[int, str]
) -> None:
    path, reference = alone
    run = tmp_path / "run"
    for (processes, parallel), images in ((first, 64), (second, 128)):
        options = (f"run={run}", f"engine.parallel={parallel}", f"num_images={images}", "--override")
        nar("train", path, *options, processes=processes)
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), rtol=1e-5, atol=0)


def test_several_processes_without_a_way_to_share_are_refused(alone: tuple[Path, Path], tmp_path: Path) -> None:
    said = nar("train", alone[0], f"run={tmp_path / 'run'}", "engine.parallel=none", processes=2, code=2)
    assert "torchrun started 2 processes but engine.parallel is none; set ddp or fsdp" in said


def test_a_batch_that_cannot_be_split_is_refused(alone: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size 32 is not a multiple of 3, 1 processes times engine\.accumulate=3"
    ):
        run_recipe(str(alone[0]), [f"run={tmp_path / 'run'}", "engine.accumulate=3"])
