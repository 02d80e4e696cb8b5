"""`nar eval --tokenizer`: what a tokenizer leaves of pictures or clips that it was not trained on, beside baselines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nar import __version__

if TYPE_CHECKING:
    import numpy as np

_TRAIN_BYTES = 2**28  # of pictures that baselines are fitted to
_SHOWN = 16  # pairs on the sheet


def judge_tokenizer(
    folder: str,
    real: str,
    *,
    size: int | None,
    group: str | None,
    number: int,
    pad: bool,
    seed: int,
    batch_size: int,
    device: str | None,
    inception: Path | None,
    sheet: Path | None,
) -> dict[str, Any]:
    """The report of a tokenizer folder on the held-out part of `real`, the same part as in its training.

    `size` and `group` are by default those that the tokenizer was trained with; pictures without a column `group` are
    held out one by one. `pad` allows sizes that are no multiple of the patch.

    Raises:
        ValueError: no size is known, or it does not fit the tokenizer.
    """
    import warnings

    import numpy as np
    import torch

    from nar.data.sources import load_pictures
    from nar.folder import digest, read_config
    from nar.metrics.evaluate import evaluate
    from nar.metrics.reconstruction import code_use, compare
    from nar.pipeline import find_model
    from nar.tokenizer import load_tokenizer
    from nar.tokenizer.perceptual import EfficientNetDistance
    from nar.training.recipe import DataConfig

    folder = str(find_model(folder))
    tokenizer = load_tokenizer(folder)
    trained = read_config(folder).get("training", {}).get("config", {}).get("data", {})
    size = size or trained.get("size") or getattr(tokenizer.config, "image_size", None)
    if size is None:
        raise ValueError(f"{folder} does not say at which size it was trained; give --size PIXELS")
    kept = {name: trained[name] for name in ("validation", "heldout_share") if name in trained}
    data = DataConfig(source=real, size=size, group=trained.get("group", "") if group is None else group, **kept)
    ungrouped = []
    try:
        train, heldout = data.open()
    except ValueError:
        if group is not None or not data.group:
            raise
        ungrouped = [f"{Path(real).name} has no column {data.group!r}, by which the tokenizer's pictures were held out"]
        data = dataclasses.replace(data, group="")
        train, heldout = data.open()
    generator = np.random.default_rng(seed)
    if len(heldout) > number:
        heldout = heldout.take(np.sort(generator.permutation(len(heldout))[:number]))
    images = load_pictures(heldout, size=size).images
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    made, codes = _through(tokenizer.to(place), images, pad=pad, batch_size=batch_size, device=place)
    distance = EfficientNetDistance().to(place)
    measures: dict[str, Any] = {"distances": {distance.name: distance}, "batch_size": batch_size, "device": place}
    counts = torch.bincount(torch.from_numpy(codes).flatten(), minlength=tokenizer.config.vocab_size)
    report: dict[str, Any] = {**compare(images, made, **measures), **code_use(counts)}
    sides = [side.reshape(-1, *side.shape[-3:]) for side in (images, made)]  # of clips every frame
    with warnings.catch_warnings():  # they are in the report
        warnings.simplefilter("ignore")
        judged = evaluate(
            [sides[0]], [sides[1]], inception=inception, calibration=0, resamplings=0, seed=seed,
            batch_size=batch_size, device=place,
        )  # fmt: skip
    report["warnings"] = ungrouped + judged["warnings"]
    distances = [name for name in judged if name.startswith(("FD", "FID")) and isinstance(judged[name], float)]
    report |= {name: judged[name] for name in distances}
    for part in ("floor", "at_floor_counts"):
        if part in judged:
            report[part] = {name: judged[part][name] for name in (*distances, "num_real", "num_fake", "what")
                            if name in judged[part]}  # fmt: skip
    size_bytes = size * size * 3
    few = generator.permutation(len(train))[: max(2, _TRAIN_BYTES // size_bytes)]
    fitted = load_pictures(train.take(few), size=size).images
    made_cheaply = _baselines(fitted, images, codes.shape[1:], tokenizer.config.vocab_size, seed)
    report["baselines"] = {name: compare(images, cheap, **measures) for name, cheap in made_cheaply.items()}
    if sheet is not None:
        _write_sheet(sheet, images, made)
    report["settings"] = {
        "tokenizer": folder, "weights_sha256": digest(folder), "config": dataclasses.asdict(tokenizer.config),
        "real": {"source": Path(real).name, "heldout": dataclasses.asdict(data) | {"source": Path(real).name}},
        "num_real": len(images), "num_fitted": len(fitted), "codes_per_sample": list(codes.shape[1:]), "size": size,
        "padded": pad, "seed": seed, "network": judged["settings"]["network"],
        "network_sha256": judged["settings"]["network_sha256"],
        "versions": {"nar": __version__, "torch": torch.__version__},
    }  # fmt: skip
    return report


def as_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table: a number a row, the tokenizer and its baselines side by side."""
    baselines = report["baselines"]
    columns = ["tokenizer", *baselines, *(["real halves", "at those counts"] if "floor" in report else [])]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in (name for name, value in report.items() if isinstance(value, float)):
        cells = [report[name], *(values.get(name) for values in baselines.values())]
        if "floor" in report:
            cells += [report["floor"].get(name), report["at_floor_counts"].get(name)]
        lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.5g}' for cell in cells)} |")
    return "\n".join(lines)


def _through(tokenizer: Any, images: np.ndarray, *, pad: bool, batch_size: int, device: Any) -> tuple[Any, Any]:
    """Pictures or clips uint8 (B, ..., 3) as the tokenizer gives them back, of the same shape, and their codes."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from nar.tokenizer.pixels import as_images, as_pixels, pad_to_multiple

    height, width = images.shape[-3:-1]
    made, codes = [], []
    with torch.inference_mode():
        for start in tqdm(range(0, len(images), batch_size), desc="reconstructing", unit="batch", disable=None):
            pixels = as_pixels(images[start : start + batch_size]).to(device)
            code = tokenizer.encode(pad_to_multiple(pixels, tokenizer.config.patch_size) if pad else pixels)
            made.append(as_images(tokenizer.decode(code)[..., :height, :width]))
            codes.append(code.cpu().numpy())
    return np.concatenate(made), np.concatenate(codes)


def _baselines(
    train: np.ndarray, images: np.ndarray, grid: tuple[int, ...], vocab_size: int, seed: int
) -> dict[str, np.ndarray]:
    """What needs no tokenizer: patches by k-means, and one pixel a code or, of clips, no motion."""
    from nar.metrics.reconstruction import motionless, nearest_patches, thumbnails

    made = {"no motion": motionless(images)} if images.ndim == 5 else {"thumbnail": thumbnails(images, grid[-2:])}  # type: ignore[arg-type]
    patch = tuple(length // cells for length, cells in zip(images.shape[1:-1], grid, strict=True))
    whole = all(cells * side == length for cells, side, length in zip(grid, patch, images.shape[1:-1], strict=True))
    enough = len(train) * (images[0].size // 3) // max(1, patch[0] * patch[1]) >= 2 * vocab_size
    if whole and enough:
        made["k-means of patches"] = nearest_patches(train, images, patch, vocab_size, seed=seed)
    return made


def _write_sheet(path: Path, images: np.ndarray, made: np.ndarray) -> None:
    """Pairs side by side, of clips their middle frames."""
    from PIL import Image

    from nar.cli.app import atomically
    from nar.sheet import contact_sheet

    pairs = [side[len(side) // 2] if side.ndim == 4 else side
             for pair in zip(images[:_SHOWN], made[:_SHOWN], strict=True) for side in pair]  # fmt: skip
    drawn = contact_sheet([Image.fromarray(side) for side in pairs], ["real", "code"] * _SHOWN, columns=8)
    atomically(path, lambda staging: drawn.save(staging, format=path.suffix[1:] or "png"))
