"""Reconstruction quality of a tokenizer on pictures or clips that it was not trained on, beside baselines.

Knows tokenizers, what they were trained on, and which cheap reconstructions stand beside theirs; does not know how
reconstructions are measured (`nar.metrics.reconstruction`), nor options.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nar import __version__
from nar.data.config import DataConfig, recorded
from nar.data.open import load_pictures
from nar.data.source import Source
from nar.evaluation.sets import BATCH, CLIP_BATCH, trained_on
from nar.media.pixels import as_images, as_pixels, pad_to_multiple
from nar.media.sheet import contact_sheet
from nar.metrics.detectors import Detector, default_detector
from nar.metrics.networks.perceptual import EfficientNetDistance
from nar.metrics.reconstruction import (
    code_use,
    compare,
    frechet_distances,
    motionless,
    nearest_patches,
    num_fitted_patches,
    thumbnails,
)
from nar.metrics.reference import ENOUGH
from nar.precision import usable_device
from nar.progress import steps
from nar.storage.fields import Length, Seed, Size, checked
from nar.storage.files import atomically
from nar.storage.folder import find_model, model_digest
from nar.tokenizer import load_tokenizer
from nar.tokenizer.multiscale import MultiScaleTokenizer, MultiScaleTokenizerConfig
from nar.tokenizer.refine import refine_codes

_KEPT = ("validation", "heldout_share", "num_frames", "stride", "frame_rate", "windows")  # of the training's data
_TRAIN_BYTES = 2**28  # of pictures that baselines are fitted to
_SHOWN = 16  # pairs on the sheet


@checked
def judge_tokenizer(
    folder: str,
    real: str,
    *,
    size: Size | None = None,
    group: str | None = None,
    num_frames: Size | None = None,
    number: Size = 10_000,
    pad: bool = False,
    refine: Length = 0,
    seed: Seed = 0,
    batch_size: Size | None = None,
    device: str | None = None,
    inception: Path | None = None,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """The report of a tokenizer folder on the held-out part of `real`, the same part as in its training.

    `size`, `group` and `num_frames` are by default those that the tokenizer was trained with, and windows of clips are
    taken as in its training. Pictures without a column `group` are held out one by one. `pad` allows sizes that are no
    multiple of the patch. Of a tokenizer of several scales the use of the codebook is reported for each. With `refine`,
    the report also has the numbers of codes refined in that many steps, which `sheet` shows then.

    Raises:
        ValueError: no size is known, it does not fit the tokenizer, or `sheet` is no kind of picture.
    """
    kind = None if sheet is None else _picture_format(sheet)
    folder = str(find_model(folder))
    tokenizer = load_tokenizer(folder)
    data, train, heldout, ungrouped = _opened(folder, tokenizer, real, size, group, num_frames)
    generator = np.random.default_rng(seed)
    if min(number, len(heldout)) < 2:
        held = f"{len(heldout)} of the pictures or clips in {real} are held out, and {number} asked for"
        raise ValueError(f"{held}: a tokenizer is judged on two or more")
    if len(heldout) > number:
        heldout = heldout.take(np.sort(generator.permutation(len(heldout))[:number]))
    images = load_pictures(heldout, size=data.size).images
    if images.ndim == 4 and len(tokenizer.pixel_axes) != 2:
        raise ValueError(f"{folder} reads clips, but {real} holds pictures, or clips of which to give --num-frames")
    batch_size = batch_size or (CLIP_BATCH if images.ndim == 5 else BATCH)
    place = torch.device(usable_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"))
    through = functools.partial(reconstruct, tokenizer.to(place), images, pad=pad, batch_size=batch_size)
    distance, detector = EfficientNetDistance().to(place), default_detector(inception, place)

    def measured(reconstructed: np.ndarray, codes: np.ndarray | None = None) -> dict[str, Any]:
        distances = {distance.name: distance}
        numbers = compare(images, reconstructed, distances=distances, batch_size=batch_size, device=place)
        if codes is None:
            return numbers
        return numbers | _use(codes, tokenizer.config.vocab_size)

    reconstructed, codes = through()
    report = measured(reconstructed, codes)
    report |= _frechet(images, reconstructed, detector, seed=seed, batch_size=batch_size)
    report["warnings"] = ungrouped + report["warnings"]
    grid = codes.shape[1:]
    if isinstance(tokenizer, MultiScaleTokenizer):
        grid = tokenizer.config.scales[-1:] * 2
        report["scales"] = use_of_scales(codes, tokenizer.config)
        poor = [name for name, use in report["scales"].items() if use["perplexity"] < 2]
        report["warnings"] += [f"scale {name} has collapsed: its codes carry less than one bit each" for name in poor]
    if refine:
        reconstructed, codes = through(refine=refine)
        report["refined"] = measured(reconstructed, codes)
    few = generator.permutation(len(train))[: max(2, _TRAIN_BYTES // images[0].nbytes)]
    fitted = load_pictures(train.take(few), size=data.size).images
    baselines = fit_baselines(fitted, images, grid, tokenizer.config.vocab_size, seed, place)
    report["baselines"] = {name: measured(cheap) for name, cheap in baselines.items()}
    if sheet is not None:
        _write_sheet(sheet, images, reconstructed, kind)
    facts: dict[str, Any] = {"tokenizer": folder, "weights_sha256": model_digest(folder)}
    facts["config"] = dataclasses.asdict(tokenizer.config)
    facts["real"] = heldout.counts() | {"heldout": dataclasses.asdict(data) | {"source": Path(real).name}}
    facts |= {"num_real": len(images), "num_fitted": len(fitted), "codes_per_sample": list(codes.shape[1:])}
    facts |= {"size": data.size, "padded": pad, "refine": refine, "seed": seed}
    facts |= {"network": detector.label, "network_sha256": detector.digest}
    report["settings"] = facts | {"versions": {"nar": __version__, "torch": torch.__version__}}
    return report


def use_of_scales(codes: np.ndarray, config: MultiScaleTokenizerConfig) -> dict[str, dict[str, float]]:
    """State how each scale of codes (B, N) uses the codebook. The coarsest ones collapse first in training, which
    numbers of all scales together, most of them the last one's, do not show."""
    ends = np.cumsum([side * side for side in config.scales])
    parts = zip(config.scales, np.split(codes, ends[:-1], 1), strict=True)
    return {f"{side}x{side}": _use(part, config.vocab_size) for side, part in parts}


def _use(codes: np.ndarray, vocab_size: int) -> dict[str, float]:
    return code_use(torch.bincount(torch.from_numpy(codes).flatten(), minlength=vocab_size))


def _opened(
    folder: str, tokenizer: Any, real: str, size: int | None, group: str | None, num_frames: int | None
) -> tuple[DataConfig, Source, Source, list[str]]:
    """The data as the tokenizer was trained with them, the parts that were learned and held out, and warnings."""
    trained = recorded(made_with) if (made_with := trained_on(folder)) else {}
    size = size or trained.get("size") or getattr(tokenizer.config, "image_size", None)
    if size is None:
        raise ValueError(f"{folder} does not say at which size it was trained; give --size PIXELS")
    if num_frames is None and not trained:
        num_frames = getattr(tokenizer.config, "num_frames", 0)
    same_group = group in (None, trained.get("group"))
    names = (*_KEPT, "group", "group_without") if same_group else _KEPT
    kept = {name: trained[name] for name in names if name in trained}
    kept |= {} if same_group else {"group": group}
    kept |= {} if num_frames is None else {"num_frames": num_frames}
    data = DataConfig(source=real, size=size, **kept)
    try:
        return data, *data.open(), []
    except ValueError:
        if group is not None or not data.group:
            raise
    text = f"{Path(real).name} has no column {data.group!r}, by which the tokenizer's pictures were held out"
    data = dataclasses.replace(data, group="")
    return data, *data.open(), [text]


def reconstruct(
    tokenizer: Any, images: np.ndarray, *, pad: bool, batch_size: int, refine: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures or clips uint8 (B, ..., 3) as the tokenizer gives them back, of the same shape, and their codes.

    The codes are those of its encoder, or refined in `refine` steps.
    """
    encode = functools.partial(refine_codes, tokenizer, steps=refine) if refine else tokenizer.encode
    doing = "refining" if refine else "reconstructing"
    height, width = images.shape[-3:-1]
    device = next(tokenizer.parameters()).device
    reconstructed, codes = [], []
    with torch.inference_mode():
        for start in steps(range(0, len(images), batch_size), doing, "batches"):
            pixels = as_pixels(images[start : start + batch_size]).to(device)
            code = encode(pad_to_multiple(pixels, tokenizer.config.patch_size) if pad else pixels)
            decoded = tokenizer.decode(code, **tokenizer.decode_options(pixels))
            reconstructed.append(as_images(decoded[..., :height, :width]))
            codes.append(code.cpu().numpy())
    return np.concatenate(reconstructed), np.concatenate(codes)


def _frechet(
    images: np.ndarray, reconstructed: np.ndarray, detector: Detector, *, seed: int, batch_size: int
) -> dict[str, Any]:
    """The part of the report about Frechet distances: of all pictures, and of halves."""
    name = detector.name("FD")
    found = frechet_distances(
        images, reconstructed, lambda pictures: detector(pictures).pooled, seed=seed, batch_size=batch_size
    )
    distance, count, _ = found["all"]
    if not math.isfinite(distance):
        return {"warnings": [f"{name} cannot be computed of {count:,} pictures"]}
    few = f"{name} of {count:,} pictures is too high; compare the reconstructed half with the real half instead"
    part: dict[str, Any] = {name: distance, "warnings": [few] if count < ENOUGH else []}
    for key, of in (("floor", "real"), ("at_floor_counts", "reconstructed")):
        if of in found:
            distance, num_real, num_fake = found[of]
            what = f"one half of the pictures, {of}, against the other half, real"
            part[key] = {name: distance, "num_real": num_real, "num_fake": num_fake, "what": what}
    return part


def fit_baselines(
    train: np.ndarray, images: np.ndarray, grid: tuple[int, ...], vocab_size: int, seed: int, device: Any
) -> dict[str, np.ndarray]:
    """Reconstructions without a tokenizer: patches by k-means, and one pixel a code or, of clips, no motion."""
    found = {"no motion": motionless(images)} if images.ndim == 5 else {"thumbnail": thumbnails(images, grid[-2:])}  # type: ignore[arg-type]
    extent = images.shape[1:-1]
    # Codes may be a row that belongs to no place, or more than pixels along an axis.
    if len(grid) == len(extent) and all(length % cells == 0 for length, cells in zip(extent, grid, strict=True)):
        patch = tuple(length // cells for length, cells in zip(extent, grid, strict=True))
        if num_fitted_patches(train, patch, vocab_size) >= 2 * vocab_size:
            found["k-means of patches"] = nearest_patches(train, images, patch, vocab_size, seed=seed, device=device)
    return found


def _picture_format(path: Path) -> str:
    """The format that the suffix of a picture names, PNG without one; raises ValueError for another suffix."""
    kinds = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    suffix = path.suffix.lower() or ".png"
    if suffix not in kinds:
        raise ValueError(f"--sheet {path.name}: {suffix} is no kind of picture that can be written; use .png or .jpg")
    return kinds[suffix]


def _write_sheet(path: Path, images: np.ndarray, reconstructed: np.ndarray, kind: str | None) -> None:
    """Pairs side by side, of clips their middle frames."""
    pairs = [side for pair in zip(images[:_SHOWN], reconstructed[:_SHOWN], strict=True) for side in pair]
    pairs = [side[len(side) // 2] if side.ndim == 4 else side for side in pairs]
    whole = contact_sheet([Image.fromarray(side) for side in pairs], ["real", "code"] * _SHOWN, columns=8)
    atomically(path, lambda staging: whole.save(staging, format=kind))
