"""Pictures to codes on disk, in shards: in parallel, resumable, with all views of a picture and a list of broken ones.

Knows sources, tokenizers and the files of `nar.data.codes`; does not know models or training.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from nar import __version__
from nar.data.clips import ClipSource
from nar.data.codes import MANIFEST
from nar.data.source import BROKEN, Source, content_of
from nar.media.crops import VIEWS
from nar.media.pixels import as_pixels, pad_to_multiple
from nar.media.video import Windows
from nar.precision import usable_device
from nar.progress import Progress
from nar.storage.fields import OneOf, Range, Size, checked
from nar.storage.files import atomically, check_file, claim, read_json, write_json, write_text
from nar.storage.folder import model_digest
from nar.tokenizer import load_tokenizer

SHARD_SIZE = 4096
_SETTINGS = "extraction.json"
_LOOKED_AT = 16  # pictures whose contents are part of what names a source


@checked
def extract(
    tokenizer_folder: str | Path,
    source: Source,
    folder: str | Path,
    *,
    size: Size,
    kind: Annotated[str, OneOf(*VIEWS)] = "centre",
    batch_size: Size = 64,
    device: torch.device | str = "cpu",
    threads: Annotated[int, Range(1, 2**10)] = 4,
    rank: int = 0,
    count: int = 1,
    wait: Callable[[], None] = lambda: None,
    quiet: bool = False,
    pad: bool = False,
) -> Path:
    """Encode all pictures of `source` into `folder`; returns it. What is there already is kept.

    Process `rank` of `count` makes every `count`-th shard; `wait` must return once all processes have called it, and
    then the first one writes the manifest. The tokenizer is copied into the folder, which so needs nothing else.
    With `pad` the edges of pictures are repeated, below and right, up to a multiple of the tokenizer's patch. Where an
    earlier version began the folder, samples keep the order and the classes that they have there.

    Raises:
        ValueError: the folder holds codes of another tokenizer, source or setting, the pictures do not fit the
            tokenizer, or more than 1 % of them are broken. Nothing is left in a folder that held nothing.
    """
    if not len(source):
        raise ValueError("there are no pictures to extract codes from")
    folder = Path(folder)
    tokenizer = load_tokenizer(tokenizer_folder).to(usable_device(device))
    if len(tokenizer.pixel_axes) == 2 and isinstance(source, ClipSource):
        raise ValueError(f"{source.origin} holds clips and {tokenizer_folder} encodes pictures; take one of clips")
    encoder = _Encoder(tokenizer, size, kind, batch_size, threads, pad, device)
    source, named = _as_begun(source, folder / _SETTINGS)
    if not (folder / _SETTINGS).is_file():
        encoder.try_one(source)  # before anything is written
    settings = {
        "tokenizer": model_digest(tokenizer_folder),
        "size": size,
        "views": kind,
        "source": named,
        "shard_size": SHARD_SIZE,
        "padding": pad,
        "given_frames": getattr(source, "given", 0),
    }
    claim(folder, settings, record=_SETTINGS, empty=True)
    starts = range(0, len(source), SHARD_SIZE)
    names = [f"data-{index:05d}-of-{len(starts):05d}.arrow" for index in range(len(starts))]
    for name in names:
        check_file(folder / name)  # a pipe would be written into
    mine = [index for index in range(rank, len(starts), count) if not (folder / names[index]).is_file()]
    rows = {index: range(starts[index], min(starts[index] + SHARD_SIZE, len(source))) for index in mine}
    try:
        total = sum(map(len, rows.values()))
        with Progress("extracting codes", total, f"{source.noun}s", quiet=quiet or rank > 0 or not total) as bar:
            broken: list[str] = []
            for index in mine:
                good, codes, found = encoder.shard(source, rows[index], broken, bar)
                _write_shard(folder / names[index], codes, source, good, found, tokenizer.config.vocab_size)
    except ValueError:
        if not any((folder / name).is_file() for name in names):
            (folder / _SETTINGS).unlink(missing_ok=True)  # or it would refuse the corrected command
        raise
    wait()
    if rank == 0 and (mine or not (folder / MANIFEST).is_file()):
        _finish(folder, names, settings, source, tokenizer_folder, tokenizer)
    wait()
    return folder


class _Encoder:
    """Pictures of a source to codes of a tokenizer, a batch at a time."""

    def __init__(
        self, tokenizer: Any, size: int, kind: str, batch_size: int, threads: int, pad: bool, device: Any
    ) -> None:
        self.tokenizer, self.size, self.kind, self.batch_size = tokenizer, size, kind, batch_size
        self.pad, self.device, self._pool = pad, device, ThreadPoolExecutor(threads)

    def try_one(self, source: Source) -> None:
        """Encode the first picture that can be decoded; raises ValueError where the tokenizer can't take its size."""
        for row in range(min(len(source), _LOOKED_AT)):
            if not isinstance(made := self._views(source, row), str):
                self._encode(made[None, :1])
                return

    def shard(
        self, source: Source, rows: range, broken: list[str], bar: Progress
    ) -> tuple[list[int], np.ndarray, list[str]]:
        """Encode some rows: those that could be decoded, their codes (n, v, *grid), and why the others could not.

        `broken` collects these of all shards; raises ValueError once they are too many.
        """
        good, pieces, found = list[int](), list[np.ndarray](), list[str]()
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            decoded = dict(zip(batch, self._pool.map(lambda row: self._views(source, row), batch), strict=True))
            bar.update(len(batch))
            failed = [reason for reason in decoded.values() if isinstance(reason, str)]
            found += failed
            broken += failed
            if source.too_many(len(broken)):
                source.check_broken(broken)
            if kept := {row: views for row, views in decoded.items() if not isinstance(views, str)}:
                good += kept
                pieces.append(self._encode(np.stack([*kept.values()])))
        return good, np.concatenate(pieces) if pieces else np.empty((0, VIEWS[self.kind], 1), np.int64), found

    def _views(self, source: Source, row: int) -> np.ndarray | str:
        """The views (v, size, size, 3) uint8 of a picture, (v, T, size, size, 3) of a clip, or why it is broken."""
        try:
            return source.views(row, self.size, self.kind)
        except BROKEN as error:
            return f"{source.names[row]} ({error})"

    @torch.inference_mode()
    def _encode(self, images: np.ndarray) -> np.ndarray:
        """Codes (b, v, *grid) of images (b, v, size, size, 3) or clips (b, v, T, size, size, 3) uint8.

        `batch_size` views at a time: sixteen views of a clip are as many clips.
        """
        flat, codes = images.reshape(-1, *images.shape[2:]), list[Tensor]()
        for start in range(0, len(flat), self.batch_size):
            pixels = as_pixels(flat[start : start + self.batch_size]).to(self.device)
            pixels = pad_to_multiple(pixels, self.tokenizer.config.patch_size) if self.pad else pixels
            codes.append(self.tokenizer.encode(pixels).cpu())
        made: np.ndarray = torch.cat(codes).unflatten(0, images.shape[:2]).numpy()
        return made


def _as_begun(source: Source, settings: Path) -> tuple[Source, str]:
    """The source as the folder's extraction has it, and what names it: as it is, or as an earlier version had it."""
    named = fingerprint(source)
    begun = read_json(settings).get("source") if settings.is_file() else None
    if begun not in (None, named):
        for before in source.as_before():
            if fingerprint(before) == begun:
                return before, begun
    return source, named


def given_folder(count: int) -> str:
    """Name of the folder, in that of some clips' codes, with the codes of their first `count` frames alone."""
    return f"given-{count}"


def fingerprint(source: Source) -> str:
    """What must stay the same for an extraction to go on: which pictures, in which order, with which labels and words.

    Of the pictures themselves a few are looked at. And of clips, which of their frames, unless they are taken whole.
    """
    hashed = hashlib.sha256("\n".join(source.names).encode())
    hashed.update(source.labels.tobytes())
    for words in (source.captions, source.groups, source.tags, source.styles):
        hashed.update(json.dumps(None if words is None else list(words)).encode())
    if source.rewordings is not None:
        hashed.update(json.dumps(list(source.rewordings)).encode())
    for row in np.linspace(0, len(source) - 1, _LOOKED_AT).round().astype(int):
        try:
            hashed.update(content_of(source.open(int(row)), 2**16))
        except BROKEN:
            hashed.update(b"broken")
    if isinstance(source, ClipSource) and source.windows != Windows():
        # Spelled as it always was, so that extractions that were begun go on.
        hashed.update(re.sub(r", whole=\w+", "", str(source.windows)).encode())
    return hashed.hexdigest()[:16]


def _write_shard(
    path: Path, codes: np.ndarray, source: Source, rows: list[int], broken: list[str], vocab_size: int
) -> None:
    import pyarrow as pa

    flat = pa.array(codes.reshape(-1).astype(np.uint16 if vocab_size <= 2**16 else np.uint32))
    texts, lists = pa.string(), pa.list_(pa.string())
    words = (
        ("caption", source.captions or [""] * len(source), texts),
        ("group", source.groups or source.names, texts),
        ("tags", source.tags, lists),
        ("rewordings", source.rewordings, lists),
        ("style", source.styles, texts),
    )
    columns = {
        "codes": pa.FixedSizeListArray.from_arrays(flat, int(np.prod(codes.shape[1:]))),
        "label": pa.array(source.labels[rows].astype(np.int32)),
    }
    columns |= {name: pa.array([of[row] for row in rows], kind) for name, of, kind in words if of is not None}
    metadata = {"broken": json.dumps(broken), "grid": json.dumps(codes.shape[2:])}
    table = pa.table(columns).replace_schema_metadata(metadata)

    def write(staged: Path) -> None:
        with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)

    atomically(path, write)


def _finish(
    folder: Path, names: Sequence[str], settings: dict[str, Any], source: Source, tokenizer_folder: Any, tokenizer: Any
) -> None:
    """Write what makes the shards a whole: the tokenizer, the list of broken pictures, and last the manifest."""
    import pyarrow as pa

    broken, kept = list[str](), list[str]()
    num_samples, grid, schema = 0, list[int](), pa.schema([])
    for name in names:
        check_file(folder / name)
        with pa.memory_map(str(folder / name)) as file:
            reader = pa.ipc.open_stream(file)
            metadata, rows = reader.schema.metadata, sum(len(batch) for batch in reader)
        broken += json.loads(metadata[b"broken"])
        if rows:
            grid, schema = json.loads(metadata[b"grid"]), reader.schema
            num_samples += rows
            kept.append(name)
    source.check_broken(broken)
    if isinstance(source, ClipSource) and source.short_clips():
        warnings.warn(source.short_clips(), stacklevel=4)
    if broken:
        write_text(folder / "broken.txt", "".join(f"{line}\n" for line in broken))
    if not (folder / "tokenizer").is_dir():
        atomically(folder / "tokenizer", lambda staged: shutil.copytree(tokenizer_folder, staged))
    # What `datasets.load_from_disk` reads.
    write_json(folder / "dataset_info.json", {"features": {field.name: _feature(field.type) for field in schema}})
    state = {"_data_files": [{"filename": name} for name in kept], "_fingerprint": settings["source"]}
    state |= dict.fromkeys(("_format_columns", "_format_type", "_split"))
    write_json(folder / "state.json", state | {"_format_kwargs": {}, "_output_all_columns": False})
    manifest = {name: settings[name] for name in ("tokenizer", "size", "views")}
    manifest |= {"version": __version__, "vocab_size": tokenizer.config.vocab_size, "grid": grid, "shards": kept}
    manifest |= {"num_views": VIEWS[settings["views"]], "num_samples": num_samples, "num_broken": len(broken)}
    manifest["num_short"] = len(source.short) if isinstance(source, ClipSource) else 0
    manifest |= {"left_out": source.counts()["left_out"], "captions": source.captions is not None}
    write_json(folder / MANIFEST, manifest | {"class_names": list(source.class_names)})


def _feature(kind: Any) -> dict[str, Any]:
    """An Arrow type as `datasets` spells it."""
    if not hasattr(kind, "value_type"):
        return {"dtype": str(kind), "_type": "Value"}
    length = {"length": kind.list_size} if hasattr(kind, "list_size") else {}
    return {"feature": _feature(kind.value_type), **length, "_type": "List"}
