"""Inputs that the fuzz tries: lines of the command with a damaged file, another option or output, and calls in Python.

Each is chosen by a seeded random number, and says what is wrong with its outcome by lines "WRONG: ..." on stderr.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import random
import re
import shutil
import signal
import stat
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_calls
import fuzz_damage
import fuzz_http
from fuzz_damage import WORDS, parted, short

EXPECTED = (ValueError, TypeError, OSError, ImportError, ArithmeticError)

# A verb's line that works, by what is read: {name} is a folder of the examples, {out} is empty.
_EVAL = (
    "eval --real {array}/set.npz --fake {drawn} --resamplings 0 --calibration 0 --cache {out}/cache --json {out}/a.json"
)
LINES: dict[str, str] = {
    "sample": "sample {model} --class-label pear -n 1 -o {out}/a.png",
    "sample npz": "sample {model} --class-label 0 -n 2 --seed 3 -o {out}/a.npz",
    "sample folder": "sample {model} -n 1 -o {out}/a",
    "sample gif": "sample {model} --class-label plum -n 1 -o {out}/a.gif",
    "sample words": "sample {words} --prompts-file {prompts}/prompts.txt -n 1 --text-encoder {encoder} -o {out}/a.png",
    "sample clips": "sample {clips} --prompt red --frames {clip}/start.gif -n 1 -o {out}/a.gif",
    "sample set": "sample {model} --labels balanced -n 2 -o {out}/a.npz",
    "sample paired": "sample {model} --labels {table}/train.parquet -n 2 -o {out}/a.npz",
    "sample prompts": "sample {words} --labels prompts --prompts-file {prompts}/prompts.txt -o {out}/a.npz",
    "sample geneval": "sample {words} --geneval {geneval}/prompts.jsonl -n 1 -o {out}/a",
    "serve": "serve {model} --port 0",
    "serve clips": "serve {model} fruit={words} {clips} --port 0 --text-encoder {encoder} --videos {out}/videos",
    "edit": "edit {model} --image {pictures}/a/0.png --box 2,2,4,3 --class-label pear -n 1 -o {out}/a.png",
    "edit masked": "edit {model} --image {pictures}/a/0.png --mask {pictures}/b/1.png -o {out}/a --sheet {out}/s.png",
    "extract": "extract {tokenizer} --data {pictures} --size 8 -o {out}/codes",
    "extract captioned": "extract {tokenizer} --data {captioned} --size 8 -o {out}/codes",
    "extract listed": "extract {tokenizer} --data {listed} --size 8 -o {out}/codes",
    "extract texts": "extract {tokenizer} --data {texts} --size 8 -o {out}/codes",
    "extract array": "extract {tokenizer} --data {array}/set.npz --size 8 -o {out}/codes",
    "extract table": "extract {tokenizer} --data {table} --size 8 --text-encoder {encoder} -o {out}/codes",
    "extract tar": "extract {tokenizer} --data {tar}/train.tar --size 8 -o {out}/codes",
    "extract idx": "extract {tokenizer} --data {idx} --size 8 -o {out}/codes",
    "extract drawn": "extract {tokenizer} --data {drawn} --size 8 -o {out}/codes",
    "extract films": "extract {clips}/tokenizer --data {films} --size 8 --frames 5 -o {out}/codes",
    "extract animations": "extract {clips}/tokenizer --data {animations} --size 8 --frames 5 -o {out}/codes",
    "extract lists": "extract {clips}/tokenizer --data {lists}/train.csv --size 8 --frames 5 -o {out}/codes",
    "info": "info {model}",
    "info json": "info {clips} --json",
    "bench": "bench {model} --repetitions 1 --warmups 0 --json {out}/a.json",
    "bench tokenizer": "bench --tokenizer {tokenizer} --repetitions 1 --warmups 0 --json {out}/a.json",
    "eval": _EVAL,
    "eval pictures": _EVAL.replace("{array}/set.npz", "{pictures}"),
    "eval table": _EVAL.replace("{array}/set.npz", "{table}/train.parquet"),
    "eval reference file": _EVAL.replace("{array}/set.npz", "{reference}/reference.npz"),
    "eval model": _EVAL.replace("--fake {drawn}", "{model} -n 2"),
    "eval inception": _EVAL + " --inception {inception}/weights.pth",
    "eval i3d": _EVAL.replace("{array}/set.npz", "{films}") + " --i3d {i3d}/i3d.pt --num-frames 2",
    "eval tokenizer": "eval tokenizer {tokenizer} --real {idx} --size 8 --json {out}/a.json --sheet {out}/a.png",
    "eval likelihood": "eval likelihood {model} --real {array}/set.npz -n 4 --json {out}/a.json",
    "eval captions": "eval captions --fake {captioned} --retrieval --json {out}/a.json",
    "eval edit": "eval edit {model} --real {array}/set.npz -n 4 --json {out}/a.json --samples {out}/made",
    "eval composed": "eval composed {composed} --json {out}/a.json",
    "eval prompts": "eval geneval --write-prompts {out}/a.jsonl",
    "eval copies": "eval copies --fake {drawn} --of {pictures} --real {array}/set.npz --json {out}/a.json",
    "eval reference": "eval reference --real {pictures} -o {out}/a.npz",
    "tune": "tune {model} --real {array}/set.npz -n 8 --tuned 8 --sampled 8 --steps 3 --family constant "
    "--json {out}/a.json",
    "compare": "compare {plan}/tiny.yaml run={out}/study seeds=[0]",
    "compare study": "compare {study}",
    "compare models": "compare {model} {twin} --real {array}/set.npz -n 8 --sampled 0 -o {out}/compared",
    "bench serve": "bench serve {url} --seconds 1 --loads 0.5 --concurrency 1 --num-seeds 1 --json {out}/a.json",
    "convert": "convert --kind nar-c2i {published}/model.pt --num-heads 2 --grid 3x4 -o {out}/m",
    "convert safe": "convert --kind nar-c2i {published-safe} --num-heads 2 --grid 3x4 -o {out}/m",
    "convert names": "convert --kind nar-c2i {published}/model.pt --num-heads 2 --grid 3x4 "
    "--class-names {names}/names.json -o {out}/m",
    "train": "train {recipe}/tiny.yaml run={out}/run",
    "train codes": "train {recipe}/tiny.yaml run={out}/run data.source= data.codes={codes} tokenizer_path=",
    "train tokenizer": "train {recipe-tokenizer}/tiny.yaml run={out}/run",
    "train on": "train {recipe}/tiny.yaml run={run} num_images=8",
}
VALUES = (
    *WORDS,
    *parted(
        "0|1|2|-7|2.5|nan|inf|-inf|1e308|1,2|0x0|3x1000000|1000000000|\udcff|%s|{}|16x16|~|.|/|/proc/self/mem|int8"
    ),
    *parted("cuda|balanced|-o|--|True|1_000| 3|3 |\u0663|\xb2|1e-320|-0|0.5|1,,2|9x9x9x9|NaN|+1|0b1|[1]|\u200b|%2e%2e"),
    *parted("a=b|@x"),
    "9" * 400,
    str(2**31),
    str(2**63),
)
KEY_VALUES = (
    *WORDS,
    *parted("0|1|2|3|-1|2.5|nan|.inf|1e-9|1e308|true|[]|[1]|[1, 2, 3]|{}|{x: 1}|[[1]]|manhattan|raster|par|*a|&a [*a]"),
    *parted("!!python/name:os.system|2024-01-01|1000000000|${oc.env:HOME}|flip|all|cosine|none|bfloat16|@|`|\ttab|["),
    *parted("toy|toy-tokenizer|scales|token|linear|[0.5]|[a, b]|{a: {b: 1}}|0x10|1_0|~|on|[-1]|[1, null]|${x}|${..x}"),
    *parted("-0.0|[1e400]"),
    "9" * 400,
)
PLACES = re.compile(r"\{([\w-]+)\}")
# These take seconds: networks that judge pictures, or timings.
COSTLY = {name for name in LINES if name.startswith(("eval", "bench"))} - {
    "eval composed",
    "eval copies",
    "eval prompts",
}
COSTLY |= {"serve", "serve clips", "tune", "compare", "compare models"}
LONG = re.compile(r"tune|eval edit.* --distances|compare models.* --tune")  # half a minute of a core at the least
REFUSED = {"eval inception", "eval i3d", "eval reference"}  # as they stand: no network that is theirs, too few pictures
WRITTEN = {"run", "study"}  # examples that a line writes into


class Input(NamedTuple):
    """What is tried: `act` runs in the process and folder of its own.

    With `refused` it must not be taken; `long` work is asked for, and may be ended.
    """

    kind: str
    title: str
    act: Callable[[Path], None]
    refused: bool = False
    long: bool = False


def read_by(line: str) -> list[str]:
    """The examples that a line reads."""
    return [place for place in PLACES.findall(line) if place not in ("out", "url")]


def damaged_file(draw: random.Random, world: Path, names: list[str]) -> Input:
    """A line that works, but one file of what it reads is damaged."""
    name = draw.choice([name for name in names if read_by(LINES[name])])
    line = LINES[name]
    item = draw.choice(read_by(line))
    files = sorted(path for path in (world / item).rglob("*") if path.is_file())
    file = draw.choice(files).relative_to(world)
    again = draw.getrandbits(64)

    def act(here: Path) -> None:
        shutil.copytree(world / item, here / item, symlinks=True)
        how = fuzz_damage.damage(here / file, random.Random(again))
        print(f"damage: {file}: {how}", file=sys.stderr)
        run_line(filled(line, world, here, {item}), world)

    return Input(f"file {item}", f"{name}: {file} damaged", act)


def standing(name: str, world: Path) -> Input:
    """A line as it stands."""

    def act(here: Path) -> None:
        run_line(filled(LINES[name], world, here, set()), world)

    return Input("line", name, act, refused=name in REFUSED, long=bool(LONG.match(name)))


def _options_of(name: str) -> list[tuple[list[str], Any]]:
    """The parameters of a verb, with the words that lead to it."""
    import typer.main

    from nar.cli import app

    command: Any = typer.main.get_command(app)
    words = name.split()[:1]
    command = command.commands[words[0]]
    if (
        (second := name.split()[1:2])
        and second[0] in getattr(command, "commands", ())
        and LINES[name].split()[1] == second[0]
    ):
        command = command.commands[second[0]]
    return [parameter for parameter in command.params if parameter.name not in ("help", "version")]


def option(draw: random.Random, world: Path, names: list[str]) -> Input:
    """A line that works, with one to three more options, or another value of them."""
    name = draw.choice(names)
    words, said, nonsense = LINES[name].split(), [], False
    for parameter in draw.sample(_options_of(name), draw.choice((1, 1, 1, 2, 3))):
        value, option = draw.choice(VALUES), max(parameter.opts, key=len)
        if value == "/" and option in ("--videos", "--samples", "--cache"):
            value = "/proc"  # which nobody can write into
        kind = str(getattr(parameter, "type", "") or parameter.type_descriptor.annotation)
        if parameter.param_type_name == "argument":
            at = next(i for i, word in enumerate([*words, "{"]) if i > 0 and word.startswith("{"))
            words[at : at + 1] = [value]
        elif getattr(parameter, "is_flag", False):
            words.append(option)
        else:
            words = [*words, option, value]
            nonsense |= "float" in kind.lower() and value in ("nan", "inf", "-inf", "NaN", "9" * 400, "x", "")
        said.append(option if getattr(parameter, "is_flag", False) else f"{option} {short(value)}")

    def act(here: Path) -> None:
        run_line(filled(words, world, here, set()), world)

    return Input(f"option {name.split()[0]}", f"{name}: {' '.join(said)}", act, refused=nonsense)


def override(draw: random.Random, world: Path, _: list[str]) -> Input:
    """A key of a recipe with another value, on the command line."""
    from nar.storage.fields import kinds
    from nar.training.plan import LENGTHS
    from nar.training.recipe import Recipe

    key = draw.choice([*kinds(Recipe), "x", "data", "model", "", "optim.x", "data.source.x"])
    value = draw.choice(KEY_VALUES)
    name = draw.choice(("train", "train", "train codes", "train tokenizer"))

    def act(here: Path) -> None:
        run_line([*filled(LINES[name], world, here, set()), f"{key}={value}"], world)

    long = key in LENGTHS and value == "1000000000"
    return Input("recipe key", f"{name}: {key}={short(value)}", act, long=long)


def output(draw: random.Random, world: Path, names: list[str]) -> Input:
    """A line that works, whose output goes somewhere else."""
    name = draw.choice([name for name in names if "{out}" in LINES[name]])
    line = filled(LINES[name], world, Path("/HERE"), set())
    at = draw.choice([index for index, word in enumerate(line) if "/HERE/out" in word])
    ending = Path(line[at]).suffix
    what = draw.choice(
        parted(
            "device|pipe|folder|full folder|link|loop|long|below a file|odd|escape|full|empty|dot|proc|victim|"
            "surrogate|space|stdout|home"
        )
    )

    def act(here: Path) -> None:
        (here / "out").mkdir()
        target = here / "out" / f"t{ending}"
        if what == "device":
            os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        elif what == "pipe":
            os.mkfifo(target)
            threading.Thread(target=lambda: target.read_bytes(), daemon=True).start()
        elif what in ("folder", "full folder"):
            target.mkdir()
            if what == "full folder":
                (target / "mine.txt").write_text("mine")
        elif what == "link":
            target.symlink_to(here / "out/other")
        elif what == "loop":
            target.symlink_to(target.name)
        elif what == "victim":
            (here / "out/victim").write_text("victim")
            (here / f"out/.t{ending}").symlink_to(here / "out/victim")
        elif what == "below a file":
            (here / "out/file").write_text("x")
        odd = {
            "long": here / f"out/{'x' * 300}{ending}",
            "below a file": here / f"out/file/t{ending}",
            "odd": here / f"out/a\nb{ending}",
            "escape": here / f"out/\x1b]0;x\x07{ending}",
            "full": Path("/dev/full"),
            "empty": Path(),
            "dot": Path(),
            "proc": Path(f"/proc/x{ending}"),
            "surrogate": here / f"out/\udcff{ending}",
            "space": here / f"out/ {ending}",
            "stdout": Path("/dev/stdout"),
            "home": Path(f"~/t{ending}"),
        }
        words = [word.replace("/HERE", str(here)) for word in line]
        option, _, _ = words[at].rpartition("=")
        words[at] = f"{option}={odd.get(what, target)}" if option else str(odd.get(what, target))
        if what == "empty":
            words[at] = f"{option}=" if option else ""
        if what == "stdout" and ending not in (".json", ""):
            words[at] = words[at].replace("/dev/stdout", os.devnull)  # pictures are no text
        run_line(words, world, outputs=False)
        if what == "device" and not stat.S_ISCHR(target.stat().st_mode):
            print("WRONG: the device was replaced", file=sys.stderr)
        if what == "full folder" and not (target / "mine.txt").is_file():
            print("WRONG: a file in the folder is gone", file=sys.stderr)
        if what == "victim" and (here / "out/victim").read_text() != "victim":
            print("WRONG: wrote through a planted link", file=sys.stderr)

    return Input("output", f"{name}: {line[at]} is {what}", act)


def python(draw: random.Random, world: Path, _: list[str]) -> Input:
    """A call in Python with one or two wrong arguments."""
    return called(*fuzz_calls.draw_call(draw, world))


def called(title: str, call: Callable[[Path], Any]) -> Input:
    """A call in Python, which has to give a result or an error of ours."""

    def act(here: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = call(here)
            except EXPECTED as error:
                _say(f"{type(error).__name__}: {error}")
                if wrong := not_ours(error):
                    _say(f"WRONG: {wrong}")
                raise SystemExit(2) from error
            except Exception as error:
                traceback.print_exc()
                _say(f"WRONG: {type(error).__name__}")
                raise SystemExit(1) from error
        _say(f"returned {str(result)[:100]!r}")

    return Input(f"python {title.partition('(')[0]}", title, act)


def together(draw: random.Random, world: Path, names: list[str]) -> Input:
    """A line that works, with two of its files damaged, or one of them and an option."""
    name = draw.choice([name for name in names if len({*read_by(LINES[name])}) > 1])
    items = draw.sample(sorted({*read_by(LINES[name])}), 2)
    again = draw.getrandbits(64)
    further = ["--batch-size", draw.choice(("1", "3", "1000000"))] if draw.random() < 0.3 else []
    further = further if any("--batch-size" in parameter.opts for parameter in _options_of(name)) else []

    def act(here: Path) -> None:
        how = random.Random(again)
        for item in items:
            shutil.copytree(world / item, here / item, symlinks=True)
            files = sorted(path for path in (here / item).rglob("*") if path.is_file())
            file = how.choice(files)
            print(f"damage: {file.relative_to(here)}: {fuzz_damage.damage(file, how)}", file=sys.stderr)
        run_line([*filled(LINES[name], world, here, {*items}), *further], world)

    return Input(f"files of {name.split()[0]}", f"{name}: {' and '.join(items)} damaged {' '.join(further)}", act)


def threads(draw: random.Random, world: Path, _: list[str]) -> Input:
    """Four calls of one pipeline at the same time, all but one of them with a wrong argument."""
    again = draw.getrandbits(64)

    def act(_: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for title, error in fuzz_calls.call_together(world, random.Random(again)):
                _say(f"damage: {title}: {type(error).__name__} {error}")
                if not isinstance(error, EXPECTED):
                    traceback.print_exception(error)
                if wrong := not_ours(error):
                    _say(f"WRONG: {wrong}")

    return Input("python threads", f"threads #{again % 10_000}", act)


def http(draw: random.Random, world: Path, _: list[str]) -> Input:
    """Requests to a server."""
    again = draw.getrandbits(64)

    def act(_: Path) -> None:
        fuzz_http.attack(world, random.Random(again))

    return Input("http", f"requests #{again % 10_000}", act)


def _say(text: str) -> None:
    print(text.encode("utf-8", "replace").decode(), file=sys.stderr)


def not_ours(error: BaseException) -> str:
    """Why a TypeError is Python's own, or that of a library, and no answer to the caller; else nothing."""
    if not isinstance(error, TypeError):
        return "" if str(error) else "an error without words"
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    if "/nar/" in last.filename and line.startswith("raise"):
        return ""
    return f"TypeError of {Path(last.filename).name}:{last.lineno}"


def filled(line: str | list[str], world: Path, here: Path, own: set[str]) -> list[str]:
    """A line's words with folders in place of names: copies for those in `own`, else the examples."""
    words = line.split() if isinstance(line, str) else line

    def place(match: re.Match[str]) -> str:
        name = match[1]
        if name == "url":
            return "{url}"  # of a server that runs while the line does
        if name in WRITTEN - own:
            shutil.copytree(world / name, here / name, dirs_exist_ok=True)
        return str((here if name in {"out", *own, *WRITTEN} else world) / name)

    return [PLACES.sub(place, word) for word in words]


def run_line(
    words: list[str], world: Path, *, outputs: bool = True, here: Path | None = None, full: bool = False
) -> None:
    """Run the command in this process, and say of its outputs what is wrong with them.

    Where the disk is `full`, what was written before that may be left, if it is whole. Servers that it starts end once
    they answer; where it asks one ({url}), there is one.
    """
    from nar import cli
    from nar.serving import server

    here = here or Path.cwd()
    if words[0] == "serve":
        begun = server.Server.startup

        async def startup(own: Any, *given: Any, **more: Any) -> None:
            await begun(own, *given, **more)
            own.handle_exit(signal.SIGTERM, None)

        server.Server.startup = startup  # type: ignore[method-assign]
    asked = (
        fuzz_http.serving(world, ("model",), here.absolute() / "jobs")
        if "{url}" in words
        else contextlib.nullcontext("")
    )
    code: Any = 0
    with asked as url:
        sys.argv = ["nar", *(word.replace("{url}", url) if url else word for word in words)]
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
    files = [path for path in here.rglob("*") if path.is_file()]
    if staged := list(here.rglob(".nar-*")):
        _say(f"WRONG: left {staged[0].name}")
    if (here / "ran").exists():
        _say("WRONG: ran code of a file")
    made = [path for path in files if path.is_relative_to(here / "out")]
    log = {"metrics.jsonl", "tensorboard"}  # which a run that began and stopped keeps
    if (code == 0 or full) and outputs:
        for path in made:
            if (why := _broken(path)) and not (full and why == "empty"):
                _say(f"WRONG: {path.relative_to(here)} is {why}")
    elif code and outputs and (left := [path for path in made if not {"cache", *log} & {*path.parts}]):
        _say(f"WRONG: left {', '.join(str(path.relative_to(here)) for path in left[:4])}")
    raise SystemExit(code)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _broken(path: Path) -> str:
    """What is wrong with a file that a verb has written."""
    import numpy as np
    from PIL import Image

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_number)
        elif path.suffix == ".npz":
            with np.load(path) as file:
                [file[name] for name in file.files]
        elif path.suffix in (".png", ".gif"):
            with Image.open(path) as picture:
                picture.load()
        elif not path.stat().st_size:
            return "empty"
    except Exception as error:
        return f"damaged ({type(error).__name__}: {error})"
    return ""
