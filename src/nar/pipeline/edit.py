"""Pictures edited by a model: what is to be new, at the model's size, as a condition; and the result put back.

A picture of any size is worked on in a region around the mask, which is brought to the model's size. Where a model has
no condition on holes, the codes outside of the mask are kept while those inside are sampled, which sees only half of
what surrounds a hole. Knows pixels, masks and codes; does not know how codes are sampled. Legend: `H W` pixels of the
picture, `h w` those of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nar.condition import PrefixCodes
from nar.media.pictures import read_picture, upright_rgb
from nar.media.pixels import as_images, as_pixels
from nar.pipeline.holes import blanked, touched
from nar.pipeline.output import Output, as_output
from nar.pipeline.requests import Given, Request, seeds_of
from nar.sampling import settings_among
from nar.tokenizer import Tokenizer

MODES = ("fill", "replace")
WHITE = 128  # from which a pixel of a mask is to be new
AROUND = 2.0  # sides of a region, of those of what the mask covers: what is new is a quarter of it
Picture = Any  # a path, a Pillow picture, or uint8 (H, W, 3)
Mask = Any  # a path or a Pillow picture, white where something new goes; or an array (H, W)


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture to edit: `picture` (H, W, 3) uint8 and its `mask` (H, W), and of its `region` the `pixels`
    (1, 3, h, w) in -1..1 and which are `hidden`, (1, h, w)."""

    picture: np.ndarray
    mask: np.ndarray
    region: Box
    pixels: Tensor
    hidden: Tensor

    def pasted(self, made: Tensor, *, blend: bool = True) -> np.ndarray:
        """The picture (H, W, 3) uint8 with what is `made` (3, h, w) of the region, in the mask; the rest as it was.

        `blend` adds the difference at the edge of the mask, fading within it, so that the seam shows less. What the
        mask hides of the picture has no part in it.
        """
        made = made[None].float().cpu()
        made = blended(made, self.pixels, self.hidden) if blend else made
        new = as_images(made)[0]
        width, height = self.region.width, self.region.height
        if new.shape[:2] != (height, width):
            new = np.asarray(Image.fromarray(new).resize((width, height), Image.Resampling.BICUBIC))
        edited, place = self.picture.copy(), self.region.slices
        edited[place] = np.where(self.mask[place][..., None], new, edited[place])
        return edited


def prepare(image: Picture, mask: Mask | None, box: Sequence[int] | None, size: tuple[int, ...]) -> Canvas:
    """A picture with its mask, or a box (left, top, width, height), for a model of `size` (h, w); see `masked`."""
    picture, hidden = masked(image, mask, box)
    region = _region(hidden, size)
    part, covered = Image.fromarray(picture[region.slices]), Image.fromarray(hidden[region.slices])
    if part.size != (shape := (size[1], size[0])):
        part = part.resize(shape, Image.Resampling.BICUBIC if part.width < size[1] else Image.Resampling.BOX)
        # All that is touched counts: enlarged by nearest, made smaller by the mean, which is above 0 then.
        grey = np.asarray(covered.convert("L").resize(shape, Image.Resampling.BOX))
        covered = Image.fromarray(grey > 0)
    pixels = as_pixels(np.array(part)[None])
    return Canvas(picture, hidden, region, pixels, torch.from_numpy(np.array(covered))[None])


def masked(image: Picture, mask: Mask | None, box: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) uint8 and what is to be new of it, (H, W) bool.

    Raises:
        ValueError: neither or both of mask and box, a mask of another size or with transparency, or one that covers
            nothing or all.
    """
    picture = _read(image)
    height, width = picture.shape[:2]
    if (mask is None) == (box is None):
        raise ValueError("say what is to be new: mask=PICTURE, white there, or box=(left, top, width, height)")
    hidden = _mask(mask) if box is None else _of_box(box, picture.shape)
    if hidden.shape != (height, width):
        sizes = f"{hidden.shape[1]}x{hidden.shape[0]}", f"{width}x{height}"
        raise ValueError(f"the mask is {sizes[0]} and the picture {sizes[1]}: they must have one size")
    if not hidden.any():
        raise ValueError("the mask covers nothing: make white what is to be new")
    if hidden.all():
        raise ValueError("the mask covers the whole picture: there is nothing to edit, sample a new one instead")
    return picture, hidden


def before(image: Picture, mask: Mask | None, box: Sequence[int] | None) -> tuple[Image.Image, Image.Image]:
    """A picture as given, and with what is to be new in grey, to be shown beside the results."""
    picture, hidden = masked(image, mask, box)
    return Image.fromarray(picture), Image.fromarray(np.where(hidden[..., None], np.uint8(128), picture))


def blended(made: Tensor, pixels: Tensor, hidden: Tensor, *, width: int = 2) -> Tensor:
    """What is made (B, 3, h, w), in `hidden` (B, h, w) moved by its difference from the visible `pixels` nearby."""
    visible = (~hidden)[:, None].float()

    def near(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, 2 * width + 1, 1, width)

    share = near(visible)
    difference = near((pixels - made) * visible) / share.clamp_min(1e-6)
    return (made + difference * (2 * share).clamp(max=1.0)).clamp(-1, 1)


def codes_given(
    tokenizer: Tokenizer, pixels: Tensor, hidden: Tensor, grid: tuple[int, ...], mode: str = "fill", *, holes: bool
) -> Given:
    """The codes that a model is given of pixels (1, 3, h, w) with `hidden` ones (1, h, w).

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
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    output_type: str = "pil",
    blend: bool = True,
) -> Output:
    """Make a part of a picture anew, `num_images_per_prompt` times for each label or prompt; settings as in a call.

    What is outside of the mask comes back as it was, byte for byte. A picture of another size than the model's is
    worked on in a region around the mask. `Output.codes` are those of the region.

    Args:
        image: a file, a Pillow picture, or uint8 (H, W, 3); transparency becomes white.
        mask: a picture of the same size, white where something new goes, or an array (H, W).
        box: (left, top, width, height) in place of a mask.
        mode: "fill" takes no notice of what the mask hides; "replace" keeps the picture's own codes around it, which
            know something of it: for changing a picture that is there.
        blend: move what is made towards the picture at the edge of the mask.

    Raises:
        ValueError: a model of clips, a mask that does not fit, an unknown class, or a setting that is out of range.
    """
    if self.makes_clips:
        raise ValueError(
            "this model makes clips, which it continues (frames=...); pictures are edited by models of them"
        )
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be pil, np or pt, not {output_type!r}: codes have no pixels around them")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    sampling = dataclasses.replace(self.sampling, **settings_among(locals()))
    words = class_labels, prompt, negative_prompt
    asked = self.inputs.requests(*words, None, read=_read, number=num_images_per_prompt, nothing=True)
    self._check_guidance(sampling, asked)
    seed = seeds_of(seed, generator, len(asked))
    canvas = prepare(image, mask, box, self.pixel_shape)
    given = codes_given(
        self.tokenizer, canvas.pixels, canvas.hidden, self.config.grid, mode, holes=self.continuation.has_holes
    )
    requests: list[Request] = [dataclasses.replace(request, given=given) for request in asked]
    count = len(requests)
    seeds, indices = ([seed] * count, range(count)) if isinstance(seed, int) else (seed, [0] * count)
    made, codes = list[np.ndarray](), list[Tensor]()
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        sampled = self._codes(requests[rows], indices[rows], sampling, seed=seeds[rows], known=None, callback=None)
        made += [canvas.pasted(pixels, blend=blend) for pixels in self.decode(sampled, exact=True)]
        codes.append(sampled)
    names = [request.named(self.label_name) for request in requests]
    images: Any = as_output(list(as_pixels(np.stack(made))), output_type)
    return Output(images, None, names, [request.label for request in requests], seed, torch.cat(codes))


def _read(image: Picture) -> np.ndarray:
    """A picture in any form as (H, W, 3) uint8."""
    if isinstance(image, str | Path):
        return np.array(read_picture(image))
    if isinstance(image, Image.Image):
        return np.array(upright_rgb(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        found = f"{array.dtype} {array.shape}" if array.ndim else type(image).__name__
        raise ValueError(f"image must be a file, a Pillow picture or uint8 (H, W, 3), not {found}")
    return array.copy()


def _mask(mask: Mask) -> np.ndarray:
    """A mask in any form as (H, W) bool."""
    if isinstance(mask, str | Path):
        with Image.open(mask) as opened:
            mask = opened.copy()
    if isinstance(mask, Image.Image):
        if "A" in mask.getbands() or "transparency" in mask.info:
            if min(np.asarray(mask.convert("RGBA"))[..., 3].flat) < 255:
                raise ValueError("the mask has transparency: give it black and white, white where something new goes")
            mask = mask.convert("RGB")
        return np.asarray(mask.convert("L")) >= WHITE
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise ValueError(f"mask must be a picture, or an array (H, W), not {array.dtype} {array.shape}")
    return array >= (WHITE if array.size and array.max() > 1 else 0.5)


def _of_box(box: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The mask of a box, of which a part lies in the picture."""
    values = list(box)
    if len(values) != 4 or not all(isinstance(value, int | np.integer) for value in values) or min(values[2:]) < 1:
        raise ValueError(f"box must be four whole numbers, (left, top, width, height), not {box!r}")
    left, top, width, height = values
    mask = np.zeros(shape[:2], bool)
    mask[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = True
    return mask


def _region(mask: np.ndarray, size: tuple[int, ...]) -> Box:
    """Where a picture is worked on: all of it where it has the model's size; else around the mask, twice as large as
    what it covers, no smaller than the model's size, of its shape as far as the picture allows."""
    height, width = mask.shape
    if (height, width) == tuple(size):
        return Box(0, 0, width, height)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    covered = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    scale = max(1.0, *(AROUND * own / wanted for own, wanted in zip(covered, size, strict=True)))
    tall, wide = (min(full, round(scale * side)) for full, side in zip((height, width), size, strict=True))
    top = int(np.clip((rows[0] + rows[-1] + 1 - tall) // 2, 0, height - tall))
    left = int(np.clip((columns[0] + columns[-1] + 1 - wide) // 2, 0, width - wide))
    return Box(left, top, wide, tall)
