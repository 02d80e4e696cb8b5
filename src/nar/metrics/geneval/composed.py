"""Objects in composed drawings: a small detector, and GenEval's judgement of such pictures with it.

A head of 136,000 weights on three stages of EfficientNet-Lite0 finds drawings on white at 64x64 pixels; their colour is
that of most of their pixels. It does not know who drew the pictures, or which drawings it was trained with.
Dimensions: B pictures, S = 16 cells a side, D channels, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nar.metrics.geneval.colours import name_colour
from nar.metrics.geneval.judge import Box, Found, Rules
from nar.metrics.networks.efficientnet import EfficientNetLite0, load_efficientnet
from nar.metrics.pictures import digest

SIZE = 64  # pixels of the pictures that are judged
CELLS = 16
WEIGHTS = Path(__file__).parents[1] / "fitted" / "composed.safetensors"
_ENLARGED = 128  # what the network sees: its stages of stride 8, 16 and 32 are then 16, 8 and 4 cells wide
_TAPS = {8: 40, 16: 112, 32: 320}  # stride of the features, and how many channels they have
_BATCH = 64
_LEAST = 0.02  # scores below this are not even candidates
_EXTENT = 32.0  # pixels that the box outputs are scaled by


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
        joined = torch.zeros(())
        for tap, stage in zip(self.taps, stages, strict=True):
            # A 1x1 convolution commutes with enlarging, and costs less before it.
            joined = joined + F.interpolate(
                tap(stage.float()), size=(CELLS, CELLS), mode="bilinear", align_corners=False
            )
        hidden = F.relu(joined)
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


def fit_head(
    features: Sequence[Tensor],
    objects: Sequence[Sequence[dict[str, Any]]],
    names: Sequence[str],
    *,
    num_epochs: int = 6,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    report: Any = None,
) -> SceneHead:
    """Train a head on the stages of scenes and the objects drawn in each (`class`, and `box` in pixels).

    A centre is a soft spot over the cells around it (as in arXiv 1904.07850); box and class are learned at the centre's
    cell. `report(epoch, loss)` is called after each epoch.
    """
    torch.manual_seed(seed)
    head = SceneHead(len(names))
    spots, cells, boxes, classes, owner = _targets(objects, names)
    number = len(objects)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.02)
    total = num_epochs * -(-number // batch_size)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total)
    for epoch in range(num_epochs):
        losses = []
        for rows in torch.randperm(number).split(batch_size):
            found = head([stage[rows] for stage in features])
            place = torch.full((number,), -1)
            place[rows] = torch.arange(len(rows))
            mine = place[owner] >= 0
            at = found.flatten(2)[place[owner[mine]], :, cells[mine]]  # (objects, 5 + K)
            loss = (
                _spot_loss(found[:, 0], spots[rows]) / mine.sum()
                + 2 * F.l1_loss(at[:, 1:5], boxes[mine])
                + F.cross_entropy(at[:, 5:], classes[mine], label_smoothing=0.05)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.step()
            losses.append(loss.item())
        if report is not None:
            report(epoch, float(np.mean(losses)))
    return head.eval().requires_grad_(False)


def _targets(
    objects: Sequence[Sequence[dict[str, Any]]], names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Spots (N, S, S); of each object its cell, its box relative to the cell's middle, its class, its picture."""
    index = {name: i for i, name in enumerate(names)}
    cell = SIZE / CELLS
    spots = torch.zeros(len(objects), CELLS, CELLS)
    middles = (torch.arange(CELLS) + 0.5) * cell
    cells, boxes, classes, owner = [], [], [], []
    for picture, some in enumerate(objects):
        for one in some:
            left, top, right, bottom = one["box"]
            x, y = (left + right) / 2, (top + bottom) / 2
            column, row = (min(CELLS - 1, int(end / cell)) for end in (x, y))
            reach = max(2.0, 0.12 * max(right - left, bottom - top))
            far = (middles[None] - middles[column]) ** 2 + (middles[:, None] - middles[row]) ** 2
            spots[picture] = torch.maximum(spots[picture], torch.exp(-far / (2 * reach**2)))
            cells.append(row * CELLS + column)
            middle_x, middle_y = (column + 0.5) * cell, (row + 0.5) * cell
            boxes.append([middle_x - left, middle_y - top, right - middle_x, bottom - middle_y])
            classes.append(index[one["class"]])
            owner.append(picture)
    return spots, torch.tensor(cells), torch.tensor(boxes) / _EXTENT, torch.tensor(classes), torch.tensor(owner)


def _spot_loss(logits: Tensor, spots: Tensor) -> Tensor:
    chance = logits.sigmoid().clamp(1e-5, 1 - 1e-5)
    centres = spots == 1
    hit = -((1 - chance) ** 2 * chance.log())[centres].sum()
    miss = -((1 - spots) ** 4 * chance**2 * (1 - chance).log())[~centres].sum()
    return hit + miss


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
        weights = Path(weights)
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} does not exist; scripts/composed_detector.py makes such a file")
        with safe_open(weights, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 no mapping
        self.names: list[str] = facts["names"]
        self.head = SceneHead(len(self.names)).eval().requires_grad_(False)
        self.head.load_state_dict(tensors)
        self.network = load_efficientnet()
        self.rules = rules or Rules(**facts["rules"])
        self.settings = {"judge": "composed drawings", "detector_sha256": digest(weights)}

    def find(self, picture: Image.Image) -> dict[str, list[Found]]:
        """Objects by class; the picture is brought to 64x64 pixels, boxes are in its own."""
        scale = (picture.width / SIZE, picture.height / SIZE)
        small = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
        found: dict[str, list[Found]] = {}
        for name, box, score in self.find_all(small[None])[0]:
            left, top, right, bottom = box
            box = (left * scale[0], top * scale[1], right * scale[0], bottom * scale[1])
            found.setdefault(name, []).append(Found(box, score))
        return found

    @torch.inference_mode()
    def find_all(self, pictures: np.ndarray) -> list[list[tuple[str, Box, float]]]:
        """Class, box and score of the objects in every picture (B, 64, 64, 3) uint8."""
        found = self.head(stages(self.network, pictures))
        return decoded(found, self.names)

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
            left, top, right, bottom = (picture[1:5, row, column] * _EXTENT).tolist()
            x, y = (column + 0.5) * cell, (row + 0.5) * cell
            left, top, right, bottom = (min(max(e, 0.0), SIZE) for e in (x - left, y - top, x + right, y + bottom))
            for index in (scores > _LEAST).nonzero().flatten().tolist():
                objects.append((names[index], (left, top, right, bottom), float(scores[index])))
        results.append(objects)
    return results


def save_head(path: str | Path, head: SceneHead, names: Sequence[str], rules: Rules, **facts: Any) -> None:
    """Write a head in bfloat16 with its classes and thresholds."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in head.state_dict().items()}
    about = {"names": list(names), "rules": vars(rules), **facts}
    save_file(tensors, path, metadata={"facts": json.dumps(about)})


def _whole(box: Box, picture: Image.Image) -> tuple[int, int, int, int]:
    """The box in whole pixels, at least one of them, inside the picture."""
    left, top = min(int(box[0]), picture.width - 1), min(int(box[1]), picture.height - 1)
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))
