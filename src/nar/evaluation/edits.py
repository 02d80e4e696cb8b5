"""How well a model fills holes in held-out pictures, under masks that are fixed by a seed.

Pictures are blanked before they are encoded, which is asserted: codes around a hole know what was in it, and keeping
those would measure the leak. PSNR alone prefers a model that always does the most likely thing; so beside it stand that
of the mean of eight samples and the distance between two. Knows models and pixels; does not know options. Legend: `M`
pictures, `K` samples of each, `H W` pixels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar import __version__
from nar.data.open import open_source
from nar.evaluation.sets import trained_on
from nar.likelihood import bits_per_token
from nar.media.masks import FIXED, fixed_mask
from nar.media.pixels import as_images, as_pixels
from nar.metrics.scores import mean_interval
from nar.pipeline import Pipeline, Request
from nar.pipeline.folder import format_facts
from nar.pipeline.holes import blanked, touched
from nar.pipeline.requests import Given
from nar.precision import usable_device
from nar.progress import steps
from nar.sampling import Sampling
from nar.storage.files import atomically, check_output
from nar.storage.folder import find_model, model_digest

NUM_SAMPLES = 8
ROWS = {
    "psnr": "PSNR in the hole, one sample (dB)",
    "psnr_mean": f"PSNR of the mean of {NUM_SAMPLES} samples (dB)",
    "distance": "PSNR of one sample against another (dB): higher is less diverse",
    "seam": "step across the mask's edge in excess of the true picture's (0..255), before blending",
    "psnr_blank": "PSNR of the blank itself (dB)",
    "psnr_reconstructed": "PSNR of the true picture's reconstruction (dB)",
    "bits_plain": "bits per token of all codes, nothing given",
    "bits_filled": "bits per token of all codes, given those of the blanked picture",
    "bits_gain": "bits_plain - bits_filled, paired",
    "bits_replaced": "bits per token of codes in the hole amid the picture's own, which know of it",
}
_BATCH = 100


def judge_edits(
    model: str,
    real: str,
    *,
    split: str = "test",
    number: int = 400,
    seed: int = 0,
    guidance_scale: float = 1.0,
    samples: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Fill five holes in held-out pictures, each with its own class or caption: {"MASK: number": mean}.

    Where a model has no condition on holes, codes of the blanked picture outside are kept. `samples` is a folder for
    the completed pictures, MASK.npz, and the true ones, real.npz, which `nar eval` compares.
    """
    folder = find_model(model)
    pipe = Pipeline.from_pretrained(folder, device=usable_device(device), dtype=dtype)
    if pipe.makes_clips:
        raise ValueError(f"{model} makes clips; edits are judged of models of pictures")
    sampling = dataclasses.replace(pipe.sampling, guidance_scale=guidance_scale)
    files = {} if samples is None else {name: Path(samples).expanduser() / f"{name}.npz" for name in (*FIXED, "real")}
    for path in files.values():
        check_output(path)
    height, width = pipe.pixel_shape
    if height != width:
        raise ValueError(f"{model} makes pictures of {height}x{width}; edits are judged of square ones")
    source = open_source(real, size=width, split=split, whole=True, label=trained_on(folder).get("label", "label"))
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:number].numpy()
    source = source.take(chosen)
    rows, pictures = zip(*source.decoded(width), strict=True)
    source = source.take(np.array(rows)) if len(rows) < len(source) else source
    edits = _Edits(pipe, source, np.stack(pictures), sampling, seed)
    found: dict[str, np.ndarray] = {}
    for name in steps(FIXED, "judging edits", "masks"):
        masks = np.stack([fixed_mask(name, (height, width), seed + row) for row in range(len(source))])
        measured, completed = edits.measured(torch.from_numpy(masks))
        found |= {f"{name}: {key}": values for key, values in measured.items()}
        if files:
            atomically(files[name], partial(np.savez, arr_0=completed))
            atomically(files["real"], partial(np.savez, arr_0=np.stack(pictures)))
    settings = {"model": model, "num_real": len(source), "seed": seed, "guidance_scale": guidance_scale}
    settings |= format_facts(pipe.model, pipe.choice)
    settings |= {"real": {**source.counts(), "split": split}, "weights_sha256": model_digest(folder)}
    settings["condition"] = "holes" if pipe.continuation.has_holes else "kept codes of the blanked picture"
    return {
        **{name: float(values.mean()) for name, values in found.items()},
        "interval": {name: mean_interval(values, seed=seed) for name, values in found.items()},
        "settings": settings | {"versions": {"nar": __version__, "torch": torch.__version__}},
    }


class _Edits:
    """Held-out pictures (M, H, W, 3) uint8 and what a model makes of their holes."""

    def __init__(self, pipe: Pipeline, source: Any, pictures: np.ndarray, sampling: Sampling, seed: int) -> None:
        self.pipe, self.pixels, self.sampling, self.seed = pipe, as_pixels(pictures), sampling, seed
        config, labels, prompts = pipe.config, np.full(len(pictures), -1), [""] * len(pictures)
        if config.num_classes:
            known = [pipe.label_index(name) for name in source.class_names] if pipe.class_names else None
            labels = source.labels if known is None else np.array(known)[source.labels]
        if config.text_dim:
            if source.captions is None:
                raise ValueError("this model reads words, and the held-out pictures have no captions")
            prompts = list(source.captions)
        self.asked = [Request(int(label), prompt) for label, prompt in zip(labels, prompts, strict=True)]
        self.codes = self._encoded(self.pixels)
        self.plain = self._bits(self.asked, None) if pipe.continuation.has_holes else None

    def measured(self, mask: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Numbers (M,) under masks (M, H, W), and the first sample of each, completed, (M, H, W, 3) uint8."""
        pipe, pixels, grid = self.pipe, self.pixels, self.pipe.config.grid
        holes, has_holes = touched(mask, grid), pipe.continuation.has_holes
        other = torch.where(mask[:, None], pixels.flip(0), pixels)
        assert torch.equal(blanked(other, mask), blanked(pixels, mask)), "what a hole hides was seen"
        blank = blanked(pixels, mask)
        codes = self._encoded(blank)
        known = codes.masked_fill(holes, -1)
        columns = zip(self.asked, codes, ~holes, [None] * len(codes) if has_holes else known, strict=True)
        asked = [Request(one.label, one.prompt, given=Given(*given)) for one, *given in columns]
        made = torch.stack([self._decoded(asked, number) for number in range(NUM_SAMPLES)], 1)  # (M, K, 3, H, W)
        inside = mask[:, None].expand_as(pixels)
        true = self._reconstructed()
        found = {
            "psnr": np.mean([_psnr(own, pixels, inside) for own in made.unbind(1)], 0),
            "psnr_mean": _psnr(made.mean(1), pixels, inside),
            "distance": _psnr(made[:, 0], made[:, 1], inside),
            "seam": _step(torch.where(inside, made[:, 0], pixels), mask) - _step(pixels, mask),
            "psnr_blank": _psnr(blank, pixels, inside),
            "psnr_reconstructed": _psnr(true, pixels, inside),
        }
        if self.plain is not None:
            filled = self._bits(asked, None)
            found |= {"bits_plain": self.plain, "bits_filled": filled, "bits_gain": self.plain - filled}
        amid = zip(self.asked, self.codes, ~holes, strict=True)
        replaced = [Request(one.label, one.prompt, given=Given(*given)) for one, *given in amid]
        found["bits_replaced"] = self._bits(replaced, self.codes.masked_fill(holes, -1))
        return found, as_images(torch.where(inside, made[:, 0], pixels))

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

    def _decoded(self, asked: list[Request], number: int) -> Tensor:
        """Sample `number` of each request: pixels (M, 3, H, W)."""
        parts = []
        for start in range(0, len(asked), _BATCH):
            batch = asked[start : start + _BATCH]
            indices = [row * NUM_SAMPLES + number for row in range(start, start + len(batch))]
            parts.append(torch.stack(self.pipe.sample(batch, indices, self.sampling, seed=self.seed)).cpu())
        return torch.cat(parts)

    def _reconstructed(self) -> Tensor:
        return torch.cat([self.pipe.decode(part).cpu() for part in self.codes.split(_BATCH)])


def _psnr(made: Tensor, true: Tensor, inside: Tensor) -> np.ndarray:
    """PSNR (M,) in dB of pixels (M, 3, H, W) where `inside`, at most 60."""
    error = ((made - true) ** 2 * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    return (10 * torch.log10(4 / error.clamp_min(4e-6))).double().numpy()


def _step(pixels: Tensor, mask: Tensor) -> np.ndarray:
    """Mean difference (M,), of 0..255, of neighbours of which one lies in the mask (M, H, W)."""
    total, count = torch.zeros(len(pixels)), torch.zeros(len(pixels))
    for axis in (1, 2):
        size = mask.shape[axis]
        crossed = mask.narrow(axis, 0, size - 1) != mask.narrow(axis, 1, size - 1)
        difference = pixels.narrow(axis + 1, 0, size - 1) - pixels.narrow(axis + 1, 1, size - 1)
        total += (difference.abs().mean(1) * crossed).sum((1, 2)) * 127.5
        count += crossed.sum((1, 2))
    return (total / count).double().numpy()
