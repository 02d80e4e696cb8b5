"""What a precision costs: held-out bits per token of a model, decoded front by front in each of them.

    python scripts/precision_quality.py --model fashion --codes runs/fashion/codes/heldout

The codes, and classes, are those that training extracted from the held-out pictures, so that nothing but the precision
differs. Tokens are given, not drawn (teacher forcing), and pass through the steps that drawing takes, since int8 rounds
the inputs of each product by the batch that it sees.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nar import ClassCondition, Transformer
from nar.data.codes import Codes
from nar.precision import PRECISIONS, convert
from nar.storage.folder import find_model


@torch.inference_mode()
def losses(model: Transformer, codes: Tensor, labels: Tensor) -> Tensor:
    """Nats (B, N) of given codes, computed as decoding does."""
    embedded, key_mask = model.embed(ClassCondition(labels))
    cache, tokens, schedule = model.new_cache(len(codes)), model.in_order(codes), model.layout.schedule
    hidden = [model.prefill(embedded, key_mask, cache)]
    for front in range(schedule.num_steps - 1):
        hidden.append(model.decode(tokens[:, : schedule.front(front).stop], range(front, front + 1), cache))
    logits = torch.cat([model.logits(part) for part in hidden], 1)
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--number", type=int, default=4000)
    given = parser.parse_args()
    held = Codes.open(given.codes)
    rows = np.arange(min(given.number, len(held)))
    codes, labels = torch.from_numpy(held.read(rows)).long(), torch.from_numpy(held.labels[rows])
    exact = None
    for precision in PRECISIONS:
        for batch in (8, 1) if precision == "int8" else (8,):
            model = convert(Transformer.from_pretrained(find_model(given.model)), precision, "cpu")
            count = len(codes) if batch > 1 else min(500, len(codes))
            found = torch.cat(
                [losses(model, codes[i : i + batch], labels[i : i + batch]) for i in range(0, count, batch)]
            )
            found = found.mean(1) / math.log(2)
            exact = found if exact is None else exact
            change = found - exact[:count]
            print(
                f"{precision}, batch {batch}, {count} pictures: {found.mean():.4f} bits per token, "
                f"{change.mean() / exact[:count].mean():+.3%} (standard error "
                f"{change.std() / count**0.5 / exact[:count].mean():.3%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
