"""Tables of pictures and clips: metadata files, parquet and npz files, data sets on the hub.

Knows columns and what they say of a picture; does not know which table is wanted.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from nar.data.clips import ClipSource
from nar.data.source import Source, Wanted
from nar.storage.arrays import array_names, read_arrays
from nar.storage.files import parse_json
from nar.storage.text import composed, printable, read_csv, read_lines, read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
_CAPTIONS = ("caption", "captions", "text", "prompt")
_WORDS = (*_CAPTIONS, "tags", "style")
_CELLS = ("image", "strip", "video")


def open_listed(path: Path, files: Sequence[Path], wanted: Wanted) -> Source:
    """The folder of a `metadata.jsonl`, `.csv` or `.json` that lists its pictures; `files` are those that lie in it."""
    folder = path.parent
    records = read_records(path)
    if not records:
        raise ValueError(f"{path} lists no pictures")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise ValueError(f"{path}, entry {number}: needed is an object with `file_name`, not {str(record)[:80]}")
    here = {composed(file.relative_to(folder).as_posix()): file for file in files}
    names = [record["file_name"] for record in records]
    places = [inside(folder, name, path) for name in names]
    places = [here.get(composed(place.relative_to(folder).as_posix()), place) for place in places]
    listed = set(places)
    unlisted = [str(file.relative_to(folder)) for file in files if file not in listed]
    found = table(path, names, columns_of(records), lambda index: places[index], wanted)
    return dataclasses.replace(found, left_out={f"not in {path.name}": unlisted} if unlisted else {})


def read_records(path: Path) -> list[Any]:
    """The entries of a metadata file: objects by line, a list of them, an object of them by file, or rows of a csv."""
    if path.suffix == ".csv":
        rows = read_csv(path)
        return [{key: text if key in _WORDS else number_or_name(text) for key, text in row.items()} for row in rows]
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
        return [parse_json(line, f"{path}, line {number}") for number, line in lines]
    found = parse_json(read_text(path), str(path))
    if isinstance(found, dict):
        return [
            {"file_name": name, **(value if isinstance(value, dict) else {"caption": value})}
            for name, value in found.items()
        ]
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of objects with `file_name`, or an object by file name")
    return found


def number_or_name(text: str) -> int | str | None:
    """What a class is called in a file without types: digits are a number, but names after a 0, and no text is none."""
    return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) else text or None


def inside(folder: Path, name: str, origin: Path | str) -> Path:
    """The file that a table calls `name`, in its folder.

    Raises:
        ValueError: the name leads out of the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
        raise ValueError(f"{origin} names the file {name!r}, which is not inside {folder}; move it there")
    return folder / path


def open_array(path: Path, wanted: Wanted) -> Source:
    """An .npz file as evaluators and `nar sample` have it.

    It holds `arr_0` uint8 (N, H, W, 3) or (N, 3, H, W), of clips (N, T, H, W, 3), and maybe `labels` or `arr_1` (N,),
    `class_names` that they index, and `names` (N,), which are captions.
    """
    known = array_names(path)
    found = read_arrays(path, ("arr_0", "labels", "arr_1", "names", "class_names"))
    if "arr_0" not in found:
        if "mu" in known:
            raise ValueError(f"{path} holds statistics (mu, sigma) and no pictures; give it as --real of `nar eval`")
        raise ValueError(f"{path} holds {', '.join(known) or 'nothing'}; pictures are expected as arr_0 (N, H, W, 3)")
    images = found["arr_0"]
    shape, dtype = images.shape, images.dtype
    if images.ndim in (4, 5) and images.shape[-1] != 3 and images.shape[1] == 3:
        images = np.moveaxis(images, 1, -1)
    axes = 5 if wanted.clips or images.ndim == 5 else 4
    if dtype != np.uint8 or images.ndim != axes or images.shape[-1] != 3 or not images.size:
        what = "clips" if axes == 5 else "pictures"
        expected = "(N, T, H, W, 3)" if axes == 5 else "(N, H, W, 3)"
        raise ValueError(
            f"{path} has arr_0 {dtype} {shape}; {what} are expected as uint8 {expected} 0..255, at least one"
        )
    columns: dict[str, list[Any]] = {}
    for column, spellings in (("label", ("labels", "arr_1")), ("caption", ("names",))):
        if key := next((name for name in spellings if name in found), ""):
            if found[key].shape != (len(images),):
                raise ValueError(f"{path} has {key} {found[key].shape} for {len(images)} pictures; give one for each")
            columns[column] = found[key].tolist()
    class_names = [str(name) for name in found.get("class_names", np.empty(0)).tolist()]
    names = [f"picture {index}" for index in range(len(images))]
    read = images.__getitem__ if axes == 5 else lambda index: Image.fromarray(images[index])
    source = table(path, names, columns, read, wanted, schema_names=class_names)
    source = dataclasses.replace(source, numbered=bool(source.class_numbers) and not class_names)
    return as_clips(source) if axes == 5 else source


def open_hub(name: str, splits: Sequence[str], wanted: Wanted) -> Source:
    """A data set that `datasets` reads, memory-mapped; pictures are decoded here, so that a broken one is only one.

    It is the first of `splits` that the data set has.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no folder {name!r} here, and reading a hub id needs datasets: pip install nar-gen[train]"
        ) from error
    rows, reasons = None, []
    for split in splits:
        try:
            rows = datasets.load_dataset(name, split=split)
            break
        except (ValueError, OSError, ConnectionError) as error:
            reasons.append(str(error).strip().splitlines()[0])
    if rows is None:
        raise FileNotFoundError(f"no folder {name!r} here, and no split {splits[0]!r} of it on the hub: {reasons[0]}")
    images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise ValueError(f"{name} has the columns {', '.join(rows.column_names)}, but none of pictures")
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    texts = rows.remove_columns(images[:1])
    columns = {key: list(texts[key]) for key in texts.column_names if key in _read(wanted)}
    schema_names = getattr(rows.features.get(wanted.label), "names", None) or []
    names, known = [f"row {index}" for index in range(len(rows))], texts.column_names

    def read(index: int) -> Any:
        return _opened(rows[index][images[0]], None, name)

    return table(name, names, columns, read, wanted, known=known, schema_names=schema_names)


def open_parquet(paths: Sequence[Path], wanted: Wanted) -> Source:
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
    cell = ""
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            known = set(file.schema_arrow.names)
            cell = cell or next((key for key in _CELLS if key in known), "")
            if cell not in known:
                raise ValueError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}; needed is `image` (or `strip` or "
                    "`video`, of clips), in all files the same, and `label` for classes"
                )
            every |= known
            present = known & _read(wanted)
            rows = file.read(list(present))
            pieces = {key: rows.column(key).to_pylist() for key in present}
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{path} is damaged or not a parquet file ({error}); copy it again") from error
        for key, piece in pieces.items():
            columns.setdefault(key, [None] * len(places)).extend(piece)
        for row_group in range(file.num_row_groups):
            places += [(number, row_group, row) for row in range(file.metadata.row_group(row_group).num_rows)]
        for column in columns.values():  # what this file lacks and an earlier one has
            column.extend([None] * (len(places) - len(column)))
        schema_names = schema_names or _schema_names(file.schema_arrow.metadata or {}, wanted.label)
    if not places:
        raise ValueError(f"{paths[0]} holds no pictures")

    @lru_cache(maxsize=8)
    def cells(number: int, row_group: int) -> Any:
        return pq.ParquetFile(paths[number]).read_row_group(row_group, columns=[cell]).column(0)

    def read(index: int) -> Any:
        number, row_group, row = places[index]
        if row >= len(column := cells(number, row_group)):
            raise ValueError(f"{paths[number]} has fewer rows than it says; copy it again")
        return _opened(column[row].as_py(), paths[number].parent, paths[number])

    names = [f"row {index}" for index in range(len(places))]
    found = table(paths[0], names, columns, read, wanted, known=every, schema_names=schema_names)
    return found if cell == "image" else as_clips(found, strips=cell == "strip")


def files_named(paths: Iterable[Path]) -> set[Path]:
    """The files whose paths stand in the cells of parquet files in place of pictures; damaged files name none here."""
    found = set[Path]()
    for path in paths:
        if path.suffix.lower() == ".parquet":
            with suppress(ImportError, OSError, KeyError, ValueError):  # pyarrow's errors are some of these
                found |= {inside(path.parent, name, path) for name in _paths_in(path)}
    return found


def _paths_in(path: Path) -> Iterator[str]:
    """Yield what cells without bytes name; row groups whose statistics say that all have bytes are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    cell = next(key for key in _CELLS if key in file.schema_arrow.names)
    leaves = {file.schema.column(place).path: place for place in range(len(file.schema))}
    kind = file.schema_arrow.field(cell).type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    place = leaves.get(cell if binary else f"{cell}.bytes")
    for group in range(file.num_row_groups):
        held = None if place is None else file.metadata.row_group(group).column(place).statistics
        if held is None or held.null_count:
            cells = file.read_row_group(group, columns=[cell]).column(0).to_pylist()
            yield from (name for data, name in map(_held, cells) if isinstance(name, str) and data is None)


def as_clips(source: Source, *, strips: bool = False) -> ClipSource:
    """The same rows as clips: their files, or `strips`, which are pictures of stacked frames."""
    class_names = source.class_names if source.has_classes else (ClipSource.noun,)
    return ClipSource(**vars(source) | {"class_names": class_names, "open": source.picture if strips else source.open})


def _opened(cell: Any, folder: Path | None, origin: Path | str) -> Any:
    data, name = _held(cell)
    if data is not None:
        return io.BytesIO(data)
    if isinstance(name, str):
        return inside(folder, name, origin) if folder is not None else Path(name)
    raise ValueError("neither bytes nor a path")


def _held(cell: Any) -> tuple[bytes | None, Any]:
    """The bytes and the path that a cell holds: both in a structure, or one of them alone."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    return data if isinstance(data, bytes) else None, name


def table(
    where: Path | str,
    names: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    read: Callable[[int], Any],
    wanted: Wanted,
    *,
    known: Iterable[str] | None = None,
    schema_names: Sequence[str] = (),
) -> Source:
    """The source that columns describe; `known` are the names of all that there are, None means these."""
    wanted.check_columns(where, columns if known is None else known)
    classes = _classes(columns, len(names), schema_names, where, wanted.label)
    groups = columns[wanted.group] if wanted.group else []  # a row without a value belongs to itself
    named = [f"row {row}" if value is None else str(value) for row, value in enumerate(groups)] or None
    return Source(names, open=read, groups=named, **classes, **_words(columns, where))


def _read(wanted: Wanted) -> set[str]:
    """The columns that are read, beside that of the pictures."""
    return {wanted.label, wanted.group, "label_name", *_WORDS}


def columns_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of a table that has one record a row."""
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: [record.get(key) for record in records] for key in keys}


def _words(columns: Mapping[str, Sequence[Any]], where: Path | str) -> dict[str, Any]:
    """The fields of a Source that describe its pictures in words; tags are lists, or words with commas between them.

    Raises:
        ValueError: a column holds what is no text; it is named.
    """
    found: dict[str, Any] = {}
    if key := next((key for key in _CAPTIONS if key in columns), ""):
        wordings = [_texts(value, where, key, row) for row, value in enumerate(columns[key])]
        found["captions"] = [texts[0] if texts else "" for texts in wordings]
        if any(len(texts) > 1 for texts in wordings):
            found["rewordings"] = [texts[1:] for texts in wordings]
    if "style" in columns:
        styles = [_texts(value, where, "style", row) for row, value in enumerate(columns["style"])]
        found["styles"] = [", ".join(texts) for texts in styles]
    if "tags" in columns:
        lists = [value.split(",") if isinstance(value, str) else value for value in columns["tags"]]
        found["tags"] = [_texts(tags, where, "tags", row) for row, tags in enumerate(lists)]
    return found


def _texts(value: Any, where: Path | str, column: str, row: int) -> tuple[str, ...]:
    """The texts of a cell: one, a list of them, or none; those that say nothing are left out."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where}: the column `{column}` holds {str(value)[:60]!r} ({type(value).__name__}) in row {row}; "
            "needed is text, or a list of texts"
        )
    return tuple(printable(text.strip()) for text in texts if text.strip())


def _schema_names(metadata: Mapping[bytes, bytes], label: str) -> list[str]:
    """Names of classes in the Hugging Face schema of a parquet file."""
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]["names"]
        return [str(name) for name in names or ()]
    except (KeyError, TypeError, ValueError):
        return []


def _classes(
    columns: Mapping[str, Sequence[Any]], count: int, schema_names: Sequence[str], path: Path | str, label: str
) -> dict[str, Any]:
    """Find labels (N,) 0..K-1 and K names: from `label_name`, else the schema, else the numbers.

    Numbers that do not occur make no class.
    """
    values = columns.get(label, columns.get("label_name"))
    if values is None:
        return {"labels": np.zeros(count, np.int64), "class_names": (Source.noun,)}
    if None in values:
        raise ValueError(f"{path}: row {list(values).index(None)} has no label; every row needs one")
    if any(isinstance(value, str) for value in values) and all(type(value) in (int, str) for value in values):
        texts = [composed(str(value)) for value in values]
        order = {name: index for index, name in enumerate(sorted(set(texts)))}
        whole = sum(isinstance(value, int) for value in values)
        mixed = f"{path}: {whole} of {count} labels are numbers and the others names; all are taken as names"
        return {
            "labels": np.array([order[text] for text in texts], np.int64),
            "class_names": tuple(order),
            "notes": (mixed,) if whole else (),
        }
    if not all(type(value) is int and value >= 0 for value in values):
        wrong = next(value for value in values if type(value) is not int or value < 0)
        raise ValueError(f"{path}: labels must be integers from 0 or strings, not {str(wrong)[:60]!r}")
    numbers = sorted(set(values))
    named = {number: str(number) for number in numbers} | dict(enumerate(schema_names))
    named |= {
        number: composed(str(name))
        for number, name in zip(values, columns.get("label_name", []), strict=False)
        if name is not None
    }
    place = {number: index for index, number in enumerate(numbers)}
    return {
        "labels": np.array([place[value] for value in values], np.int64),
        "class_names": tuple(named[number] for number in numbers),
        "class_numbers": tuple(numbers),
    }
