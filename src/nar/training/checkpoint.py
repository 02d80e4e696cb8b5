"""What a run needs to go on after a stop: one file, replaced atomically, so that it is whole or the one before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

CHECKPOINT = "checkpoint.pt"


def write_checkpoint(run: Path, values: dict[str, Any]) -> None:
    """Write `values` (tensors and plain data) to the run's checkpoint, durably and atomically."""
    staging = run / f".{CHECKPOINT}.{os.getpid()}"
    try:
        with staging.open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(run / CHECKPOINT)
    finally:
        staging.unlink(missing_ok=True)


def read_checkpoint(run: Path) -> dict[str, Any] | None:
    """The run's checkpoint, or None when there is none; raises ValueError when it can't be read."""
    path = run / CHECKPOINT
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can't be read ({type(error).__name__}); delete it to start this run anew") from error
    return values
