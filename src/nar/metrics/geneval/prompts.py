"""Prompts that say how many, in which colour and where, each with what a judge must find: the six tasks of GenEval.

Knows words and the published form of the metadata (`tag`, `include`, `exclude`, `prompt`); does not know pictures,
models or judges. Source: GenEval (arXiv 2310.11513), whose prompt set its draws reproduce exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nar.storage.files import parse_json, write_text

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The 80 classes of COCO in their order, four of them under GenEval's names.
_OBJECTS = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, "
    "book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
GENEVAL_OBJECTS = tuple(_OBJECTS.split(", "))
_IRREGULAR = {"fish": "fish", "mouse": "mice", "leaf": "leaves", "scissors": "scissors", "glasses": "glasses"}


def composition(
    task: str,
    names: Sequence[str],
    *,
    count: int = 1,
    colours: Sequence[str] = (),
    relation: str = "",
    prefix: str = "",
    plural: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """One prompt and what it asks for, in the published form.

    `names` are one or two objects; in a position the first stands in `relation` to the second. `colours` has one for
    each object, or none. A count is exact: as many are included, one more is excluded.
    """
    wanted: dict[str, Any] = {"tag": task, "include": [{"class": name, "count": count} for name in names]}
    if task == "counting":
        wanted["exclude"] = [{"class": names[0], "count": count + 1}]
        words = f"{NUMBERS[count]} {(plural or plural_of)(names[0])}"
    elif task == "position":
        first, second = wanted["include"]
        wanted["include"] = [second, first | {"position": [relation, 0]}]
        words = f"{with_article(names[0])} {relation} {with_article(names[1])}"
    else:
        for need, colour in zip(wanted["include"], colours, strict=False):
            need["color"] = colour
        phrases = [f"{colour} {name}" for colour, name in zip(colours, names, strict=True)] if colours else names
        words = " and ".join(map(with_article, phrases))
    return wanted | {"prompt": f"{prefix}{words}"}


def composition_prompts(
    names: Sequence[str] = GENEVAL_OBJECTS,
    colours: Sequence[str] = GENEVAL_COLOURS,
    *,
    prefix: str = "a photo of ",
    plural: Callable[[str], str] | None = None,
    num_per_task: int = 100,
    max_count: int = 4,
    seed: int = 43,
) -> list[dict[str, Any]]:
    """Draw prompts of all six tasks: every object once, then `num_per_task` of each other task; no prompt twice.

    With its defaults and `plural=add_s` this is the published GenEval set of 553 prompts, in its order.
    Nobody is asked for a coloured person.
    """
    if len(names) < 3 or len(colours) < 2:
        raise ValueError(f"{len(names)} objects and {len(colours)} colours are too few; 3 and 2 are needed")
    generator = np.random.default_rng(seed)
    paintable = [name for name in names if name != "person"]

    def some(words: Sequence[str], number: int) -> list[str]:
        return [words[int(i)] for i in generator.choice(len(words), size=number, replace=False)]

    def one(words: Sequence[str]) -> str:
        return words[int(generator.choice(len(words)))]

    def draw(task: str) -> dict[str, Any]:
        if task == "two_object":
            return composition(task, some(names, 2), prefix=prefix)
        if task == "counting":
            name, count = one(names), int(generator.integers(2, max_count, endpoint=True))
            return composition(task, [name], count=count, prefix=prefix, plural=plural)
        if task == "colors":
            return composition(task, [one(paintable)], colours=[one(colours)], prefix=prefix)
        if task == "position":
            return composition(task, some(names, 2), relation=one(RELATIONS), prefix=prefix)
        return composition(task, some(paintable, 2), colours=some(colours, 2), prefix=prefix)

    prompts = [composition("single_object", [name], prefix=prefix) for name in some(names, len(names))]
    prompts += [draw(task) for task in TASKS[1:] for _ in range(num_per_task)]
    return list({wanted["prompt"]: wanted for wanted in prompts}.values())


def write_prompts(path: str | Path, prompts: Sequence[dict[str, Any]]) -> None:
    """Write prompts as GenEval's `evaluation_metadata.jsonl`, one a line."""
    write_text(Path(path), "".join(json.dumps(wanted) + "\n" for wanted in prompts))


def checked(text: str, name: str) -> dict[str, Any]:
    """One prompt's metadata from JSON; raises ValueError that says what `name` lacks."""
    wanted = parse_json(text, name)
    lacking = [key for key in ("tag", "include", "prompt") if not isinstance(wanted, dict) or key not in wanted]
    if lacking:
        raise ValueError(f"{name} lacks {', '.join(lacking)}; needed is GenEval's form: tag, include, exclude, prompt")
    included, excluded = wanted["include"], wanted.get("exclude", [])
    parts = [included, excluded] if isinstance(included, list) and isinstance(excluded, list) else [[None]]
    if not all(_is_need(need, len(parts[0])) for part in parts for need in part):
        form = "a class, a count from 1, and maybe a color and a position (relation and number of another object)"
        raise ValueError(f"{name}: include and exclude must be lists of objects with {form}")
    if not (isinstance(wanted["tag"], str) and isinstance(wanted["prompt"], str)):
        raise ValueError(f"{name}: tag and prompt must be texts")
    return dict(wanted)


def _is_need(need: Any, num_included: int) -> bool:
    """Whether this is an object of GenEval's metadata; `num_included` may be named by a position."""
    if not isinstance(need, dict) or type(need.get("count")) is not int or need["count"] < 1:
        return False
    words = isinstance(need.get("class"), str) and isinstance(need.get("color", ""), str)
    match need.get("position", [RELATIONS[0], 0]):
        case [str() as relation, int() as other]:
            return words and relation in RELATIONS and 0 <= other < num_included
    return False


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural_of(name: str) -> str:
    """The plural in English, for the objects that this package names."""
    stem, space, last = name.rpartition(" ")
    if last in _IRREGULAR:
        return f"{stem}{space}{_IRREGULAR[last]}"
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if last.endswith("y") and last[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def add_s(name: str) -> str:
    """The plural as the published prompts have it: `buses`, but also `benchs` and `knifes`."""
    return f"{name}es" if name.endswith("s") else f"{name}s"
