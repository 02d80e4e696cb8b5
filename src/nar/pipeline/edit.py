"""Pictures and clips edited by a model: what is given of them as a condition, and a window after the other sampled.

A picture of any size is worked on in a region around the mask, which is brought to the model's size; one that is
extended in windows that overlap. Where a model has no condition on holes, the codes outside of the mask are kept while
those inside are sampled, which sees only half of what surrounds a hole. Knows masks, codes and requests; does not know
how codes are sampled. Legend: `T H W` frames and pixels of what is edited, `h w` pixels of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Never

import numpy as np
import torch
from torch import Tensor

from nar.condition import PrefixCodes
from nar.media.clips import as_array
from nar.media.pixels import as_pixels
from nar.pipeline import habits
from nar.pipeline.canvas import Box, Canvas, Mask, Picture, around, extended, masked, read, windows
from nar.pipeline.holes import blanked, touched
from nar.pipeline.output import Output, as_output
from nar.pipeline.particles import check_particles
from nar.pipeline.requests import Given, Request, check_call, check_guidance, seeds_of
from nar.sampling import settings_among
from nar.tokenizer import Tokenizer

MODES = ("fill", "replace")


def opened(pipe: Any, image: Picture) -> np.ndarray:
    """What a pipeline is to edit as uint8 ([T,] H, W, 3); of a clip as many frames as the model makes.

    Raises:
        ValueError: what is no picture, or a clip of another length.
    """
    if not pipe.makes_clips:
        return read(image)
    clip, count = as_array(image, frame_rate=pipe._trained_rate), pipe.pixel_shape[0]
    if len(clip) != count:
        raise ValueError(f"the clip has {len(clip)} frames, this model edits clips of {count}: cut it to so many")
    return clip


def codes_given(
    tokenizer: Tokenizer, pixels: Tensor, hidden: Tensor, grid: tuple[int, ...], mode: str = "fill", *, holes: bool
) -> Given:
    """The codes that a model is given of pixels (1, 3, [T,] h, w) with `hidden` ones (1, [T,] h, w).

    In mode "fill" they are those of what is left of the picture, which is blanked before it is encoded; in "replace"
    its own, and those around the mask are kept.

    `holes` says that the model has a condition on them; others keep the codes outside of the mask in both modes.
    """
    seen = blanked(pixels, hidden) if mode == "fill" else pixels
    with torch.inference_mode():
        codes = tokenizer.encode(seen.to(next(tokenizer.parameters()).device))[0].cpu()
    hole = touched(hidden, grid)[0]
    known = codes.masked_fill(hole, -1)
    return Given(codes.masked_fill(hole, 0), ~hole, None if holes and mode == "fill" else known)


def with_given(prefix: PrefixCodes | None, requests: Sequence[Request]) -> PrefixCodes | None:
    """A prefix with the codes that some requests are given in place of its holes."""
    if prefix is None or prefix.mask is None or not any(request.given for request in requests):
        return prefix
    codes, mask = prefix.codes.clone(), prefix.mask.clone()
    for row, request in enumerate(requests):
        if own := request.given:
            codes[row], mask[row] = own.codes.to(codes.device), own.there.to(mask.device)
    return PrefixCodes(codes, mask)


def kept(known: Tensor | None, requests: Sequence[Request], context: Tensor | None) -> Tensor | None:
    """The codes (B, *grid) to keep, -1 where free: those of `context` frames, those that requests are given to keep,
    and `known`, in this order."""
    rows = [None if request.given is None else request.given.known for request in requests]
    own = None
    if any(row is not None for row in rows):
        free = torch.full_like(next(row for row in rows if row is not None), -1)
        own = torch.stack([free if row is None else row for row in rows])
    for more in (own, context):
        if more is not None:
            known = more if known is None else torch.where(more >= 0, more, known.to(more.device))
    return known


def edit(
    self: Any,
    image: Picture,
    *,
    mask: Mask | None = None,
    box: Sequence[int] | None = None,
    class_labels: Sequence[str | int] | str | int | None = None,
    prompt: Sequence[str] | str | None = None,
    negative_prompt: Sequence[str] | str | None = None,
    mode: str = "fill",
    num_images_per_prompt: int = 1,
    guidance_scale: float | None = None,
    guidance_interval: int | None = None,
    guidance_curve: str | None = None,
    guidance_power: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    particles: int = 1,
    batch_size: int = 32,
    output_type: str = "pil",
    callback_on_front_end: Callable[[Any, int, Tensor], None] | None = None,
    blend: bool = True,
    **others: Never,
) -> Output:
    """Make a part of a picture or clip anew, `num_images_per_prompt` times for each label or prompt; settings as in a
    call.

    What is outside of the mask comes back as it was, byte for byte. A picture of another size than the model's is
    worked on in a region around the mask. `Output.codes` are those of the region.

    Args:
        image: a file, a Pillow picture, or uint8 (H, W, 3); transparency becomes white. Of a model of clips a clip with
            as many frames as the model makes: a file, Pillow pictures, or uint8 (T, H, W, 3).
        mask: a picture of the same size, white where something new goes, or an array (H, W), of clips maybe (T, H, W).
        box: (left, top, width, height) in place of a mask.
        mode: "fill" takes no notice of what the mask hides; "replace" keeps the picture's own codes around it, which
            know something of it: for changing a picture that is there.
        particles: samples of each result, weighted by how likely they make the codes that are kept, of models without a
            condition on holes, and in mode "replace".
        blend: move what is made towards the picture at the edge of the mask.

    Raises:
        ValueError: a model whose codes have no places or that only continues clips, a mask that does not fit, an
            unknown class, or a setting that is out of range.
    """
    habits.refuse(others, habits.CALL, signature(edit).parameters)
    asked = {name: value for name, value in locals().items() if name != "others"}
    _check(self, asked)
    picture = opened(self, image)
    hidden = masked(picture, mask, box)
    return _sampled(self, picture, hidden, [around(hidden, self.pixel_shape[-2:])], asked)


def extend(
    self: Any,
    image: Picture | None,
    size: Sequence[int],
    *,
    position: Sequence[int] | None = None,
    **options: Any,
) -> Output:
    """Continue a picture beyond its edges, in any direction, to `size` (H, W); without one make a whole one of it.

    It is made in windows of the model's size, each half over what is there already, the nearest first. What is given
    comes back as it was, byte for byte.

    Args:
        image: as of `edit`; None for nothing.
        position: where the given picture lies in the result, (left, top); by default in the middle.
        options: those of `edit`, except for its mask and mode.

    Raises:
        ValueError: a model of clips, a size in which the picture does not fit, and as of `edit`.
        TypeError: an argument that there is none of.
    """
    taken = {name: own.default for name, own in signature(edit).parameters.items() if name not in _NOT_EXTENDED}
    habits.refuse(set(options) - set(taken), habits.CALL, [*taken, "size", "position"])
    asked = {**taken, "mode": "fill", **options}
    if self.makes_clips:
        raise ValueError("this model makes clips, which it continues in time (frames=...): it extends no pictures")
    _check(self, asked)
    picture, hidden, given = extended(None if image is None else read(image), size, position)
    return _sampled(self, picture, hidden, windows(given, hidden.shape, self.pixel_shape), asked)


def of_size(self: Any, size: Sequence[int], arguments: Mapping[str, Any]) -> Output:
    """A call for pictures of `size` (H, W), with all its `arguments`."""
    for name in ("frames", "num_frames", "known", "callback_on_front_end"):
        if arguments[name] is not None:
            raise ValueError(f"size does not go with {name}: pictures of another size are made in several passes")
    taken = set(signature(edit).parameters) - {*_NOT_EXTENDED, "blend", "particles"}
    return extend(self, None, size, **{name: arguments[name] for name in taken})


_NOT_EXTENDED = ("self", "image", "mask", "box", "mode", "others")


def _check(self: Any, asked: Mapping[str, Any]) -> None:
    """Refuse arguments of `edit` that are not what they must be, and models that can't."""
    if self.continuation.prefix and not self.continuation.has_holes:
        raise ValueError("this model continues clips (frames=...) and was not trained to edit them")
    if all(axis.isdecimal() for axis in self.tokenizer.code_axes):
        raise ValueError("this model's codes have no places of their own in its results: it can't edit")
    if self.continuation.has_holes and asked["mode"] == "fill" and asked["particles"] != 1:
        raise ValueError("this model has a condition on holes and keeps no codes in mode 'fill': leave particles out")
    check_particles(asked["particles"], known=())
    if asked["mode"] not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {asked['mode']!r}")
    check_call(asked["output_type"], asked["batch_size"], asked["callback_on_front_end"], blend=asked["blend"])
    if asked["output_type"] == "codes":
        raise ValueError("output_type must be pil, np or pt, not 'codes': codes have no pixels around them")


def _sampled(
    self: Any, picture: np.ndarray, hidden: np.ndarray, regions: Sequence[Box], asked: Mapping[str, Any]
) -> Output:
    """What is `hidden` of a picture or clip sampled, in one region after the other, as often as `asked` for."""
    sampling = dataclasses.replace(self.sampling, **settings_among(asked))
    words = asked["class_labels"], asked["prompt"], asked["negative_prompt"]
    requests = self.inputs.requests(*words, None, read=read, number=asked["num_images_per_prompt"], nothing=True)
    check_guidance(self.sampling, sampling, requests)
    count = len(requests)
    seed = seeds_of(asked["seed"], asked["generator"], count)
    seeds, indices = ([seed] * count, range(count)) if isinstance(seed, int) else (seed, [0] * count)
    made, codes = list[np.ndarray](), list[Tensor]()
    for start in range(0, count, asked["batch_size"]):
        rows = slice(start, start + asked["batch_size"])
        pictures, left, number = [picture] * len(requests[rows]), hidden.copy(), 0
        for region in regions:
            new = np.zeros_like(left)
            new[(..., *region.slices)] = left[(..., *region.slices)]
            if not new.any():
                continue
            canvases = {id(one): Canvas.of(one, left, region, self.pixel_shape[-2:]) for one in pictures}
            given = {key: _given(self, canvas, asked["mode"]) for key, canvas in canvases.items()}
            now = [
                dataclasses.replace(request, given=given[id(one)])
                for request, one in zip(requests[rows], pictures, strict=True)
            ]
            streams = [index + (number << 32) for index in indices[rows]]  # each region has its own
            options = {"known": None, "particles": asked["particles"], "callback": asked["callback_on_front_end"]}
            sampled = self._codes(now, streams, sampling, seed=seeds[rows], **options)
            decoded = self.decode(sampled, exact=True)
            pictures = [
                canvases[id(one)].pasted(pixels, blend=asked["blend"])
                for one, pixels in zip(pictures, decoded, strict=True)
            ]
            left, number = left & ~new, number + 1
        made += pictures
        codes.append(sampled)
    output: Any = as_output(list(as_pixels(np.stack(made))), asked["output_type"])
    images, videos = (None, output) if self.makes_clips else (output, None)
    names = [request.named(self.label_name) for request in requests]
    labels = [request.label for request in requests]
    return Output(images, videos, names, labels, seed, torch.cat(codes), self.frame_rate)


def _given(self: Any, canvas: Canvas, mode: str) -> Given:
    options = {"holes": self.continuation.has_holes}
    return codes_given(self.tokenizer, canvas.pixels, canvas.hidden, self.config.grid, mode, **options)
