"""Lines that work, in surroundings that do not, or with an example of another kind; sets of odd files.

Knows the examples and the lines; does not know what the answer to each is: one line, or whole outputs, will do.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fuzz_damage
from fuzz_damage import WORDS, parted, short
from fuzz_inputs import LINES, Input, filled, read_by, run_line

# Variables that the command or its libraries read, but those that would let it reach the network.
VARIABLES = "NAR_MAX_PIXELS NAR_DATA NAR_API_KEYS OPENAI_API_KEY HOME TMPDIR COLUMNS LINES TERM NO_COLOR XDG_CACHE_HOME"
NAMES = (
    *parted("a|A|\xe4|a\u0308|\ufb01|train|val|test|Test|valid|.hidden|a b|a#b|a%20b|a=b|[a]|{a}|$a|a;b|'a'|*|?|0|00"),
    *parted("1e3|None|true|null|nan|-1|-rf|~|a.png|a.b|a.|__MACOSX|@eaDir|images|labels|CON|\u202ea|\U0001f600|a\nb"),
    *parted("a\tb|a\x1b[31mb|data.json"),
    "x" * 200,
    "\udcff",
)
ENDINGS = parted(
    ".png|.PNG|.jpg|.jpeg|.jpe|.webp|.bmp|.gif|.tif|.tiff|.avif|.jp2|.ppm|.pgm|.ico|.tga|.mp4|.npy|.npz|.txt|.json|"
    ".csv|.jsonl|.parquet|.tar|.tar.gz|.zip|.heic|.svg|.pdf|.psd|.exr|.hdr|.raw|.xmp|.caption|.cls|.mat|.h5|.arrow|"
    ".part~|"
)
READERS = {
    "extract": "extract {tokenizer} --data {out}/../set --size 8 -o {out}/codes",
    "extract split": "extract {tokenizer} --data {out}/../set --size 8 --split test -o {out}/codes",
    "extract padded": "extract {tokenizer} --data {out}/../set --size 8 --pad -o {out}/codes",
    "extract clips": "extract {clips}/tokenizer --data {out}/../set --size 8 --frames 5 -o {out}/codes",
    "extract words": "extract {tokenizer} --data {out}/../set --size 8 --text-encoder {encoder} -o {out}/codes",
    "copies": "eval copies --fake {out}/../set --of {pictures} --real {array}/set.npz --json {out}/a.json",
    "copies of": "eval copies --fake {drawn} --of {out}/../set --real {array}/set.npz --json {out}/a.json",
    "train": "train {recipe}/tiny.yaml run={out}/run data.source={out}/../set num_images=8 batch_size=2",
}


def swapped(draw: random.Random, world: Path, names: list[str]) -> Input:
    """A line that works, with an example of another kind in the place of one, or a file in it."""
    name = draw.choice([name for name in names if read_by(LINES[name])])
    words = LINES[name].split()
    at = draw.choice([at for at, word in enumerate(words) if read_by(word)])
    other = draw.choice(sorted(path for path in world.iterdir() if path.is_dir()))
    if draw.random() < 0.5:
        other = draw.choice(sorted(path for path in other.rglob("*") if path.is_file() or draw.random() < 0.3))
    option, equals, _ = words[at].rpartition("=")
    words[at] = f"{option}{equals}{str(other).replace(str(world), '{world}')}"
    title = f"{name}: {words[at]}"
    words[at] = words[at].replace("{world}", str(world))

    def act(here: Path) -> None:
        run_line(filled(words, world, here, set()), world)

    # `nar eval` samples 10,000 pictures of a model.
    return Input(f"swapped {name.split()[0]}", title, act, long=name.startswith("eval") and "model" in title)


def surroundings(draw: random.Random, world: Path, names: list[str]) -> Input:
    """A line that works, with odd variables, few open files, small files, a folder that is gone, or closed streams."""
    name = draw.choice(names)
    what = draw.choice(("variable", "variable", "variable", "files", "size", "size", "folder", "home", "mask"))
    if "{url}" in LINES[name] and what == "files":
        what = "home"  # the server that is asked would run in the same process, out of files too
    variable, value = (
        draw.choice(VARIABLES.split()),
        draw.choice((*WORDS, "0", "1", "-1", "1e3", "nan", "9" * 30, "/", ".", "\udcff")),
    )
    limit = draw.choice((5000, 10_000, 20_000, 50_000, 100_000, 200_000))  # what it prints goes into a file too

    def act(here: Path) -> None:
        line = filled(LINES[name], world, here, set())
        if what == "variable":
            os.environ[variable] = value
        elif what == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (draw_files, draw_files))
        elif what == "size":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            print(f"damage: files of at most {limit} bytes", flush=True)
        elif what == "folder":
            (here / "gone").mkdir()
            os.chdir(here / "gone")
            (here / "gone").rmdir()
        elif what == "home":
            os.environ["HOME"] = "/nowhere"
        else:
            os.umask(0o777)
        run_line(line, world, here=here, full=what == "size")

    draw_files = draw.choice((8, 12, 16, 24, 40))
    said = {
        "variable": f"{variable}={short(value)}",
        "files": f"{draw_files} open files",
        "size": f"files of {limit} bytes",
    }
    return Input(f"around {name.split()[0]}", f"{name}: {said.get(what, what)}", act)


def odd_set(draw: random.Random, world: Path, _: list[str]) -> Input:
    """A folder of pictures, words and other things with odd names, at odd places, of odd kinds, that a line reads."""
    name, again = draw.choice(sorted(READERS)), draw.getrandbits(64)

    def act(here: Path) -> None:
        (here / "set").mkdir()
        (here / "out").mkdir()
        for said in fill(here / "set", random.Random(again), world):
            print(f"damage: {said!a}")
        run_line(filled(READERS[name], world, here, set()), world)

    return Input(f"set {name.split()[0]}", f"{name}: set #{again % 10_000}", act)


def fill(folder: Path, draw: random.Random, world: Path) -> list[str]:
    """Write a set of up to 30 odd files; returns what was written."""
    said, folders = [], [folder]
    for _ in range(draw.choice((0, 1, 2, 2, 3, 6))):
        made = draw.choice(folders) / draw.choice(NAMES).replace("/", "")
        try:
            made.mkdir(exist_ok=True)
        except OSError:
            continue
        folders.append(made)
    writers: tuple[Callable[[Path, random.Random, Path], None], ...] = (
        _plain,
        _plain,
        _plain,
        _plain,
        _example,
        _words,
        _other,
    )
    for index in range(draw.choice((0, 1, 2, 5, 12, 30))):
        stem = draw.choice((draw.choice(NAMES).replace("/", "")[:200], f"{index}", f"{index:04}"))
        path = draw.choice(folders) / f"{stem}{draw.choice(ENDINGS)}"
        writer = draw.choice(writers)
        if path.exists() and not path.is_file():
            continue  # as in `_words`
        try:
            writer(path, draw, world)
            if draw.random() < 0.1 and path.is_file() and not path.is_symlink():
                fuzz_damage.damage(path, draw)
        except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, tarfile.TarError):
            continue
        said.append(f"{path.relative_to(folder)} {writer.__name__}")
    return said


def _plain(path: Path, draw: random.Random, _: Path) -> None:
    """A picture of some mode and size, in the format of its ending where there is one."""
    from PIL import Image

    size = draw.choice(((8, 8), (8, 8), (8, 8), (16, 16), (9, 7), (1, 1), (1, 900), (64, 8)))
    mode = draw.choice(
        ("RGB", "RGB", "RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "LAB", "YCbCr", "HSV")
    )
    values = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, (*size[::-1], 3), np.uint8)
    picture = Image.new(mode, size) if mode in ("I;16", "I", "F", "LAB") else Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = draw.choice((0, 1, 3, 6, 8, 9, 255))
    more = {"exif": exif} if draw.random() < 0.3 else {}
    frames = [picture] * draw.choice((1, 1, 1, 2, 6))
    if path.suffix == ".avif":  # whose encoder does not outlive others
        picture, frames, more = Image.fromarray(values).resize((8, 8)), [picture], {}
    if len(frames) > 1:
        more |= {"save_all": True, "append_images": frames[1:]}
    kind = None if path.suffix.lower() in Image.registered_extensions() else "PNG"
    try:
        picture.save(path, kind, **more)
    except (OSError, ValueError, KeyError, TypeError, SystemError):
        picture.convert("RGB").save(path, "PNG")


def _example(path: Path, draw: random.Random, world: Path) -> None:
    """One of the examples, perhaps under another ending."""
    found = draw.choice(sorted(file for file in world.rglob("*") if file.is_file() and file.stat().st_size < 1 << 20))
    shutil.copy(found, path.with_suffix(found.suffix) if draw.random() < 0.7 else path)


def _words(path: Path, draw: random.Random, _: Path) -> None:
    """A file of words or metadata beside pictures."""
    word = draw.choice((*WORDS, "a red apple", "a,b", '"', "\ufeffred", "\x00", "é".encode().decode("latin-1")))
    beside = sorted(file.name for file in path.parent.iterdir())[:3] or ["0.png"]
    metadata = draw.choice(
        ("metadata.jsonl", "metadata.csv", "metadata.json", "labels.csv", "dataset_info.json", "samples.json")
    )
    rows = [
        {draw.choice(("file_name", "file", "image")): name, draw.choice(("text", "caption", "label")): word}
        for name in beside
    ]
    texts = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".csv": "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]),
        ".json": json.dumps(draw.choice((rows, {"data": rows}, {}, []))),
    }
    target, text = path.parent / metadata, texts[Path(metadata).suffix]
    if draw.random() >= 0.5:
        target = (path.parent / beside[0]).with_suffix(draw.choice((".txt", ".caption", ".json", ".TXT")))
        text = word
    if target.is_file() or not target.exists():  # a pipe that is there already waits for a reader
        target.write_text(text, errors="surrogatepass")


def _other(path: Path, draw: random.Random, _: Path) -> None:
    """A thing that is no file, or not what its ending says."""
    what = draw.choice(("empty", "noise", "link", "loop", "pipe", "folder", "outside", "pointer", "device"))
    if what in ("empty", "noise", "pointer"):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        path.write_bytes({"empty": b"", "noise": draw.randbytes(500), "pointer": pointer}[what])
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": "nowhere", "loop": path.parent, "outside": "/etc/passwd", "device": "/dev/zero"}[what])
