"""Pictures judged by their captions, and against what was trained on: CLIP score, retrieval, near-copies.

Knows which judge reads what; does not know how each judges (`nar.metrics`), nor options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nar.data.open import load_pictures, open_source
from nar.data.source import Source
from nar.precision import usable_device
from nar.storage.fields import Seed, Size, checked
from nar.storage.text import read_lines


@checked
def judge_captions(
    fake: str,
    *,
    captions: Path | None = None,
    clip: Path | None = None,
    clip_prefix: str = "",
    retrieval: bool = False,
    size: Size | None = None,
    seed: Seed = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """The CLIP score of pictures with their captions, by the model in the folder `clip`, and `retrieval`.

    Captions are those of the source, or the lines of a file. `clip_prefix` and `size` are of the CLIP score.

    Raises:
        ValueError: neither is asked for, or the captions are not as many as the pictures.
    """
    from nar.metrics.text_image import ClipScorer, RetrievalScorer, clip_score, weights_digest

    if clip is None and not retrieval:
        raise ValueError("say what to measure: --clip FOLDER for the CLIP score, --retrieval, or both")
    source, said = _captioned(fake, captions)
    place = usable_device(device) or "cpu"
    settings = {"fake": source.counts(), "num_fake": len(source), "seed": seed}
    report: dict[str, Any] = {"interval": {}, "settings": settings}
    if clip is not None:
        scorer = ClipScorer(clip, device=place)
        found = clip_score(_pictures(source), said, scorer, prefix=clip_prefix, size=size, seed=seed)
        _merge(report, found, clip_sha256=weights_digest(clip), clip_prefix=clip_prefix, size=size)
    if retrieval:
        _merge(report, RetrievalScorer(device=place).score(_pictures(source), said, seed=seed))
    return report


@checked
def judge_copies(fake: str, of: str, real: str, *, split: str = "test", size: Size = 64) -> dict[str, Any]:
    """The share of pictures that lie closer to a training picture `of` these than 99 % of `real`, unseen ones do."""
    from nar.metrics.text_image import near_copies

    parts = {"fake": (fake, "train"), "training": (of, "train"), "real": (real, split)}
    sources = {name: open_source(path, size=size, split=part, whole=True) for name, (path, part) in parts.items()}
    pictures = {name: load_pictures(source, size=size) for name, source in sources.items()}
    report = near_copies(*(part.images for part in pictures.values()))
    counts = {name: source.counts() for name, source in sources.items()}
    report["settings"] = {"size": size, **counts, **{f"num_{name}": len(part) for name, part in pictures.items()}}
    return report


def _merge(report: dict[str, Any], found: dict[str, Any], **settings: Any) -> None:
    report["interval"] |= found.pop("interval", {})
    report["settings"] |= found.pop("settings", {}) | settings
    report |= found


def _pictures(source: Source) -> Iterator[Image.Image]:
    return map(source.picture, range(len(source)))


def _captioned(fake: str, file: Path | None) -> tuple[Source, Sequence[str]]:
    """A source of pictures and a caption for each, its own or the lines of a file."""
    source = open_source(fake, size=64)
    captions = source.captions
    if file is not None:
        captions = [line.strip() for line in read_lines(file) if line.strip()]
    if captions is None or len(captions) != len(source):
        number = "no" if captions is None else str(len(captions))
        raise ValueError(
            f"{fake} has {len(source)} pictures and {number} captions; give --captions FILE with one a line in the "
            "order of the names, a .txt beside each picture, a metadata.jsonl, or a .parquet with `caption`"
        )
    return source, captions
