"""Load on a server of OpenAI's images: open-loop arrivals, latencies from the time that was meant, what is lost.

Knows HTTP from a client's side, any server's; does not know what runs behind it. Latencies of a closed loop hide
overload, as its callers wait with the server: here only the capacity is measured so.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

from nar.media import pictures

PERCENTS = (50, 90, 99, 100)


@dataclass(frozen=True)
class Setup:
    """What is asked of a server.

    Attributes:
        prompts: take turns, as do `num_seeds` seeds from `seed` on; a picture is known by both.
        partial_images: pictures on the way that are asked for; 0 asks for whole answers.
        first_partial_limit_seconds, limit_seconds: what an answer must keep to count in goodput; infinite by default.
        timeout_seconds: after which a request without an end counts as lost.
    """

    url: str
    prompts: tuple[str, ...]
    model: str | None = None
    partial_images: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)
    key: str = "none"
    seed: int = 0
    num_seeds: int = 16
    first_partial_limit_seconds: float = float("inf")
    limit_seconds: float = float("inf")
    timeout_seconds: float = 120.0

    def body(self, number: int) -> dict[str, Any]:
        """The request of this number."""
        body: dict[str, Any] = {"prompt": self.prompts[number % len(self.prompts)], **self.fields}
        body |= {"seed": self.seed + number % self.num_seeds}
        body |= {"model": self.model} if self.model else {}
        return body | ({"stream": True, "partial_images": self.partial_images} if self.partial_images else {})


@dataclass
class Call:
    """One request: when it was due and what came of it, in seconds on one clock.

    `outcome` is "ok", "refused" (429, 503), "failed" (another error, which the client sees) or "lost": no end at all.
    """

    number: int
    due: float
    sent: float = 0.0
    first_partial: float | None = None
    ended: float = 0.0
    outcome: str = "lost"
    status: int = 0
    pixels: str = ""  # digest of the picture's pixels
    said: str = ""


@dataclass(frozen=True)
class Row:
    """What a load did. Latencies are seconds at 50, 90, 99 and 100 % of the answers; None where there were none.

    Attributes:
        rate: requests a second that were due; None of a closed loop.
        goodput: answers a second within the limits.
        wrong: pictures that are not those of the model itself; None where that was not looked at.
        client_share: of one core, that this program took.
    """

    rate: float | None
    concurrency: int | None
    seconds: float
    sent: int
    ok: int
    refused: int
    failed: int
    lost: int
    wrong: int | None
    throughput: float
    goodput: float
    first_partial_seconds: tuple[float, ...] | None
    whole_seconds: tuple[float, ...] | None
    refusal_seconds: tuple[float, ...] | None
    client_share: float


def closed(setup: Setup, concurrency: int, seconds: float) -> list[Call]:
    """So many callers that each ask again as soon as they are answered."""

    async def run() -> list[Call]:
        calls, numbers, end = list[Call](), iter(range(10**9)), perf_counter() + seconds

        async def caller() -> None:
            while perf_counter() < end:
                calls.append(await ask(setup, next(numbers), perf_counter()))
                if calls[-1].outcome != "ok":
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(caller() for _ in range(concurrency)))
        return calls

    with asyncio.Runner() as runner:  # which refuses before there is anything to run
        return runner.run(run())


def opened(setup: Setup, rate: float, seconds: float, *, seed: int = 0) -> list[Call]:
    """Requests that arrive as a Poisson process, whether those before are answered or not."""

    async def run() -> list[Call]:
        generator, start, due = random.Random(seed), perf_counter() + 0.1, 0.0
        tasks = list[asyncio.Task[Call]]()
        while (due := due + generator.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, start + due - perf_counter()))
            tasks.append(asyncio.create_task(ask(setup, len(tasks), start + due)))
        return list(await asyncio.gather(*tasks))

    with asyncio.Runner() as runner:  # which refuses before there is anything to run
        return runner.run(run())


async def ask(setup: Setup, number: int, due: float) -> Call:
    """Send one request and read its answer to the end; never raises for what a server does."""
    call = Call(number, due, sent=perf_counter())
    try:
        async with asyncio.timeout(setup.timeout_seconds):
            await _ask(setup, call)
    except (OSError, EOFError, ValueError, TimeoutError) as error:
        call.said = repr(error)
    except (LookupError, AttributeError, TypeError) as error:  # an answer without a picture where one belongs
        call.outcome, call.said = "failed", repr(error)
    call.ended = perf_counter()
    return call


async def _ask(setup: Setup, call: Call) -> None:
    status, lines = await _post(setup, "/v1/images/generations", setup.body(call.number))
    call.status = status
    if status != 200:
        call.said = b"".join([line async for line in lines]).decode("utf-8", "replace")[:500]
        call.outcome = "refused" if status in (429, 503) else "failed"
        return
    if not setup.partial_images:
        answer = json.loads(b"".join([line async for line in lines]))
        call.pixels, call.outcome = _digest(answer["data"][0]["b64_json"]), "ok"
        return
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        event = json.loads(line[5:])
        kind = str(event.get("type", ""))
        if kind.endswith(".partial_image") and call.first_partial is None:
            call.first_partial = perf_counter()
        elif kind.endswith(".completed"):
            call.pixels, call.outcome = _digest(event["b64_json"]), "ok"
        elif kind == "error":
            code = event.get("error", {}).get("code")
            call.outcome = "refused" if code in ("deadline_exceeded", "server_is_overloaded") else "failed"
            call.said = str(event)[:500]


async def _post(setup: Setup, path: str, body: Any) -> tuple[int, AsyncIterator[bytes]]:
    """The status and the lines of an answer. A connection each: whoever is measured, it is not our pool."""
    parts = urlsplit(setup.url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=2**26)
    content = json.dumps(body).encode()
    head = (
        f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {setup.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers = {}
        while (line := (await reader.readuntil(b"\r\n")).strip()) != b"":
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip().lower()
    except BaseException:
        writer.close()
        raise
    return status, _lines(reader, writer, headers)


async def _lines(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[bytes, bytes]
) -> AsyncIterator[bytes]:
    """The lines of a body, whether it comes in chunks, with a length, or ends with the connection.

    Raises:
        EOFError: it ends before it is whole.
    """
    rest = b""
    try:
        if headers.get(b"transfer-encoding") == b"chunked":
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                rest += await reader.readexactly(size)
                await reader.readexactly(2)
                *whole, rest = rest.split(b"\n")
                for line in whole:
                    yield line
        elif b"content-length" in headers:
            rest = await reader.readexactly(int(headers[b"content-length"]))
        else:
            rest = await reader.read()
        for line in rest.split(b"\n"):
            yield line
    finally:
        writer.close()


def row(
    setup: Setup,
    calls: Sequence[Call],
    seconds: float,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    known: Mapping[tuple[str, int], str] | None = None,
    client_seconds: float = 0.0,
) -> Row:
    """Sum up calls; `known` are the digests that pictures of a prompt and a seed must have."""
    answered = [call for call in calls if call.outcome == "ok"]
    firsts = [call.first_partial - call.due for call in answered if call.first_partial is not None]
    good = [
        call
        for call in answered
        if call.ended - call.due <= setup.limit_seconds
        and (call.first_partial or call.ended) - call.due <= setup.first_partial_limit_seconds
    ]
    wrong = None
    if known is not None:
        bodies = [(call, setup.body(call.number)) for call in answered]
        wrong = sum(known[body["prompt"], body["seed"]] != call.pixels for call, body in bodies)
    start = min((call.due for call in calls), default=0.0)
    lasted = max(seconds, max((call.ended for call in answered), default=start) - start)
    outcomes = [call.outcome for call in calls]
    return Row(
        rate=rate,
        concurrency=concurrency,
        seconds=seconds,
        sent=len(calls),
        ok=len(answered),
        refused=outcomes.count("refused"),
        failed=outcomes.count("failed"),
        lost=outcomes.count("lost"),
        wrong=wrong,
        throughput=len(answered) / lasted,
        goodput=len(good) / lasted,
        first_partial_seconds=percentiles(firsts),
        whole_seconds=percentiles([call.ended - call.due for call in answered]),
        refusal_seconds=percentiles([call.ended - call.sent for call in calls if call.outcome == "refused"]),
        client_share=client_seconds / lasted,
    )


def measure(
    setup: Setup,
    *,
    concurrency: int,
    loads: Sequence[float],
    rates: Sequence[float],
    seconds: float,
    known: Mapping[tuple[str, int], str] | None = None,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """One caller alone, the capacity with `concurrency` callers, then open loops at `rates` (requests a second) and
    at `loads` (shares of the capacity), of so many seconds each."""
    rows: list[Row] = []

    def add(run: Callable[[], list[Call]], **how: Any) -> Row:
        begun = process_time()
        calls = run()
        rows.append(row(setup, calls, seconds, known=known, client_seconds=process_time() - begun, **how))
        if report is not None:
            report(rows[-1])
        return rows[-1]

    add(lambda: closed(setup, 1, seconds), concurrency=1)
    capacity = add(lambda: closed(setup, concurrency, seconds), concurrency=concurrency).throughput
    for rate in [*rates, *(load * capacity for load in loads)]:
        if rate > 0:
            add(lambda rate=rate: opened(setup, rate, seconds), rate=rate)  # type: ignore[misc]
    return rows


def prompts_of(url: str, model: str | None, key: str) -> list[str]:
    """The class names of a server's model, or of one without a few words that are nobody's.

    Raises:
        OSError: nobody answers.
    """
    request = Request(f"{url.rstrip('/').removesuffix('/v1')}/v1/models", headers={"authorization": f"Bearer {key}"})
    try:
        with urlopen(request, timeout=30) as answer:
            cards = json.load(answer)["data"]
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"{url} does not answer as a server of OpenAI's routes ({error})") from error
    card: dict[str, Any] = next((card for card in cards if model in (None, card["id"])), {})
    return [str(name) for name in card.get("class_names") or ("a red apple", "a cat face", "a blue house")]


def offline(setup: Setup, model: str) -> dict[tuple[str, int], str]:
    """The digests of the pictures that a model, loaded here, makes of every prompt and seed."""
    from nar.pipeline import Pipeline

    pipe, digests = Pipeline.from_pretrained(model), {}
    for number in range(len(setup.prompts) * setup.num_seeds):
        body = setup.body(number)
        fields = {name: value for name, value in body.items() if name not in ("prompt", "seed", "model", "stream")}
        fields.pop("partial_images", None)
        words = {"prompt": body["prompt"]} if pipe.model.config.text_dim else {"class_labels": body["prompt"]}
        if (body["prompt"], body["seed"]) not in digests:
            picture = pipe(**words, seed=body["seed"], **fields).images[0]
            digests[body["prompt"], body["seed"]] = hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()
    return digests


def percentiles(values: Sequence[float]) -> tuple[float, ...] | None:
    """Those of PERCENTS, or None of nothing."""
    return tuple(float(value) for value in np.percentile(values, PERCENTS)) if values else None


def table(rows: Sequence[Row]) -> str:
    """Rows as text, aligned; milliseconds."""

    def cells(row: Row) -> list[str]:
        kind = f"{row.rate:.2f}/s" if row.rate is not None else f"{row.concurrency} at once"
        counts = [row.sent, row.ok, row.refused, row.failed, row.lost, "" if row.wrong is None else row.wrong]
        times = [row.first_partial_seconds, row.whole_seconds, row.refusal_seconds]
        shown = ["/".join(f"{1000 * value:.0f}" for value in (one[0], one[2])) if one else "" for one in times]
        return [
            kind,
            *map(str, counts),
            f"{row.throughput:.2f}",
            f"{row.goodput:.2f}",
            *shown,
            f"{row.client_share:.0%}",
        ]

    head = "load sent ok refused failed lost wrong answers/s good/s first-p50/99 whole-p50/99 refusal-p50/99 client"
    lines = [head.split(), *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Latencies at 50 and 99 %, and goodput, over the rate of requests."""
    from matplotlib.figure import Figure

    loads = sorted((row for row in rows if row.rate is not None), key=lambda row: row.rate or 0.0)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = [row.rate for row in loads]
    for name, values in (
        ("first picture on the way", [row.first_partial_seconds for row in loads]),
        ("whole", [row.whole_seconds for row in loads]),
    ):
        for place, style in ((0, "-"), (2, "--")):
            seconds = [value[place] if value else float("nan") for value in values]
            left.plot(rates, seconds, style, marker="o", label=f"{name}, {PERCENTS[place]} %")
    left.set(xlabel="requests a second", ylabel="seconds", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.plot(rates, [row.goodput for row in loads], marker="o", label="answers within the limits")
    right.plot(rates, [row.refused / row.seconds for row in loads], marker="o", label="refused")
    right.set(xlabel="requests a second", ylabel="a second")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def _digest(encoded: str) -> str:
    """A digest of the pixels of a picture in base64."""
    with pictures.opened(io.BytesIO(base64.b64decode(encoded)), "an answer") as picture:
        return hashlib.sha256(np.asarray(picture.convert("RGB")).tobytes()).hexdigest()
