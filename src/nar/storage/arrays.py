"""Arrays in .npz files: read by name, none of them of objects, nor larger than what its file can hold.

Does not know what the arrays mean.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_MOST_UNPACKED = 2**31  # bytes of an array that is packed more than _MOST_PACKED times
_MOST_PACKED = 200


def array_names(path: Path) -> list[str]:
    """The names of a file's arrays; raises ValueError where it is no .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged or not an .npz file ({error}); copy it again") from None


def read_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Read those of `names` that a file has, by default all.

    Raises:
        ValueError: names the file: damaged, of another format, or an array that is too large or of objects.
    """
    known = array_names(path)
    wanted = known if names is None else [name for name in names if name in known]
    try:
        for name in wanted:
            _check_size(path, name)
        with np.load(path) as file:
            return {name: file[name] for name in wanted}
    except OSError:
        raise
    except Exception as error:  # damaged bytes lead the readers anywhere
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged or not an .npz file ({error}); copy it again") from error


def _check_size(path: Path, name: str) -> None:
    """Look at what an array's header claims, before anything is allocated."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        entry = archive.getinfo(f"{name}.npy")
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} is an array of objects; save it as numbers or text")
    needed = math.prod(shape) * dtype.itemsize
    if needed > entry.file_size:
        found = f"{needed:,} bytes and has {entry.file_size:,}"
        raise ValueError(f"{path}: {name} {shape} would need {found}; copy it again")
    if needed > _MOST_UNPACKED and needed > _MOST_PACKED * max(1, entry.compress_size):
        raise ValueError(
            f"{path}: {name} unpacks from {entry.compress_size:,} to {needed:,} bytes; at most {_MOST_UNPACKED:,} are "
            f"unpacked where they are packed more than {_MOST_PACKED} times: save it with np.savez"
        )
