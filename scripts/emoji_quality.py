"""Measure a text model of emoji against real drawings of a vendor that it has not seen: a Markdown table, and JSON.

    python scripts/emoji_quality.py --model emoji --data emoji/train.parquet --held-out runs/emoji/held-out.json

Two sets of prompts, one picture each:

- *seen*: 200 learned captions that the unseen vendor (`--vendor`) has drawn too, in plain words.
- *pairs*: the held-out pairs of caption and style, "taco, noto", whose captions were learned in other styles only.

Both are judged by `nar.metrics.text_image.RetrievalScorer`: is a picture's own caption the nearest of 1,000 (R@1) or
among the five nearest (R@5), and its own concept's mean drawing the nearest of all (concept accuracy). Beside them
stand the same numbers of the unseen vendor's drawings of the same captions, before and after the tokenizer, and of the
very drawings that were held out as pairs. The scorer was fitted without that vendor, but on the styles that the model
learned: a model that draws in those styles has it easier than the vendor. Near-copies: the share closer to a training
drawing than 99 % of the unseen vendor's drawings are, and the same of these after the tokenizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nar import Pipeline
from nar.data.config import SKIN_TONES
from nar.data.open import load_pictures, open_source
from nar.data.split import families
from nar.media.pixels import as_images, as_pixels
from nar.metrics.text_image import RetrievalScorer, near_copies

SIZE = 64
BATCH = 8


def draw(pipe: Pipeline, prompts: Sequence[str], *, guidance_scale: float | None, seed: int) -> np.ndarray:
    """Pictures (N, 64, 64, 3) uint8, one of each prompt."""
    parts = [
        pipe(
            prompt=list(prompts[start : start + BATCH]),
            guidance_scale=guidance_scale,
            seed=seed + start,
            output_type="np",
        ).images
        for start in range(0, len(prompts), BATCH)
    ]
    return np.concatenate(parts)


@torch.inference_mode()
def after_tokenizer(pipe: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """What the tokenizer leaves of pictures (N, 64, 64, 3) uint8."""
    tokenizer = pipe.tokenizer
    parts = as_pixels(pictures).split(64)
    return np.concatenate([as_images(tokenizer.decode(tokenizer.encode(some))) for some in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="held-out.json of the model's run")
    parser.add_argument("--vendor", default="twemoji", help="the style that neither model nor scorer has seen")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures here (.npz)")
    given = parser.parse_args()

    held = json.loads(given.held_out.read_text())
    if given.vendor not in held["styles"]:
        raise SystemExit(f"{given.vendor} was not held out: {held['styles']}")
    source = open_source(given.data, size=SIZE, group="hexcode")
    source = dataclasses.replace(source, groups=families(source.groups, SKIN_TONES))
    if source.groups is None or source.styles is None or source.captions is None:
        raise SystemExit(f"{given.data} has no column `hexcode`, `style` or `caption`")
    styles, captions = source.styles, source.captions
    pairs = {(group, style): caption for group, style, caption in held["pairs"]}
    out = set(held["groups"])
    learned: list[int] = []
    real: dict[str, int] = {}
    drawn_pairs: dict[tuple[str, str], int] = {}
    for row, key in enumerate(zip(source.groups, styles, strict=True)):
        if key in pairs:
            drawn_pairs[key] = row
        elif key[1] == given.vendor:
            real.setdefault(captions[row], row)
        elif key[0] not in out and key[1] not in held["styles"]:
            learned.append(row)
    both = sorted({captions[row] for row in learned} & real.keys())
    seen = sorted(np.random.default_rng(given.seed).permutation(both)[: given.number].tolist())
    keys = sorted(drawn_pairs)

    pipe = Pipeline.from_pretrained(given.model)
    started = time.monotonic()
    drawn = {
        "seen": draw(pipe, seen, guidance_scale=given.guidance_scale, seed=given.seed),
        "pairs": draw(
            pipe, [f"{pairs[key]}, {key[1]}" for key in keys], guidance_scale=given.guidance_scale, seed=given.seed
        ),
    }
    seconds = (time.monotonic() - started) / (len(seen) + len(keys))
    if given.pictures:
        np.savez_compressed(
            given.pictures,
            seen=drawn["seen"],
            pairs=drawn["pairs"],
            seen_prompts=seen,
            pair_prompts=[pairs[key] for key in keys],
        )

    def pictures(rows: Sequence[int]) -> np.ndarray:
        return load_pictures(source.take(np.array(rows, np.int64)), size=SIZE).images

    real_seen, real_pairs = pictures([real[caption] for caption in seen]), pictures([drawn_pairs[key] for key in keys])
    asked = {"seen": seen, "pairs": [pairs[key] for key in keys]}
    scorer = RetrievalScorer()
    scores = {
        "drawn, seen captions": scorer.score(drawn["seen"], asked["seen"]),
        f"real, the same captions, {given.vendor}": scorer.score(real_seen, asked["seen"]),
        "the same after the tokenizer": scorer.score(after_tokenizer(pipe, real_seen), asked["seen"]),
        "drawn, held-out pairs": scorer.score(drawn["pairs"], asked["pairs"]),
        "real, the same pairs": scorer.score(real_pairs, asked["pairs"]),
    }
    training, unseen = pictures(learned), pictures(sorted(real.values()))
    everything = np.concatenate([drawn["seen"], drawn["pairs"]])
    copies = {
        "drawn": near_copies(everything, training, unseen)["near_copies"],
        "real, after the tokenizer": near_copies(after_tokenizer(pipe, unseen), training, unseen)["near_copies"],
    }
    table = ["| | pictures | R@1 | R@5 | concept accuracy |", "|---|---|---|---|---|"]
    for name, score in scores.items():
        table.append(
            f"| {name} | {score['num_fake']} | " + " | ".join(_with_interval(score, key) for key in _SHARES) + " |"
        )
    print("\n".join(table))
    print("near-copies: " + ", ".join(f"{name} {share:.1%}" for name, share in copies.items()))
    print(f"{seconds:.2f} s a picture at batch {BATCH}")
    if given.json:
        report: dict[str, Any] = {"scores": scores, "near_copies": copies, "seconds_per_picture": seconds}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


_SHARES = ("R@1", "R@5", "concept accuracy")


def _with_interval(score: dict[str, Any], key: str) -> str:
    low, high = score["interval"][key]
    return f"{score[key]:.3f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
