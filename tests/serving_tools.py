"""A server in a thread of the tests' process, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from nar.serving.app import App
from nar.serving.models import Served
from nar.serving.server import Server, bound

http = httpx2.Client(timeout=120)


@contextmanager
def serving(models: Sequence[Served], *, header_seconds: float = 30.0, **options: Any) -> Iterator[tuple[str, App]]:
    """Serve models until the block ends; gives the address and the app."""
    app = App(models, **options)
    server = Server(app, log_level="warning", header_seconds=header_seconds)
    socket = bound("127.0.0.1", 0)
    thread = threading.Thread(target=server.run_on, args=(socket,), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", app
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        for served in models:
            served.close()


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
