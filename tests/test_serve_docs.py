"""Every example of docs/howto/serving.md runs as it stands, but for the port; the load tool counts what it should."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nar.bench import load
from nar.cli import app
from nar.serving.jobs import Store
from nar.serving.models import Served
from serving_tools import serving
from test_readme import blocks

DOCUMENT = Path(__file__).parents[1] / "docs/howto/serving.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(clips_folder: Path, toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = [Served.load("fashion"), Served.load(f"clips={clips_folder}"), Served.load(f"toy={toy_folder}")]
    with serving(models, store=Store(tmp_path_factory.mktemp("jobs"))) as (address, _):
        yield address


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(url: str) -> None:
    lines = "".join(blocks("sh", DOCUMENT)).splitlines()
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.replace(ADDRESS, url))
        done = subprocess.run([*words, "--fail-with-body", "-s"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}: {done.stdout}"
        assert json.loads(done.stdout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks("python", DOCUMENT)).replace(ADDRESS, url)
    exec(compile(source, str(DOCUMENT), "exec"), {})
    assert (tmp_path / "sneaker.png").is_file()
    assert (tmp_path / "cat.mp4").is_file()


def test_load_of_a_server_that_answers(url: str, toy_folder: Path, tmp_path: Path) -> None:
    files = f"--json {tmp_path / 'load.json'} --plot {tmp_path / 'load.png'} --verify {toy_folder}"
    command = (
        f"bench serve {url}/v1 --model toy --seconds 1 --loads 0.5 --rates 5 --num-seeds 2 --concurrency 2 {files}"
    )
    done = CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "load.json").read_text())
    assert [(row["rate"] is None, row["concurrency"]) for row in rows] == [
        (True, 1),
        (True, 2),
        (False, None),
        (False, None),
    ]
    for row in rows:
        assert row["sent"] == row["ok"] > 0
        assert row["wrong"] == row["lost"] == row["failed"] == 0
        assert row["first_partial_seconds"][0] <= row["whole_seconds"][0] <= row["whole_seconds"][-1]
    assert (tmp_path / "load.png").stat().st_size > 1000


class _Bad(BaseHTTPRequestHandler):
    """Answers requests in turns: refused, an error, a stream that is cut, nothing, or else these words."""

    protocol_version = "HTTP/1.1"
    kinds = iter(())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        kind = next(self.kinds)
        if kind in ("429", "500"):
            self.send_response(int(kind))
            self.end_headers()
        elif kind == "cut":
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"c\r\ndata: {}\n\n ")
        elif kind != "nothing":
            self.send_response(200)
            self.send_header("content-length", str(len(kind)))
            self.end_headers()
            self.wfile.write(kind.encode())
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def test_what_is_lost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    late = 'data: {"type": "error", "error": {"code": "internal_error"}}'
    kinds = ["429", "500", "cut", "nothing", late, 'data: {"type": "error", "error": "boom"}', "data: 1"]
    whole = ['{"data": []}', '{"data": [{"url": "x"}]}', '{"data": [{"b64_json": null}]}', "[]", "3"]
    monkeypatch.setattr(_Bad, "kinds", iter([*kinds, *whole]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bad)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    setup = load.Setup(f"http://127.0.0.1:{server.server_port}", ("pear",), timeout_seconds=5)
    import asyncio

    calls = [asyncio.run(load.ask(setup, number, 0.0)) for number in range(len(kinds))]
    answers = dataclasses.replace(setup, partial_images=0)
    calls += [asyncio.run(load.ask(answers, number, 0.0)) for number in range(len(whole))]
    server.shutdown()
    outcomes = ["refused", "failed", "lost", "lost", "failed", "failed", "failed"]
    assert [call.outcome for call in calls] == [*outcomes, *["failed"] * len(whole)]
    row = load.row(setup, calls, 1.0)
    assert (row.sent, row.ok, row.refused, row.failed, row.lost) == (12, 0, 1, 9, 2)


def test_wrong_pictures_are_counted() -> None:
    setup = load.Setup("http://x", ("pear",), num_seeds=1)
    calls = [load.Call(0, due=0.0, ended=1.0, outcome="ok", pixels=pixels) for pixels in ("a", "b")]
    assert load.row(setup, calls, 1.0, known={("pear", 0): "a"}).wrong == 1


def test_goodput_keeps_limits() -> None:
    setup = load.Setup("http://x", ("pear",), limit_seconds=2.0, first_partial_limit_seconds=0.5)
    calls = [
        load.Call(0, due=0.0, first_partial=0.4, ended=1.0, outcome="ok"),
        load.Call(1, due=0.0, first_partial=0.6, ended=1.0, outcome="ok"),
        load.Call(2, due=0.0, first_partial=0.4, ended=3.0, outcome="ok"),
    ]
    assert load.row(setup, calls, 3.0).goodput == pytest.approx(1 / 3)


def test_nobody_there() -> None:
    with pytest.raises(OSError, match="does not answer"):
        CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9"], catch_exceptions=False)


@pytest.mark.parametrize("text", ["x", "0", "-1"])
def test_loads_that_are_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="--loads must be numbers"):
        CliRunner().invoke(
            app, ["bench", "serve", "http://127.0.0.1:9", "--prompt", "x", "--loads", text], catch_exceptions=False
        )
