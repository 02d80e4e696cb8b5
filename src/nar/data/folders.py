"""Folders and tars of files: one walk, splits, classes, words beside pictures, and what is left out.

Knows names of files and what they mean; does not know pixels. A file is its place and its name, in a folder or a tar.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nar.data.clips import open_list
from nar.data.source import Source, Wanted, listed, some
from nar.data.tables import (
    METADATA,
    as_clips,
    columns_of,
    files_named,
    number_or_name,
    open_array,
    open_listed,
    open_parquet,
    table,
)
from nar.media import pictures, video
from nar.storage.files import parse_json, read_bytes, read_json
from nar.storage.text import composed, decode_text, printable

SAMPLES = "samples.json"  # of `nar sample`: which file shows what
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "t10k"),
}
WORDS = (".json", ".caption", ".txt", ".cls")  # files beside a picture; of two that hold a caption the later counts
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
# What systems and archivers leave in folders; names that begin with a dot are hidden too.
_HIDDEN = frozenset(
    {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
    | {"lost+found"}
)
_LOOKED_AT = 4  # files that are opened to see whether a folder of pictures holds animations


def walk(folder: Path) -> list[Path]:
    """All files below a folder, in natural order; hidden ones, and those in hidden folders, are no data.

    Links to folders are followed, each folder once.
    """
    files, seen = list[Path](), set[str]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        # Links last: a folder is read under its own name.
        folders[:] = sorted(
            (name for name in folders if not is_hidden(name)), key=lambda name: Path(parent, name).is_symlink()
        )
        files += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted((file for file in files if file.is_file() or file.is_symlink()), key=pictures.natural)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data."""
    return name.startswith(".") or name in _HIDDEN


def split_named(name: str) -> str:
    """The split that a file's or folder's name stands for: train, val or test; "" where it is none."""
    plain = re.sub(r"[-_. ]?(set|data|images|pictures|split|[0-9]{4})$", "", name.lower())  # train_set, val2017
    return next((split for split, names in SPLITS.items() if plain in names), "")


def splits_of(folder: Path, *, clips: bool = False) -> dict[str, list[Path]]:
    """The splits of a folder, each a folder or files of a table; none where it has other folders too.

    Folders are splits where all are named as splits; tables where they are called as one, or begin with it and a mark;
    lists of clips where they end so.
    """
    top = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    found: dict[str, list[Path]] = defaultdict(list)
    for ending in (".parquet", ".tar"):
        tables = [path for path in top if path.suffix.lower() == ending and path.is_file()]
        for path in tables:
            if split := split_named(re.split("[-_.]", path.stem)[0]):
                found[split].append(path)
        if found and (ending == ".parquet" or sum(map(len, found.values())) == len(tables)):
            return dict(found)
        found.clear()
    for path in top if clips else ():
        split = next((key for key, names in SPLITS.items() if path.stem.lower().endswith(names)), "")
        if path.suffix.lower() == ".csv" and split and path.is_file():
            found[split].append(path)
    folders = [path for path in top if path.is_dir()]
    if not found and folders and all(split_named(path.name) for path in folders):
        for path in folders:
            found[split_named(path.name)].append(path)
        if several := [paths for paths in found.values() if len(paths) > 1]:
            raise ValueError(
                f"{folder} has two folders of one split, {' and '.join(path.name for path in several[0])}; leave one"
            )
    return dict(found)


def open_split(folder: Path, splits: Mapping[str, Sequence[Path]], name: str, wanted: Wanted) -> Source:
    """Open one of a folder's splits; files beside them are left out, unless the splits are lists of such files."""
    found = dataclasses.replace(open_files(splits[name], wanted), splits=tuple(splits))
    used = {path for paths in splits.values() for path in paths}
    files = [] if any(path.suffix.lower() == ".csv" for path in used) else sorted(folder.iterdir())
    beside = [path for path in files if path.is_file() and path not in used and not is_hidden(path.name)]
    read = files_named(used) if beside else set()
    names = [path.name for path in beside if path not in read]
    return _with_left_out(found, {"beside the splits": names} if names else {})


def open_files(paths: Sequence[Path], wanted: Wanted) -> Source:
    """Open a folder without splits, or files of one kind: tables, tars, an array, or lists of clips."""
    path, ending = paths[0], paths[0].suffix.lower()
    if path.is_dir():
        return _open_folder(path, wanted)
    if ending == ".csv" and wanted.clips:
        wanted.check_columns(path)
        return open_list(paths)
    if ending == ".parquet":
        return open_parquet(paths, wanted)
    if ending == ".tar":
        return _open_tars(paths, wanted)
    if ending == ".npz":
        return open_array(path, wanted)
    reason = "is packed: unpack it" if ending in PACKED else "is a file"
    reason = "is a single array: save it with np.savez" if ending == ".npy" else reason
    raise ValueError(f"{path} {reason}; allowed are {allowed_files(wanted)}, or a folder with {wanted.noun}s")


def allowed_files(wanted: Wanted) -> str:
    """Which files may be given, in words."""
    return f"a .parquet, .tar{', .csv' if wanted.clips else ''} or .npz file"


def _open_folder(folder: Path, wanted: Wanted) -> Source:
    """Find the pictures, or clips, of a folder without splits: in tables, a list, or folders of classes."""
    files = walk(folder)
    top = [file for file in files if file.parent == folder]
    for ending in (".tar", ".parquet"):
        if tables := [file for file in top if file.suffix.lower() == ending]:
            used = {*tables, *(files_named(tables) if len(files) > len(tables) else ())}
            return _with_left_out(open_files(tables, wanted), _by_ending(folder, files, used))
    if listing := {file for file in top if file.name in METADATA}:
        shown = [file for file in files if file.suffix.lower() in wanted.endings]
        read = next(folder / name for name in METADATA if folder / name in listing)
        return _with_left_out(open_listed(read, shown, wanted), _by_ending(folder, files, {read, *shown}))
    return _open_classes(folder, [file for file in files if file.name != SAMPLES], wanted)


def _open_classes(folder: Path, files: Sequence[Path], wanted: Wanted) -> Source:
    """Samples by class, those of a class in natural order; the classes are folders, or there is one."""
    noun = wanted.noun
    samples, left_out, beside = _samples(folder, files, clips=wanted.clips)
    here = [name for name in samples if "/" not in name]
    if len(here) < len(samples) and any(not isinstance(samples[name], list) for name in here):
        inner = next(name for name in samples if "/" in name)
        raise ValueError(
            f"{folder} holds both {noun}s ({here[0]}, ...) and folders ({inner.partition('/')[0]}, ...); "
            f"allowed is either one folder per class or only {noun}s"
        )
    flat = len(here) == len(samples)
    classes = {name: noun if flat else composed(name.partition("/")[0]) for name in samples}
    below = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    read = {os.path.realpath(path.parent) for path in files}
    again = [path.name for path in below if path.is_symlink() and os.path.realpath(path) in read]
    again = [name for name in sorted(again) if composed(name) not in classes.values()]
    folders = [path.name for path in below if path.name not in again]
    left_out |= {"that is a link to a folder that is read": again} if again else {}
    empty = [] if flat and samples else [name for name in sorted(folders) if composed(name) not in classes.values()]
    if empty or not samples:
        _refuse_empty(folder / empty[0] if empty else folder, left_out, wanted)
    if not wanted.clips:
        _refuse_animations([place for place in samples.values() if isinstance(place, Path)])
    names = sorted(samples, key=classes.__getitem__)  # stable: in a class, the order of the walk
    records = [_record(beside.get(name, {}), read_bytes, with_class=flat) for name in names]
    if not any("caption" in record for record in records) and (prompts := _prompts(folder / SAMPLES)):
        for name, record in zip(names, records, strict=True):
            record["caption"] = prompts.get(name.rpartition("/")[2], "")
    shown = [*map(printable, names)]
    found = table(folder, shown, columns_of(records), lambda index: samples[names[index]], wanted)
    if not (flat and found.has_classes):
        class_names = sorted(set(classes.values()))
        labels = np.array([class_names.index(classes[name]) for name in names], np.int64)
        found = dataclasses.replace(found, labels=labels, class_names=tuple(class_names), class_numbers=())
    if uneven := _uneven(samples):
        found = dataclasses.replace(found, notes=(*found.notes, uneven))
    return _with_left_out(as_clips(found) if wanted.clips else found, left_out)


def _uneven(samples: Mapping[str, Path | list[Path]]) -> str:
    """Say which clips of frames are numbered unevenly: a frame may be missing, or the pictures be no frames."""
    gaps = {name: _gap(frames) for name, frames in samples.items() if isinstance(frames, list)}
    found = [f"{name} ({gap})" for name, gap in gaps.items() if gap]
    few = f"the frames of {len(found)} of {len(samples)} clips are not numbered evenly, and are taken in their order"
    return f"{few}: {some(found)}" if found else ""


def _gap(frames: Sequence[Path]) -> str:
    """Where the last numbers in the names of frames do not rise evenly; "" where they do."""
    numbers = [re.search(r"([0-9]+)[^0-9]*$", frame.stem) for frame in frames]
    if None in numbers:
        return f"{frames[numbers.index(None)].name} has no number" if len(frames) > 1 else ""
    steps = [int(after[1]) - int(before[1]) for before, after in pairwise(filter(None, numbers))]
    odd = next((place for place, step in enumerate(steps) if step != min(steps)), None)
    return "" if odd is None else f"{frames[odd + 1].name} after {frames[odd].name}"


def _refuse_empty(place: Path, left_out: Mapping[str, Sequence[str]], wanted: Wanted) -> NoReturn:
    packed = [name for names in left_out.values() for name in names if name.lower().endswith(PACKED)]
    fix = f"unpack {packed[0]}" if packed else "add some or give another folder"
    fix += "" if wanted.clips else ", and for clips say how many frames (data.num_frames)"
    there = f"; {listed(left_out)}" if left_out else ""
    raise ValueError(f"{place} holds no {wanted.noun}s ({', '.join(sorted(wanted.endings))}); {fix}{there}")


def _samples(
    folder: Path, files: Sequence[Path], *, clips: bool
) -> tuple[dict[str, Path | list[Path]], dict[str, list[str]], dict[str, dict[str, Path]]]:
    """The samples of files by name, what is left out, and the words beside each sample by ending.

    A clip is a video, an animation, or else all stills of one folder, its frames.
    """
    named = {file.relative_to(folder).as_posix(): file for file in files}
    shown = pictures.ENDINGS | (video.ENDINGS if clips else frozenset())
    samples: dict[str, Path | list[Path]] = {}
    by_folder = defaultdict[Path, list[Path]](list)
    for file in files:
        if file.suffix.lower() in shown:
            by_folder[file.parent].append(file)
    for parent, found in by_folder.items():
        if clips and not any(_is_clip(file) for file in found):
            samples[folder.name if parent == folder else parent.relative_to(folder).as_posix()] = found
        else:
            samples |= {file.relative_to(folder).as_posix(): file for file in found}
    others = [name for name, file in named.items() if file.suffix.lower() not in shown]
    beside, left_out = pair(list(samples), others)
    return samples, left_out, {name: {end: named[text] for end, text in of.items()} for name, of in beside.items()}


def _is_clip(file: Path) -> bool:
    if file.suffix.lower() in video.VIDEO_ENDINGS:
        return True
    if file.suffix.lower() not in video.ENDINGS:
        return False
    try:
        with pictures.opened(file) as picture:
            return pictures.num_frames(picture) > 1
    except (OSError, ValueError):
        return False  # named when its frames are read


def _refuse_animations(files: Sequence[Path]) -> None:
    """Refuse a folder of animations where pictures are wanted, by looking into a few files."""
    may = [file for file in files if file.suffix.lower() in (".gif", ".webp", ".apng", ".avif")]
    for place in np.linspace(0, len(may) - 1, min(_LOOKED_AT, len(may))).astype(int):
        if _is_clip(may[place]):
            pictures.read_picture(may[place])  # says what to do


def pair(samples: Sequence[str], others: Sequence[str]) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """The words beside each sample by ending, and what is left out of the other files.

    A text belongs to the samples of its own name, whatever their ending, or of its name and their ending; else to those
    of which it has the name up to the first dot, as in webdataset tars: s0.txt to s0.left.png and s0.right.png.
    """
    exact, first = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for name in samples:
        stem, key = _stem(name), _key(name)
        for spelling in dict.fromkeys((stem, composed(name))):
            exact[spelling].append(name)
        if key != stem:
            first[key].append(name)
    beside, left_out = defaultdict[str, dict[str, str]](dict), defaultdict[str, list[str]](list)
    for name in others:
        end = _ending(name)
        owners = (exact.get(_stem(name)) or first.get(_stem(name), [])) if end in WORDS else []
        for owner in owners:
            beside[owner][end] = name
        if not owners:
            left_out[f"{end} without a picture" if end in WORDS else end or "without an ending"].append(name)
    passed = {texts[".caption"] for texts in beside.values() if ".txt" in texts and ".caption" in texts}
    left_out |= {".caption beside a .txt": sorted(passed)} if passed else {}
    return dict(beside), dict(left_out)


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


def _stem(name: str) -> str:
    return composed(name[: len(name) - len(_ending(name))])


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return composed(f"{folder}{slash}{base.partition('.')[0]}")


def _record(beside: Mapping[str, Any], read: Callable[[Any], bytes], *, with_class: bool = True) -> dict[str, Any]:
    """What the files beside a sample say of it; `read` gives their bytes."""
    record: dict[str, Any] = {}
    for end in WORDS:
        if end not in beside:
            continue
        text = decode_text(read(beside[end]), str(beside[end])).strip()
        if end == ".json":
            found = parse_json(text, str(beside[end]))
            if not isinstance(found, dict):
                raise ValueError(f"{beside[end]} must hold an object of JSON, not {type(found).__name__}")
            record |= found
        elif end == ".cls":
            record["label"] = number_or_name(text)
        else:
            record["caption"] = text
    return record if with_class else {key: value for key, value in record.items() if key != "label"}


def _prompts(path: Path) -> dict[str, Any]:
    """What `samples.json`, of `nar sample`, says that files show."""
    if not path.is_file():
        return {}
    records = read_json(path, list)
    if not all(isinstance(record, dict) and isinstance(record.get("file"), str) for record in records):
        raise ValueError(f"{path} must hold a list of objects with `file`, as `nar sample` writes it; delete it")
    return {record["file"]: record["prompt"] for record in records if record.get("prompt")}


def _open_tars(paths: Sequence[Path], wanted: Wanted) -> Source:
    """Webdataset shards: uncompressed tars, indexed once by their headers and then read where a picture lies."""
    names, places, records = list[str](), list[tuple[Path, int, int]](), list[dict[str, Any]]()
    left_out = defaultdict[str, list[str]](list)
    for path in paths:
        found, others = _members(path)
        shown = [name for name in found if _ending(name) in wanted.endings]
        beside, unread = pair(shown, [name for name in found if _ending(name) not in wanted.endings])
        for what, which in {**unread, **others}.items():
            left_out[what] += [f"{path.name}:{name}" for name in which]

        def read(name: str, found: dict[str, tuple[Path, int, int]] = found) -> bytes:
            return _part_of(*found[name]).getvalue()

        try:
            records += [_record(beside.get(name, {}), read) for name in shown]
        except ValueError as error:
            raise ValueError(f"shard {path}: {error}") from error
        names += [f"{path.name}:{_stem(name)}" for name in shown]
        places += [found[name] for name in shown]
    if not names:
        _refuse_empty(paths[0], left_out, wanted)
    made = table(paths[0], names, columns_of(records), lambda index: _part_of(*places[index]), wanted)
    return _with_left_out(as_clips(made) if wanted.clips else made, left_out)


def _members(path: Path) -> tuple[dict[str, tuple[Path, int, int]], dict[str, list[str]]]:
    """Where the files of a tar lie, by name, and what else is in it; of one name the last counts, as it is unpacked."""
    found, others = dict[str, tuple[Path, int, int]](), defaultdict[str, list[str]](list)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..")):
                    continue
                if member.isfile():
                    if member.name in found:
                        others["of a name that comes again"].append(member.name)
                    found[member.name] = (path, member.offset_data, member.size)
                elif not member.isdir():
                    others["that is a link or a device"].append(member.name)
            end = _part_of(path, tar.offset, 4 * tarfile.RECORDSIZE).getvalue()
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise ValueError(f"it is damaged or cut off, or another tar follows, at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, ValueError) as error:
        head = path.read_bytes()[:6] if path.is_file() else b""
        if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")):
            raise ValueError(f"shard {path} is compressed, and pictures are read where they lie; unpack it") from error
        raise ValueError(f"shard {path} can't be read ({error}); copy it again") from error
    return found, others


def _part_of(path: Path, offset: int, length: int) -> io.BytesIO:
    with path.open("rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def _by_ending(folder: Path, files: Sequence[Path], read: Set[Path]) -> dict[str, list[str]]:
    """Names of the files that are not `read`."""
    found = defaultdict[str, list[str]](list)
    for file in files:
        if file not in read:
            found[file.suffix.lower() or "without an ending"].append(file.relative_to(folder).as_posix())
    return dict(found)


def _with_left_out(source: Source, more: Mapping[str, Sequence[str]]) -> Source:
    merged = {what: [*source.left_out.get(what, ()), *more.get(what, ())] for what in {**source.left_out, **more}}
    return dataclasses.replace(source, left_out=merged)
