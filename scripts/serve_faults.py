"""Requests to `nar serve` under faults of the network, of clients and of its own process: what is lost, wrong, leaks.

A proxy between client and server delays, slices, cuts, resets, stalls and throttles; clients send nonsense or half a
head, read a byte at a time and leave; the server is stopped for a while, and killed and started again. Every good
request is repeated until it is answered, as OpenAI's client would: one that has neither an answer nor an error is lost,
and a picture that differs from the model's own is wrong.

    python scripts/serve_faults.py fashion --requests 10000 --json faults.json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from nar.bench import load

FAULTS = ("none", "none", "none", "none", "latency", "slicer", "bandwidth", "limit_data", "reset_peer", "timeout")
GOOD = ("whole", "stream", "stream")
BAD = ("nonsense", "half_head", "slow_reader", "leaves")
BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b'{"prompt": 5}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "n": 1e999}',
    b'{"prompt": "x", "seed": -1}',
    b'{"prompt": "x", "nn": 2}',
    b"[" * 5000,
    b'{"prompt": "' + b"x" * 40_000 + b'"}',
)
HANGS_SECONDS = 90.0
MOST_TRIES = 200


class Proxy:
    """A TCP proxy with a fault, chosen anew for every connection."""

    def __init__(self, port: int, generator: random.Random) -> None:
        self.port, self._random = port, generator  # of the server, which changes when it is started again
        self.counts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self._random.choice(FAULTS)
        self.counts[fault] += 1
        with suppress(OSError):
            if fault == "timeout":  # takes everything, answers nothing, then goes
                await asyncio.sleep(1.0)
            else:
                upstream = await asyncio.open_connection("127.0.0.1", self.port)
                ways = self._pump(reader, upstream[1], "none"), self._pump(upstream[0], writer, fault)
                tasks = {asyncio.create_task(way) for way in ways}
                self._tasks |= tasks  # asyncio itself holds none
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                self._tasks -= tasks
                upstream[1].close()
        if fault == "reset_peer":
            writer.transport.abort()
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str) -> None:
        left = self._random.randint(1, 3000) if fault in ("limit_data", "reset_peer") else None
        try:
            while content := await reader.read(2**16):
                if fault == "latency":
                    await asyncio.sleep(self._random.uniform(0, 0.1))
                if left is not None:
                    content, left = content[:left], left - len(content)
                step = {"slicer": 7, "bandwidth": 1000}.get(fault, len(content))
                for start in range(0, len(content), step):
                    writer.write(content[start : start + step])
                    await writer.drain()
                    await asyncio.sleep({"slicer": 0, "bandwidth": 0.01}.get(fault, 0))
                if left is not None and left <= 0:
                    break
        finally:
            with suppress(OSError):
                writer.write_eof() if left is None else writer.close()


class Process:
    """`nar serve` as a process that can be killed and started again, on a port of its own each time."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._arguments, self._log = arguments, folder / "server.log"
        self.number, self.port = 0, 0
        self._process: subprocess.Popen[str] | None = None

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        command = [sys.executable, "-c", "from nar.cli import main; main()", "serve", *self._arguments, "--port", "0"]
        begun = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        self.number = self._process.pid
        while self._process.poll() is None:
            if found := re.search(r"^http://\S+:(\d+)$", self._log.read_text()[begun:], re.MULTILINE):
                self.port = int(found[1])
                return
            sleep(0.1)
        raise RuntimeError(f"the server did not start: {self._log.read_text()}")

    def send(self, sign: int) -> None:
        os.kill(self.number, sign)

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self._process is not None
        await asyncio.to_thread(self._process.wait)

    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.number}/status").read_text(encoding="utf-8")
        return 1024 * int(text.partition("VmRSS:")[2].split()[0])

    def tracebacks(self) -> int:
        return self._log.read_text().count("Traceback")


@dataclasses.dataclass
class Run:
    """What is counted of all requests."""

    setup: load.Setup
    known: dict[tuple[str, int], str]
    address: Callable[[], str]
    answered: int = 0
    lost: int = 0
    wrong: int = 0
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: Counter[str] = dataclasses.field(default_factory=Counter)
    refusals_of_nonsense: Counter[int] = dataclasses.field(default_factory=Counter)

    async def good(self, number: int, kind: str) -> None:
        """Ask until it is answered."""
        partial = 0 if kind == "whole" else 3
        for _ in range(MOST_TRIES):
            setup = dataclasses.replace(
                self.setup, url=self.address(), partial_images=partial, timeout_seconds=HANGS_SECONDS
            )
            call = await load.ask(setup, number, monotonic())
            if call.outcome == "ok":
                body = setup.body(number)
                self.answered += 1
                self.wrong += self.known[body["prompt"], body["seed"]] != call.pixels
                return
            if "TimeoutError" in call.said:
                break
            self.errors[str(call.status) if call.status != 200 else "cut"] += 1
            await asyncio.sleep(0.2)
        self.lost += 1

    async def nonsense(self, number: int) -> None:
        """A body that is nothing: never an error of the server's."""
        body = BODIES[number % len(BODIES)]
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        answer = await self._raw(head.encode() + body)
        if found := re.match(rb"HTTP/1.1 (\d+)", answer):
            self.refusals_of_nonsense[int(found[1])] += 1

    async def half_head(self, _: int) -> None:
        """Half a head, and then nothing for a while."""
        await self._raw(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Le", wait=0.5)

    async def leaves(self, number: int) -> None:
        """A stream that is left after its first bytes."""
        await self._raw(self._request(number, partial=6), most=300)

    async def slow_reader(self, number: int) -> None:
        """A stream that is read a byte at a time for a while."""
        await self._raw(self._request(number, partial=6), step=1, wait=2.0)

    def _request(self, number: int, partial: int) -> bytes:
        setup = dataclasses.replace(self.setup, partial_images=partial)
        body = json.dumps(setup.body(number)).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def _raw(self, request: bytes, *, most: int = 2**20, step: int = 2**16, wait: float = 10.0) -> bytes:
        answer, port = b"", int(self.address().rpartition(":")[2])
        with suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(request)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    while len(answer) < most and (read := await reader.read(step)):
                        answer += read
            writer.transport.abort()
        return answer


async def videos(run: Run, count: int) -> dict[str, int]:
    """Clips that are asked for while everything goes wrong; each must be completed in the end."""
    from urllib.request import Request, urlopen

    def call(path: str, body: bytes | None = None) -> Any:
        request = Request(run.address() + path, data=body, headers={"content-type": "application/json"})
        with urlopen(request, timeout=10) as answer:
            return json.load(answer)

    async def tried(path: str, body: bytes | None = None) -> Any:
        for _ in range(MOST_TRIES):
            try:
                return await asyncio.to_thread(call, path, body)
            except (OSError, ValueError, HTTPException):
                await asyncio.sleep(0.3)
        raise RuntimeError(f"{path} is never answered")

    numbers = [(await tried("/v1/videos", json.dumps({"seed": seed}).encode()))["id"] for seed in range(count)]
    statuses: Counter[str] = Counter()
    for number in numbers:
        end = monotonic() + 600
        while (job := await tried(f"/v1/videos/{number}"))["status"] in ("queued", "in_progress"):
            if monotonic() > end:
                break
            await asyncio.sleep(0.5)
        statuses[job["status"]] += 1
    return dict(statuses)


async def faults(
    models: list[str], requests: int, *, kills: int, stops: int, clips: int, callers: int, seed: int, folder: Path
) -> dict[str, Any]:
    """All of it, and what came of it."""
    generator = random.Random(seed)
    process = Process([*models, "--videos", str(folder / "videos"), "--max-waiting", "64"], folder)
    await process.start()
    try:
        return await _faults(process, models, requests, kills, stops, clips, callers, generator)
    finally:
        process.send(signal.SIGKILL)


async def _faults(
    process: Process,
    models: list[str],
    requests: int,
    kills: int,
    stops: int,
    clips: int,
    callers: int,
    generator: random.Random,
) -> dict[str, Any]:
    proxy = Proxy(process.port, generator)
    port = await proxy.start()
    name = models[0].partition("=")[0]
    direct = f"http://127.0.0.1:{process.port}"
    prompts = load.prompts_of(direct, name, "none")[:3]
    setup = load.Setup(direct, tuple(prompts), name, num_seeds=8)
    known = load.offline(setup, models[0].rpartition("=")[2])
    run = Run(setup, known, lambda: f"http://127.0.0.1:{port}")
    begun, memory = monotonic(), list[int]()
    jobs = asyncio.create_task(videos(run, clips)) if clips else None
    numbers = iter(range(requests))
    done = 0

    async def caller() -> None:
        nonlocal done
        for number in numbers:
            if generator.random() < 0.75:
                await run.good(number, generator.choice(GOOD))
            else:
                kind = generator.choice(BAD)
                run.bad[kind] += 1
                act: Callable[[int], Awaitable[None]] = getattr(run, kind)
                await act(number)
            done += 1
            if done % max(1, requests // 20) == 0:
                sys.stderr.write(
                    f"{done} of {requests}, {round(monotonic() - begun)} s: {run.lost} lost, {run.wrong} wrong\n"
                )

    async def trouble() -> None:
        """Stops and kills in the first half; then memory is watched in a process that lives to the end."""
        events = sorted(
            generator.sample(range(requests // 20, max(requests // 20 + kills + stops, requests // 2)), kills + stops)
        )
        kinds = ["kill"] * kills + ["stop"] * stops
        generator.shuffle(kinds)
        for place, kind in zip(events, kinds, strict=True):
            while done < place:
                await asyncio.sleep(0.05)
            if kind == "stop":
                process.send(signal.SIGSTOP)
                await asyncio.sleep(5)
                process.send(signal.SIGCONT)
            else:
                await process.kill()
                await process.start()
                proxy.port = process.port
        while done < requests * 0.6:
            await asyncio.sleep(0.05)
        while done < requests:
            memory.append(process.resident_bytes())
            await asyncio.sleep(0.5)

    await asyncio.gather(*(caller() for _ in range(callers)), trouble())
    made = await jobs if jobs is not None else {}
    memory.append(process.resident_bytes())
    await asyncio.sleep(1.0)
    return {
        "requests": requests,
        "seconds": round(monotonic() - begun),
        "answered": run.answered,
        "lost": run.lost,
        "wrong": run.wrong,
        "errors_that_clients_saw": dict(run.errors),
        "bad_clients": dict(run.bad),
        "answers_to_nonsense": dict(run.refusals_of_nonsense),
        "network_faults": dict(proxy.counts),
        "kills": kills,
        "stops": stops,
        "clips": made,
        "resident_bytes": [memory[0], max(memory), memory[-1]],
        "tracebacks": process.tracebacks(),
    }


def main() -> None:
    """Parse options, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the first one makes pictures; with --clips one more makes clips")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--stops", type=int, default=1)
    parser.add_argument("--clips", type=int, default=0)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    path = given.pop("json")
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(faults(**given, folder=Path(folder)))
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
