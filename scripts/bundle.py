"""Put a trained model into the package: weights in bfloat16, its tokenizer inside, the card left as it is.

    python scripts/bundle.py runs/clips/model src/nar/bundled/clips --limit 14
    python scripts/bundle.py runs/fashion/model src/nar/bundled/fashion --tokenizer runs/fashion-decoder/model --limit 6

The tokenizer is that of `--tokenizer`, or the one that the target has already, which is not written anew, or the
model's own. It must have the codebook that the model was trained with. Paths in the recipe are cut to their last part.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from nar import Transformer, load_tokenizer
from nar.storage.folder import read_config


def bundle(model: Path, target: Path, tokenizer: Path | None = None) -> int:
    """Write the folder; returns its size in bytes."""
    present = target / "tokenizer"
    source = tokenizer or (present if present.is_dir() else model / "tokenizer")
    codebooks = [
        load_tokenizer(folder).quantizer.embedding.weight.bfloat16() for folder in (model / "tokenizer", source)
    ]
    if not torch.equal(*codebooks):
        raise ValueError(f"{source} has other codes than {model / 'tokenizer'}")
    config, card = read_config(model), target / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    with tempfile.TemporaryDirectory() as staging:
        half = Path(staging) / "tokenizer"
        if source == present:
            shutil.copytree(source, half)
        else:
            training = without_places(read_config(source)["training"])
            load_tokenizer(source).save_pretrained(half, dtype=torch.bfloat16, training=training)
        kept = {name: value for name, value in without_places(config).items() if name not in ("kind", "model")}
        Transformer.from_pretrained(model).save_pretrained(target, dtype=torch.bfloat16, tokenizer=half, **kept)
    if text is not None:
        card.write_text(text, encoding="utf-8")
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def without_places(value: Any) -> Any:
    """The same nested value, absolute paths in it cut to their last part: where the data lay is nobody's business."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--limit", type=float, help="largest size in MB (10^6 bytes)")
    given = parser.parse_args()
    size = bundle(given.model, given.target, given.tokenizer)
    print(f"{size:,} bytes")
    if given.limit and size > given.limit * 1e6:
        raise SystemExit(f"{given.target} has more than {given.limit:g} MB")
