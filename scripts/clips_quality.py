"""Measure a model of animated emoji by its words and by what it makes of given frames: Markdown tables, and JSON.

    python scripts/clips_quality.py --model clips --data clips.parquet --held-out runs/clips/held-out.json

- *Words*: one clip of each of `--number` learned captions. `nar.metrics.text_image.RetrievalScorer` judges the first
  frames: is a clip's own caption the nearest of 1,000 (R@1), or among the five nearest (R@5)? Beside them stand the
  first frames of the real clips with these captions, before and after the tokenizer, and of each the mean absolute
  difference of neighbouring frames, in levels of 0..255.
- *Given frames*, nothing else told: PSNR of the frames that follow, the mean of all clips', drawn at this model's
  settings, and where the last given frame is repeated; of learned and of held-out clips.

How the motion is distributed, FD-TransNetV2 beside its floor, is measured by `nar eval --video`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nar import Pipeline
from nar.data.config import SKIN_TONES
from nar.data.open import load_pictures, open_source
from nar.data.split import families
from nar.media.pixels import as_images, as_pixels
from nar.media.video import Windows
from nar.metrics.reconstruction import psnr
from nar.metrics.text_image import RetrievalScorer

SIZE = 64
BATCH = 8


def draw(pipe: Pipeline, seed: int, **asked: Any) -> np.ndarray:
    """Clips (N, T, 64, 64, 3) uint8, one of each of N prompts, or of each of N clips' given frames."""
    parts = []
    for start in range(0, min(map(len, asked.values())), BATCH):
        some: dict[str, Any] = {name: list(values[start : start + BATCH]) for name, values in asked.items()}
        parts.append(pipe(**some, seed=seed + start, output_type="np").videos)
    return np.concatenate(parts)


@torch.inference_mode()
def after_tokenizer(pipe: Pipeline, clips: np.ndarray) -> np.ndarray:
    """What the tokenizer leaves of clips (N, T, 64, 64, 3) uint8."""
    tokenizer = pipe.tokenizer
    parts = as_pixels(clips).split(BATCH)
    return np.concatenate([as_images(tokenizer.decode(tokenizer.encode(some))) for some in parts])


def frame_difference(clips: np.ndarray) -> float:
    """Of clips (N, T, 64, 64, 3) uint8, in levels of 0..255."""
    return float(np.abs(np.diff(clips.astype(np.int16), axis=1)).mean())


def mean_psnr(made: np.ndarray, real: np.ndarray) -> float:
    """Of clips (N, T, 64, 64, 3) uint8, the mean of each one's PSNR in dB; one without any error counts 60."""
    errors = ((made.astype(np.float32) - real) ** 2).mean((1, 2, 3, 4))
    return float(np.mean([min(psnr(float(error)), 60) for error in errors]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clips")
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="held-out.json of the model's run")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    source = open_source(given.data, size=SIZE, group="hexcode", windows=Windows())
    source = dataclasses.replace(source, groups=families(source.groups, SKIN_TONES))
    if source.groups is None or source.captions is None:
        raise SystemExit(f"{given.data} has no column `hexcode` or `caption`")
    out = set(json.loads(given.held_out.read_text())["groups"])
    rows = np.random.default_rng(given.seed).permutation(len(source))
    learned = [int(row) for row in rows if source.groups[row] not in out][: given.number]
    unseen = [int(row) for row in rows if source.groups[row] in out]
    captions = [source.captions[row] for row in learned]
    real = {
        name: load_pictures(source.take(np.array(some)), size=SIZE).images
        for name, some in (("learned", learned), ("held out", unseen))
    }

    pipe = Pipeline.from_pretrained(given.model)
    started = time.monotonic()
    drawn = draw(pipe, given.seed, prompt=captions)
    seconds = (time.monotonic() - started) / len(captions)
    scorer, scores = RetrievalScorer(), {}
    print("| | clips | R@1 | R@5 | frame difference |\n|---|---|---|---|---|")
    for name, clips in {
        "drawn": drawn,
        "real": real["learned"],
        "real, after the tokenizer": after_tokenizer(pipe, real["learned"]),
    }.items():
        score = scorer.score(np.ascontiguousarray(clips[:, 0]), captions)
        scores[name] = {key: score[key] for key in ("R@1", "R@5", "interval")} | {"difference": frame_difference(clips)}
        shares = (
            f"{score[key]:.3f} ({low:.2f} to {high:.2f})" for key in _SHARES for low, high in [score["interval"][key]]
        )
        print(f"| {name} | {len(clips)} | {' | '.join(shares)} | {scores[name]['difference']:.1f} |")

    followed: dict[str, dict[str, float]] = {}
    print("\n| frames given | clips | drawn | last frame repeated |\n|---|---|---|---|")
    for count in (number for number in pipe.continuation.counts if number):
        for name, clips in real.items():
            made = draw(pipe, given.seed, frames=clips[:, :count])
            repeated = np.repeat(clips[:, count - 1 : count], clips.shape[1] - count, 1)
            found = {
                "drawn": mean_psnr(made[:, count:], clips[:, count:]),
                "repeated": mean_psnr(repeated, clips[:, count:]),
            }
            followed[f"{count}, {name}"] = found
            print(f"| {count} | {len(clips)} {name} | {found['drawn']:.1f} dB | {found['repeated']:.1f} dB |")
    print(f"\n{seconds:.2f} s a clip at batch {BATCH}")
    if given.json:
        report = {"words": scores, "given_frames": followed, "seconds_per_clip": seconds}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


_SHARES = ("R@1", "R@5")


if __name__ == "__main__":
    main()
