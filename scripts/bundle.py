"""Put a trained model into the package: weights in bfloat16, its tokenizer inside, the card left as it is.

    python scripts/bundle.py runs/fashion/model runs/fashion-decoder/model src/nar/bundled/fashion

The second folder's tokenizer must have the codebook that the model was trained with.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from nar import Transformer, load_tokenizer
from nar.folder import read_config

LIMIT_BYTES = 6_000_000


def bundle(model: Path, tokenizer: Path, target: Path) -> int:
    """Write the folder; returns its size in bytes."""
    codebooks = [load_tokenizer(folder).quantizer.embedding.weight for folder in (model / "tokenizer", tokenizer)]
    if not torch.equal(*codebooks):
        raise ValueError(f"{tokenizer} has other codes than {model / 'tokenizer'}")
    config, card = read_config(model), target / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    with tempfile.TemporaryDirectory() as staging:
        half = Path(staging) / "tokenizer"
        load_tokenizer(tokenizer).save_pretrained(
            half, dtype=torch.bfloat16, training=read_config(tokenizer)["training"]
        )
        kept = {name: config[name] for name in ("training", "sampling", "text_encoder") if name in config}
        Transformer.from_pretrained(model).save_pretrained(
            target, dtype=torch.bfloat16, class_names=tuple(config["class_names"]), tokenizer=half, **kept
        )
    if text is not None:
        card.write_text(text, encoding="utf-8")
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


if __name__ == "__main__":
    size = bundle(*map(Path, sys.argv[1:4]))
    print(f"{size:,} bytes")
    sys.exit(size > LIMIT_BYTES)
