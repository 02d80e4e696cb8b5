"""Classes, words or given frames in, pictures or clips out: the only place where text encoder, condition, sampling and
tokenizer meet.

Knows model folders, names of classes, captions and pixels; does not know the command line or HTTP. Legend: `B` batch,
`T H W` frames and pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nar.condition import NULL_CLASS, Condition, TextFeatures
from nar.media.clips import Frames, as_array, several
from nar.media.pixels import as_images
from nar.model import Transformer
from nar.pipeline.continuation import Continuation
from nar.sampling import Sampling, Session, generate_fronts
from nar.storage.fields import suggestion
from nar.storage.folder import CONFIG, find_model, from_dict, read_config
from nar.text import TextEncoder, TextEncoderConfig
from nar.tokenizer import Tokenizer, load_tokenizer

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
USUAL_FRAME_RATE = 8.0  # of clips of models that do not say
KEPT_CAPTIONS = 128  # whose features are not computed again: of flan-t5-xl a MB each
DECODED_PIXELS = 2**20  # at once: 16 pictures of 256x256, whose decoder takes some 2 GB

Callback = Callable[["Pipeline", int, Tensor], None]


class Encoder(Protocol):
    """What makes features of captions: `nar.text.TextEncoder`, or anything with these three."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, T, F) float32, padded on the left, and their mask (B, T) bool."""
        ...

    def blank(self, captions: Sequence[str]) -> Tensor:
        """Which captions (B,) bool say nothing."""
        ...

    def close(self) -> None:
        """Free the memory; another `encode` takes it again."""
        ...


@dataclass(frozen=True)
class Output:
    """What a call made: `images` or, of a model that makes clips, `videos`; the other is None.

    By output type they are Pillow pictures (a list of them a clip), uint8 (B, [T,] H, W, 3), float -1..1
    (B, 3, [T,] H, W), or codes (B, *grid). `names` says what each is of: its prompt, or else the name of its class.
    Number i can be drawn again with `seed` at its place in `indices` of `nar.generate`.
    """

    images: Any
    videos: Any
    names: list[str]
    class_labels: list[int]
    seed: int


@dataclass(frozen=True, eq=False)
class Request:
    """What one picture or clip is made from. `frames` are float -1..1 (3, T, H, W), those given."""

    label: int = NULL_CLASS
    prompt: str = ""
    negative: str = ""
    frames: Tensor | None = None


class Pipeline:
    """A model with its tokenizer and, where it reads captions, its text encoder; call it to get pictures or clips.

    Args:
        text: the encoder for prompts: loaded at the first prompt when given as its config.
        given_frames: numbers of frames that frame prediction was trained to continue; see
            `nar.pipeline.continuation.Continuation`.
        frame_rate: of clips, frames per second. Where it is known, files with given frames are read at it; None stands
            for 8, and for frames as they are.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        class_names: Sequence[str] = (),
        sampling: Sampling | None = None,
        *,
        text: TextEncoderConfig | Encoder | None = None,
        given_frames: Sequence[int] = (),
        frame_rate: float | None = None,
    ) -> None:
        if tokenizer.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the model has {model.config.vocab_size} codes but the tokenizer {tokenizer.config.vocab_size}: "
                "they do not belong together"
            )
        self.model = model
        self.session = Session(model)
        self._half = next(model.parameters()).dtype == torch.bfloat16
        self.tokenizer = tokenizer
        self.class_names = tuple(class_names)
        self.sampling = sampling or Sampling()
        self.text = text
        self._encoded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._encoded_by: Encoder | None = None
        self.pixel_shape = tokenizer.pixel_shape(model.config.grid)
        self.continuation = Continuation(model, tokenizer, given_frames)
        self._trained_rate, self.frame_rate = frame_rate, frame_rate or USUAL_FRAME_RATE

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype = "float32",
        text_encoder: str | Path | None = None,
        revision: str | None = None,
    ) -> Pipeline:
        """Load a bundled name, a model folder or a hub id (`revision`: its branch, tag or commit).

        `device` defaults to cuda where there is one.

        The weights of the tokenizer stay in float32, whatever the `dtype` of the transformer: "float32", "bfloat16",
        "float16", or on a CPU "int8"; with "bfloat16" its decoder computes in that. On a CPU "float16" means
        half-precision weights and float32 arithmetic; see `nar.precision`. `text_encoder` (a folder or hub id) takes
        the place of the one that the folder names; published text models name none. It is loaded at the first prompt.

        Raises:
            FileNotFoundError: no such model, or it comes without a tokenizer.
            ValueError: a damaged folder, or a text encoder for a model that reads no words.
        """
        folder = find_model(source, revision)
        config = read_config(folder)
        if config.get("kind") == "transformer" and not (folder / "tokenizer").is_dir():
            raise FileNotFoundError(
                f"{folder} has no tokenizer to make pictures with; copy a converted one to {folder / 'tokenizer'}, "
                "or convert the model again with --tokenizer FOLDER"
            )
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = Transformer.from_pretrained(folder, dtype, place)
        if text_encoder and not model.config.text_dim:
            raise ValueError(f"{source} reads no words: leave the text encoder out")
        # Features of published models are those of cleaned captions; only they keep a caption's padding when it drops.
        text = {"source": "", "max_length": model.config.text_length, "clean": model.config.null_mask == "caption"}
        text |= config.get("text_encoder", {}) | ({"source": str(text_encoder)} if text_encoder else {})
        return cls(
            model,
            load_tokenizer(folder / "tokenizer").to(place),
            config.get("class_names", ()),
            from_dict(Sampling, config.get("sampling", {}), folder / CONFIG),
            text=from_dict(TextEncoderConfig, text, folder / CONFIG) if model.config.text_dim else None,
            given_frames=config.get("given_frames", ()),
            frame_rate=config.get("frame_rate"),
        )

    def at_grid(self, grid: Sequence[int]) -> Pipeline:
        """The same pipeline, weights shared, for pictures of another size; raises ValueError when the model can't."""
        return Pipeline(
            self.model.at_grid(tuple(grid)),
            self.tokenizer,
            self.class_names,
            self.sampling,
            text=self.text,
            given_frames=self.continuation.counts,
            frame_rate=self._trained_rate,
        )

    @property
    def makes_clips(self) -> bool:
        """Whether results have frames."""
        return len(self.pixel_shape) == 3

    def label_index(self, label: str | int) -> int:
        """The number of a class, given its name (any case) or number; raises ValueError with the names.

        A string is a name where there is one like it, "10" too; an int is always the number.
        """
        count = self.model.config.num_classes
        if not count:
            raise ValueError(f"this model has no classes; it takes {self._inputs()}")
        text = str(label).strip()
        names = [name.lower() for name in self.class_names]
        if isinstance(label, str) and text.lower() in names:
            return names.index(text.lower())
        if text.isdecimal() and int(text) < count:
            return int(text)
        listed = ", ".join(self.class_names) if 0 < len(names) <= 40 else f"numbers 0 to {count - 1}"
        raise ValueError(f"unknown class {text!r}{suggestion(text.lower(), names)}; classes: {listed}")

    def label_name(self, index: int) -> str:
        """The name of a class, or its number where there are no names."""
        return self.class_names[index] if index < len(self.class_names) else str(index)

    def text_encoder(self) -> Encoder:
        """The encoder for prompts, opened when it is first asked for.

        Raises:
            ValueError: the model names none and none was given, or it is another one than the model was trained with.
            ModuleNotFoundError: a package is missing.
        """
        if self.text is None or (isinstance(self.text, TextEncoderConfig) and not self.text.source):
            raise ValueError(
                "this model's folder names no text encoder; give the one that it was trained with: "
                "--text-encoder FOLDER, or Pipeline.from_pretrained(..., text_encoder=FOLDER) "
                "(published NAR and LlamaGen text models: google/flan-t5-xl)"
            )
        if isinstance(self.text, TextEncoderConfig):
            encoder = TextEncoder.open(self.text, device=self.model.device)
            if encoder.dim != self.model.config.text_dim:
                raise ValueError(
                    f"text encoder {self.text.source} has width {encoder.dim}, the model takes "
                    f"{self.model.config.text_dim}; use the encoder that the model was trained with"
                )
            self.text = encoder
        return self.text

    def drop_text_encoder(self) -> None:
        """Free the memory of the text encoder; the next prompt loads it again."""
        self._encoded = {}
        if self.text is not None and not isinstance(self.text, TextEncoderConfig):
            self.text.close()

    def __call__(
        self,
        class_labels: Sequence[str | int] | str | int | None = None,
        *,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: Sequence[str] | str | None = None,
        frames: Frames | None = None,
        num_frames: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        guidance_curve: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        known: Tensor | np.ndarray | None = None,
        batch_size: int = 32,
        output_type: str = "pil",
        callback_on_front_end: Callback | None = None,
    ) -> Output:
        """Draw `num_images_per_prompt` pictures, or clips, of each label, prompt or given clip, in that order.

        Settings that are None take the model's own defaults. Number i depends on (seed, i) and on what it is told, not
        on `batch_size` or its neighbours; without `seed` or `generator` a seed is drawn, and returned.

        Args:
            prompt: words; an empty string is unconditional. Where several kinds are given, one value goes with all.
            negative_prompt: words that guidance leads away from, in place of the model's null condition.
            frames: a clip to continue, or a list with one for each result: a file, Pillow pictures, or uint8
                (T, H, W, 3). Its last frames are the condition; the result begins with all of them, as given (cut and
                resized to the model's size where they have another). Files are read at the model's frame rate.
            num_frames: length of the clips, those given included. By default what one pass of the model adds. Longer
                ones are drawn in several passes, each of which sees only the last frames of what is there.
            guidance_scale: 1.0 is off.
            generator: the seed is drawn from it, so that the next call with it makes others.
            known: codes (number of pictures, *grid) kept as given, -1 where free; given frames come first.
            output_type: "pil", "np" (uint8), "pt" (float -1..1) or "codes" (of one pass).
            callback_on_front_end: called as f(pipe, front, codes) after each front of each batch; codes are -1 where
                undecided.

        Raises:
            ValueError: an unknown class, something that the model does not take, or a setting that is out of range.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
        if num_images_per_prompt < 1 or batch_size < 1:
            raise ValueError(
                f"num_images_per_prompt {num_images_per_prompt} and batch_size {batch_size} must be at least 1"
            )
        given = {
            "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "guidance_curve": guidance_curve,
            "temperature": temperature, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip
        sampling = dataclasses.replace(self.sampling, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        if generator is not None and not (seed is None and isinstance(generator, torch.Generator)):
            raise ValueError("give either seed or one torch.Generator for all; number i depends on (seed, i)")
        if seed is None:
            seed = secrets.randbits(32) if generator is None else _drawn_seed(generator)
        requests = self.requests(class_labels, prompt, negative_prompt, frames)
        requests = [request for request in requests for _ in range(num_images_per_prompt)]
        if sampling.guidance_scale == 1.0 and any(_says(request.negative) for request in requests):
            raise ValueError("a negative prompt needs guidance: set guidance_scale above 1.0")
        known = None if known is None else torch.as_tensor(known)
        if known is not None and len(known) != len(requests):
            raise ValueError(f"known has {len(known)} rows for {len(requests)} pictures")
        self._check_length(num_frames, requests, output_type)
        made: list[Tensor] = []
        for start in range(0, len(requests), batch_size):
            rows = range(start, min(start + batch_size, len(requests)))
            batch = requests[rows.start : rows.stop]
            fixed = None if known is None else known[rows.start : rows.stop]
            options: dict[str, Any] = {"seed": seed, "known": fixed, "callback": callback_on_front_end}
            if output_type == "codes":
                made.extend(self._codes(batch, rows, sampling, **options))
            else:
                made.extend(self.draw(batch, rows, sampling, num_frames=num_frames, exact=True, **options))
        result = torch.stack(made) if output_type == "codes" else _as_output(made, output_type)
        return Output(
            None if self.makes_clips else result,
            result if self.makes_clips else None,
            [request.prompt or (self.label_name(request.label) if request.label >= 0 else "") for request in requests],
            [request.label for request in requests],
            seed,
        )

    def requests(
        self,
        class_labels: Sequence[str | int] | str | int | None = None,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: Sequence[str] | str | None = None,
        frames: Frames | None = None,
    ) -> list[Request]:
        """What the arguments of a call ask for, one entry each; raises ValueError for what the model does not take."""
        config = self.model.config
        for name, value, taken in (
            ("class labels", class_labels, config.num_classes), ("prompts", prompt, config.text_dim),
            ("negative prompts", negative_prompt, config.text_dim), ("frames", frames, config.prefix_grid),
        ):  # fmt: skip
            if value is not None and not taken:
                raise ValueError(f"this model takes no {name}; it takes {self._inputs()}")
        if class_labels is None and prompt is None and frames is None:
            if 0 in self.continuation.counts and not (config.num_classes or config.text_dim):
                return [Request()]  # a clip from nothing
            raise ValueError(f"say what to make: this model takes {self._inputs()}")
        if config.prefix_grid and frames is None and 0 not in self.continuation.counts:
            raise ValueError("this model continues clips: give it frames")
        if config.num_classes and class_labels is None and not config.null_class:
            raise ValueError("this model has no null class: give it class labels too")
        columns: dict[str, list[Any]] = {}
        if class_labels is not None:
            columns["label"] = [self.label_index(label) for label in _listed(class_labels)]
        if prompt is not None:
            columns["prompt"] = _texts(prompt)
        if negative_prompt is not None:
            columns["negative"] = _texts(negative_prompt)
        if frames is not None:
            columns["frames"] = [self._read(clip) for clip in several(frames)]
        count = max(map(len, columns.values()))
        if wrong := [f"{len(column)} of {name}" for name, column in columns.items() if len(column) not in {1, count}]:
            raise ValueError(f"{', '.join(wrong)} for {count} results: give one, or as many")
        if not count:
            raise ValueError("nothing is asked for: the list is empty")
        return [
            Request(**{name: column[index % len(column)] for name, column in columns.items()}) for index in range(count)
        ]

    def draw(
        self,
        batch: Sequence[Request],
        indices: Sequence[int],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        num_frames: int | None = None,
        known: Tensor | None = None,
        callback: Callback | None = None,
        exact: bool = False,
    ) -> list[Tensor]:
        """One batch, whose row k is number `indices[k]` of the seed: pictures (3, H, W) or clips (3, T, H, W) in -1..1.

        Clips are the given frames and passes of the model until there are `num_frames`. For `exact` see `decode`.
        """
        sampling = sampling or self.sampling
        if not self.makes_clips:
            codes = self._codes(batch, indices, sampling, seed=seed, known=known, callback=callback)
            return list(self.decode(codes, exact=exact))
        clips = [request.frames for request in batch]
        for number in itertools.count():
            asked = [dataclasses.replace(request, frames=clip) for request, clip in zip(batch, clips, strict=True)]
            streams = [index + (number << 32) for index in indices]  # each pass has its own
            codes = self._codes(asked, streams, sampling, seed=seed, known=known, callback=callback)
            known = None
            longer = []
            for clip, made in zip(clips, self.decode(codes, exact=exact), strict=True):
                added = made[:, self.continuation.num_context(clip) :]
                longer.append(added if clip is None else torch.cat([clip, added], 1))
            if all(clip.shape[1] >= (num_frames or 0) for clip in longer):
                break
            clips = [*longer]
        return [clip[:, :num_frames] for clip in longer]

    def condition(self, requests: Sequence[Request]) -> tuple[Condition, Condition | None]:
        """What the model is told, and what guidance leads it away from where that is not simply the null condition."""
        config = self.model.config
        labels = torch.tensor([request.label for request in requests])
        clips = [request.frames for request in requests]
        prefix = self.continuation.condition(clips).prefix if config.prefix_grid else None

        def together(labels: Tensor, prompts: Sequence[str], null: Sequence[bool]) -> Condition:
            return Condition(
                labels if config.num_classes else None,
                self._words(prompts, null) if config.text_dim else None,
                prefix,
            )

        told = together(labels, [request.prompt for request in requests], [False] * len(requests))
        led = [_says(request.negative) for request in requests]
        if not any(led):
            return told, None
        apart = [request.negative if says else request.prompt for request, says in zip(requests, led, strict=True)]
        return told, together(torch.full_like(labels, NULL_CLASS), apart, [not says for says in led])

    def _words(self, prompts: Sequence[str], null: Sequence[bool]) -> TextFeatures:
        """The features of each caption, encoded alone so that they do not depend on the others.

        Those marked in `null`, and those that say nothing, are the null condition.
        """
        features, masks, blank = (
            torch.cat(parts).to(self.model.device) for parts in zip(*map(self._features, prompts), strict=True)
        )
        return TextFeatures(features, masks, blank | torch.tensor(null).to(blank.device))

    def _features(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """Features (1, T, F) and mask (1, T) of one caption, and whether it says nothing (1,); some are kept."""
        if _says(prompt):
            encoder = self.text_encoder()
            if encoder is not self._encoded_by:
                self._encoded, self._encoded_by = {}, encoder
            if prompt not in self._encoded:
                while len(self._encoded) >= KEPT_CAPTIONS:
                    del self._encoded[next(iter(self._encoded))]
                features, mask = encoder.encode([prompt])
                self._encoded[prompt] = features, mask, encoder.blank([prompt]).to(features.device)
            return self._encoded[prompt]
        config, device = self.model.config, self.model.device  # no encoder is needed for nothing
        last = torch.arange(config.text_length, device=device) == config.text_length - 1  # where the text ends
        features = torch.zeros(1, config.text_length, config.text_dim, device=device)
        return features, last[None], torch.ones(1, dtype=torch.bool, device=device)

    def _codes(
        self,
        batch: Sequence[Request],
        indices: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
        known: Tensor | None,
        callback: Callback | None,
    ) -> Tensor:
        """One pass of the model: codes (B, *grid)."""
        condition, negative = self.condition(batch)
        told = any(request.label >= 0 or _says(request.prompt) for request in batch)
        if negative is None and not told and (self.model.config.num_classes or self.model.config.text_dim):
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)  # the null condition, led away from itself
        given = self.continuation.known(condition)
        if known is None or given is None:
            known = given if known is None else known
        else:
            known = torch.where(given >= 0, given, known.to(given.device))
        codes = torch.empty(0)
        for front, codes in generate_fronts(
            self.model, condition, sampling, negative=negative, seed=seed, indices=indices, known=known,
            session=self.session,
        ):  # fmt: skip
            if callback is not None:
                callback(self, front, codes)
        return codes

    def _check_length(self, num_frames: int | None, requests: Sequence[Request], output_type: str) -> None:
        """Refuse lengths that can't be, before anything is drawn."""
        if not self.makes_clips:
            if num_frames is not None:
                raise ValueError("this model makes pictures: num_frames is for models that make clips")
            return
        if output_type == "codes" and num_frames is not None:
            raise ValueError("codes are those of one pass: leave num_frames out")
        lengths = {0 if request.frames is None else request.frames.shape[1] for request in requests}
        self.continuation.check(lengths, num_frames)
        if num_frames is None and len(lengths) > 1 and output_type in ("np", "pt"):
            raise ValueError(f"clips of {sorted(lengths)} given frames grow to several lengths: set num_frames")

    def _inputs(self) -> str:
        """What the model can be told."""
        config = self.model.config
        names = (("class labels", config.num_classes), ("prompts", config.text_dim), ("frames", config.prefix_grid))
        return ", ".join(name for name, present in names if present)

    def _read(self, frames: Frames) -> Tensor:
        """A clip as float -1..1 (3, T, H, W) of the model's size."""
        _, height, width = self.pixel_shape
        clip = torch.from_numpy(as_array(frames, (height, width), frame_rate=self._trained_rate))
        return clip.permute(3, 0, 1, 2).to(self.model.device).float() / 127.5 - 1

    @torch.inference_mode()
    def decode(self, codes: Tensor, *, exact: bool = False) -> Tensor:
        """Codes (B, *grid), all decided, to pixels -1..1 (B, 3, [T,] H, W), some at a time so that memory is bounded.

        `exact` decodes each alone on a CPU, so that rounding does not depend on the others either. Beside a model in
        bfloat16 the decoder's products are too.
        """
        codes = codes.to(self.model.device)
        alone = exact and codes.device.type == "cpu"
        count = 1 if alone else max(1, DECODED_PIXELS // math.prod(self.pixel_shape))
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self._half):
            return torch.cat([self.tokenizer.decode(part).float().clamp(-1, 1) for part in codes.split(count)])

    @torch.inference_mode()
    def pictures(self, codes: Tensor, output_type: str = "pil") -> Any:
        """Decode codes (B, *grid), with -1 (drawn as mid-grey) where undecided, into one of the output types."""
        if output_type == "codes":
            return codes
        pixels = self.decode(codes.clamp_min(0))
        if (codes < 0).any():
            hidden = (codes < 0)[:, None].float().to(pixels.device)
            pixels = pixels.masked_fill(torch.nn.functional.interpolate(hidden, size=pixels.shape[2:]).bool(), 0.0)
        return _as_output(list(pixels), output_type)


def _as_output(pixels: Sequence[Tensor], output_type: str) -> Any:
    """Pictures (3, H, W) or clips (3, T, H, W) in -1..1 as one of the output types."""
    if output_type == "pt":
        return torch.stack(list(pixels))
    arrays = [as_images(one[None])[0] for one in pixels]
    if output_type == "np":
        return np.stack(arrays)
    return [
        Image.fromarray(array) if array.ndim == 3 else [Image.fromarray(frame) for frame in array] for array in arrays
    ]


def _says(prompt: str) -> bool:
    """Whether anything is left of a prompt without spaces and control characters."""
    return any(character.isprintable() and not character.isspace() for character in prompt)


def _drawn_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**32, (), generator=generator, device=generator.device))


def _listed(value: Any) -> list[Any]:
    value = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    return [value] if isinstance(value, str | int) else list(value)


def _texts(prompts: Sequence[str] | str) -> list[str]:
    listed = _listed(prompts)
    if strange := [prompt for prompt in listed if not isinstance(prompt, str)]:
        raise ValueError(f"a prompt must be a string, not {type(strange[0]).__name__}")
    return listed
