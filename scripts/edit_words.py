"""Draw what the bundled `emoji-edit` makes of the same hole by different words.

    python scripts/edit_words.py emoji/train.parquet docs/images/editing-words.png

A row is a drawing that was learned, what is hidden of it in grey, and two results of each prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from nar import Pipeline
from nar.data.open import open_source
from nar.media.sheet import contact_sheet
from nar.pipeline.canvas import before

SIZE = 64
MOUTH, EYES = (8, 32, 48, 26), (6, 12, 52, 24)
GLASSES = "smiling face with sunglasses"
EDITS = [  # the drawing's caption; left, top, width and height of the hole; prompts
    ("red apple", (0, 32, 64, 32), ["red apple", "green apple", "red heart", "lemon"]),
    ("cat", (0, 0, 64, 32), ["cat", "dog", "lion", "rabbit"]),
    (GLASSES, MOUTH, ["grinning face", "crying face", "angry face", "face with tongue"]),
    (GLASSES, EYES, [GLASSES, "smiling face with heart eyes", "winking face", "nerd face"]),
]


def sheet(source: str, seed: int) -> Image.Image:
    """Rows of the drawing, its hole and what is made of it."""
    pipe, drawings = Pipeline.from_pretrained("emoji-edit"), open_source(source, size=SIZE)
    kinds = list(zip(drawings.captions or (), drawings.styles or (), strict=True))
    pictures, names = list[Image.Image](), list[str]()
    for caption, (left, top, width, height), prompts in EDITS:
        row = next(row for row, (said, style) in enumerate(kinds) if said == caption and style.startswith("fluent"))
        drawing, mask = drawings.array(row, SIZE), np.zeros((SIZE, SIZE), bool)
        mask[top : top + height, left : left + width] = True
        pictures += before(drawing, mask)
        names += [caption, ""]
        for prompt in prompts:
            pictures += pipe.edit(drawing, mask=mask, prompt=prompt, num_images_per_prompt=2, seed=seed).images
            names += [prompt, ""]
    return contact_sheet(pictures, names, columns=10, cell=96)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sheet(asked.source, asked.seed).save(asked.output)
