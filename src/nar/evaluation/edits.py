"""How well a model fills holes in held-out pictures, under masks that are fixed by a seed.

Pictures are blanked before they are encoded, which is asserted: codes around a hole know what was in it, and keeping
those would measure the leak. PSNR alone prefers a model that always does the most likely thing; so beside it stand that
of the mean of eight samples and the distance between two. A seam is judged by its step beside the ordinary steps next
to it, where pictures that are glued together must fail. Knows models and pixels; does not know options. Legend: `M`
pictures, `K` samples of each, `H W` pixels.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nar import __version__
from nar.evaluation.floors import Floors, psnr_inside
from nar.evaluation.real import open_learned, open_real
from nar.evaluation.sets import class_labels, trained_on
from nar.likelihood import bits_per_token
from nar.media.masks import FIXED, fixed_mask
from nar.media.pixels import as_images, as_pixels
from nar.metrics.evaluate import evaluate
from nar.metrics.scores import mean_interval
from nar.pipeline import Pipeline, Request
from nar.pipeline.canvas import blended
from nar.pipeline.folder import format_facts
from nar.pipeline.holes import blanked, touched
from nar.pipeline.particles import check_particles
from nar.pipeline.requests import Given
from nar.precision import usable_device
from nar.progress import steps
from nar.sampling import Sampling
from nar.storage.fields import NotNegative, Seed, Size, checked
from nar.storage.files import atomically, check_output
from nar.storage.folder import find_model, model_digest

NUM_SAMPLES = 8
ROWS = {
    "psnr": "PSNR in the hole, one sample (dB)",
    "psnr_mean": f"PSNR of the mean of {NUM_SAMPLES} samples (dB)",
    "distance": "PSNR of one sample against another (dB): higher is less diverse",
    "seam": "step across the mask's edge in excess of the true picture's (0..255), before blending",
    "seam_reconstructed": "the same with the true picture's reconstruction in the hole: what the tokenizer alone costs",
    "seam_ratio": "steps at the mask's edge and 3 pixels inside, as it comes back, of ordinary ones next to them",
    "seam_ratio_true": "the same of the true pictures",
    "seam_ratio_glued": "the same of another picture's pixels, blended in",
    "psnr_blank": "PSNR of the blank itself (dB)",
    "psnr_reconstructed": "PSNR of the true picture's reconstruction (dB)",
    "bits_plain": "bits per token of all codes, nothing given",
    "bits_filled": "bits per token of all codes, given those of the blanked picture",
    "bits_gain": "bits_plain - bits_filled, paired",
    "bits_replaced": "bits per token of codes in the hole amid the picture's own, which know of it",
    "psnr_nearest": "PSNR of the training picture nearest by what is visible (dB)",
    "psnr_nearest_mean": f"PSNR of the mean of the {NUM_SAMPLES} nearest training pictures (dB)",
    "psnr_regression": "PSNR of a linear regression from what is visible and the class (dB)",
    "class": f"share of completed pictures whose {NUM_SAMPLES} nearest training pictures are mostly of their class",
    "class_true": "the same of the true pictures",
    "class_glued": "the same with another picture's pixels in the hole",
    "KID-EffLite0": "KID of the completed pictures against the true ones (EfficientNet-Lite0)",
    "FD-EffLite0": "Frechet distance of the completed pictures against the true ones (EfficientNet-Lite0)",
    "KID-EffLite0 reconstructed": "KID where the hole holds the true picture's reconstruction",
    "FD-EffLite0 reconstructed": "Frechet distance where the hole holds the true picture's reconstruction",
}
EXTENDED = "extended"  # the middle half of pictures, continued to twice the model's width
_BATCH = 100
_MOST_EXTENDED = 100  # pictures, each in passes of its own
_BLENDED, _NEAR = 3, 4  # pixels: inside of a mask's edge, where results are blended, and then of ordinary steps


@checked
def judge_edits(
    model: str,
    real: str,
    *,
    split: str = "test",
    number: Size = 400,
    seed: Seed = 0,
    seeds: Size = 1,
    guidance_scale: NotNegative = 1.0,
    temperature: NotNegative = 1.0,
    particles: Size = 1,
    train: str | None = None,
    distances: bool = False,
    samples: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Fill five holes in held-out pictures, each with its own class or caption: {"MASK: number": mean}.

    Where a model has no condition on holes, codes of the blanked picture outside are kept, by `particles` samples of
    each. `seeds` seeds of sampling, from `seed` on, are averaged, of the same pictures and masks; the report's `seeds`
    holds the number of each. `train` names training pictures (see `nar.data.open.open_source`), for floors and classes,
    and `distances` asks for those of the completed pictures from the true ones. `samples` is a folder for the completed
    pictures of the first seed, MASK.npz, and the true ones, real.npz, which `nar eval` compares.
    """
    folder = find_model(model)
    pipe = Pipeline.from_pretrained(folder, device=usable_device(device), dtype=dtype)
    if pipe.makes_clips:
        raise ValueError(f"{model} makes clips; edits are judged of models of pictures")
    sampling = dataclasses.replace(pipe.sampling, guidance_scale=guidance_scale, temperature=temperature)
    check_particles(particles, known=())
    files = {} if samples is None else {name: Path(samples).expanduser() / f"{name}.npz" for name in (*FIXED, "real")}
    for path in files.values():
        check_output(path)
    height, width = pipe.pixel_shape
    if height != width:
        raise ValueError(f"{model} makes pictures of {height}x{width}; edits are judged of square ones")
    trained = trained_on(folder)
    source = open_real(real, [trained], split=split, size=width)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:number].numpy()
    source = source.take(chosen)
    rows, pictures = zip(*source.decoded(width), strict=True)
    source = source.take(np.array(rows)) if len(rows) < len(source) else source
    edits = _Edits(pipe, source, np.stack(pictures), sampling, particles)
    floors = None
    if train is not None:
        floors = Floors.of(open_learned(train, trained, size=width), size=width, class_names=source.class_names)
    found: dict[str, list[np.ndarray]] = {}
    for name in steps(FIXED, "judging edits", "masks"):
        masks = torch.from_numpy(
            np.stack([fixed_mask(name, (height, width), seed + row) for row in range(len(source))])
        )
        once = edits.bits(masks)
        if distances:
            reconstructed = torch.where(masks[:, None], edits.reconstructed, edits.pixels)
            once |= {f"{key} reconstructed": value for key, value in edits.distances(reconstructed).items()}
        if floors is not None:
            once |= floors.measured(edits.pixels, masks, source.labels)
        if floors is not None and source.has_classes:
            once["class_true"] = floors.classified(edits.pixels, source.labels)
            once["class_glued"] = floors.classified(_glued(edits.pixels, masks), source.labels)
        for turn in range(seeds):
            measured, completed = edits.measured(masks, seed + turn)
            measured |= once | (edits.distances(completed) if distances else {})
            if floors is not None and source.has_classes:
                measured["class"] = floors.classified(completed, source.labels)
            for key, values in measured.items():
                found.setdefault(f"{name}: {key}", []).append(values)
            if files and not turn:
                atomically(files[name], partial(np.savez, arr_0=as_images(completed)))
                atomically(files["real"], partial(np.savez, arr_0=np.stack(pictures)))
    for turn in range(seeds):
        for key, values in edits.extended(seed + turn).items():
            found.setdefault(f"{EXTENDED}: {key}", []).append(values)
    settings = {"model": model, "num_real": len(source), "seed": seed, "num_seeds": seeds}
    settings |= format_facts(pipe.model, pipe.choice)
    settings |= {"guidance_scale": guidance_scale, "temperature": temperature, "particles": particles}
    settings |= {"real": {**source.counts(), "split": split}, "train": train, "weights_sha256": model_digest(folder)}
    settings["condition"] = "holes" if pipe.continuation.has_holes else "kept codes of the blanked picture"
    means = {name: [_value(values) for values in turns] for name, turns in found.items()}
    return {
        **{name: float(np.mean(values)) for name, values in means.items()},
        "interval": {name: _interval(turns, seed) for name, turns in found.items() if turns[0].size > 1},
        "seeds": means if seeds > 1 else {},
        "settings": settings | {"versions": {"nar": __version__, "torch": torch.__version__}},
    }


def _value(values: np.ndarray) -> float:
    """The mean of (M,); of pairs (M, 2) the ratio of their means."""
    return float(values.mean() if values.ndim < 2 else values[:, 0].mean() / values[:, 1].mean())


def _interval(turns: list[np.ndarray], seed: int) -> list[float]:
    """The 95 % interval of `_value`, by resampling pictures, each with all its seeds."""
    values = np.mean(turns, 0)
    if values.ndim < 2:
        return mean_interval(values, seed=seed)
    rows = np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))
    means = values[rows].mean(1)
    return [float(end) for end in np.quantile(means[:, 0] / means[:, 1], (0.025, 0.975))]


class _Edits:
    """Held-out pictures (M, H, W, 3) uint8 and what a model makes of their holes."""

    def __init__(self, pipe: Pipeline, source: Any, pictures: np.ndarray, sampling: Sampling, particles: int) -> None:
        self.pipe, self.pixels, self.sampling, self.particles = pipe, as_pixels(pictures), sampling, particles
        config, labels, prompts = pipe.config, np.full(len(pictures), -1), [""] * len(pictures)
        if config.num_classes:
            labels = class_labels(pipe, source)
        if config.text_dim:
            if source.captions is None:
                raise ValueError("this model reads words, and the held-out pictures have no captions")
            prompts = list(source.captions)
        self.asked = [Request(int(label), prompt) for label, prompt in zip(labels, prompts, strict=True)]
        self.codes = self._encoded(self.pixels)
        self.reconstructed = torch.cat([pipe.decode(part).cpu() for part in self.codes.split(_BATCH)])
        self.plain = self._bits(self.asked, None) if pipe.continuation.has_holes else None

    def measured(self, mask: Tensor, seed: int) -> tuple[dict[str, np.ndarray], Tensor]:
        """Numbers of what is sampled under masks (M, H, W), and the first sample of each, completed, (M, 3, H, W)."""
        pixels, inside, asked = self.pixels, mask[:, None].expand_as(self.pixels), self._filling(mask)
        made = torch.stack([self._decoded(asked, number, seed) for number in range(NUM_SAMPLES)], 1)  # (M, K, 3, H, W)
        completed = torch.where(inside, blended(made[:, 0], pixels, mask), pixels)
        step = _edge_step(pixels, mask)
        found = {
            "psnr": np.mean([psnr_inside(own, pixels, inside) for own in made.unbind(1)], 0),
            "psnr_mean": psnr_inside(made.mean(1), pixels, inside),
            "distance": psnr_inside(made[:, 0], made[:, 1], inside),
            "seam": _edge_step(torch.where(inside, made[:, 0], pixels), mask) - step,
            "seam_reconstructed": _edge_step(torch.where(inside, self.reconstructed, pixels), mask) - step,
            "psnr_blank": psnr_inside(blanked(pixels, mask), pixels, inside),
            "psnr_reconstructed": psnr_inside(self.reconstructed, pixels, inside),
            "seam_ratio": seam_steps(completed, mask),
            "seam_ratio_true": seam_steps(pixels, mask),
            "seam_ratio_glued": seam_steps(_glued(pixels, mask), mask),
        }
        return found, completed

    def bits(self, mask: Tensor) -> dict[str, np.ndarray]:
        """Bits per token (M,) of the true codes under masks (M, H, W)."""
        holes, found = touched(mask, self.pipe.config.grid), dict[str, np.ndarray]()
        if self.plain is not None:
            filled = self._bits(self._filling(mask), None)
            found |= {"bits_plain": self.plain, "bits_filled": filled, "bits_gain": self.plain - filled}
        amid = zip(self.asked, self.codes, ~holes, strict=True)
        replaced = [Request(one.label, one.prompt, given=Given(*given)) for one, *given in amid]
        return found | {"bits_replaced": self._bits(replaced, self.codes.masked_fill(holes, -1))}

    def distances(self, completed: Tensor) -> dict[str, np.ndarray]:
        """Distances, one number each, of completed pictures (M, 3, H, W) from the true ones."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that pictures are few
            real, fake = as_images(self.pixels), as_images(completed)
            report = evaluate(real, fake, calibration=0, resamplings=0, progress=False)
        return {name: np.array([report[name]]) for name in ("KID-EffLite0", "FD-EffLite0")}

    def extended(self, seed: int) -> dict[str, np.ndarray]:
        """Steps at the edges of the middle half of pictures that is continued to twice the model's width."""
        pipe, number = self.pipe, min(len(self.asked), _MOST_EXTENDED)
        options = {**dataclasses.asdict(self.sampling), "output_type": "pt", "seed": [seed]}
        if not pipe.continuation.has_holes:
            options["particles"] = self.particles
        pixels, (height, width) = self.pixels[:number], pipe.pixel_shape
        middle, mask = slice(width // 4, width - width // 4), torch.ones(number, height, width, dtype=torch.bool)
        mask[:, :, middle], made = False, list[Tensor]()
        for picture, one in zip(as_images(pixels[..., middle]), self.asked, strict=False):
            options["class_labels"] = one.label if one.label >= 0 else None
            options["prompt"] = one.prompt or None
            wide = pipe.extend(picture, (height, 2 * width), **options).images[0]
            made.append(wide[..., width // 2 : width // 2 + width])  # around what is given, where it is in the picture
        ratios = torch.stack(made), pixels, _glued(pixels, mask)
        names = "seam_ratio", "seam_ratio_true", "seam_ratio_glued"
        return {name: seam_steps(each, mask) for name, each in zip(names, ratios, strict=True)}

    def _filling(self, mask: Tensor) -> list[Request]:
        """What is asked for under masks (M, H, W): the codes of blanked pictures are given."""
        pixels, grid, has_holes = self.pixels, self.pipe.config.grid, self.pipe.continuation.has_holes
        other, blank = torch.where(mask[:, None], pixels.flip(0), pixels), blanked(pixels, mask)
        assert torch.equal(blanked(other, mask), blank), "what a hole hides was seen"
        codes, holes = self._encoded(blank), touched(mask, grid)
        known = [None] * len(codes) if has_holes else codes.masked_fill(holes, -1)
        columns = zip(self.asked, codes, ~holes, known, strict=True)
        return [Request(one.label, one.prompt, given=Given(*given)) for one, *given in columns]

    def _bits(self, asked: list[Request], known: Tensor | None) -> np.ndarray:
        parts = []
        for start in range(0, len(asked), _BATCH):
            rows = slice(start, start + _BATCH)
            condition, kept_rows = self.pipe.condition(asked[rows])[0], None if known is None else known[rows]
            parts.append(bits_per_token(self.pipe.model, self.codes[rows], condition, known=kept_rows))
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def _encoded(self, pixels: Tensor) -> Tensor:
        device, tokenizer = self.pipe.device, self.pipe.tokenizer
        return torch.cat([tokenizer.encode(part.to(device)).cpu() for part in pixels.split(_BATCH)]).clone()

    def _decoded(self, asked: list[Request], number: int, seed: int) -> Tensor:
        """Sample `number` of each request: pixels (M, 3, H, W)."""
        parts = []
        for start in range(0, len(asked), _BATCH):
            batch = asked[start : start + _BATCH]
            indices = [row * NUM_SAMPLES + number for row in range(start, start + len(batch))]
            made = self.pipe.sample(batch, indices, self.sampling, seed=seed, particles=self.particles)
            parts.append(torch.stack(made).cpu())
        return torch.cat(parts)


def _glued(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (M, 3, H, W) with those of the next picture in the mask (M, H, W), blended as results are."""
    return torch.where(mask[:, None], blended(pixels.roll(1, 0), pixels, mask), pixels)


def seam_steps(pixels: Tensor, mask: Tensor) -> np.ndarray:
    """Mean differences (M, 2), of 0..255, of neighbours in pixels (M, 3, H, W): at the edge of the mask (M, H, W) and
    up to 3 pixels inside of it, where results are blended, and of ordinary ones beyond: 4 pixels farther inside, and 7
    outside.

    A ratio of means of both leaves blank backgrounds out: they add nothing to either. With the edge alone two pictures
    pass that are glued and blended.
    """
    total, count = torch.zeros(len(pixels), 2), torch.zeros(len(pixels), 2)
    for axis in (1, 2):
        first, second = (mask.narrow(axis, start, mask.shape[axis] - 1) for start in (0, 1))
        crossed = first != second
        band = crossed | (_along(crossed, axis, _BLENDED) & first & second)
        near = _along(crossed, axis, _BLENDED + _NEAR) & ~band
        left, right = (pixels.narrow(axis + 1, start, mask.shape[axis] - 1) for start in (0, 1))
        for column, where in enumerate((band, near)):
            total[:, column] += ((left - right).abs().mean(1) * where).sum((1, 2)) * 127.5
            count[:, column] += where.sum((1, 2))
    return (total / count).double().numpy()


def _edge_step(pixels: Tensor, mask: Tensor) -> np.ndarray:
    """Mean difference (M,), of 0..255, of neighbours of which one lies in the mask (M, H, W)."""
    total, count = torch.zeros(len(pixels)), torch.zeros(len(pixels))
    for axis in (1, 2):
        size = mask.shape[axis]
        crossed = mask.narrow(axis, 0, size - 1) != mask.narrow(axis, 1, size - 1)
        difference = pixels.narrow(axis + 1, 0, size - 1) - pixels.narrow(axis + 1, 1, size - 1)
        total += (difference.abs().mean(1) * crossed).sum((1, 2)) * 127.5
        count += crossed.sum((1, 2))
    return (total / count).double().numpy()


def _along(pairs: Tensor, axis: int, distance: int) -> Tensor:
    """Pairs (M, h, w) of which one marked lies no farther along an axis."""
    window = [1, 1]
    window[axis - 1] = 2 * distance + 1
    return F.max_pool2d(pairs[:, None].float(), window, 1, [side // 2 for side in window])[:, 0].bool()
