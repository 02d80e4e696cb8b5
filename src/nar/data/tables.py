"""Tables of pictures and clips: metadata.jsonl, webdataset tars, parquet and npz files, data sets on the hub.

Knows columns and what they say of a picture; does not know which table is wanted.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nar.data.clips import ClipSource
from nar.data.source import SUFFIXES, Source
from nar.media.video import SUFFIXES as CLIP_SUFFIXES

_CAPTIONS = ("caption", "text", "prompt")
_WORDS = (*_CAPTIONS, "tags", "style")


def open_listed(folder: Path, label: str, group: str) -> Source:
    """A folder whose `metadata.jsonl` lists its pictures."""
    path = folder / "metadata.jsonl"
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append({**record, "file_name": str(record["file_name"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needed is a JSON object with file_name ({error!r})") from error
    if not records:
        raise ValueError(f"{path} lists no pictures")
    names = [record["file_name"] for record in records]
    return _table(path, names, _columns(records), lambda index: folder / names[index], label, group)


def open_tars(paths: Sequence[Path], label: str, group: str, *, clips: bool = False) -> Source:
    """Webdataset shards: uncompressed tars, indexed once by their headers and then read where a picture lies."""
    word, suffixes = ("clip", CLIP_SUFFIXES) if clips else ("picture", SUFFIXES)
    places: list[tuple[Path, int, int]] = []
    names: list[str] = []
    records: list[dict[str, Any]] = []
    for path in paths:
        samples: dict[str, dict[str, Any]] = {}
        found: dict[str, tuple[Path, int, int]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                    name = f"{member.name.rpartition('/')[0]}/{stem}"
                    sample = samples.setdefault(name, {})
                    if f".{suffix.lower()}" in suffixes:
                        found[name] = (path, member.offset_data, member.size)
                    elif suffix in ("txt", "cls", "json") and (file := tar.extractfile(member)):
                        _add_text(sample, suffix, file.read().decode())
        except (tarfile.TarError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"shard {path} can't be read ({error}); copy it again") from error
        for name, sample in samples.items():
            if name in found:
                names.append(f"{path.name}:{name.lstrip('/')}")
                places.append(found[name])
                records.append(sample)
    if not records:
        raise ValueError(f"{paths[0]} holds no {word}s ({', '.join(sorted(suffixes))})")

    def read(index: int) -> io.BytesIO:
        path, offset, length = places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))

    return _table(paths[0], names, _columns(records), read, label, group)


def _add_text(sample: dict[str, Any], suffix: str, text: str) -> None:
    if suffix == "json":
        sample.update(json.loads(text))
    else:
        sample["caption" if suffix == "txt" else "label"] = text.strip() if suffix == "txt" else int(text)


def open_array(path: Path, label: str, group: str) -> Source:
    """An .npz file as evaluators and `nar sample` have it: `arr_0` (N, H, W, 3), maybe `labels` or `arr_1`, `names`."""
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in ("arr_0", "labels", "arr_1", "names") if name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or not an .npz file ({error}); copy it again") from error
    images = found.get("arr_0", np.empty(0))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(
            f"{path} has arr_0 {images.dtype} {images.shape}; pictures are expected as uint8 (N, H, W, 3), at least one"
        )
    columns: dict[str, list[Any]] = {}
    labels = found.get("labels", found.get("arr_1"))
    if labels is not None and labels.shape == (len(images),):
        columns["label"] = labels.tolist()
    if "names" in found:
        columns["caption"] = found["names"].tolist()
    names = [f"picture {index}" for index in range(len(images))]
    return _table(path, names, columns, lambda index: Image.fromarray(images[index]), label, group)


def open_hub(name: str, split: str, label: str, group: str) -> Source:
    """A data set that `datasets` reads, memory-mapped; pictures are decoded here, so that a broken one is only one."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no folder {name!r} here, and reading a hub id needs datasets: pip install nar-gen[train]"
        ) from error
    try:
        table = datasets.load_dataset(name, split="test" if split == "t10k" else split)
    except (ValueError, OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no folder {name!r} here, and no split {split!r} of it on the hub: {reason}"
        ) from error
    images = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise ValueError(f"{name} has the columns {', '.join(table.column_names)}, but none of pictures")
    table = table.cast_column(images[0], datasets.Image(decode=False))
    texts = table.remove_columns([key for key in table.column_names if key == images[0]])
    columns = {key: list(texts[key]) for key in texts.column_names if key in (label, group, "label_name", *_WORDS)}
    schema_names = getattr(table.features.get(label), "names", None) or []
    names = [f"row {index}" for index in range(len(table))]
    return _table(
        name, names, columns, lambda index: _opened(table[index][images[0]], Path()), label, group,
        known=texts.column_names, schema_names=schema_names,
    )  # fmt: skip


def open_parquet(paths: Sequence[Path], label: str, group: str) -> Source:
    """Parquet files as one table; clips where the column is `strip` or `video`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {paths[0]} needs pyarrow: pip install nar-gen[train]") from error
    columns: dict[str, list[Any]] = {}
    places: list[tuple[int, int, int]] = []  # file, row group, row in it
    schema_names: list[str] = []
    every: set[str] = set()
    pictures = ""
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            known = file.schema_arrow.names
            pictures = pictures or next((key for key in ("image", "strip", "video") if key in known), "")
            if pictures not in known:
                raise ValueError(
                    f"{path} has the columns {', '.join(known)}; needed is `image` (or `strip` or `video`, of clips), "
                    "in all files the same, and `label` for classes"
                )
            every.update(known)
            wanted = [key for key in dict.fromkeys((label, "label_name", group, *_WORDS)) if key in known]
            table = file.read(wanted)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged or not a parquet file ({error}); copy it again") from error
        for key in wanted:
            columns.setdefault(key, [None] * len(places)).extend(table.column(key).to_pylist())
        for row_group in range(file.num_row_groups):
            places += [(number, row_group, row) for row in range(file.metadata.row_group(row_group).num_rows)]
        for column in columns.values():  # what this file lacks and an earlier one has
            column.extend([None] * (len(places) - len(column)))
        schema_names = schema_names or _schema_names(file.schema_arrow.metadata or {}, label)
    if not places:
        raise ValueError(f"{paths[0]} holds no pictures")

    @lru_cache(maxsize=8)
    def cells(number: int, row_group: int) -> Any:
        return pq.ParquetFile(paths[number]).read_row_group(row_group, columns=[pictures]).column(0)

    def read(index: int) -> Any:
        number, row_group, row = places[index]
        return _opened(cells(number, row_group)[row].as_py(), paths[number].parent)

    names = [f"row {index}" for index in range(len(places))]
    found = _table(paths[0], names, columns, read, label, group, known=every, schema_names=schema_names)
    return found if pictures == "image" else as_clips(found, strips=pictures == "strip")


def as_clips(source: Source, *, strips: bool = False) -> ClipSource:
    """The same rows as clips: their files, or `strips`, which are pictures of stacked frames."""
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(Source)}
    return ClipSource(**fields | {"open": source.picture if strips else source.open})


def _opened(cell: Any, folder: Path) -> Any:
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if isinstance(name, str):
        return folder / name
    raise ValueError("neither bytes nor a path")


def check_columns(source: Path | str, label: str, group: str, known: Iterable[str] = ()) -> None:
    """Refuse a `label` or `group` that is none of the `known` columns; the default label may be missing."""
    for key, column, default in (("group", group, ""), ("label", label, "label")):
        if column not in ("", default, *known):
            has = ", ".join(sorted(known))
            fix = "name one of these" if has else "give a table with it (.parquet, .tar, metadata.jsonl)"
            raise ValueError(
                f"{source} has no column {column!r} for {key}, it has {has or 'none'}; {fix}, or leave {key} out"
            )


def _table(
    where: Path | str,
    names: Sequence[str],
    columns: dict[str, list[Any]],
    read: Callable[[int], Any],
    label: str,
    group: str,
    *,
    known: Iterable[str] | None = None,
    schema_names: Sequence[str] = (),
) -> Source:
    """The source that columns describe; `known` are the names of all that there are, None means these."""
    check_columns(where, label, group, columns if known is None else known)
    labels, class_names = _classes(columns, len(names), schema_names, where, label)
    return Source(names, np.array(labels), class_names, read, groups=_groups(columns, group), **_words(columns))


def _columns(records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = {key for record in records for key in record}
    return {key: [record.get(key) for record in records] for key in keys}


def _words(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """The fields of a Source that describe its pictures; tags are lists, or words with commas between them."""
    found: dict[str, Any] = {}
    for key in _CAPTIONS:
        if key in columns:
            found["captions"] = [str(value or "") for value in columns[key]]
            break
    if "style" in columns:
        found["styles"] = [str(value or "") for value in columns["style"]]
    if "tags" in columns:
        lists = [value.split(",") if isinstance(value, str) else value or () for value in columns["tags"]]
        found["tags"] = [tuple(str(tag).strip() for tag in tags) for tags in lists]
    return found


def _groups(columns: dict[str, list[Any]], group: str) -> list[str] | None:
    """What each row belongs to; a row without a value belongs to itself."""
    if not group:
        return None
    return [f"row {row}" if value is None else str(value) for row, value in enumerate(columns[group])]


def _schema_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """Names of classes in the Hugging Face schema of a parquet file."""
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]["names"]
    except (KeyError, TypeError, json.JSONDecodeError):
        return []
    return [str(name) for name in names]


def _classes(
    columns: dict[str, list[Any]], count: int, schema_names: Sequence[str], path: Path | str, label: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return labels 0..K-1 and K names: from `label_name`, else the schema, else the numbers."""
    values = columns.get(label)
    if values is None:
        return [0] * count, ("picture",)
    if any(value is None for value in values):
        raise ValueError(f"{path}: row {values.index(None)} has no label; every row needs one")
    if all(isinstance(value, str) for value in values):
        texts = sorted(set(values))
        index = {name: number for number, name in enumerate(texts)}
        return [index[value] for value in values], tuple(texts)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"{path}: labels must be integers from 0 or strings, not {values[0]!r}, ...")
    class_names = [*schema_names]
    class_names += [str(number) for number in range(len(class_names), max(values) + 1)]
    for number, name in zip(values, columns.get("label_name", []), strict=False):
        if name is not None:
            class_names[number] = str(name)
    return list(values), tuple(class_names)
