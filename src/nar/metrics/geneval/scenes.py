"""Scenes composed of drawings on white: so many, in that colour, left of the other, with a prompt that says so.

Knows drawings with captions, named colours and what a prompt asks for; does not know models or judges. What trains and
what is held out is the caller's choice of drawings. White is not among the colours: it can't be told from the ground.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nar.data.source import Source
from nar.metrics.geneval.prompts import RELATIONS, TASKS, composition, composition_prompts

# Captions of emoji that are objects, and what a prompt calls them. Only things of a clear shape: a composed drawing
# has some 20 pixels. Where the two are the same, one stands for both.
_NAMES = (
    "red apple=apple, green apple=apple, pear, lemon, banana, pineapple, carrot, mushroom, eggplant, hamburger, "
    "doughnut, cookie, birthday cake=cake, lollipop, cat, dog, dog face=dog, pig, rabbit, rabbit face=rabbit, "
    "elephant, horse, tiger, penguin, frog, turtle, snake, tropical fish=fish, whale, spouting whale=whale, octopus, "
    "snail, butterfly, lady beetle=beetle, honeybee=bee, spider, cactus, tulip, rose, evergreen tree=tree, guitar, "
    "bell, key, hammer, crown, top hat=hat, running shoe=shoe, handbag, necktie=tie, t-shirt=shirt, closed book=book, "
    "green book=book, blue book=book, orange book=book, camera, telephone, light bulb, pencil, automobile=car, bus, "
    "bicycle, airplane, rocket, sailboat, tractor, helicopter, house, star, umbrella, alarm clock=clock, balloon, "
    "wrapped gift=gift, soccer ball=ball, trophy, ghost, robot, skull, green heart=heart, blue heart=heart, yellow "
    "heart=heart, purple heart=heart"
)
OBJECTS = {caption: name or caption for caption, _, name in (word.partition("=") for word in _NAMES.split(", "))}
# What a drawing is painted with (0..255); `name_colour` gives every one of them its own name.
PAINTS = {
    "red": (222, 28, 36),
    "orange": (250, 132, 8),
    "yellow": (250, 214, 20),
    "green": (50, 165, 50),
    "blue": (30, 95, 225),
    "purple": (128, 50, 180),
    "pink": (250, 120, 185),
    "brown": (122, 70, 30),
    "black": (34, 34, 38),
}
COLOURS = tuple(PAINTS)
GROUND = 232  # a pixel whose least channel is above this is taken for white ground
_HUE_ENDS = (14, 42, 68, 168, 250, 292, 344, 361)  # where in the circle of 360 degrees a colour ends
_HUES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "red")
MAX_COUNT = 4
_GAP = 1  # pixels between two drawings, at least
# Longer side of a drawing as a share of the picture, by how many there are.
_SIDES = {1: (0.4, 1.0), 2: (0.31, 0.47), 3: (0.28, 0.42), 4: (0.25, 0.39)}


class Scenes(NamedTuple):
    """Pictures (N, size, size, 3) uint8, a prompt each, and GenEval's metadata of each prompt.

    Beside `tag`, `include`, `exclude` and `prompt` the metadata list the `objects` drawn: `class`, `color` (None where
    the drawing kept its own) and `box` (left, top, right, bottom) in pixels.
    """

    pictures: np.ndarray
    prompts: list[str]
    metadata: list[dict[str, Any]]


class _Piece(NamedTuple):
    drawing: np.ndarray
    name: str
    colour: str | None


def composed_scenes(
    pictures: np.ndarray | Sequence[np.ndarray],
    captions: Sequence[str],
    seed: int,
    *,
    number: int = 1000,
    size: int = 64,
    tasks: Sequence[str] = TASKS,
    objects: Mapping[str, str] = OBJECTS,
    start: int = 0,
) -> Scenes:
    """Compose `number` scenes of drawings (M, H, W, 3) uint8 on white, the tasks in turn.

    Scene i depends on (seed, i), the drawings and `size` only; `start` is the first i. Drawings whose caption is not
    in `objects` are left out.

    Raises:
        ValueError: too few objects among the captions, or an unknown task.
    """
    drawings: dict[str, list[np.ndarray]] = {}
    for picture, caption in zip(pictures, captions, strict=True):
        if caption in objects and (trimmed := trim(picture)).size:
            drawings.setdefault(objects[caption], []).append(trimmed)
    names = sorted(drawings)
    if len(names) < 2:
        raise ValueError(f"the captions name {len(names)} of the {len(set(objects.values()))} objects; 2 are needed")
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"tasks {', '.join(sorted(unknown))} are unknown; allowed are {', '.join(TASKS)}")
    images, metadata = np.empty((number, size, size, 3), np.uint8), []
    for row, index in enumerate(range(start, start + number)):
        generator = np.random.default_rng((seed, index))
        images[row], wanted = _scene(tasks[index % len(tasks)], drawings, names, size, generator)
        metadata.append(wanted)
    return Scenes(images, [wanted["prompt"] for wanted in metadata], metadata)


def composed_source(source: Source, *, seed: int, number: int, size: int) -> Source:
    """Scenes of the drawings in `source`, composed now and kept in memory, with their prompts as captions.

    They have no class.

    Raises:
        ValueError: the drawings have no captions, or too few show an object.
    """
    if source.captions is None:
        raise ValueError("scenes are composed of drawings with captions, and these have none")
    rows = [row for row, caption in enumerate(source.captions) if caption in OBJECTS]
    captions = [source.captions[row] for row in rows]
    scenes = composed_scenes([source.array(row, size) for row in rows], captions, seed, number=number, size=size)
    fingerprint = hashlib.sha256(scenes.pictures.tobytes()).hexdigest()[:16]
    names, classes = [f"scene {index} of {fingerprint}" for index in range(number)], np.full(number, -1)
    pictures = scenes.pictures
    return Source(names, classes, source.class_names, lambda row: Image.fromarray(pictures[row]), scenes.prompts)


def scene_prompts(*, num_per_task: int = 100, seed: int = 43) -> list[dict[str, Any]]:
    """The benchmark's prompts, in GenEval's form: every object once, then as many of each other task."""
    names = sorted(set(OBJECTS.values()))
    return composition_prompts(names, COLOURS, prefix="", num_per_task=num_per_task, max_count=MAX_COUNT, seed=seed)


def trim(picture: np.ndarray) -> np.ndarray:
    """Cut the white margins of a drawing (H, W, 3) off."""
    inked = picture.min(-1) < 245
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    if not len(rows):
        return picture[:0, :0]
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _scene(
    task: str, drawings: Mapping[str, list[np.ndarray]], names: Sequence[str], size: int, generator: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw one scene: choose what, then make room for it."""
    count = int(generator.integers(2, MAX_COUNT, endpoint=True)) if task == "counting" else 1
    pair = task in ("two_object", "position", "color_attr")
    chosen = [names[int(i)] for i in generator.choice(len(names), 1 + pair, replace=False)]
    colours = [COLOURS[int(i)] for i in generator.choice(len(COLOURS), len(chosen), replace=False)]
    painted = colours if task in ("colors", "color_attr") else []
    relation = RELATIONS[int(generator.integers(len(RELATIONS)))] if task == "position" else ""
    wanted = composition(task, chosen, count=count, colours=painted, relation=relation)

    pieces = []
    for name, colour in itertools.zip_longest(chosen, painted):
        drawing = drawings[name][int(generator.integers(len(drawings[name])))]
        pieces += [_Piece(drawing, name, colour)] * count  # a counted object is the same drawing every time
    canvas = np.full((size, size, 3), 255, np.uint8)
    objects = []
    for piece, (left, top, width, height) in zip(pieces, _places(pieces, relation, size, generator), strict=True):
        small = np.asarray(Image.fromarray(piece.drawing).resize((width, height), Image.Resampling.LANCZOS))
        canvas[top : top + height, left : left + width] = small if piece.colour is None else paint(small, piece.colour)
        box = [left, top, left + width, top + height]
        objects.append({"class": piece.name, "color": piece.colour, "box": box})
    return canvas, wanted | {"objects": objects}


def _places(
    pieces: Sequence[_Piece], relation: str, size: int, generator: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of every drawing, apart from one another, and in the relation that is asked for."""
    low, high = _SIDES[len(pieces)]
    shrink = 1.0
    while True:
        for _ in range(20):
            side = generator.uniform(low, high) * size * shrink  # one scale a scene
            extents = [_extent(piece.drawing, side * generator.uniform(0.9, 1.1), size) for piece in pieces]
            corners = [generator.integers(0, [size - w + 1, size - h + 1]) for w, h in extents]
            boxes = [(int(x), int(y), w, h) for (x, y), (w, h) in zip(corners, extents, strict=True)]
            apart = all(_apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
            if apart and (not relation or _holds(relation, boxes[0], boxes[1])):
                return boxes
        shrink *= 0.95


def _extent(drawing: np.ndarray, side: float, size: int) -> tuple[int, int]:
    height, width = drawing.shape[:2]
    scale = min(side, size) / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return any(a[i] + a[i + 2] + _GAP <= b[i] or b[i] + b[i + 2] + _GAP <= a[i] for i in (0, 1))


def _holds(relation: str, a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Clearly so: wholly on that side, and more along the axis than across it."""
    if relation in ("right of", "below"):
        return _holds("left of" if relation == "right of" else "above", b, a)
    axis = 0 if relation == "left of" else 1
    along, across = (abs(a[i] + a[i + 2] / 2 - b[i] - b[i + 2] / 2) for i in (axis, 1 - axis))
    return a[axis] + a[axis + 2] + _GAP <= b[axis] and along > 1.5 * across


def paint(drawing: np.ndarray, colour: str) -> np.ndarray:
    """Return a uint8 drawing (H, W, 3) on white in one named colour: its shades stay, white stays white."""
    if colour not in PAINTS:
        raise ValueError(f"colour {colour!r} is not one of {', '.join(PAINTS)}")
    pixels = drawing.astype(np.float32)
    solid = np.clip((255 - pixels.min(-1)) / 40, 0, 1)[..., None]  # soft edges stay soft
    light = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    inside = light[solid[..., 0] > 0.9]
    low, high = np.percentile(inside, (5, 95)) if inside.size else (0, 255)
    shade = np.clip((light - low) / max(high - low, 1), 0, 1)[..., None]
    full = np.array(PAINTS[colour], np.float32)
    # Twice as many shades below the paint as above it: lightened orange or red would soon be another colour.
    painted = np.where(shade < 2 / 3, full * (0.75 + 0.375 * shade), full + (255 - full) * (shade - 2 / 3) * 0.75)
    result: np.ndarray = (painted * solid + 255 * (1 - solid)).round().astype(np.uint8)
    return result


def name_colour(pixels: np.ndarray) -> str:
    """The name that most pixels (..., 3) uint8 have, white ground and greys left out; "white" where nothing else is."""
    pixels = pixels.reshape(-1, 3).astype(np.float32)
    pixels = pixels[pixels.min(-1) < GROUND]
    if not len(pixels):
        return "white"
    high, low = pixels.max(-1), pixels.min(-1)
    spread = np.maximum(high - low, 1e-6)
    red, green, blue = pixels.T
    sides = [(green - blue) / spread % 6, (blue - red) / spread + 2, (red - green) / spread + 4]
    hue = 60 * np.select([high == red, high == green], sides[:2], sides[2])
    value, purity = high / 255, spread / np.maximum(high, 1)
    found = np.array(_HUES, dtype=object)[np.searchsorted(_HUE_ENDS, hue, side="right")]
    found[(hue >= 8) & (hue < 48) & (value < 0.68)] = "brown"
    found[((hue < 14) | (hue > 320)) & (value > 0.8) & (purity < 0.6)] = "pink"
    grey = purity < 0.25
    found[grey] = "grey"
    found[(value < 0.3) | (grey & (value < 0.45))] = "black"
    counts = {name: int((found == name).sum()) for name in COLOURS}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "white"
