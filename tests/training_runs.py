"""Tiny runs of `nar train`, in processes of their own, for the tests of the trainer."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from nar import cli
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig

TOKENIZER = {
    "vocab_size": 64,
    "code_dim": 4,
    "channels": 8,
    "channel_multipliers": [1, 2, 2],
    "num_blocks": 1,
    "latent_channels": 16,
    "norm_groups": 4,
}
MODEL = {
    "task": "model",
    "data": {"source": "toy", "size": 16},
    "model": {"dim": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 64},
    "optim": {"learning_rate": 3e-3, "warmup_images": 64},
    "batch_size": 32,
    "num_images": 128,
    "log_every": 1,
    "preview_every": 100,
    "checkpoint_every": 2,
}
# A server that has imported everything forks the processes: each starts in a tenth of a second. Windows can't fork.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(
        ["nar.training.tasks", "torch.distributed.fsdp", "torch.utils.tensorboard", "training_runs"]
    )


def random_tokenizer(folder: Path, seed: int = 0) -> Path:
    """A tokenizer folder with random weights, 16x16 pixels to 4x4 codes of 64."""
    torch.manual_seed(seed)
    ImageTokenizer(ImageTokenizerConfig(**TOKENIZER)).save_pretrained(folder)
    return folder


def recipe(folder: Path, **values: object) -> Path:
    """The recipe MODEL with other `values`, as a YAML file in `folder`, with a random tokenizer beside it."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        random_tokenizer(tokenizer)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**MODEL, "tokenizer_path": str(tokenizer), **values}))
    return path


def tokenizer_recipe(folder: Path, **values: object) -> Path:
    """A recipe for the tokenizer TOKENIZER of four steps with every part of the loss, as a YAML file in `folder`."""
    kept = {name: value for name, value in MODEL.items() if name not in ("task", "model")}
    path = folder / "tiny-tokenizer.yaml"
    own = {"task": "tokenizer", "tokenizer": TOKENIZER, "tokenizer_loss": {"restart_every": 2}}
    path.write_text(yaml.safe_dump({**kept, **own, **values}))
    return path


def start(
    *arguments: object, rank: int = 0, processes: int = 1, port: int = 0, output: Path | None = None
) -> multiprocessing.Process:
    """Start the command `nar` as one of `processes` that torchrun would start; it prints into `output`."""
    environment = {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    process = _CONTEXT.Process(target=_main, args=([*map(str, arguments)], environment, output))
    process.start()
    return process


def nar(*arguments: object, processes: int = 1, code: int = 0) -> str:
    """Run the command on some processes; returns what the first one printed, after checking all exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(processes)]
        started = [
            start(*arguments, rank=rank, processes=processes, port=port, output=file) for rank, file in enumerate(files)
        ]
        for process, file in zip(started, files, strict=True):
            process.join(240)
            assert process.exitcode == code, file.read_text()
        return files[0].read_text()


def _main(arguments: list[str], environment: dict[str, str], output: Path | None) -> None:
    os.environ.update(environment)
    with Path(output or os.devnull).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["nar", *arguments]
    cli.main()


def losses(run: Path, name: str = "loss") -> list[float]:
    """The values of one number in a run's log, by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return load_file(run / "model" / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
