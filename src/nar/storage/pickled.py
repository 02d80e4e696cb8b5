"""PyTorch's own files (.pth), read as data: nothing in them is run. Does not know which tensors anybody needs."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_pickle(path: Path, *, allowed: Sequence[Any] = ()) -> Any:
    """Read a file of tensors and plain values; `allowed` are further types that may be rebuilt from it.

    Raises:
        ValueError: damaged, of another format, or it asks for other types; in one line, without what is in the file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")  # a pipe would be waited for
    with torch.serialization.safe_globals([*allowed]):
        try:
            # Mapped, not read: only the tensors that are used come into memory. Old files cannot be mapped.
            mapped = zipfile.is_zipfile(path) or None
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            reason = (re.findall(r".*rror:\s*(.+)", str(error)) or ["its pickle is malformed"])[0]
            if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
                reason = f"it asks for {named[1]}, which no checkpoint needs and which could run code"
            raise ValueError(f"{path} is refused: {reason}") from None
        except Exception as error:  # damaged bytes lead the unpickler anywhere
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is truncated or not a checkpoint ({reason}); download it again") from error
