"""Objects in composed drawings: a small detector, and GenEval's judgement of such pictures with it.

A head of 136,000 weights on three stages of EfficientNet-Lite0 finds drawings on white at 64x64 pixels; their colour is
that of most of their pixels. It does not know who made the pictures, or which drawings it was trained with.
Dimensions: B pictures, S = 16 cells a side, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nar.metrics.geneval.judge import Box, Found, Rules
from nar.metrics.geneval.scenes import name_colour
from nar.metrics.networks.efficientnet import EfficientNetLite0, load_efficientnet
from nar.metrics.text_image import read_fitted
from nar.storage.files import digest

SIZE = 64  # pixels of the pictures that are judged
CELLS = 16
WEIGHTS = Path(__file__).parents[1] / "fitted" / "composed.safetensors"
_ENLARGED = 128  # what the network sees: its stages of stride 8, 16 and 32 are then 16, 8 and 4 cells wide
_TAPS = {8: 40, 16: 112, 32: 320}  # stride of the features, and how many channels they have
_BATCH = 64
_LEAST = 0.02  # scores below this are not even candidates
EXTENT = 32.0  # pixels that the box outputs are scaled by


class SceneHead(nn.Module):
    """Stages of the network to a map (B, 1 + 4 + K, S, S): centre logit, box, class logits."""

    def __init__(self, num_classes: int, dim: int = 96) -> None:
        super().__init__()
        self.taps = nn.ModuleList([nn.Conv2d(channels, dim, 1) for channels in _TAPS.values()])
        self.body = nn.Conv2d(dim, dim, 3, padding=1)
        self.out = nn.Conv2d(dim, 5 + num_classes, 1)
        with torch.no_grad():
            cast(Tensor, self.out.bias)[0] = -4.0  # centres are rare

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        # A 1x1 convolution commutes with enlarging, and costs less before it.
        tapped = (tap(stage.float()) for tap, stage in zip(self.taps, stages, strict=True))
        enlarged = (F.interpolate(maps, size=(CELLS, CELLS), mode="bilinear") for maps in tapped)
        hidden = F.relu(sum(enlarged, torch.zeros(())))
        found: Tensor = self.out(F.relu(hidden + self.body(hidden)))
        return found


@torch.inference_mode()
def stages(network: EfficientNetLite0, pictures: np.ndarray) -> list[Tensor]:
    """What the head reads of pictures (B, 64, 64, 3) uint8: three stages in float16."""
    parts: list[list[Tensor]] = []
    for start in range(0, len(pictures), _BATCH):
        x = torch.from_numpy(np.array(pictures[start : start + _BATCH])).movedim(-1, 1)
        x = F.interpolate(x.float(), size=(_ENLARGED, _ENLARGED), mode="bicubic", antialias=True).clamp(0, 255)
        parts.append([stage.half() for stage in network.stages(x, tuple(_TAPS))])
    return [torch.cat(some) for some in zip(*parts, strict=True)]


class ComposedJudge:
    """The judge of composed drawings, for `nar.metrics.geneval.judge.judge_folder`.

    Args:
        weights: of a head; by default those that come with the package.
        rules: thresholds; by default those stored with the weights.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: the weights of EfficientNet-Lite0 are not installed.
    """

    def __init__(self, weights: str | Path = WEIGHTS, *, rules: Rules | None = None) -> None:
        tensors, facts = read_fitted(Path(weights), "scripts/composed_detector.py")
        self.names: list[str] = facts["names"]
        self.head = SceneHead(len(self.names)).eval().requires_grad_(False)
        self.head.load_state_dict(tensors)
        self.network = load_efficientnet()
        self.rules = rules or Rules(**facts["rules"])
        self.settings = {"judge": "composed drawings", "detector_sha256": digest(weights)}

    def find(self, picture: Image.Image) -> dict[str, list[Found]]:
        """Objects by class; the picture is brought to 64x64 pixels, boxes are in its own."""
        x, y = picture.width / SIZE, picture.height / SIZE
        small = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
        with torch.inference_mode():
            maps = self.head(stages(self.network, small[None]))
        found: dict[str, list[Found]] = {}
        for name, (left, top, right, bottom), score in decoded(maps, self.names)[0]:
            found.setdefault(name, []).append(Found((left * x, top * y, right * x, bottom * y), score))
        return found

    def colours(self, picture: Image.Image, name: str, found: Sequence[Found]) -> list[str]:  # noqa: ARG002
        """The colour that most pixels of each box have, the ground left out."""
        return [name_colour(np.asarray(picture.convert("RGB").crop(_whole(one.box, picture)))) for one in found]


def decoded(found: Tensor, names: Sequence[str]) -> list[list[tuple[str, Box, float]]]:
    """Peaks of the centre map as objects: class, box in pixels, and as the score centre times class.

    A peak counts for every class that is likely enough, not only for the likeliest, as in GenEval: what is asked is
    whether a drawing can be taken for a cat. It matters for drawings of an unseen vendor: some 0.9 of the scenes are
    judged right, against 0.74 with the likeliest class only; with another scene's prompt 0.02, against 0.00.
    """
    chance = found[:, 0].sigmoid()
    peak = chance * (F.max_pool2d(chance[:, None], 3, stride=1, padding=1)[:, 0] == chance)
    cell = SIZE / CELLS
    results = []
    for picture, heat in zip(found, peak, strict=True):
        objects: list[tuple[str, Box, float]] = []
        for row, column in (heat > _LEAST).nonzero().tolist():
            scores = heat[row, column] * picture[5:, row, column].softmax(0)
            left, top, right, bottom = (picture[1:5, row, column] * EXTENT).tolist()
            x, y = (column + 0.5) * cell, (row + 0.5) * cell
            left, top, right, bottom = (min(max(e, 0.0), SIZE) for e in (x - left, y - top, x + right, y + bottom))
            for index in (scores > _LEAST).nonzero().flatten().tolist():
                objects.append((names[index], (left, top, right, bottom), float(scores[index])))
        results.append(objects)
    return results


def _whole(box: Box, picture: Image.Image) -> tuple[int, int, int, int]:
    """The box in whole pixels, at least one of them, inside the picture."""
    left, top = min(int(box[0]), picture.width - 1), min(int(box[1]), picture.height - 1)
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))
