"""Ways to damage a file, as a seeded random number says: as suits its kind, or as any can be damaged."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# What stands where something else belongs. The words for numbers are written as such into JSON and YAML.
WORDS = (
    "",
    " ",
    "x",
    "null",
    "-1",
    "1e400",
    "../x",
    "/dev/zero",
    "\x1b]0;x\x07",
    "a\nb",
    "é\u202e",
    "\U0001d7d9",
    "x" * 5000,
)
NUMBERS: tuple[Any, ...] = (0, -1, 1, 3, 2.5, -0.0, 1e308, 2**31, 2**40, 2**63, 10**400)
NO_NUMBERS: tuple[Any, ...] = (float("nan"), float("inf"), -float("inf"))
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1, "x"], {"x": 1}, [[[1]]])
HOSTILE: tuple[Any, ...] = (*WORDS, *NUMBERS, *NO_NUMBERS, *OTHERS)


def damage(path: Path, draw: random.Random) -> str:
    """Damage one file, as suits its kind or as any can be; returns how, in words."""
    kinds: dict[str, Callable[[Path, random.Random], str]] = {
        ".json": _json,
        ".jsonl": _json,
        ".yaml": _yaml,
        ".npz": _npz,
        ".parquet": _parquet,
        ".tar": _tar,
        ".safetensors": _safetensors,
        ".pt": _pickle,
        ".pth": _pickle,
        ".png": _picture,
        ".csv": _text,
        ".txt": _text,
    }
    kind = kinds.get(path.suffix, _bytes)
    return draw.choices((kind, _bytes, _place), (6, 3, 1))[0](path, draw)


def swapped(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """JSON values with one replaced, removed, added, or wrapped; and how."""
    places = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))] if tree else []
    for holder, key in places:  # grows while it is walked
        inner = holder[key]
        if isinstance(inner, dict | list):
            places += [(inner, name) for name in (inner if isinstance(inner, dict) else range(len(inner)))]
    what = draw.choices(("value", "gone", "extra", "whole", "wrapped", "word"), (8, 2, 1, 1, 1, 2))[0]
    if what == "whole" or not places:
        value = draw.choice(HOSTILE)
        return value, f"all is {short(value)}"
    holder, key = draw.choice(places)
    if what == "gone":
        del holder[key]
    elif what == "extra" and isinstance(holder, dict):
        holder["\x1b[31mextra"] = 1
    elif what == "wrapped":
        holder[key] = [holder[key]]
    elif what == "word":
        holder[key] = str(holder[key])
    else:
        holder[key] = value = draw.choice(HOSTILE)
        return tree, f"{key} = {short(value)}"
    return tree, f"{key}: {what}"


def parted(text: str) -> list[str]:
    """Words that are joined by `|`."""
    return text.split("|")


def short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**70 else "10**400"
    return text if len(text) < 60 else f"{text[:50]}..."


def _nested(draw: random.Random) -> str:
    return draw.choice(("[" * 200_000, '{"a":' * 200_000, "[" * 900 + "]" * 900))


def _json(path: Path, draw: random.Random) -> str:
    lines = path.suffix == ".jsonl" and draw.random() < 0.9
    text = path.read_text(encoding="utf-8")
    if draw.random() < 0.08:
        path.write_text(_nested(draw), encoding="utf-8")
        return "nested"
    if lines:
        rows = text.splitlines()
        index = draw.randrange(len(rows))
        tree, how = swapped(json.loads(rows[index]), draw)
        rows[index] = json.dumps(tree)
        path.write_text("\n".join(rows), encoding="utf-8")
    else:
        tree, how = swapped(json.loads(text) if path.suffix == ".json" else None, draw)
        path.write_text(json.dumps(tree), encoding="utf-8")
    return how


def _yaml(path: Path, draw: random.Random) -> str:
    import yaml

    if draw.random() < 0.3:
        extra = draw.choice(
            (
                "about: ${oc.env:HOME}\n",
                "base: tiny.yaml\n",
                "base: /etc/passwd\n",
                "base: [1]\n",
                "base: ../x\n",
                "a: &a [1]\nb: *a\n",
                "x: !!python/object/apply:os.system [ls]\n",
                "cuda_recipe: tiny.yaml\n",
                "tokenizer_recipe: tiny.yaml\n",
                "? [a]\n: 1\n",
                "data: &d {source: *d}\n",
                "task: model\n",
                "\ttab\n",
                "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nabout: [*c,*c]\n",
                "init: 2024-01-01\n",
                "<<: 1\n",
                "---\nx: 1\n",
                _nested(draw),
            )
        )
        path.write_text(path.read_text(encoding="utf-8") + extra, encoding="utf-8")
        return f"with {extra[:40]!r}"
    tree, how = swapped(yaml.safe_load(path.read_text(encoding="utf-8")), draw)
    path.write_text(yaml.safe_dump(tree) if draw.random() < 0.5 else json.dumps(tree), encoding="utf-8")
    return how


def _bytes(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    what = draw.choice(("cut", "flip", "flip", "zeros", "empty", "twice", "noise", "front"))
    at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else draw.randrange(min(len(data), 200) + 1)
    if what == "cut":
        del data[at:]
    elif what == "flip":
        for _ in range(draw.choice((1, 1, 4, 20))):
            if data:
                data[draw.randrange(len(data)) if draw.random() < 0.5 else min(at, len(data) - 1)] ^= (
                    1 << draw.randrange(8)
                )
    elif what == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif what == "empty":
        data.clear()
    elif what == "twice":
        data *= 2
    elif what == "noise":
        data[at : at + 16] = draw.randbytes(16)
    else:
        data[:0] = draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"GIF89a"))
    path.write_bytes(data)
    return f"{what} at {at}"


def _place(path: Path, draw: random.Random) -> str:
    text = path.suffix in (".txt", ".json", ".jsonl", ".yaml", ".csv")  # which may be piped, and is waited for
    what = draw.choice(("folder", "loop", "dangling", "gone", "null", "zero", *(() if text else ("pipe",))))
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what in ("null", "zero"):
        path.symlink_to(f"/dev/{what}")
    elif what == "pipe":
        os.mkfifo(path)
    return what


def _text(path: Path, draw: random.Random) -> str:
    lines = path.read_text(encoding="utf-8").split("\n")
    index = draw.randrange(len(lines))
    odd = draw.choice(
        (*WORDS, "\0", "\r", "\x85", "\u2028", '"', ",,,,,", "a,b\tc", "\ud800", "/../../etc/passwd,1", "," * 9999)
    )
    lines[index] = draw.choice((odd, lines[index] + odd, odd + lines[index], f"{odd},{odd}"))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"line {index} has {short(odd)}"


def _npz(path: Path, draw: random.Random) -> str:
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    name = draw.choice([*arrays])
    array = arrays[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes: dict[str, Callable[[], Any]] = {
            "gone": lambda: None,
            "objects": lambda: np.array([None, {"a": 1}], object),
            "text": lambda: np.array(["x"] * len(array) if array.ndim else "x"),
            "floats": lambda: array.astype(float) / 3 if array.dtype.kind in "iuf" else np.array(1.5),
            "nan": lambda: np.full(array.shape, np.nan),
            "negative": lambda: np.full(array.shape, -1),
            "huge": lambda: np.full(array.shape, 2**62),
            "scalar": lambda: np.array(7),
            "empty": lambda: array[:0] if array.ndim else np.array([]),
            "short": lambda: array[:1] if array.ndim else array,
            "axis": lambda: array[None],
            "complex": lambda: np.full(array.shape, 1j),
            "dates": lambda: np.full(array.shape, np.datetime64("2024-01-01")),
            "structured": lambda: np.zeros(array.shape, [("a", "u1")]),
            "unsigned": lambda: np.full(array.shape, 2**64 - 1, np.uint64),
            "half": lambda: np.full(array.shape, 0.5, np.float16),
            "fortran": lambda: np.asfortranarray(array),
            "truth": lambda: np.zeros(array.shape, bool),
        }
        what = draw.choice([*changes, "lie", "lie", "bomb"])
        if what == "lie":
            return _lying_npz(path, name, draw)
        if what == "bomb":
            arrays[name] = np.zeros((20_000, 64, 64, 3), np.uint8)
        else:
            arrays[name] = changes[what]()
        np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return f"{name}: {what}"


def _lying_npz(path: Path, name: str, draw: random.Random) -> str:
    """The header of an array says something else than what follows."""
    shape = draw.choice(
        ("(1000000, 1000, 1000, 3)", "(12, 8, 8, 3)", "(-1, 8, 8, 3)", "(2**40,)", "(0, 8, 8, 3)", "()", "(1e9,)")
    )
    kind = draw.choice(("|u1", "<f8", "|O", "<U9", "|V1", "x", "<i8"))
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64))
    return f"{name}: header {kind} {shape}"


def _parquet(path: Path, draw: random.Random) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    name = draw.choice(table.column_names)
    count, index = len(table), table.column_names.index(name)
    columns: dict[str, Any] = {
        "nulls": [None] * count,
        "numbers": list(range(count)),
        "text": ["x"] * count,
        "floats": [0.5] * count,
        "nan": [float("nan")] * count,
        "lists": [[1]] * count,
        "structs": [{"bytes": None, "path": "/etc/passwd"}] * count,
        "other structs": [{"x": 1}] * count,
        "bytes": [b"x"] * count,
        "negative": [-1] * count,
        "huge": [2**62] * count,
        "nested": [[["x"]]] * count,
        "truth": [True] * count,
        "controls": ["\x1b]0;x\x07"] * count,
    }
    what = draw.choice([*columns, "gone", "twice", "none"])
    if what == "gone":
        table = table.drop_columns([name])
    elif what == "twice":
        table = table.append_column(name, table.column(name))
    elif what == "none":
        table = table.slice(0, 0)
    else:
        table = table.set_column(index, name, pa.array(columns[what]))
    pq.write_table(table, path)
    return f"{name}: {what}"


def _tar(path: Path, draw: random.Random) -> str:
    names = ("../../x.png", "/tmp/x.png", "a/b/c.png", "x.cls", "x.json", ".png", "", "x\n.png", "0.png", "x.txt", "x")
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE)
    contents = (
        b"",
        b"x",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"label": [1], "caption": {"a": 1}}',
        b"-5",
        b"9" * 400,
        b"nan",
    )
    said = []
    with tarfile.open(path, "a") as file:
        for _ in range(draw.randrange(1, 4)):
            member = tarfile.TarInfo(draw.choice(names))
            member.type = draw.choice((tarfile.REGTYPE, tarfile.REGTYPE, *kinds))
            member.linkname = draw.choice(("0.png", "/etc/passwd", "nowhere", member.name))
            data = draw.choice(contents) if member.type == tarfile.REGTYPE else b""
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
            said.append(f"{member.name!r} {member.type!r} {data[:10]!r}")
    return "with " + ", ".join(said)


def _safetensors(path: Path, draw: random.Random) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = draw.choice(("header", "header", "nan", "size", "dtype"))
    if what == "nan":
        body = b"\xff" * len(body)
    elif what == "size":
        size = draw.choice((0, 1, 2**63, len(data), 10**8))
        path.write_bytes(size.to_bytes(8, "little") + data[8:])
        return f"header of {size} bytes"
    elif what == "dtype":
        name = draw.choice([key for key in header if key != "__metadata__"])
        header[name]["dtype"] = what = draw.choice(("F64", "I32", "BF16", "BOOL", "U8", "F8_E4M3", "I64", "F16"))
        size = {"F64": 8, "I64": 8, "I32": 4, "BF16": 2, "F16": 2}.get(what, 1)
        begin, end = header[name]["data_offsets"]
        count = (end - begin) // 4
        header = {name: header[name], **{key: value for key, value in header.items() if key != name}}
        body += bytes(count * size)  # at the end, with a hole where it was, unless it was the last
        header[name]["data_offsets"] = [len(body) - count * size, len(body)]
    else:
        header, what = swapped(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return what


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def _pickle(path: Path, draw: random.Random) -> str:
    import torch

    try:
        tree = torch.load(path, weights_only=True)
    except Exception:  # a scripted module
        return _bytes(path, draw)
    name = draw.choice([*tree])
    tensor = tree[name]
    values: dict[str, Callable[[], Any]] = {
        "gone": lambda: None,
        "shape": lambda: tensor[:1],
        "scalar": lambda: torch.tensor(1.0),
        "int": lambda: tensor.int(),
        "number": lambda: 3,
        "text": lambda: "x",
        "list": lambda: [tensor],
        "nan": lambda: tensor * float("nan"),
        "complex": lambda: tensor.to(torch.complex64),
        "truth": lambda: tensor > 0,
        "empty": lambda: tensor[:0],
        "wide": lambda: torch.zeros(1).expand(2**20, 2**20),
        "meta": lambda: tensor.to("meta"),
        "code": _Command,
        "sparse": tensor.to_sparse,
        "transposed": lambda: tensor.T,
        "axis": lambda: tensor[None],
    }
    wholes: tuple[Any, ...] = (
        [],
        {},
        None,
        3,
        {"model": 3},
        {"model": {}},
        {"args": 5, "model": tree},
        {1: tensor},
        {"model": {"sd": tree, "args": 3}},
        {"ema": tree},
        {"model": tree, "ema": tree},
        [tree],
        {"model": {"sd": {}}},
        {"model": {"sd": tree, "ema_sd": 3}},
        {"model": {"sd": tree, "name": [1], "args": {"grid": "x"}}},
    )
    if draw.random() < 0.4:
        whole = draw.choice(wholes)
        torch.save(whole, path)
        return f"wrapped as {type(whole).__name__} {[*whole] if isinstance(whole, dict) else ''}"
    what = draw.choice([*values])
    tree[name] = values[what]()
    torch.save(tree, path, _use_new_zipfile_serialization=draw.random() < 0.5 or what == "meta")
    return f"{name}: {what}"


def _picture(path: Path, draw: random.Random) -> str:
    """Pictures that claim sizes, or are of unusual kinds."""
    from PIL import Image

    size = draw.choice(((1, 1), (1, 3000), (3000, 1), (0, 0), (65535, 65535), (2**31 - 1, 1), (30_000, 30_000)))
    mode = draw.choice(("1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK", "claims", "claims", "bomb", "frames"))
    if mode == "claims":
        data = bytearray(path.read_bytes())
        data[16:24] = struct.pack(">2I", *size)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        path.write_bytes(data)
        return f"claims {size}"
    if mode == "bomb":
        Image.new("L", (9_000, 9_000)).save(path)
    elif mode == "frames":
        frames = [Image.new("P", (2_000, 2_000), number) for number in range(40)]
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    else:
        Image.new(mode, (8, 8)).save(path, "TIFF" if mode in ("F", "I", "CMYK", "I;16") else "PNG")
    return mode
