"""What a model that edits learns from: for each sample a mask, the codes of the picture without what it covers, and how
much each token counts.

Knows pictures, masks and codes; does not know models or steps. Legend: `b` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nar.condition import Condition
from nar.data.codes import Codes
from nar.data.source import Source
from nar.media.crops import VIEWS
from nar.media.masks import random_mask
from nar.media.pixels import as_pixels
from nar.pipeline.holes import blanked, holes_condition, touched
from nar.storage.fields import NotNegative, Share, check
from nar.tokenizer import Tokenizer


@dataclass(frozen=True)
class EditConfig:
    """How a model learns to fill holes.

    Attributes:
        plain: share of the samples of which nothing is given: generation as before.
        replace: share of the others that keep their own codes outside of the hole, of which it is to be the middle; the
            rest are filled: only the codes of the blanked picture are given, and all codes are sampled.
        outside: how much a token outside of the hole counts in the loss, where one inside counts 1.
    """

    plain: Share = 0.25
    replace: Share = 0.5
    outside: NotNegative = 0.5

    def __post_init__(self) -> None:
        check(self, "edit.")


class Holes:
    """The samples of `codes`, which `source` was encoded to, with holes.

    Pictures are read and encoded again whenever they are asked for: no mask comes twice, and for the tokenizer of
    `fashion` that is a tenth of a step's work.

    Raises:
        ValueError: the codes are not those of the whole source, in its order.
    """

    def __init__(self, config: EditConfig, source: Source, codes: Codes, tokenizer: Tokenizer) -> None:
        self.config, self.codes, self._source, self._tokenizer = config, codes, source, tokenizer
        whole = Codes.open(codes.folder)
        if len(whole) != len(source) or list(whole.groups) != list(source.groups or source.names):
            raise ValueError(
                f"edit needs every picture of {source.origin or 'the source'} that has codes: {len(whole):,} of "
                f"{len(source):,} have; take the broken ones out (they are listed in {codes.folder / 'broken.txt'})"
            )
        if len(codes.grid) != len(tokenizer.pixel_shape(codes.grid)):
            raise ValueError("edit needs a tokenizer whose codes have places; this one's describe a clip as a whole")
        self.shape = tokenizer.pixel_shape(codes.grid)
        self._rows = np.arange(len(source)) if codes.rows is None else codes.rows

    def picked(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks (b, [T,] H, W) of samples, and which of these (b,) keep their own codes, by numbers (b,) in [0, 1)."""
        masks, replaced = list[np.ndarray](), list[bool]()
        for draw in draws:
            rng = np.random.default_rng(int(draw * 2**24))  # the numbers are float32: there are no more
            plain, own = rng.random(2) < (self.config.plain, self.config.replace)
            masks.append(np.ones(self.shape, bool) if plain else random_mask(rng, self.shape))
            replaced.append(bool(own and not plain))
        return np.stack(masks), np.array(replaced)

    def fixed(self, rows: np.ndarray, mode: str) -> tuple[Condition, Tensor]:
        """As `read`, of samples that are all "filled" or all "replaced", each under a mask of its row; tokens count the
        same, in the hole when replaced."""
        masks = np.stack([random_mask(np.random.default_rng((0, int(row))), self.shape) for row in rows])
        condition, weight = self.read(rows, masks, np.full(len(rows), mode == "replaced"))
        return condition, weight if mode == "replaced" else torch.ones_like(weight)

    @torch.no_grad()
    def read(
        self, rows: np.ndarray, masks: np.ndarray, replaced: np.ndarray, views: np.ndarray | None = None
    ) -> tuple[Condition, Tensor]:
        """The condition of samples on their codes outside of `masks`, and the weights (b, *grid) of their tokens.

        Those `replaced` (b,) keep the codes of the whole picture there. `views` are as in `Codes.read`.
        """
        device = next(self._tokenizer.parameters()).device
        kind, size = self.codes.manifest["views"], self.codes.manifest["size"]
        chosen = [0] * len(rows) if views is None else (np.asarray(views) * VIEWS[kind]).astype(np.int64)
        pictures = [
            self._source.views(int(self._rows[row]), size, kind)[view] for row, view in zip(rows, chosen, strict=True)
        ]
        mask, own = torch.from_numpy(masks).to(device), torch.from_numpy(replaced).to(device)
        own = own[(...,) + (None,) * (mask.ndim - 1)]
        codes = self._tokenizer.encode(blanked(as_pixels(np.stack(pictures)).to(device), mask & ~own))
        holes = touched(mask, self.codes.grid)
        weight = torch.where(holes, 1.0, torch.where(own, 0.0, self.config.outside))
        return holes_condition(codes, holes), weight
