"""Classes, words or context frames in, pictures or clips out: text encoder, condition, sampling and tokenizer meet.

Knows model folders, names of classes, captions and pixels; does not know the command line or HTTP. Legend: `B` batch,
`T H W` frames and pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Never

import numpy as np
import torch
from torch import Tensor

from nar.condition import NULL_CLASS, Condition, TextFeatures
from nar.media.clips import Frames, as_array
from nar.model import ModelConfig, Transformer
from nar.pipeline import habits
from nar.pipeline.continuation import Continuation
from nar.pipeline.edit import edit, extend, kept, of_size, with_given
from nar.pipeline.folder import moved, number_format, read, save, upload
from nar.pipeline.formats import Choice
from nar.pipeline.output import OUTPUT_TYPES, Output, as_output, greyed
from nar.pipeline.particles import check_particles, weighted_fronts
from nar.pipeline.requests import HEADS, Inputs, Request, check_call, check_guidance, known_codes, row_of, seeds_of
from nar.precision import PRECISIONS, usable_device
from nar.progress import Progress
from nar.sampling import Sampling, Session, generate_fronts, settings_among
from nar.storage.fields import OneOf, checked, holds_whole_numbers
from nar.text import TextEncoder, TextEncoderConfig
from nar.text.captions import Captions
from nar.tokenizer import Tokenizer

USUAL_FRAME_RATE = 8.0  # of clips of models that do not say
# They fit together.
FIXED = ("model", "tokenizer", "session", "captions", "continuation", "inputs", "class_names", "pixel_shape")
DECODED_PIXELS = 2**20  # at once: 16 pictures of 256x256, whose decoder takes some 2 GB

Callback = Callable[["Pipeline", int, Tensor], None]


class Pipeline:
    """A model with its tokenizer and, where it reads captions, its text encoder; call it to get pictures or clips.

    Args:
        text: the encoder for prompts: loaded at the first prompt when given as its config.
        given_frames: numbers of context frames that frame prediction was trained with; see
            `nar.pipeline.continuation.Continuation`.
        frame_rate: of clips, frames per second. Where it is known, files with context frames are read at it; None
            stands for 8, and for frames as they are.

    Attributes:
        pixel_shape: height and width of results, of clips with the number of frames of a pass before.
        folder: where it was read from, if it was.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        class_names: Sequence[str] = (),
        sampling: Sampling | None = None,
        *,
        text: TextEncoderConfig | TextEncoder | None = None,
        given_frames: Sequence[int] = (),
        frame_rate: float | None = None,
    ) -> None:
        config = model.config
        if tokenizer.config.vocab_size != config.vocab_size:
            codes = f"{config.vocab_size} codes but the tokenizer {tokenizer.config.vocab_size}"
            raise ValueError(f"the model has {codes}: they do not belong together")
        self.model, self.tokenizer, self.session = model, tokenizer, Session(model)
        self._half = next(model.parameters()).dtype == torch.bfloat16
        self.class_names, self.sampling = tuple(class_names), sampling or Sampling()
        self.captions = Captions(text, length=config.text_length, dim=config.text_dim, device=model.device)
        self.pixel_shape = tokenizer.pixel_shape(config.grid)
        self.continuation = Continuation(model, tokenizer, given_frames)
        self.inputs = Inputs(config, self.class_names, self.continuation.counts)
        self._trained_rate = frame_rate
        self._lock = threading.RLock()  # one generation at a time; re-entrant, for callbacks that raise a better error
        self._sharing = weakref.WeakSet([self])  # pipelines with the same weights
        self.choice: Choice | None = None  # why it has its number format, where that was measured
        self.folder: Path | None = None

    @classmethod
    @checked
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype = "float32",
        text_encoder: str | Path | None = None,
        revision: str | None = None,
        **others: Never,
    ) -> Pipeline:
        """Load a bundled name, a model folder or a hub id (`revision`: its branch, tag or commit).

        `device` defaults to cuda where there is one. The weights of the tokenizer stay in float32, whatever the `dtype`
        of the transformer: "float32", "bfloat16", "float16", or on a CPU "int8"; with "bfloat16" its decoder computes
        in that. On a CPU "float16" means half-precision weights and float32 arithmetic; see `nar.precision`. "auto"
        measures for some seconds, once on each machine, takes the fastest that costs less than 0.1 % of the bits, and
        sets the number of threads of the process; `choice` says why.
        `text_encoder` (a folder or hub id) takes the place of the one that the folder names; published text models name
        none. It is loaded at the first prompt.

        Raises:
            FileNotFoundError: no such model, or it comes without a tokenizer.
            ValueError: a damaged folder, a device that is not there, or a text encoder for a model that reads no words.
            TypeError: an argument that there is none of; of those of other libraries it says what takes their place.
        """
        habits.refuse(others, habits.LOAD, signature(cls.from_pretrained).parameters)
        folder, parts, choice = read(source, device, str(dtype), text_encoder, revision)
        pipe = cls(**parts)
        pipe.folder, pipe.choice = folder, choice
        return pipe

    save_pretrained, push_to_hub = save, upload

    @checked
    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> Pipeline:
        """Move the pipeline to a device, or into a number format, in place; returns it.

        A model packed for a CPU is read again from its folder, as its weights are no longer as they were. What other
        pipelines share with this one (`at_grid`, `with_heads`) stays as it is: then copies are moved.

        Raises:
            ValueError: a device that is not there, a format that it has no kernels for, or a packed model that was not
                read from a folder.
        """
        if dtype is None and (isinstance(device, torch.dtype) or device in PRECISIONS):
            device, dtype = None, device
        usable_device(None if device is None else str(device))
        place = torch.device(device or self.device)  # type: ignore[arg-type]
        name = number_format(self.model) if dtype is None else str(dtype).removeprefix("torch.")
        with self._lock:
            if (place, name) != (self.device, number_format(self.model)):
                shared = len(self._sharing) > 1
                model = moved(self.model, place, name, self.folder, shared=shared)
                tokenizer = (copy.deepcopy(self.tokenizer) if shared else self.tokenizer).to(place)
                vars(self).update(model=model, session=Session(model), choice=None, _half=name == "bfloat16")
                vars(self).update(tokenizer=tokenizer, captions=self.captions.moved(place))
                vars(self.continuation).update(model=model, tokenizer=tokenizer)
                self._sharing.discard(self)
                self._sharing = weakref.WeakSet([self])
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is; `to` moves it."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the transformer's weights."""
        return getattr(torch, number_format(self.model))  # type: ignore[no-any-return]

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        return self.model.config

    @property
    def frame_rate(self) -> float:
        """Of clips, frames per second."""
        return self._trained_rate or USUAL_FRAME_RATE

    @property
    def num_steps(self) -> int:
        """Forward passes that a picture takes, or one pass over a clip: one a front."""
        return self.model.layout.schedule.num_steps

    def described(self) -> str:
        """What it makes of what, in a line."""
        *frames, height, width = self.pixel_shape
        made = f"clips of {frames[0]} frames of {height}x{width}" if frames else f"pictures of {height}x{width}"
        return f"{made} from {self.inputs}; grid {'x'.join(map(str, self.config.grid))}, {self.num_steps} steps"

    def __repr__(self) -> str:
        name, how = (
            self.folder.name if self.folder else "",
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
        )
        return f"<Pipeline{' ' * bool(name)}{name}: {self.described()}, {how}>"

    if not TYPE_CHECKING:  # a checker of types goes on finding names that there are none of

        def __getattr__(self, name: str) -> Any:
            answer = habits.ATTRIBUTES.get(name)
            raise AttributeError(f"a pipeline has no {name!r}" + (f": {answer}" if answer else ""), name=name, obj=self)

        def __setattr__(self, name: str, value: Any) -> None:
            if name in habits.ATTRIBUTES or (name in FIXED and name in vars(self)):
                answer = habits.ATTRIBUTES.get(name, "Pipeline(model, tokenizer) takes other parts")
                raise AttributeError(f"{name!r} of a pipeline can't be set: {answer}", name=name, obj=self)
            if name == "sampling" and not isinstance(value, Sampling):
                raise TypeError(f"sampling must be a nar.Sampling, not {value!r}")
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a pipeline can't be pickled or copied: it holds packed weights and memory of a device; load it in each "
            "process with Pipeline.from_pretrained, and between threads share one, which takes a call after the other"
        )

    @checked
    def at_grid(self, grid: tuple[int, ...]) -> Pipeline:
        """The same pipeline, weights shared, for pictures of another size; raises ValueError when the model can't."""
        return self._with(self.model.at_grid(grid))

    @checked
    def with_heads(self, heads: Annotated[str, OneOf(*HEADS)]) -> Pipeline:
        """The same pipeline, weights shared, with one head deciding where several predict (the paper's table 5).

        "mean" is as trained. What one head does not predict, horizontally the first column, the others do. Raises
        ValueError where the model has no such head.
        """
        return self._with(self.model.decided_by(row_of(heads, self.model.layout.schedule)))

    def _with(self, model: Transformer) -> Pipeline:
        parts = model, self.tokenizer, self.class_names, self.sampling
        other = Pipeline(*parts, given_frames=self.continuation.counts, frame_rate=self._trained_rate)
        vars(other).update({name: vars(self)[name] for name in ("captions", "folder", "choice", "_lock", "_sharing")})
        self._sharing.add(other)
        return other

    @property
    def makes_clips(self) -> bool:
        """Whether results have frames."""
        return self.continuation.makes_clips

    @property
    def text(self) -> TextEncoderConfig | TextEncoder | None:
        """The encoder for prompts; its config as long as it is not open."""
        return self.captions.encoder

    def text_encoder(self) -> TextEncoder:
        """The encoder for prompts, opened when it is first asked for."""
        return self.captions.open()

    def drop_text_encoder(self) -> None:
        """Free the memory of the text encoder; the next prompt loads it again."""
        self.captions.close()

    def label_index(self, label: str | int) -> int:
        """The number of a class, given its name (any case) or number; raises ValueError with the names."""
        return self.inputs.label_index(label)

    @checked
    def label_name(self, index: int) -> str:
        """The name of a class, or its number where there are no names."""
        return self.class_names[index] if 0 <= index < len(self.class_names) else str(index)

    def __call__(
        self,
        what: Sequence[str | int] | str | int | None = None,
        /,
        *,
        class_labels: Sequence[str | int] | str | int | None = None,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: Sequence[str] | str | None = None,
        frames: Frames | None = None,
        num_frames: int | None = None,
        num_images_per_prompt: int = 1,
        size: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        guidance_curve: str | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        known: Tensor | np.ndarray | None = None,
        particles: int = 1,
        batch_size: int = 32,
        output_type: str = "pil",
        callback_on_front_end: Callback | None = None,
        progress: bool = False,
        **others: Never,
    ) -> Output:
        """Sample `num_images_per_prompt` pictures, or clips, of each label, prompt or clip, in that order.

        Settings that are None take the model's own defaults; see `Sampling`. Number i depends on (seed, i) and on its
        condition, not on `batch_size` or its neighbours; without `seed` or `generator` the seed is new, and returned.
        Threads may share a pipeline: their batches come one after another.

        Args:
            what: prompts where the model reads words and all are text, else class labels.
            class_labels: names or numbers of classes.
            prompt: words; an empty string is unconditional. Where several kinds are given, one value goes with all.
            negative_prompt: words that take the place of the model's null condition in guidance.
            frames: a clip to continue, or a list with one for each result: a file, Pillow pictures, or uint8
                (T, H, W, 3). Its last frames are the condition; the result begins with all of them, as given (cut and
                resized to the model's size where they have another). Files are read at the model's frame rate.
            num_frames: length of the clips, context included. By default what one pass of the model adds. Longer
                ones are sampled in several passes, each of which sees only the last frames of what is there.
            size: (H, W) of pictures of another size than the model's, made in windows that overlap; see `extend`.
            seed: one for all, or a list with one for each result, which then is the first one of that seed.
            generator: the seed is its next number, so that the next call with it makes others; of a list each one's.
            known: codes (number of results, *grid) kept as given, -1 where free; context frames come first.
            particles: samples of each result, weighted by how likely they make what is known; see `particles`.
            output_type: "pil", "np" (uint8), "pt" (float -1..1) or "codes" (of one pass).
            callback_on_front_end: called as f(pipe, front, codes) after each front of each batch; codes are -1 where
                undecided.
            progress: show a bar on a terminal, and lines elsewhere.

        Raises:
            ValueError: an unknown class, something that the model does not take, or a setting that is out of range.
            TypeError: an argument that there is none of.
        """
        habits.refuse(others, habits.CALL, signature(Pipeline.__call__).parameters)
        class_labels, prompt = self.inputs.meant(what, class_labels, prompt)
        check_call(output_type, batch_size, callback_on_front_end, progress=progress)
        check_particles(particles, known)
        if size is not None:
            return of_size(self, size, locals())
        sampling = dataclasses.replace(self.sampling, **settings_among(locals()))
        requests = self.inputs.requests(
            class_labels, prompt, negative_prompt, frames, read=self._read, number=num_images_per_prompt
        )
        check_guidance(self.sampling, sampling, requests)
        self.check_length(num_frames, requests, output_type)
        seed = seeds_of(seed, generator, len(requests))
        kept = None if known is None else known_codes(known, len(requests), self.config.grid)
        pixels, codes, count = list[Tensor](), list[Tensor](), len(requests)
        seeds, indices = ([seed] * count, range(count)) if isinstance(seed, int) else (seed, [0] * count)
        with Progress("sampling", None if num_frames else count * self.num_steps, "steps", quiet=not progress) as shown:

            def after_front(pipe: Pipeline, front: int, codes: Tensor) -> None:
                shown.update(len(codes))
                if callback_on_front_end is not None:
                    callback_on_front_end(pipe, front, codes)

            for start in range(0, count, batch_size):
                rows = slice(start, start + batch_size)
                some: dict[str, Any] = {"seed": seeds[rows], "particles": particles, "callback": after_front}
                some["known"] = None if kept is None else kept[rows]
                if output_type == "codes":
                    codes.append(self._codes(requests[rows], indices[rows], sampling, **some))
                    continue
                made, last = self._passes(requests[rows], indices[rows], sampling, num_frames, exact=True, **some)
                pixels.extend(made)
                codes.append(last)
        whole = torch.cat(codes)
        output = whole if output_type == "codes" else as_output(pixels, output_type)
        images, videos = (None, output) if self.makes_clips else (output, None)
        names = [request.named(self.label_name) for request in requests]
        return Output(images, videos, names, [request.label for request in requests], seed, whole, self.frame_rate)

    edit, extend = edit, extend

    def requests(
        self,
        class_labels: Sequence[str | int] | str | int | None = None,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: Sequence[str] | str | None = None,
        frames: Frames | None = None,
    ) -> list[Request]:
        """What the arguments of a call ask for, one entry each; raises ValueError for what the model does not take."""
        return self.inputs.requests(class_labels, prompt, negative_prompt, frames, read=self._read)

    def sample(
        self,
        batch: Sequence[Request],
        indices: Sequence[int],
        sampling: Sampling | None = None,
        *,
        seed: int | Sequence[int] = 0,
        num_frames: int | None = None,
        known: Tensor | None = None,
        particles: int = 1,
        callback: Callback | None = None,
        exact: bool = False,
    ) -> list[Tensor]:
        """Sample a batch, whose row k is number `indices[k]` of the seed, or of its own: pictures (3, H, W) or clips
        (3, T, H, W) in -1..1.

        Clips are the context frames and passes of the model until there are `num_frames`. For `exact` see `decode`.
        """
        options: dict[str, Any] = {"seed": seed, "known": known, "particles": particles, "callback": callback}
        return self._passes(batch, indices, sampling or self.sampling, num_frames, exact=exact, **options)[0]

    def _passes(
        self,
        batch: Sequence[Request],
        indices: Sequence[int],
        sampling: Sampling,
        num_frames: int | None,
        *,
        known: Tensor | None,
        exact: bool,
        **options: Any,
    ) -> tuple[list[Tensor], Tensor]:
        """What `sample` gives, and the codes (B, *grid) of the last pass."""
        if not self.makes_clips:
            codes = self._codes(batch, indices, sampling, known=known, **options)
            return list(self.decode(codes, exact=exact)), codes
        clips = [request.frames for request in batch]
        for number in itertools.count():
            asked = [dataclasses.replace(request, frames=clip) for request, clip in zip(batch, clips, strict=True)]
            streams = [index + (number << 32) for index in indices]  # each pass has its own
            codes = self._codes(asked, streams, sampling, known=known, **options)
            known = None
            decoded = self.decode(codes, exact=exact)
            longer = [self.continuation.extended(clip, own) for clip, own in zip(clips, decoded, strict=True)]
            if all(clip.shape[1] >= (num_frames or 0) for clip in longer):
                break
            clips = [*longer]
        return [clip[:, :num_frames] for clip in longer], codes

    def condition(self, requests: Sequence[Request]) -> tuple[Condition, Condition | None]:
        """The condition of requests, and the negative one where that is not simply the null condition."""
        config = self.model.config
        labels = torch.tensor([request.label for request in requests])
        frames = [request.frames for request in requests]
        prefix = with_given(self.continuation.condition(frames).prefix, requests) if config.prefix_grid else None

        def together(labels: Tensor, prompts: Sequence[str], null: Sequence[bool]) -> Condition:
            text = None
            if config.text_dim:
                features, mask, blank = self.captions.encode(prompts)
                text = TextFeatures(features, mask, blank | torch.tensor(null).to(blank.device))
            return Condition(labels if config.num_classes else None, text, prefix)

        positive = together(labels, [request.prompt for request in requests], [False] * len(requests))
        null = [not request.has_negative for request in requests]
        if all(null):
            return positive, None
        words = [request.negative if request.has_negative else request.prompt for request in requests]
        return positive, together(torch.full_like(labels, NULL_CLASS), words, null)

    def prepared(
        self, batch: Sequence[Request], sampling: Sampling, known: Tensor | None
    ) -> tuple[Condition, Condition | None, Sampling, Tensor | None]:
        """What a pass of the model over requests takes: conditions as in `condition`, settings, and codes to keep."""
        condition, negative = self.condition(batch)
        if not any(request.is_guided for request in batch) and (self.config.num_classes or self.config.text_dim):
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)  # both sides would be the null condition
        return condition, negative, sampling, kept(known, batch, self.continuation.known(condition))

    def _codes(
        self,
        batch: Sequence[Request],
        indices: Sequence[int],
        sampling: Sampling,
        *,
        seed: int | Sequence[int],
        known: Tensor | None,
        callback: Callback | None,
        particles: int = 1,
    ) -> Tensor:
        """Sample one pass of the model: codes (B, *grid). One thread at a time, as the session holds one generation."""
        with self._lock:
            condition, negative, sampling, known = self.prepared(batch, sampling, known)
            options: dict[str, Any] = {"negative": negative, "seed": seed, "indices": indices, "known": known}
            how: Any = partial(generate_fronts, session=self.session)
            if particles > 1 and known is not None:
                how = partial(weighted_fronts, particles=particles)
            codes = torch.empty(0)
            for front, codes, *_ in how(self.model, condition, sampling, **options):
                if callback is not None:
                    callback(self, front, codes)
            return codes

    def check_length(self, num_frames: int | None, requests: Sequence[Request], output_type: str) -> None:
        """Refuse lengths that can't be, before anything is sampled."""
        lengths = {0 if request.frames is None else request.frames.shape[1] for request in requests}
        self.continuation.check(lengths, num_frames, output_type)

    def _read(self, frames: Frames) -> Tensor:
        """A clip as float -1..1 (3, T, H, W) of the model's size."""
        _, height, width = self.pixel_shape
        clip = torch.from_numpy(as_array(frames, (height, width), frame_rate=self._trained_rate))
        return clip.permute(3, 0, 1, 2).to(self.model.device).float() / 127.5 - 1

    @checked
    @torch.inference_mode()
    def decode(self, codes: Tensor, *, exact: bool = False) -> Tensor:
        """Codes (B, *grid), all decided, to pixels -1..1 (B, 3, [T,] H, W), some at a time so that memory is bounded.

        `exact` decodes each alone on a CPU, so that rounding does not depend on the others either. Beside a model in
        bfloat16 the decoder's products are too.
        """
        if codes.ndim != 1 + len(self.model.config.grid):
            raise ValueError(f"codes must be (B, *{self.model.config.grid}), not {tuple(codes.shape)}")
        codes = codes.to(self.model.device)
        alone = exact and codes.device.type == "cpu"
        count = 1 if alone else max(1, DECODED_PIXELS // math.prod(self.pixel_shape))
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self._half):
            return torch.cat([self.tokenizer.decode(part).float().clamp(-1, 1) for part in codes.split(count)])

    @checked
    @torch.inference_mode()
    def pictures(self, codes: Tensor, output_type: Annotated[str, OneOf(*OUTPUT_TYPES)] = "pil") -> Any:
        """Decode codes (B, *grid), with -1 (shown as mid-grey) where undecided, into one of the output types."""
        if output_type == "codes":
            return codes
        if not holds_whole_numbers(codes):
            raise ValueError(f"codes must be whole numbers, not {codes.dtype}")
        partial = self.tokenizer is not None and self.tokenizer.shows_undecided
        pixels = self.decode(codes if partial else codes.clamp_min(0))
        return as_output(list(pixels if partial else greyed(pixels, codes < 0)), output_type)
