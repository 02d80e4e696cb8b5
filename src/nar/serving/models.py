"""The models of a server: what each takes, its requests as work for its batcher, and what comes back as files.

Knows pipelines, the batcher and picture formats; does not know HTTP. Pixels are decoded and encoded in a thread of
their own, beside the one that samples.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nar.media.clips import save_clip
from nar.media.pixels import as_images, as_pictures
from nar.pipeline import Pipeline
from nar.pipeline.folder import number_format
from nar.pipeline.requests import Request
from nar.sampling import Sampling, settings_among
from nar.serving.batcher import Batcher, Done, Event, Failed, Partial, Refused, Work
from nar.serving.edits import Edit, prepare, read_frames
from nar.serving.protocol import Clip, Generation, Pictures, Refusal, partial_fronts
from nar.storage.folder import CONFIG, find_model, read_config

MOST_WEBP = 16_383  # pixels of a side that the format holds
_EXACT = ("float32", "float16", "int8")  # formats in which a picture's bits do not depend on its neighbours (on a CPU)


@dataclass(frozen=True)
class Picture:
    """A picture of a request, as a file's bytes. `front` is the number of the one it was taken after, or None for the
    result."""

    index: int
    front: int | None
    encoded: bytes


class Served:
    """A pipeline under a name, with its batcher; see `load`."""

    def __init__(self, name: str, pipeline: Pipeline, batcher: Batcher, *, created: int, dtype: str) -> None:
        self.name, self.pipeline, self.batcher = name, pipeline, batcher
        self.dtype, self._created = dtype, created
        self._pixels = ThreadPoolExecutor(1, thread_name_prefix=f"pixels-{name}")

    @classmethod
    def load(
        cls,
        source: str,
        *,
        device: str | None = None,
        dtype: str = "float32",
        text_encoder: str | None = None,
        **limits: Any,
    ) -> Served:
        """Load a bundled name, a folder or a hub id, which is called by its last part, or `NAME=MODEL` where that whole
        is no path.

        `limits` are those of `Batcher`. The text encoder is for a model that reads words.
        """
        name, _, place = ("", "", source) if Path(source).exists() else source.rpartition("=")
        config = read_config(find_model(place)).get("model")
        encoder = text_encoder if isinstance(config, dict) and config.get("text_dim") else None
        pipeline = Pipeline.from_pretrained(place, device=device, dtype=dtype, text_encoder=encoder)
        if pipeline.model.config.text_dim:
            pipeline.condition(pipeline.requests(prompt="a"))  # loads the encoder: seconds, or that there is none
        batcher = Batcher(pipeline, **limits)
        created = int((find_model(place) / CONFIG).stat().st_mtime)
        dtype = number_format(pipeline.model)  # "auto" has chosen one
        return cls(name or name_of(place), pipeline, batcher, created=created, dtype=dtype)

    @property
    def reads_words(self) -> bool:
        """Whether it takes prompts in words of one's own."""
        return bool(self.pipeline.model.config.text_dim)

    @property
    def makes_clips(self) -> bool:
        """Whether results are clips, which are jobs."""
        return self.pipeline.makes_clips

    @property
    def edits(self) -> bool:
        """Whether parts of a given picture can be sampled anew: codes are places in a picture."""
        return not self.makes_clips and len(self.pipeline.model.config.grid) == 2

    @property
    def size(self) -> str:
        """Of results in pixels, as WxH."""
        height, width = self.pipeline.pixel_shape[-2:]
        return f"{width}x{height}"

    @property
    def num_fronts(self) -> int:
        """Steps of one pass of the model."""
        return self.pipeline.model.layout.schedule.num_steps

    @property
    def num_tokens(self) -> int:
        """Of one picture, or of a pass of a clip."""
        return int(self.pipeline.model.layout.schedule.num_positions)

    @property
    def is_exact(self) -> bool:
        """Whether a seed's picture is the same to the last bit beside any other requests."""
        return self.dtype in _EXACT and self.pipeline.model.device.type == "cpu"

    def card(self) -> dict[str, Any]:
        """What GET /v1/models says of it: OpenAI's four fields, and what a page needs to ask for pictures."""
        pipe, config = self.pipeline, self.pipeline.model.config
        taken = {
            "prompt": config.text_dim,
            "negative_prompt": config.text_dim,
            "class_label": config.num_classes,
            "image": self.edits,
            "input_reference": config.prefix_grid and self.makes_clips,
        }
        card: dict[str, Any] = {"id": self.name, "object": "model", "created": self._created, "owned_by": "nar"}
        card |= {"kind": "video" if self.makes_clips else "image", "size": self.size, "grid": list(config.grid)}
        card |= {"num_fronts": self.num_fronts, "fronts": self._fronts(), "num_classes": config.num_classes}
        card |= {"class_names": list(pipe.class_names), "takes": [name for name, value in taken.items() if value]}
        card |= {"defaults": dataclasses.asdict(pipe.sampling), "dtype": self.dtype, "seed_is_exact": self.is_exact}
        if self.makes_clips:
            card |= {"num_frames": pipe.continuation.num_frames, "fps": pipe.frame_rate}
            card |= {"context_frames": list(pipe.continuation.counts), "continues": bool(config.prefix_grid)}
        return card

    def described(self) -> str:
        """One line for people: what it makes, in how many steps, and its memory."""
        batcher, what = self.batcher, "clips" if self.makes_clips else "pictures"
        most = f"{batcher.slots} at once, {batcher.max_waiting} more wait"
        return f"{self.name}: {what} of {self.size} in {self.num_fronts} steps; {most}"

    def _fronts(self) -> list[list[int]]:
        """The raster indices of every front."""
        schedule = self.pipeline.model.layout.schedule
        return [schedule.order[schedule.front(front)].tolist() for front in range(schedule.num_steps)]

    def front_ends(self) -> list[int]:
        """How many tokens are decided after each front."""
        schedule = self.pipeline.model.layout.schedule
        return [schedule.front(front).stop for front in range(schedule.num_steps)]

    def request(self, asked: Generation) -> Request:
        """What is asked for, as the pipeline takes it.

        Of a model without words the prompt is the name or number of a class, and no condition at all the null class.
        """
        config, prompt, label = self.pipeline.model.config, asked.prompt, asked.class_label
        if asked.negative_prompt and not config.text_dim:
            raise Refusal(400, "this model takes no negative prompts", param="negative_prompt")
        if not config.text_dim and prompt.strip():
            if label is not None and self._label(label) != self._label(prompt, "prompt"):
                said = f"prompt {prompt[:80]!r} and class_label {label!r} are two classes: give one of them"
                raise Refusal(400, said, param="class_label")
            label = prompt
        arguments: dict[str, Any] = {"prompt": prompt if config.text_dim else None}
        if label is not None:
            self._label(label, "prompt" if label is prompt else "class_label")
            arguments["class_labels"] = [label]
        if asked.negative_prompt:
            arguments["negative_prompt"] = asked.negative_prompt
        is_null = not prompt.strip() and label is None and not asked.negative_prompt
        if is_null and (self.makes_clips or not config.text_dim):
            if config.num_classes and not config.null_class:
                raise Refusal(400, "this model has no null class: give class_label", param="class_label")
            return Request()
        try:
            return self.pipeline.requests(**arguments)[0]
        except ValueError as error:
            raise Refusal(400, str(error)) from error

    def _label(self, label: str | int, param: str = "class_label") -> int:
        try:
            return self.pipeline.label_index(label)
        except ValueError as error:
            raise Refusal(400, str(error), param=param) from error

    def sampling(self, asked: Generation) -> Sampling:
        """The model's own settings with those that are asked for."""
        names = {field.name for field in dataclasses.fields(Sampling)}
        given = settings_among({name: getattr(asked, name) for name in names})
        try:
            sampling = dataclasses.replace(self.pipeline.sampling, **given)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        if asked.negative_prompt and sampling.guidance_scale == 1.0:
            raise Refusal(400, "negative_prompt needs guidance: set guidance_scale above 1.0", param="negative_prompt")
        return sampling

    def check(self, asked: Generation) -> None:
        """Refuse sizes and numbers of steps other than the model's; before anything heavy."""
        if asked.size not in ("auto", self.size):
            raise Refusal(
                400,
                f"size {asked.size[:40]!r}: this model makes {self.size} ('auto')",
                param="size",
                code="invalid_size",
            )
        if asked.num_inference_steps not in (None, self.num_fronts):
            said = f"num_inference_steps {asked.num_inference_steps}: this model always takes {self.num_fronts}"
            raise Refusal(400, said, param="num_inference_steps")

    def begin(self, asked: Pictures, key: str, edit: Edit | None = None) -> Running:
        """Hand a request to the batcher, from within the event loop.

        Raises:
            Refusal: something that the model does not take (400), or no room for it now (429, 503).
        """
        self.check(asked)
        if asked.partial_images > self.num_fronts:
            said = f"partial_images {asked.partial_images}: at most {self.num_fronts}, one a front"
            raise Refusal(400, said, param="partial_images")
        fronts = partial_fronts(self.front_ends(), asked.partial_images) if asked.partial_images else []
        request = dataclasses.replace(self.request(asked), given=None if edit is None else edit.codes)
        work = self._work(asked, [request] * asked.n, key, partial_fronts={0, *fronts})

        def encode(codes: Tensor, undecided: bool) -> bytes:
            picture = self.picture(codes, undecided=undecided)
            picture = picture if edit is None else edit.paste(picture, blend=not undecided)
            return encoded(picture, asked.output_format, asked.output_compression)

        return Running(self, work, encode, fronts)

    async def edit(self, asked: Pictures, image: bytes, mask: bytes | None) -> Edit:
        """Read and encode what is to be edited, where there is room for the request now.

        Raises:
            Refusal: there is none (503), or the files are not taken (400).
        """
        self.check(asked)
        batcher = self.batcher
        if batcher.running + batcher.waiting + asked.n > batcher.slots + batcher.max_waiting:
            wait = batcher.predicted_wait()
            raise Refusal(503, f"the queue is full; try again in {wait:.1f} s", retry_after_seconds=wait)
        edit: Edit = await self.in_pixels(prepare, self.pipeline, image, mask)
        return edit

    def _work(self, asked: Generation, requests: list[Request], key: str, **options: Any) -> Work:
        deadline = None if asked.deadline_ms is None else asked.deadline_ms / 1000
        sampling = self.sampling(asked)
        return Work(requests, sampling, self.seed_of(asked), key=key, deadline_seconds=deadline, **options)

    @staticmethod
    def seed_of(asked: Generation) -> int:
        """The seed that is asked for, or a new one."""
        return secrets.randbits(32) if asked.seed is None else asked.seed

    def clip_files(
        self, done: Partial | Done | None, wanted: Mapping[str, tuple[str, str]]
    ) -> dict[str, Callable[[Path], Any]]:
        """What writes each file of a clip: itself, its first frame, and all frames side by side."""
        assert isinstance(done, Done)
        assert done.pixels is not None
        frames = as_images(done.pixels[None])[0]
        rate = self.pipeline.frame_rate
        strip = np.concatenate(list(frames), 1)
        writers: dict[str, Callable[[Path], Any]] = {
            "video": lambda path: save_clip(frames, path, frame_rate=rate),
            "thumbnail": lambda path: Image.fromarray(frames[0]).save(path, lossless=True),
            "spritesheet": lambda path: Image.fromarray(strip[:, :MOST_WEBP]).save(path, lossless=True),
        }
        return {name: writers[variant] for variant, (name, _) in wanted.items()}

    def planned(self, asked: Clip, reference: bytes | None, is_added: bool = False) -> tuple[Request, int]:
        """What a clip is asked for, with the frames to continue, and how many frames it will have: as many as are
        asked for, or with `is_added` so many more than the reference.

        Raises:
            Refusal: something that the model does not take, or a length that can't be.
        """
        self.check(asked)
        self.sampling(asked)
        pipe, request = self.pipeline, self.request(asked)
        if asked.fps not in (None, pipe.frame_rate):
            raise Refusal(400, f"fps {asked.fps:g}: this model makes {pipe.frame_rate:g}", param="fps")
        if reference is not None:
            if not pipe.model.config.prefix_grid:
                raise Refusal(400, "this model continues no clips: leave input_reference out", param="input_reference")
            request = dataclasses.replace(request, frames=read_frames(pipe, reference))
        num_frames = asked.num_frames
        if asked.seconds is not None:
            num_frames = max(1, round(asked.seconds * pipe.frame_rate))
        length = 0 if request.frames is None else int(request.frames.shape[1])
        if is_added and num_frames is not None:
            num_frames += length
        try:
            pipe.check_length(num_frames, [request], "pil")
        except ValueError as error:
            raise Refusal(400, str(error), param="num_frames" if asked.seconds is None else "seconds") from error
        added = pipe.continuation.num_frames - pipe.continuation.num_context(request.frames)
        return request, num_frames or length + added

    def begin_clip(self, asked: Clip, request: Request, num_frames: int, key: str) -> Running:
        """Hand a clip that was planned to the batcher; every front of every pass is told."""
        passes = self.pipeline.continuation.num_passes(
            0 if request.frames is None else int(request.frames.shape[1]), num_frames
        )
        fronts = range(passes * self.num_fronts)
        work = self._work(asked, [request], key, num_frames=num_frames, partial_fronts=fronts)
        return Running(self, work, fronts=fronts)

    def picture(self, codes: Tensor, *, undecided: bool) -> Image.Image:
        """Decode codes (*grid), as the pipeline decodes them alone; areas that are undecided are mid-grey."""
        shown = self.pipeline.pictures(codes[None]) if undecided else self._decoded(codes)
        return shown[0]

    def _decoded(self, codes: Tensor) -> list[Image.Image]:
        return as_pictures(self.pipeline.decode(codes[None], exact=True))

    def text_tokens(self) -> int:
        """Tokens of the condition that the model is fed for one picture."""
        config = self.pipeline.model.config
        return config.text_length * bool(config.text_dim) + bool(config.num_classes)

    def in_pixels(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Run something in the thread for pixels."""
        return asyncio.get_running_loop().run_in_executor(self._pixels, function, *arguments)

    def close(self, *, drain: bool = False) -> None:
        """End the batcher, with `drain` after what it has begun."""
        self.batcher.close(drain=drain)
        self._pixels.shutdown(wait=False, cancel_futures=True)


class Running:
    """One request in a batcher, for one reader, in whose loop it is made.

    Of codes on the way only the newest of each are kept, so a slow reader costs no memory. `left` is the number of
    results that are still to come, `queue_seconds` the time to the end of the first front, `progress` the share in
    percent of the fronts of the result that was last told of.
    """

    def __init__(
        self,
        served: Served,
        work: Work,
        encode: Callable[[Tensor, bool], bytes] | None = None,
        fronts: Collection[int] = (),
    ) -> None:
        self.seed, self._served, self._encode, self._fronts = work.seed, served, encode, frozenset(fronts)
        self._submitted = perf_counter()
        self.queue_seconds: float | None = None
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._partial: dict[int, Partial] = {}
        self._done: deque[Done] = deque()
        self._error: Exception | None = None
        self.left, self.progress = len(work.requests), 0
        try:
            self._ticket = served.batcher.submit(work, self._from_engine)
        except Refused as error:
            raise refusal(error) from error
        except ValueError as error:
            raise Refusal(400, str(error)) from error

    async def picture(self, timeout: float | None = None) -> Picture | None:
        """The next of `next`, as a file's bytes."""
        event = await self.next(timeout)
        if event is None or self._encode is None:
            return None
        front = event.front if isinstance(event, Partial) else None
        return Picture(event.index, front, await self._served.in_pixels(self._encode, event.codes, front is not None))

    async def next(self, timeout: float | None = None) -> Partial | Done | None:
        """What comes next, results before codes on the way; None after `timeout` seconds without any.

        Raises:
            Refusal: it failed, or its deadline has passed.
        """
        while not (self._done or self._partial):
            if self._error is not None:
                raise refusal(self._error) from self._error
            try:
                await asyncio.wait_for(self._news.wait(), timeout)
            except TimeoutError:
                return None
            self._news.clear()
        if self._done:
            self.left -= 1
            return self._done.popleft()
        return self._partial.pop(min(self._partial, key=lambda index: self._partial[index].front))

    def cancel(self) -> None:
        """Leave the batcher; nothing happens where all is done."""
        self._ticket.cancel()

    def _from_engine(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take, event)
        except RuntimeError:  # the loop has ended, and its readers with it
            self._ticket.cancel()

    def _take(self, event: Event) -> None:
        if isinstance(event, Partial):
            self.queue_seconds = self.queue_seconds or perf_counter() - self._submitted
            if event.front in self._fronts:
                self._partial[event.index] = event
            self.progress = min(99, 100 * (event.front + 1) // event.num_fronts)
        elif isinstance(event, Done):
            self._partial.pop(event.index, None)
            self._done.append(event)
        elif isinstance(event, Failed):
            self._error = event.error
        self._news.set()


def refusal(error: Exception) -> Refusal:
    """What a client is told of an error of the batcher."""
    if isinstance(error, Refused):
        status = 429 if error.reason == "limit" else 503
        code = {"deadline": "deadline_exceeded"}.get(error.reason)
        return Refusal(status, str(error), code=code, retry_after_seconds=error.retry_after_seconds)
    if isinstance(error, ValueError):
        return Refusal(400, str(error))
    return Refusal(500, "the model failed on this request; the server's log says more")


def encoded(picture: Image.Image, form: str, compression: int | None) -> bytes:
    """A picture as the bytes of a file of this format; `compression` 100 is the best quality, or lossless for webp."""
    file, quality = BytesIO(), 100 if compression is None else compression
    options: dict[str, Any] = {"png": {}, "jpeg": {"quality": quality}, "webp": {"quality": quality}}[form]
    if form == "webp" and quality == 100:
        options = {"lossless": True}
    picture.save(file, form, **options)
    return file.getvalue()


def name_of(source: str) -> str:
    """What a model is called by default: the last part of its path that says something."""
    parts = [part for part in Path(source).parts if part not in ("model", "/", ".", "..")]
    return parts[-1] if parts else "model"
