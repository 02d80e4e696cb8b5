"""Draw how a model fills holes: for each of five masks two held-out pictures, chosen by the seed and by nothing else.

    python scripts/edit_sheet.py fashion-edit fashion-mnist docs/images/editing.png

A row is the picture, what is hidden of it in grey, and four results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from nar import Pipeline
from nar.evaluation.real import open_real
from nar.evaluation.sets import trained_on
from nar.media.masks import FIXED, fixed_mask
from nar.media.sheet import contact_sheet
from nar.pipeline.canvas import before


def sheet(model: str, real: str, seed: int, each: int = 2) -> Image.Image:
    """Rows of the picture, its mask and what the model makes of it."""
    pipe = Pipeline.from_pretrained(model)
    size = pipe.pixel_shape[-1]
    source = open_real(real, [trained_on(pipe.folder)], split="test", size=size)
    pictures, names = list[Image.Image](), list[str]()
    rows = iter(np.random.default_rng(seed).permutation(len(source)).tolist())
    for mask in FIXED:
        for _ in range(each):
            row = next(rows)
            picture, hidden = source.array(row, size), fixed_mask(mask, (size, size), row)
            words = source.captions is not None and pipe.config.text_dim > 0
            label = source.captions[row] if words else source.class_names[source.labels[row]]
            asked = {"prompt" if words else "class_labels": label}
            made = pipe.edit(picture, mask=hidden, **asked, num_images_per_prompt=4, seed=seed)
            pictures += [*before(picture, hidden), *made.images]
            names += [label, mask, *[""] * 4]
    return contact_sheet(pictures, names, columns=12, cell=2 * size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("real")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sheet(asked.model, asked.real, asked.seed).save(asked.output)
