"""GenEval (arXiv 2310.11513): are the objects there that a prompt asks for, as many, in their colours and places?

The published rules on current libraries: judging is arithmetic on detections, whoever made them; `Mask2FormerJudge`
makes them with local `transformers` folders of Mask2Former and CLIP. It does not know how pictures were made.
Dimensions: Q queries, K classes, n pictures, h x w a mask at the network's size.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nar import __version__
from nar.media.pictures import read_picture
from nar.metrics.geneval.prompts import GENEVAL_COLOURS, GENEVAL_OBJECTS, TASKS, checked
from nar.metrics.scores import mean_interval
from nar.metrics.text_image import IMAGENET_MEAN, IMAGENET_STD, ClipScorer, normalisation, weights_digest
from nar.progress import steps
from nar.storage.text import read_text
from nar.text.encoder import load_pretrained

GREY = (153, 153, 153)  # behind an object whose colour is asked for
COLOUR_PROMPTS = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
MAX_DETECTIONS = 100  # of a picture, before the thresholds
_SHORTEST, _LONGEST = 800, 1333  # sides of the pictures that the published detector sees

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """An object in a picture: its box (left, top, right, bottom) in pixels, score, and where known its mask (H, W)."""

    box: Box
    score: float
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Rules:
    """What counts: the published thresholds. `max_overlap` 1.0 keeps overlapping boxes, as published."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1


class Judge(Protocol):
    """What finds objects and names colours; `settings` are the facts that change its numbers."""

    rules: Rules
    settings: dict[str, Any]

    def find(self, picture: Image.Image) -> Mapping[str, Sequence[Found]]:
        """All candidates in a picture, by the name of their class."""
        ...

    def colours(self, picture: Image.Image, name: str, found: Sequence[Found]) -> list[str]:
        """The colour of each found object of one class."""
        ...


def kept(candidates: Sequence[Found], threshold: float, rules: Rules) -> list[Found]:
    """The objects that count, surest first: above the threshold, at most `max_objects`, without overlaps."""
    ranked = sorted((found for found in candidates if found.score > threshold), key=lambda found: -found.score)
    chosen: list[Found] = []
    for found in ranked[: rules.max_objects]:
        if rules.max_overlap >= 1 or all(overlap(found.box, other.box) < rules.max_overlap for other in chosen):
            chosen.append(found)
    return chosen


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, both of whose ends are inside (one pixel added, as published)."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box, margin: float) -> set[str]:
    """Where `a` lies relative to `b`: the part of the offset of the centres that exceeds `margin` of both sizes.

    A direction counts when that part is more than half of the whole offset; two directions may.
    """
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    sizes = np.abs([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    rest = np.sign(offset) * np.maximum(np.abs(offset) - margin * sizes, 0)
    if np.all(np.abs(rest) < 1e-3):
        return set()
    x, y = rest / np.linalg.norm(offset)
    where = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in where.items() if true}


def judge_picture(judge: Judge, picture: Image.Image, wanted: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a picture has what its prompt asks for, and if not, why.

    All of `include` must be there and none of `exclude`. Of each class only the surest objects, as many as are asked
    for, are looked at for colour and place; counting has its own threshold.
    """
    rules = judge.rules
    threshold = rules.counting_threshold if wanted["tag"] == "counting" else rules.threshold
    objects = {name: kept(some, threshold, rules) for name, some in judge.find(picture).items()}
    faults: list[str] = []
    groups: list[list[Found] | None] = []  # by place in `include`, what a position may refer to
    for need in wanted["include"]:
        found = objects.get(need["class"], [])[: need["count"]]
        fault = _fault(judge, picture, need, found, groups)
        faults += [fault] if fault else []
        groups.append(None if fault else found)
    for need in wanted.get("exclude", ()):
        if (number := len(objects.get(need["class"], ()))) >= need["count"]:
            faults.append(f"{number} {need['class']}, fewer than {need['count']} are wanted")
    return not faults, "; ".join(faults)


def _fault(
    judge: Judge, picture: Image.Image, need: Mapping[str, Any], found: list[Found], groups: list[list[Found] | None]
) -> str:
    """What is wrong with the objects that one requirement is about; empty when nothing is."""
    name, count = need["class"], need["count"]
    if len(found) < count:
        return f"{len(found)} {name}, {count} wanted"
    if "color" in need:
        colours = judge.colours(picture, name, found)
        if colours.count(need["color"]) < count:
            return f"{name} is {', '.join(colours)}, {need['color']} wanted"
    if "position" in need:
        relation, target = need["position"]
        if (others := groups[target]) is None:
            return f"nothing for {name} to be {relation}"
        for other, one in itertools.product(others, found):
            where = relations(one.box, other.box, judge.rules.position_margin)
            if relation not in where:
                return f"{name} is {' and '.join(sorted(where)) or 'nowhere clear'}, {relation} wanted"
    return ""


def judge_folder(folder: str | Path, judge: Judge, *, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Judge pictures laid out as GenEval does: `00000/metadata.jsonl` and `00000/samples/0000.png`, and on.

    Returns the report: the share of right pictures of every task present, `score` their mean, `prompts` the share of
    prompts with at least one right picture, 95 % intervals by resampling prompts, and every picture with its fault.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that is laid out so.
        ValueError: metadata or a picture that can't be read, prompts without pictures; named.
    """
    rows: list[dict[str, Any]] = []
    for place in steps(_prompt_folders(folder), "judging", "prompts", quiet=not progress):
        wanted = checked(read_text(place / "metadata.jsonl"), str(place / "metadata.jsonl"))
        for file in _samples(place):
            right, fault = judge_picture(judge, read_picture(file), wanted)
            row = {"file": file.relative_to(folder).as_posix(), "tag": wanted["tag"], "prompt": wanted["prompt"]}
            rows.append(row | {"place": place.name, "right": right, "fault": fault})
    versions = {"nar": __version__, "torch": torch.__version__, "numpy": np.__version__}
    versions["python"] = platform.python_version()
    numbers = {"num_pictures": len(rows), "num_prompts": len({row["place"] for row in rows})}
    facts = {"rules": asdict(judge.rules), "seed": seed, "folder": Path(folder).name, **numbers, "versions": versions}
    return summary(rows, seed=seed) | {
        "pictures": [{key: value for key, value in row.items() if key != "place"} for row in rows],
        "settings": {**judge.settings, **facts},
    }


def summary(rows: Sequence[Mapping[str, Any]], *, seed: int = 0, resamplings: int = 1000) -> dict[str, Any]:
    """Shares of right pictures by task and their mean, of rows with `tag`, `place` (their prompt) and `right`."""
    by_task: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        by_task.setdefault(row["tag"], {}).setdefault(row["place"], []).append(bool(row["right"]))
    generator = np.random.default_rng(seed)
    report, resampled = {}, {}
    for task in sorted(by_task, key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task)):
        answers = by_task[task].values()
        rights, counts = (np.array([function(some) for some in answers], float) for function in (sum, len))
        report[task] = float(rights.sum() / counts.sum())
        draws = generator.integers(0, len(rights), (resamplings, len(rights)))
        resampled[task] = rights[draws].sum(1) / counts[draws].sum(1)
    report["score"] = float(np.mean([*report.values()]))
    resampled["score"] = np.mean([*resampled.values()], 0)
    intervals = {name: np.quantile(shares, (0.025, 0.975)).tolist() for name, shares in resampled.items()}
    some = np.array([any(answers) for places in by_task.values() for answers in places.values()], float)
    report["prompts"] = float(some.mean())
    return report | {"interval": intervals | {"prompts": mean_interval(some, resamplings=resamplings, seed=seed)}}


class Mask2FormerJudge:
    """Objects by a Mask2Former, colours by a CLIP model, both local `transformers` folders.

    A detector with COCO's 80 things (alone or before 53 kinds of stuff) is read by their order and so finds GenEval's
    objects; any other by its own labels.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: what is missing or does not fit.
    """

    def __init__(
        self, detector: str | Path, clip: str | Path, *, rules: Rules = Rules(), device: torch.device | str = "cpu"
    ) -> None:
        self.rules = rules
        self.device = device
        self.network = load_pretrained("Mask2FormerForUniversalSegmentation", detector).to(device)
        self.prepare = normalisation(detector, IMAGENET_MEAN, IMAGENET_STD)
        labels = self.network.config.id2label
        own = [labels[index] for index in range(len(labels))]
        self.names = list(GENEVAL_OBJECTS) if len(own) in (80, 133) else own
        self.clip = ClipScorer(clip, device=device)
        self.settings: dict[str, Any] = {"judge": "GenEval", "detector_sha256": weights_digest(detector)}
        self.settings |= {"clip_sha256": weights_digest(clip), "num_classes": len(self.names)}
        self._colour_texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def find(self, picture: Image.Image) -> dict[str, list[Found]]:
        """Objects by class: every query's classes, the best 100, each scored by class times sureness of its mask."""
        scale = min(_SHORTEST / min(picture.size), _LONGEST / max(picture.size))
        size = (max(32, round(picture.width * scale)), max(32, round(picture.height * scale)))
        pixels = self.prepare(picture.resize(size, Image.Resampling.BILINEAR)).to(self.device)
        output = self.network(pixel_values=pixels)
        chances = output.class_queries_logits[0].float().softmax(-1)[:, : len(self.names)]  # (Q, K): things only
        scores, places = chances.flatten().topk(min(MAX_DETECTIONS, chances.numel()))
        queries, classes = places // chances.shape[1], places % chances.shape[1]
        logits = output.masks_queries_logits[0].float()[queries]  # (n, h, w)
        logits = F.interpolate(logits[None], size=(picture.height, picture.width), mode="bilinear")[0]
        inside = logits > 0
        sure = (logits.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1e-6)
        found: dict[str, list[Found]] = {}
        for score, index, mask in zip((scores * sure).tolist(), classes.tolist(), inside.cpu().numpy(), strict=True):
            if mask.any():
                found.setdefault(self.names[index], []).append(Found(_box(mask), score, mask))
        return found

    def colours(self, picture: Image.Image, name: str, found: Sequence[Found]) -> list[str]:
        """Colours by CLIP, without examples: the masked objects on grey, cut to their boxes, against three wordings."""
        if name not in self._colour_texts:
            texts = [prompt.format(colour=colour, name=name) for colour in GENEVAL_COLOURS for prompt in COLOUR_PROMPTS]
            rows = self.clip.texts(texts).unflatten(0, (len(GENEVAL_COLOURS), len(COLOUR_PROMPTS))).mean(1)
            self._colour_texts[name] = F.normalize(rows, dim=-1)
        cuts = []
        for one in found:
            ground = Image.new("RGB", picture.size, GREY)
            whole = picture if one.mask is None else Image.composite(picture, ground, Image.fromarray(one.mask))
            cuts.append(whole.crop(tuple(round(end) for end in one.box)))  # type: ignore[arg-type]
        likeness = self.clip.pictures(cuts) @ self._colour_texts[name].T
        return [GENEVAL_COLOURS[int(index)] for index in likeness.argmax(1)]


def _box(mask: np.ndarray) -> Box:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _prompt_folders(folder: str | Path) -> list[Path]:
    places = sorted(place for place in Path(folder).glob("*/") if place.name.isdigit())
    if not places:
        fault = "has no prompts" if Path(folder).is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {fault}; it must hold 00000/metadata.jsonl, 00000/samples/0000.png and on")
    empty = [place.name for place in places if not _samples(place)]
    if empty:
        shown = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        what = f"{len(empty)} of {len(places)} prompts have no picture in samples/ ({shown})"
        raise ValueError(f"{what}; sample them first")
    return places


def _samples(place: Path) -> list[Path]:
    return sorted(file for file in (place / "samples").glob("*.png") if file.stem.isdigit() and file.is_file())
