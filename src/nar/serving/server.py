"""The process around the app: its socket, signals and connections.

Knows uvicorn; does not know routes or models.
"""

from __future__ import annotations

import asyncio
import copy
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn

from nar.serving.app import App

HEADER_SECONDS = 30.0  # that a connection may take for the head of a request; uvicorn itself waits for ever
_SWEEP_TICKS = 10  # of 0.1 s


def bound(host: str, port: int) -> socket.socket:
    """A socket on this address, which does not listen yet.

    Raises:
        OSError: the address is taken, not this machine's, or no address; it is named.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # by which asyncio knows it: no Nagle
    try:
        # On Windows SO_REUSEADDR would let a second server take the port of one that runs.
        alone = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        made.setsockopt(socket.SOL_SOCKET, alone, 1)
        made.bind((host, port))
    except (OSError, TypeError, ValueError) as error:  # what is no name at all is a TypeError, or one of Unicode
        made.close()
        why, other = getattr(error, "strerror", None) or error, "--port" if isinstance(error, OSError) else "--host"
        raise OSError(f"can't listen on {host}:{port} ({why}); try another {other}") from error
    return made


class Server(uvicorn.Server):
    """Runs an app until a signal; then no new work is taken, and what runs has `drain_seconds` to end.

    After that, or with a second signal, every request gets its refusal and jobs go back to the queue; a third signal
    does not wait for that. `on_start` is called when it answers.
    """

    def __init__(
        self,
        app: App,
        *,
        drain_seconds: float = 30.0,
        header_seconds: float = HEADER_SECONDS,
        on_start: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        logs = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
        logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # a pipe that only the address is read from fills up
        options = {"log_config": logs, "timeout_graceful_shutdown": 2, "server_header": False, **options}
        config = uvicorn.Config(app.asgi, ws="none", **options)
        super().__init__(config)
        self._app, self._drain_seconds, self._header_seconds = app, drain_seconds, header_seconds
        self._on_start, self._ending, self._is_stopped = on_start, False, False
        self._end = 0.0
        self._idle_since: dict[Any, float] = {}

    def run_on(self, bound_socket: socket.socket) -> None:
        """Serve until a signal comes."""
        self.run([bound_socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 uvicorn's signature
        """Begin to end; a handler of signals."""
        if self._is_stopped:
            self.should_exit = self.force_exit = True
        self._end = monotonic() + (0.0 if self._ending else self._drain_seconds)
        self._ending = self._app.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether all that ran has ended, and which connections never say anything."""
        if self._ending and self._app.is_busy and monotonic() > self._end and not self._is_stopped:
            self._is_stopped = True
            await asyncio.to_thread(self._app.stop)
        if self._ending and (not self._app.is_busy or monotonic() > self._end):
            self.should_exit = True
        if counter % _SWEEP_TICKS == 0:
            self._sweep()
        return await super().on_tick(counter)

    def _sweep(self) -> None:
        """Close connections that have begun no request for too long."""
        now, since = monotonic(), self._idle_since
        idle = [one for one in self.server_state.connections if getattr(one, "cycle", None) is None]
        self._idle_since = {one: since.get(one, now) for one in idle}
        for one, start in self._idle_since.items():
            if now - start > self._header_seconds and (transport := getattr(one, "transport", None)) is not None:
                transport.abort()
