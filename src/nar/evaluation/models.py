"""Pictures or clips judged against real ones: a set in files, or what a model samples while it is judged.

Knows models, tokenizers and detectors, and which known defects stand beside a score; does not know how numbers are made
(`nar.metrics`), nor options. Dimensions: B pictures or clips, T frames, H x W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nar.data.source import Source as DataSource
from nar.evaluation.sets import BATCH, CLIP_BATCH, Sampled, made_by, paired_places, set_labels
from nar.media.pixels import as_images, as_pixels
from nar.metrics.defects import Defect, motion_defects, swapped_patches
from nar.metrics.evaluate import evaluate
from nar.metrics.pictures import Source, opened
from nar.metrics.reference import is_reference
from nar.pipeline import Pipeline, Request
from nar.pipeline.folder import format_facts
from nar.precision import usable_device
from nar.storage.fields import Seed
from nar.storage.folder import bundled_names, find_model, model_digest
from nar.tokenizer import Tokenizer, load_tokenizer

NUMBER = 10_000  # pictures that a model samples
TOKEN_SHARES = (0.0, 0.02, 0.05, 0.1)  # of the known defects with a tokenizer; 0: only encoded and decoded
_AS_THEY_ARE = ("inception", "num_frames", "size", "resamplings", "seed", "cache", "progress")  # for `evaluate`
PROTOCOLS: dict[str, dict[str, Any]] = {"ucf101": {"num_frames": 16, "size": 128}}


@dataclass(frozen=True)
class Comparison:
    """How fake pictures or clips are compared with real ones, whoever made them.

    Attributes:
        real, split, floor: real pictures, see `nar.data.open.open_source`; without splits they are read whole.
        size, num_frames: what all pictures and clips are cut to; None leaves them, or takes what `protocol` fixes.
        number: how many are sampled, or chosen of the real ones by `protocol`; None is 10,000, or all there are.
        inception, video, i3d, i3d_variant: which network makes features; EfficientNet-Lite0 without any of them.
        tokenizer: whose codes of real pictures are spoilt, for rows of known defects; without one, `calibration` is the
            share of patches that are exchanged. A calibration of 0 leaves these rows out.
    """

    real: str | DataSource
    split: str = "test"
    floor: str | None = None
    size: int | None = None
    num_frames: int | None = None
    protocol: str | None = None
    number: int | None = None
    inception: Path | None = None
    video: bool = False
    i3d: Path | None = None
    i3d_variant: str = "stylegan-v"
    tokenizer: str | None = None
    calibration: float = 0.05
    resamplings: int = 1000
    seed: Seed = 0
    cache: Path | None = None
    batch_size: int | None = None
    device: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be {' or '.join(PROTOCOLS)}, not {self.protocol!r}")

    def cut(self) -> Comparison:
        """The comparison with the sizes that its protocol fixes, where it does not say its own."""
        fixed = {name: getattr(self, name) or value for name, value in PROTOCOLS.get(self.protocol or "", {}).items()}
        return dataclasses.replace(self, **fixed)


def is_model(source: str) -> bool:
    """Whether a source of fake pictures names a model that samples them."""
    return source in bundled_names() or (Path(source).expanduser() / "config.json").is_file()


def judge_set(how: Comparison, fake: str) -> dict[str, Any]:
    """The report of a set in files."""
    how, places = how.cut(), None
    if how.protocol:
        how = _choosable(how)
        places = paired_places(len(how.real), how.number or NUMBER)
    return _report(how, fake, only_real=places)


def judge_model(
    how: Comparison, model: str, *, labels: str | None = None, settings: dict[str, Any], dtype: str = "float32"
) -> dict[str, Any]:
    """The report of what a model samples, with `settings` of sampling in place of its own.

    `labels` are "balanced", "random" or "real": the classes of real pictures; None is what the protocol asks for.

    Raises:
        ValueError: the model samples clips and pictures are asked for, has no classes, or not these.
    """
    how, folder = how.cut(), find_model(model)
    labels = labels or ("balanced" if how.protocol is None else "real")
    pipe = Pipeline.from_pretrained(model, device=usable_device(how.device), dtype=dtype)
    if pipe.makes_clips:
        if how.inception is not None:
            raise ValueError(f"{model} makes clips, which the Inception network does not judge: leave --inception out")
        how = dataclasses.replace(how, video=True, batch_size=how.batch_size or CLIP_BATCH)
        how = dataclasses.replace(how, num_frames=how.num_frames or pipe.pixel_shape[0])
    size, tokenizer = how.size or pipe.pixel_shape[-1], how.tokenizer or str(folder / "tokenizer")
    how = dataclasses.replace(how, size=size, tokenizer=tokenizer)
    chosen: str | Sequence[str | int] = labels
    places, count = None, how.number or NUMBER
    if labels == "real":
        how = _choosable(how)
        chosen = how.real.classes(pipe.class_names)  # type: ignore[union-attr]
        places = paired_places(len(chosen), count)
        count = how.number or len(places)
    numbers = set_labels(pipe, chosen, count, how.seed).tolist()
    sampling = dataclasses.replace(pipe.sampling, **settings)
    source = Sampled(pipe, [*map(Request, numbers)], sampling, how.seed, how.batch_size or BATCH)
    made_with = {
        "model": model,
        "labels": labels,
        "seed": how.seed,
        **dataclasses.asdict(sampling),
        **format_facts(pipe.model, pipe.choice),
    }
    made_with |= {"grid": list(pipe.model.config.grid), "classes": len(set(numbers)), **made_by(folder)}
    return _report(how, source, only_real=None if places and len(places) == len(chosen) else places, settings=made_with)


def _choosable(how: Comparison) -> Comparison:
    """The comparison with its real side open; raises ValueError for statistics, of which no pictures can be chosen."""
    if is_reference(how.real):
        raise ValueError(
            f"--real {how.real} holds statistics: real pictures can't be chosen of it, nor their classes be read; give "
            "the pictures themselves, or leave --labels real and --protocol out"
        )
    return dataclasses.replace(how, real=_opened(how, how.real))


def _opened(how: Comparison, real: str | DataSource) -> Any:
    """Real pictures or clips as the comparison reads them; a file of statistics stays a path."""
    if is_reference(real):
        return real
    clips = how.video or how.i3d is not None
    return opened(real, split=how.split, size=how.size, num_frames=how.num_frames, clips=clips)


def _report(
    how: Comparison, fake: Source, *, only_real: list[int] | None, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    device, detector = usable_device(how.device), None
    if how.i3d is not None or how.video:
        from nar.metrics.detectors import I3DDetector, TransNetDetector

        place = device or "cpu"
        detector = TransNetDetector(place) if how.i3d is None else I3DDetector(how.i3d, how.i3d_variant, place)
    defects: float | list[Defect] = how.calibration
    if how.calibration and (how.tokenizer or detector):
        defects = [swapped_patches(how.calibration, how.seed)]
        if how.tokenizer:
            defects = token_defects(find_model(how.tokenizer), device, how.seed)
        defects += motion_defects(how.seed) if detector else []
    report = evaluate(
        _opened(how, how.real),
        fake,
        detector=detector,
        only_real=only_real,
        floor=None if how.floor is None else _opened(how, how.floor),
        calibration=defects,
        batch_size=how.batch_size or (CLIP_BATCH if detector else BATCH),
        device=device,
        settings=settings,
        **{name: getattr(how, name) for name in _AS_THEY_ARE},
    )
    report["settings"]["protocol"] = how.protocol
    return report


def token_defects(tokenizer_folder: Path, device: str | None, seed: int) -> list[Defect]:
    """Real pictures with some of their tokens resampled: what a model that errs now and then would make of them."""
    tokenizer = load_tokenizer(tokenizer_folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights = model_digest(tokenizer_folder)

    def defect(share: float) -> Defect:
        name = f"{100 * share:.3g} % of tokens resampled" if share else "encoded and decoded"
        return Defect(
            name,
            f"tokens {share} {seed} {weights}",
            lambda images, first: resample_tokens(tokenizer, images, share, seed + first),
        )

    return [*map(defect, TOKEN_SHARES)]


@torch.inference_mode()
def resample_tokens(tokenizer: Tokenizer, images: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Encode uint8 pictures (B, H, W, 3) or clips (B, T, H, W, 3), resample a share of their tokens, decode.

    New tokens are taken from all places of all these pictures, so they follow the marginal distribution of real tokens.
    With one seed the tokens changed at a small share are also changed at a larger one, and to the same values; share 0
    shows what the tokenizer alone costs.
    """
    place = next(tokenizer.parameters()).device
    codes = tokenizer.encode(as_pixels(images).to(place)).cpu().numpy()
    generator = np.random.default_rng(seed)
    changed = generator.random(codes.shape) < share
    sampled = codes.reshape(-1)[generator.integers(0, codes.size, codes.shape)]
    return as_images(tokenizer.decode(torch.from_numpy(np.where(changed, sampled, codes)).to(place)))
