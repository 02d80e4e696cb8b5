"""OpenAI's routes for pictures and clips over the models of a server, and the page that uses them.

Knows HTTP: routes, keys, limits, answers, disconnects. Does not know tensors, or how a batcher shares its work.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nar.serving import videos
from nar.serving.jobs import Store
from nar.serving.metrics import Metrics, Watch
from nar.serving.protocol import Pictures, Refusal, event, now, read_fields, refusal_of, usage
from nar.serving.videos import Videos
from nar.storage.text import shortened

if TYPE_CHECKING:
    from nar.serving.edits import Edit
    from nar.serving.models import Picture, Running, Served

MOST_FILE = 50 * 2**20  # bytes of a picture that is sent, as OpenAI's
MOST_BODY = {"json": 2**20, "form": MOST_FILE + 8 * 2**20}
KEEPALIVE_SECONDS = 15.0
STATIC = Path(__file__).parent / "static"
CONTENT_POLICY = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'"
BODY_SECONDS = 60.0  # that a client may take to send its request
Value = TypeVar("Value")
_PLAIN = {413: f"the body is larger than is taken: {MOST_BODY['json']:,} bytes, with pictures {MOST_BODY['form']:,}"}
_log = logging.getLogger("nar.serving")


class App:
    """The state of a server: its models, its keys, and whether it takes more work. `asgi` is what runs.

    `max_waiting_per_key` is of clips; pictures have their batchers' limits.
    """

    def __init__(
        self,
        models: Sequence[Served],
        *,
        keys: Sequence[str] = (),
        store: Store | None = None,
        max_waiting_per_key: int | None = None,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
    ) -> None:
        self.models = {served.name: served for served in models}
        if len(self.models) < len(models):
            listed = ", ".join(served.name for served in models)
            raise ValueError(f"two models have one name, of {listed}: name one, as NAME=MODEL")
        self.first, self.keys, self.keepalive_seconds = models[0], tuple(keys), keepalive_seconds
        self.metrics = Metrics({name: served.batcher for name, served in self.models.items()})
        self.is_draining = False
        self.num_open = 0  # requests for pictures that are not answered yet
        self.videos = None if store is None else Videos(self, store, max_waiting_per_key)
        app = FastAPI(title="nar", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=self._life)
        self.asgi = app
        for kind in (Refusal, RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, _answer_error)
        page = _page()
        app.add_middleware(_Edge, self, {"/health", "/metrics", *page})
        _add_routes(app, self)
        if self.videos is not None:
            videos.add_routes(app, self, self.videos, read_form, MOST_BODY["form"])
        for place, path in page.items():
            _add_file(app, place, path)

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        """Work through jobs as long as the server runs."""
        clips = [served for served in self.models.values() if served.makes_clips]
        made = self.videos
        tasks = [asyncio.create_task(made.work(served)) for served in clips] if made is not None else []
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def model(self, name: str | None) -> Served:
        """A model by its name, by default the first.

        Raises:
            Refusal: there is none of this name.
        """
        if name is None:
            return self.first
        if name not in self.models:
            listed = ", ".join(self.models)
            said = f"no model {shortened(name)!r}; models here: {listed}"
            raise Refusal(404, said, param="model", code="model_not_found")
        return self.models[name]

    def key_of(self, request: Request) -> str:
        """Whose share of the queue a request counts in: its key's, or without keys its address'."""
        return str(request.scope.get("nar.key") or (request.client.host if request.client else ""))

    def owner_of(self, request: Request) -> str:
        """Whose jobs a request may see: its key's; without keys all jobs are everybody's."""
        return str(request.scope.get("nar.key", ""))

    @property
    def is_busy(self) -> bool:
        """Whether anything is not answered yet, or a clip is being made."""
        return self.num_open > 0 or (self.videos is not None and self.videos.num_working > 0)

    def check_open(self) -> None:
        """Refuse new work while the server ends."""
        if self.is_draining:
            raise Refusal(503, "the server is ending; ask another, or again", retry_after_seconds=5.0)

    def stop(self) -> None:
        """Refuse all that runs or waits."""
        for served in self.models.values():
            served.batcher.close(drain=False)

    async def pictures(self, request: Request, asked: Pictures, kind: str, edit: Edit | None = None) -> Response:
        """Answer a request for pictures, whole or as events; `kind` is what these are called."""
        served, watch = self.model(asked.model), self.metrics.began(kind)
        try:
            if served.makes_clips:
                raise Refusal(400, f"{served.name} makes clips: POST /v1/videos", param="model")
            running = served.begin(asked, self.key_of(request), edit)
        except Refusal as error:
            watch.end("refused" if error.status in (429, 503) else "error")
            raise
        answer = _Answer(self, served, asked, running, watch, kind, edit is not None)
        if asked.stream:
            return _Events(answer)
        return await answer.whole(request)


class _Answer:
    """One request for pictures on its way back."""

    def __init__(
        self,
        app: App,
        served: Served,
        asked: Pictures,
        running: Running,
        watch: Watch,
        kind: str,
        is_edit: bool,
    ) -> None:
        self.app, self.served, self.asked, self.running, self.watch = app, served, asked, running, watch
        self.kind, self._is_edit = kind, is_edit

    def shared(self) -> dict[str, Any]:
        """Fields that every answer and event has."""
        asked = self.asked
        shared = {"size": self.served.size, "quality": "auto", "background": "opaque"}
        return shared | {"output_format": asked.output_format}

    def _usage(self, count: int) -> dict[str, Any]:
        tokens = self.served.num_tokens
        return usage(self.served.text_tokens() * count, tokens * self._is_edit, tokens * count)

    async def whole(self, request: Request) -> Response:
        """All pictures in one body; when the client leaves, its work ends."""
        try:
            results = await _unless_gone(request, self._results())
        except Refusal as error:
            self.watch.end(outcome_of(error))
            raise
        except Exception:
            self.watch.end("error")
            raise
        except BaseException:
            self.watch.end("cancelled")
            raise
        finally:
            self.running.cancel()
        if results is None:
            self.watch.end("cancelled")
            return Response(status_code=499)  # nobody reads it
        seed = self.running.seed
        data = [
            {"b64_json": _text(result), "revised_prompt": None, "url": None, "seed": seed, "image_index": result.index}
            for result in sorted(results, key=lambda result: result.index)
        ]
        body = {"created": now(), "data": data, **self.shared(), "usage": self._usage(len(data)), "seed": seed}
        if self.asked.safety_identifier:
            body["safety_identifier"] = self.asked.safety_identifier
        self.watch.queued(self.served.name, self.running.queue_seconds)
        self.watch.end("ok")
        return JSONResponse(body)

    async def _results(self) -> list[Picture]:
        results: list[Picture] = []
        while self.running.left:
            picture = await self.running.picture()
            if picture is not None and picture.front is None:
                results.append(picture)
        return results

    async def events(self) -> AsyncIterator[str]:
        """Pictures on the way and results, as they come; comments in between keep the connection."""
        places: dict[int, int] = {}
        try:
            yield ": accepted\n\n"
            while self.running.left:
                picture = await self.running.picture(self.app.keepalive_seconds)
                if picture is None:
                    yield ": keepalive\n\n"
                    continue
                fields: dict[str, Any] = {"b64_json": _text(picture), "created_at": now(), **self.shared()}
                fields |= {"image_index": picture.index, "num_fronts": self.served.num_fronts}
                if picture.front is not None:
                    self.watch.partial(self.served.name)
                    places[picture.index] = place = places.get(picture.index, -1) + 1
                    yield event(f"{self.kind}.partial_image", partial_image_index=place, front=picture.front, **fields)
                    continue
                fields |= {"seed": self.running.seed, "usage": self._usage(1)}
                if self.asked.safety_identifier:
                    fields["safety_identifier"] = self.asked.safety_identifier
                if not self.running.left:
                    self.watch.queued(self.served.name, self.running.queue_seconds)
                    self.watch.end("ok")  # the last one may end the reader
                yield event(f"{self.kind}.completed", **fields)
        except Refusal as error:
            self.watch.end(outcome_of(error))
            yield event("error", error=error.error)
        except Exception:
            _log.exception("a request failed")
            self.watch.end("error")
            yield event("error", error=Refusal(500, "the server failed on this request").error)


class _Events(StreamingResponse):
    """Server-sent events; whatever ends them frees what the request holds."""

    def __init__(self, answer: _Answer) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(answer.events(), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.running.cancel()
            self._answer.watch.end("cancelled")


class _Edge:
    """What every request passes: an id for its answer, its key for all but `open_paths`, and headers of safety."""

    def __init__(self, app: ASGIApp, server: App, open_paths: Collection[str]) -> None:
        self._app, self._server, self._open_paths = app, server, open_paths
        self._keys = [key.encode() for key in server.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["nar.request_id"] = identity = f"req_{secrets.token_hex(12)}"

        is_replaced = False  # by an answer in OpenAI's form, where a library's is plain text

        async def named(message: Message) -> None:
            nonlocal is_replaced
            if is_replaced:
                return
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"application/json")
                if message["status"] >= 400 and not kind.startswith(b"application/json"):
                    answer = _body(Refusal(message["status"], _PLAIN.get(message["status"], "this is not taken")), {})
                    await answer(scope, receive, named)
                    is_replaced = True
                    return
                extra = {
                    "x-request-id": identity,
                    "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer",
                }
                lines = [(name.encode(), value.encode()) for name, value in extra.items()]
                message["headers"] = [*message.get("headers", ()), *lines]
            await send(message)

        # `path` begins with the prefix that the app is mounted under, by a proxy, Starlette or Ray.
        if self._keys and scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) not in self._open_paths:
            scope["nar.key"] = found = self._key(scope)
            if not found:
                said = "a key is needed, as Authorization: Bearer KEY; the one that came is none of this server's"
                await _body(Refusal(401, said), {"www-authenticate": "Bearer"})(scope, receive, named)
                return
        self._server.num_open += 1
        try:
            await self._app(scope, _in_time(receive), named)
        finally:
            self._server.num_open -= 1

    def _key(self, scope: Scope) -> str:
        """Which of the keys came, by its hash; nothing where none did. All are compared, so time says nothing."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, value = given.partition(b" ")
        found = [hmac.compare_digest(value.strip(), key) for key in self._keys]
        name = hashlib.sha256(value.strip()).hexdigest()[:16]
        return name if kind.lower() == b"bearer" and any(found) else ""


def _in_time(receive: Receive) -> Receive:
    """The same, but a body that takes too long is an error; afterwards it waits for the client to leave."""
    end, is_whole = monotonic() + BODY_SECONDS, False

    async def received() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), end - monotonic())
        except TimeoutError:
            raise Refusal(408, f"the body took longer than {BODY_SECONDS:.0f} s") from None
        is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return received


def _add_routes(app: FastAPI, server: App) -> None:
    @app.get("/health")
    async def health() -> Response:
        dead = [name for name, served in server.models.items() if not served.batcher.is_alive()]
        if server.is_draining or dead:
            status = "ending" if server.is_draining else f"not running: {', '.join(dead)}"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [served.card() for served in server.models.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(server.model(name).card())

    @app.post("/v1/images/generations", max_body_size=MOST_BODY["json"])
    async def generations(request: Request, asked: Pictures) -> Response:
        server.check_open()
        return await server.pictures(request, asked, "image_generation")

    @app.post("/v1/images/edits", max_body_size=MOST_BODY["form"])
    async def edits(request: Request) -> Response:
        server.check_open()
        fields, files = await read_form(request, {"image": True, "mask": False})
        asked = read_fields(Pictures, fields)
        served = server.model(asked.model)
        if not served.edits:
            raise Refusal(400, f"{served.name} does not edit pictures", param="model")
        edit = await served.edit(asked, files["image"], files.get("mask"))
        return await server.pictures(request, asked, "image_edit", edit)


def _page() -> dict[str, Path]:
    """The files of the page by their paths in addresses."""
    files = [path for path in sorted(STATIC.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {"/" if path.name == "index.html" else f"/{path.relative_to(STATIC).as_posix()}": path for path in files}


def _add_file(app: FastAPI, place: str, path: Path) -> None:
    """A route of its own, so that unknown paths and methods stay what they are."""

    async def file() -> Response:
        return FileResponse(path, headers={"content-security-policy": CONTENT_POLICY, "cache-control": "no-cache"})

    app.add_api_route(place, file, methods=["GET", "HEAD"], include_in_schema=False)


async def read_form(request: Request, files: dict[str, bool]) -> tuple[dict[str, str], dict[str, bytes]]:
    """The texts and the files of a form; `files` are the names of those that may come, True where one must.

    `name[]`, as clients send lists, is `name`.

    Raises:
        Refusal: no form, a field that comes twice, a file that is missing or too large.
    """
    texts: dict[str, str] = {}
    found: dict[str, bytes] = {}
    async with request.form(max_files=8, max_fields=64, max_part_size=2**18) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if name in texts or name in found:
                raise Refusal(400, f"{name} came twice: give one", param=name[:80])
            if isinstance(value, UploadFile) and name in files:
                if (value.size or 0) > MOST_FILE:
                    raise Refusal(413, f"{name} has {value.size:,} bytes: at most {MOST_FILE:,}", param=name)
                found[name] = await value.read()
            elif isinstance(value, UploadFile):
                raise Refusal(400, f"unknown file {name[:80]!r}; files: {', '.join(files)}", param=name[:80])
            else:
                texts[name] = value
    if missing := [name for name, needed in files.items() if needed and not found.get(name)]:
        said = f"{missing[0]} is missing: send it as a file of a form (multipart/form-data)"
        raise Refusal(400, said, param=missing[0])
    return texts, found


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Value]) -> Value | None:
    """The result of `work`, or None when the client has left before; servers do not say so by themselves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(left()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _answer_error(request: Request, error: Exception) -> Response:
    """Any error as an answer in OpenAI's form."""
    headers = {}
    if isinstance(error, RequestValidationError):
        error = refusal_of(error.errors(), Pictures.model_fields)
    elif isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        path = request.url.path[:80]
        said = {404: f"no {path}", 405: f"{request.method} is not for {path}"}
        detail = said.get(error.status_code, str(error.detail))
        error = Refusal(400 if error.status_code == 422 else error.status_code, detail)
    elif not isinstance(error, Refusal):  # its traceback goes into the log, by the server
        # The server closes the connection after such an error: a client must not send the next request there.
        headers = {"x-request-id": str(request.scope.get("nar.request_id", "")), "connection": "close"}
        error = Refusal(500, "the server failed on this request")
    return _body(error, headers)


def _body(error: Refusal, headers: dict[str, str]) -> Response:
    text = json.dumps({"error": error.error})  # in ASCII: a name that is repeated may be half a character
    return Response(text, error.status, {**headers, **error.headers}, "application/json")


def outcome_of(error: Refusal) -> str:
    """How a request that was refused late is counted."""
    return "late" if error.code == "deadline_exceeded" else "refused" if error.status in (429, 503) else "error"


def _text(picture: Picture) -> str:
    return base64.b64encode(picture.encoded).decode()
