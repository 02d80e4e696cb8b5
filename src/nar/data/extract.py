"""Pictures to codes on disk, in shards: in parallel, resumable, with all views of a picture and a list of broken ones.

Knows sources, tokenizers and the files of `nar.data.codes`; does not know models or training.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nar import __version__
from nar.data.clips import ClipSource
from nar.data.codes import MANIFEST
from nar.data.source import BROKEN, BROKEN_SHARE, Source, check_broken
from nar.media.crops import VIEWS
from nar.media.pixels import as_pixels, pad_to_multiple
from nar.media.video import Windows
from nar.storage.files import atomically
from nar.storage.folder import digest
from nar.tokenizer import load_tokenizer

SHARD_SIZE = 4096
_SETTINGS = "extraction.json"
_LOOKED_AT = 16  # pictures whose contents are part of what names a source


def extract(
    tokenizer_folder: str | Path,
    source: Source,
    folder: str | Path,
    *,
    size: int,
    kind: str = "centre",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    threads: int = 4,
    rank: int = 0,
    count: int = 1,
    wait: Callable[[], None] = lambda: None,
    quiet: bool = False,
    pad: bool = False,
) -> Path:
    """Encode all pictures of `source` into `folder`; returns it. What is there already is kept.

    Process `rank` of `count` makes every `count`-th shard; `wait` must return once all processes have called it, and
    then the first one writes the manifest. The tokenizer is copied into the folder, which so needs nothing else.
    With `pad` the edges of pictures are repeated, below and right, up to a multiple of the tokenizer's patch.

    Raises:
        ValueError: the folder holds codes of another tokenizer, source or setting, or more than 1 % of the pictures are
            broken.
    """
    if kind not in VIEWS:
        raise ValueError(f"views must be one of {', '.join(VIEWS)}, not {kind!r}")
    if not len(source):
        raise ValueError("there are no pictures to extract codes from")
    folder = Path(folder)
    settings = {
        "tokenizer": digest(tokenizer_folder),
        "size": size,
        "views": kind,
        "source": fingerprint(source),
        "shard_size": SHARD_SIZE,
        "padding": pad,
        "given_frames": getattr(source, "given", 0),
    }
    _claim(folder, settings)
    tokenizer = load_tokenizer(tokenizer_folder).to(device)
    starts = range(0, len(source), SHARD_SIZE)
    names = [f"data-{index:05d}-of-{len(starts):05d}.arrow" for index in range(len(starts))]
    mine = [index for index in range(rank, len(starts), count) if not (folder / names[index]).is_file()]
    ends = {index: min(starts[index] + SHARD_SIZE, len(source)) for index in mine}
    broken: list[str] = []
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=sum(ends[index] - starts[index] for index in mine), desc="extracting codes", unit="img",
            disable=True if quiet or rank else None,
        ) as bar,
    ):  # fmt: skip
        for index in mine:
            rows, pieces, found = [], list[np.ndarray](), list[str]()
            for start in range(starts[index], ends[index], batch_size):
                batch = range(start, min(start + batch_size, ends[index]))
                decoded = list(pool.map(lambda row: _views(source, row, size, kind), batch))
                bar.update(len(batch))
                found += [piece for piece in decoded if isinstance(piece, str)]
                good = [(row, piece) for row, piece in zip(batch, decoded, strict=True) if not isinstance(piece, str)]
                if good:
                    rows += [row for row, _ in good]
                    images = np.stack([piece for _, piece in good])
                    pieces.append(_encode(tokenizer, images, device, batch_size, pad))
            broken += found
            if len(broken) > BROKEN_SHARE * len(source):
                check_broken(broken, len(source))
            codes = np.concatenate(pieces) if pieces else np.empty((0, VIEWS[kind], 1), np.int64)
            _write_shard(folder / names[index], codes, source, rows, found, tokenizer.config.vocab_size)
    wait()
    if rank == 0:
        _finish(folder, names, settings, source, tokenizer_folder, tokenizer, size)
    wait()
    return folder


def given_folder(count: int) -> str:
    """Name of the folder, in that of some clips' codes, with the codes of their first `count` frames alone."""
    return f"given-{count}"


def _views(source: Source, row: int, size: int, kind: str) -> np.ndarray | str:
    """The views (v, size, size, 3) uint8 of a picture, (v, T, size, size, 3) of a clip, or why it is broken."""
    try:
        return source.views(row, size, kind)
    except BROKEN as error:
        return f"{source.names[row]} ({error})"


@torch.inference_mode()
def _encode(tokenizer: Any, images: np.ndarray, device: torch.device | str, batch_size: int, pad: bool) -> np.ndarray:
    """Codes (b, v, *grid) of images (b, v, size, size, 3) or clips (b, v, T, size, size, 3) uint8.

    `batch_size` views at a time: sixteen views of a clip are as many clips.
    """
    flat, codes = images.reshape(-1, *images.shape[2:]), list[Tensor]()
    for start in range(0, len(flat), batch_size):
        pixels = as_pixels(flat[start : start + batch_size]).to(device)
        codes.append(tokenizer.encode(pad_to_multiple(pixels, tokenizer.config.patch_size) if pad else pixels).cpu())
    made: np.ndarray = torch.cat(codes).unflatten(0, images.shape[:2]).numpy()
    return made


def fingerprint(source: Source) -> str:
    """What must stay the same for an extraction to go on: which pictures, in which order, with which labels and words.

    Of the pictures themselves a few are looked at. And of clips, which of their frames, unless they are taken whole.
    """
    hashed = hashlib.sha256("\n".join(source.names).encode())
    hashed.update(source.labels.tobytes())
    for words in (source.captions, source.groups, source.tags, source.styles):
        hashed.update(json.dumps(None if words is None else list(words)).encode())
    for row in np.linspace(0, len(source) - 1, _LOOKED_AT).round().astype(int):
        try:
            hashed.update(_beginning(source.open(int(row))))
        except BROKEN:
            hashed.update(b"broken")
    if isinstance(source, ClipSource) and source.windows != Windows():
        hashed.update(repr(source.windows).encode())
    return hashed.hexdigest()[:16]


def _beginning(opened: Any) -> bytes:
    """What tells one file, or picture, from another."""
    if isinstance(opened, Image.Image):
        return opened.tobytes()
    if isinstance(opened, io.BytesIO):
        return opened.getvalue()
    if isinstance(opened, bytes):
        return opened
    with Path(opened).open("rb") as file:
        return file.read(2**16)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    strange = [other for other in folder.iterdir() if not other.name.startswith(".")]
    if not path.is_file():  # another of the extraction's processes may have written it since
        if strange:
            raise ValueError(f"{folder} is not empty and holds no codes; give a new folder")
        _write_text(path, json.dumps(settings, indent=1))
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        raise ValueError(
            f"{folder} holds codes made with another {' and another '.join(changed)}; "
            "give a new folder, or delete this one"
        )


def _write_shard(
    path: Path, codes: np.ndarray, source: Source, rows: list[int], broken: list[str], vocab_size: int
) -> None:
    import pyarrow as pa

    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    width = int(np.prod(codes.shape[1:]))
    flat = pa.array(codes.reshape(-1).astype(dtype))
    columns = {
        "codes": pa.FixedSizeListArray.from_arrays(flat, width),
        "label": pa.array(source.labels[rows].astype(np.int32)),
        "caption": pa.array([source.captions[row] if source.captions is not None else "" for row in rows], pa.string()),
        "group": pa.array([(source.groups or source.names)[row] for row in rows], pa.string()),
    }
    if source.tags is not None:
        columns["tags"] = pa.array([list(source.tags[row]) for row in rows], pa.list_(pa.string()))
    if source.styles is not None:
        columns["style"] = pa.array([source.styles[row] for row in rows], pa.string())
    metadata = {"broken": json.dumps(broken), "grid": json.dumps(codes.shape[2:])}
    table = pa.table(columns).replace_schema_metadata(metadata)

    def write(staged: Path) -> None:
        with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)

    atomically(path, write)


def _finish(
    folder: Path, names: list[str], settings: dict[str, Any], source: Source, tokenizer_folder: str | Path,
    tokenizer: Any, size: int,
) -> None:  # fmt: skip
    """Write what makes the shards a whole: the tokenizer, the list of broken pictures, and last the manifest."""
    import pyarrow as pa

    broken: list[str] = []
    num_samples, grid, kept = 0, list[int](), list[str]()
    for name in names:
        with pa.memory_map(str(folder / name)) as file:
            reader = pa.ipc.open_stream(file)
            metadata, rows = reader.schema.metadata, sum(len(batch) for batch in reader)
        broken += json.loads(metadata[b"broken"])
        if rows:
            grid = json.loads(metadata[b"grid"])
            num_samples += rows
            kept.append(name)
    check_broken(broken, len(source))
    if broken:
        _write_text(folder / "broken.txt", "".join(f"{line}\n" for line in broken))
    if not (folder / "tokenizer").is_dir():
        staging = folder / ".tokenizer"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(tokenizer_folder, staging)
        staging.replace(folder / "tokenizer")
    values = [{"dtype": "uint16" if tokenizer.config.vocab_size <= 2**16 else "uint32", "_type": "Value"}]
    width = VIEWS[settings["views"]] * int(np.prod(grid))
    features: dict[str, dict[str, Any]] = {
        "codes": {"feature": values[0], "length": width, "_type": "List"},
        "label": {"dtype": "int32", "_type": "Value"},
        "caption": {"dtype": "string", "_type": "Value"},
        "group": {"dtype": "string", "_type": "Value"},
    }
    if source.tags is not None:
        features["tags"] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    if source.styles is not None:
        features["style"] = {"dtype": "string", "_type": "Value"}
    files = [{"filename": name} for name in kept]
    _write_text(folder / "dataset_info.json", json.dumps({"features": features}, indent=1))
    state = {"_data_files": files, "_fingerprint": settings["source"], "_format_columns": None,
             "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}  # fmt: skip
    _write_text(folder / "state.json", json.dumps(state, indent=1))
    manifest = {
        "version": __version__,
        "tokenizer": settings["tokenizer"],
        "vocab_size": tokenizer.config.vocab_size,
        "size": size,
        "views": settings["views"],
        "num_views": VIEWS[settings["views"]],
        "grid": grid,
        "num_samples": num_samples,
        "num_broken": len(broken),
        "captions": source.captions is not None,
        "class_names": list(source.class_names),
        "shards": kept,
    }
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _write_text(path: Path, text: str) -> None:
    atomically(path, lambda staged: staged.write_text(text + "\n", encoding="utf-8"))
