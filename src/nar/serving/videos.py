"""Clips as jobs: OpenAI's routes for videos over a store on disk, and who works through it.

Knows the forms of jobs and the life of one; does not know tensors, nor how the store keeps its jobs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from nar.serving.jobs import Job, Store
from nar.serving.protocol import Clip, Refusal, read_fields

if TYPE_CHECKING:
    from nar.serving.models import Running, Served

POLL_MILLISECONDS = 250  # that clients are asked to wait between two looks at a job
PROGRESS_SECONDS = 0.5  # between two notes of how far a job is
LOOK_SECONDS = 1.0  # between two looks for jobs that other processes left
SWEEP_SECONDS = 600.0
MOST_WAITING = 100  # clips of a model
RETRY_SECONDS = 2.0  # after something went wrong that is not the job's fault
VARIANTS = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.webp", "image/webp"),
}
REFERENCE = "input_reference"
VIDEO = "video"  # to extend
_PUBLIC = (
    "id model status progress created_at completed_at expires_at prompt size seconds remixed_from_video_id error "
    "seed num_frames fps"
)
_log = logging.getLogger("nar.serving")
FormReader = Callable[[Request, dict[str, bool]], Any]


class Server(Protocol):
    """What videos need of the app."""

    models: dict[str, Served]
    is_draining: bool

    def model(self, name: str | None) -> Served: ...
    def owner_of(self, request: Request) -> str: ...
    def check_open(self) -> None: ...


class Videos:
    """The jobs of a server; `work` makes their clips until it is cancelled."""

    def __init__(self, server: Server, store: Store, max_waiting_per_key: int | None = None) -> None:
        self.server, self.store, self._max_waiting_per_key = server, store, max_waiting_per_key
        self.running: dict[str, Running] = {}
        self.num_working = 0  # workers that have a job
        self._news = asyncio.Event()

    async def create(self, asked: Clip, reference: bytes | None, key: str, *, is_added: bool = False) -> Job:
        """Check a clip that is asked for, and put it in the queue.

        With `is_added` its length is what is added to the reference, else that of the whole clip.
        """
        clips = {name: served for name, served in self.server.models.items() if served.makes_clips}
        served = self.server.model(asked.model) if asked.model or not clips else next(iter(clips.values()))
        if not served.makes_clips:
            listed = ", ".join(clips) or "none"
            raise Refusal(400, f"{served.name} makes pictures; models of clips here: {listed}", param="model")
        _, num_frames = await served.in_pixels(served.planned, asked, reference, is_added)
        seed = served.seed_of(asked)
        fps = served.pipeline.frame_rate
        fields = asked.model_copy(update={"seed": seed, "num_frames": num_frames, "seconds": None})
        job = {
            "model": served.name,
            "prompt": asked.prompt,
            "size": served.size,
            "seconds": f"{num_frames / fps:.4g}",
            "seed": seed,
            "num_frames": num_frames,
            "fps": fps,
            "key": key,
            "fields": fields.model_dump(exclude_none=True),
        }
        files = {} if reference is None else {REFERENCE: reference}
        try:
            made = await asyncio.to_thread(self._queued, job, files)
        except OSError as error:
            _log.error("a job can't be kept: %s", error)
            raise Refusal(507, "the server can't keep the job: its disk is full or can't be written") from error
        self._news.set()
        return made

    def _queued(self, job: Job, files: dict[str, bytes]) -> Job:
        """Put a job in its model's queue: others are not waited for, and may be those of models that are gone.

        Raises:
            Refusal: the queue is full (503), or the key has too much in it (429).
        """
        model, key, most = job["model"], job["key"], self._max_waiting_per_key
        waiting = [one["key"] for one in self.store.jobs() if one["status"] == "queued" and one["model"] == model]
        if len(waiting) >= MOST_WAITING:
            said = f"{len(waiting)} clips of {model} are waiting, at most {MOST_WAITING} may; try again later"
            raise Refusal(503, said, retry_after_seconds=30.0)
        if key and most is not None and (own := waiting.count(key)) >= most:
            said = f"{own} clips of {model} are waiting for this key, at most {most} may; try again later"
            raise Refusal(429, f"{said}, or delete one", retry_after_seconds=30.0)
        return self.store.create(job, files)

    def get(self, number: str, key: str) -> Job:
        """A job of this key; raises Refusal (404) for others'."""
        job = self.store.get(number)
        if job is None or job["key"] != key:
            raise Refusal(404, f"no video {number[:80]!r}", param="video_id")
        return job

    def listed(self, key: str, after: str | None, limit: int, order: str) -> dict[str, Any]:
        """A page of the key's jobs."""
        jobs = [job for job in self.store.jobs() if job["key"] == key]
        jobs = jobs if order == "asc" else jobs[::-1]
        if after is not None:
            places = [place for place, job in enumerate(jobs) if job["id"] == after]
            if not places:
                raise Refusal(400, f"after: no video {after[:80]!r}", param="after")
            jobs = jobs[places[0] + 1 :]
        page = [public(job) for job in jobs[:limit]]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(jobs) > limit}

    def content(self, job: Job, variant: str) -> tuple[Path, str]:
        """The file of a job, and its type."""
        if variant not in VARIANTS:
            raise Refusal(400, f"variant {variant[:40]!r}: one of {', '.join(VARIANTS)}", param="variant")
        name, kind = VARIANTS[variant]
        path = self.store.file(job["id"], name)
        if job["status"] != "completed" or not path.is_file():
            raise Refusal(404, f"{job['id']} is {job['status']}, at {job['progress']} %: its content comes later")
        return path, kind

    async def extension(self, fields: dict[str, Any], file: bytes | None, key: str) -> Job:
        """A job for a clip with more frames: those of `video`, a file or the id of a finished job, and new ones."""
        number = fields.pop(f"{VIDEO}[id]", None)
        if (number is None) == (file is None):
            raise Refusal(400, 'video is {"id": ...} of a finished clip, or a file of a form', param=VIDEO)
        if number is not None:
            job = self.get(number, key)
            file = await asyncio.to_thread(self.content(job, "video")[0].read_bytes)
            fields.setdefault("model", job["model"])
        return await self.create(read_fields(Clip, fields), file, key, is_added=True)

    async def finished(self, job: Job, request: Request) -> Job:
        """Wait for the end of a job; it is deleted when the client leaves before."""
        number = job["id"]
        while job["status"] in ("queued", "in_progress"):
            if await request.is_disconnected():
                await self.delete(number)
                raise Refusal(499, "the client has left", param="video_id")
            await asyncio.sleep(POLL_MILLISECONDS / 1000)
            job = self.get(number, job["key"])
        if job["status"] == "failed":
            raise Refusal(500, job["error"]["message"], code=job["error"]["code"])
        return job

    async def delete(self, number: str) -> None:
        """Drop a job, at once if it runs here; another process that works on it sees that it is gone."""
        if running := self.running.get(number):
            running.cancel()
        await asyncio.to_thread(self.store.delete, number)

    async def work(self, served: Served) -> None:
        """Make the clips of one model, one job after the other, while keys take turns; for ever, whatever goes wrong
        with one."""
        swept, turns = monotonic(), dict[str, float]()  # when a key's last clip began
        while True:
            try:
                if monotonic() - swept > SWEEP_SECONDS:
                    await asyncio.to_thread(self.store.sweep)
                    swept = monotonic()
                job = None
                if not self.server.is_draining:
                    job = await asyncio.to_thread(
                        self.store.claim,
                        lambda job: job["model"] == served.name,
                        lambda job: turns.get(job["key"], 0.0),
                    )
                if job is not None:
                    turns[job["key"]] = monotonic()
                    self.num_working += 1
                    try:
                        await self._run(served, job)
                    finally:
                        self.num_working -= 1
                    continue
                self._news.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), LOOK_SECONDS)
            except OSError as error:  # a full disk, say: the job stays, and is tried again
                _log.error("jobs can't be worked on: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _run(self, served: Served, job: Job) -> None:
        """Make one clip; when this is cancelled the job is in the queue again."""
        number, error = job["id"], None
        beats = asyncio.create_task(self._beat(number))
        try:
            await self._make(served, job)
        except Refusal as refused:
            if self.server.is_draining and refused.retry_after_seconds is not None:  # it was stopped, not refused
                self.store.update(number, status="queued", progress=0)
                return
            error = {"code": refused.code, "message": refused.message}
        except (asyncio.CancelledError, OSError):
            self.store.update(number, status="queued", progress=0)
            raise
        except Exception:
            _log.exception("%s failed", number)
            error = {"code": "internal_error", "message": "the server failed on this clip"}
        finally:
            beats.cancel()
        if error is not None:
            self.store.update(number, status="failed", error=error)

    async def _beat(self, number: str) -> None:
        """Say that a job is worked on, also while its files are written, until it is deleted or another's."""
        while self.store.beat(number):
            await asyncio.sleep(PROGRESS_SECONDS)

    async def _make(self, served: Served, job: Job) -> None:
        number, asked = job["id"], read_fields(Clip, job["fields"])
        path = self.store.file(number, REFERENCE)
        reference = path.read_bytes() if path.is_file() else None
        request, num_frames = await served.in_pixels(served.planned, asked, reference)
        while True:
            try:
                running = served.begin_clip(asked, request, num_frames, f"videos of {job['key']}")
                break
            except Refusal as refused:  # pictures fill the queue
                if refused.retry_after_seconds is None or refused.code == "deadline_exceeded":
                    raise
                if not self.store.beat(number):
                    return
                await asyncio.sleep(min(5.0, max(0.1, refused.retry_after_seconds)))
        self.running[number] = running
        try:
            noted = 0.0
            while True:
                event = await running.next(1.0)
                if monotonic() - noted > PROGRESS_SECONDS:
                    noted, progress = monotonic(), running.progress
                    if not self.store.beat(number) or not self.store.update(number, progress=progress):
                        return  # deleted, or taken over while this process stood still
                if event is not None and not running.left:
                    break
        finally:
            del self.running[number]
            running.cancel()
        for name, write in served.clip_files(event, VARIANTS).items():
            if not await served.in_pixels(self.store.write, number, name, write):
                return
        self.store.update(number, status="completed", progress=100)


def public(job: Job) -> dict[str, Any]:
    """What clients see of a job."""
    return {"object": "video"} | {name: job.get(name) for name in _PUBLIC.split()}


def add_routes(app: FastAPI, server: Server, videos: Videos, read_form: FormReader, most_body: int) -> None:
    """OpenAI's routes for videos."""

    def answer(job: Job) -> Response:
        return JSONResponse(public(job), headers={"openai-poll-after-ms": str(POLL_MILLISECONDS)})

    async def created(request: Request) -> Job:
        server.check_open()
        fields, reference = await _read(request, REFERENCE, read_form)
        return await videos.create(read_fields(Clip, fields), reference, server.owner_of(request))

    @app.post("/v1/videos", max_body_size=most_body)
    async def create(request: Request) -> Response:
        return answer(await created(request))

    @app.post("/v1/videos/sync", max_body_size=most_body)
    async def whole(request: Request) -> Response:
        job = await videos.finished(await created(request), request)
        path, kind = videos.content(job, "video")
        return FileResponse(path, media_type=kind, headers={"x-video-id": job["id"], "x-seed": str(job["seed"])})

    @app.post("/v1/videos/extensions", max_body_size=most_body)
    async def extend(request: Request) -> Response:
        server.check_open()
        fields, file = await _read(request, VIDEO, read_form)
        return answer(await videos.extension(fields, file, server.owner_of(request)))

    @app.get("/v1/videos")
    async def listed(request: Request, after: str | None = None, limit: int = 20, order: str = "desc") -> Response:
        if not 0 <= limit <= 100 or order not in ("asc", "desc"):
            raise Refusal(400, "limit must be 0 to 100, and order asc or desc")
        return JSONResponse(videos.listed(server.owner_of(request), after, limit, order))

    @app.get("/v1/videos/{number}")
    async def get(request: Request, number: str) -> Response:
        return answer(videos.get(number, server.owner_of(request)))

    @app.delete("/v1/videos/{number}")
    async def delete(request: Request, number: str) -> Response:
        videos.get(number, server.owner_of(request))
        await videos.delete(number)
        return JSONResponse({"id": number, "object": "video.deleted", "deleted": True})

    @app.get("/v1/videos/{number}/content")
    async def content(request: Request, number: str, variant: str = "video") -> Response:
        path, kind = videos.content(videos.get(number, server.owner_of(request)), variant)
        return FileResponse(path, media_type=kind)


async def _read(request: Request, name: str, read_form: FormReader) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a body, JSON or a form, and the file `name`, which JSON holds as a data URL.

    What a form says as `name[id]` and JSON as {"id": ...} is the field `name[id]`.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        texts, files = await read_form(request, {name: False})
        return texts, files.get(name)
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body must be a JSON object ({error})") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    given = body.pop(name, None)
    if given is None:
        return body, None
    number = given.get("id") if isinstance(given, dict) else None
    if name == VIDEO and isinstance(number, str) and len(given) == 1:
        return body | {f"{name}[id]": number}, None
    url = given.get("image_url") if isinstance(given, dict) else None
    data = re.fullmatch(r"data:[^,]*;base64,(.*)", url, re.DOTALL) if isinstance(url, str) else None
    if data is None:
        said = f'{name} is {{"image_url": "data:...;base64,..."}}, or a file of a form'
        raise Refusal(400, f'{said}, or {{"id": ...}}' if name == VIDEO else said, param=name)
    try:
        return body, base64.b64decode(data[1], validate=True)
    except binascii.Error as error:
        raise Refusal(400, f"{name} is not base64 ({error})", param=name) from error
