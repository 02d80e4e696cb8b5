"""Calls of the Python API that the fuzz makes: each works as it stands, and gets one or two wrong arguments.

A call is a function of the folder of examples to what is called and its arguments.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz_damage import HOSTILE, short

Call = tuple[Callable[..., Any], dict[str, Any]]


class Strange:
    """An object of nobody's type."""

    def __repr__(self) -> str:
        return "<strange>"


VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda value=value: value for value in HOSTILE),
    Strange,
    lambda: int,
    lambda: print,
    lambda: b"x",
    lambda: b"\xff\xfe",
    lambda: {1, 2},
    lambda: range(3),
    lambda: iter([1]),
    lambda: (1, 2),
    lambda: (0, 0),
    lambda: (-1, 4),
    lambda: [4, "x"],
    lambda: (2**40,),
    lambda: (100_000, 100_000),
    lambda: [float("nan")],
    lambda: [None],
    lambda: ["x"] * 3,
    lambda: 1j,
    lambda: Decimal("NaN"),
    lambda: Decimal("1.5"),
    lambda: Fraction(1, 3),
    lambda: Path("nowhere"),
    lambda: Path(),
    lambda: np.float64("nan"),
    lambda: np.int64(-1),
    lambda: np.bool_(True),
    lambda: np.array([]),
    lambda: np.array(["x"]),
    lambda: np.array([None]),
    lambda: np.zeros((2, 8, 8, 3), np.uint8),
    lambda: np.zeros((2, 8, 8, 3), np.float64),
    lambda: np.zeros((2, 8, 8, 4), np.uint8),
    lambda: np.zeros((0, 8, 8, 3), np.uint8),
    lambda: np.full((2, 3, 8, 8), np.nan, np.float32),
    lambda: torch.tensor(float("nan")),
    lambda: torch.tensor(1),
    lambda: torch.tensor([1, 2]),
    lambda: torch.tensor([]),
    lambda: torch.tensor(True),
    lambda: torch.tensor([0.5]),
    lambda: torch.tensor([10**9]),
    lambda: torch.tensor([-5]),
    lambda: torch.zeros(1, 4, 4, dtype=torch.long),
    lambda: torch.zeros(1, 4, 4),
    lambda: torch.zeros(1, 4, 4, dtype=torch.int8),
    lambda: torch.zeros(1, 4, 4, dtype=torch.complex64),
    lambda: torch.full((1, 4, 4), 99),
    lambda: torch.full((1, 4, 4), -7),
    lambda: torch.zeros(1, 3, 8, 8),
    lambda: torch.full((1, 3, 8, 8), float("nan")),
    lambda: torch.zeros(1, 3, 8, 8, dtype=torch.half),
    lambda: torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    lambda: torch.zeros(0, 3, 8, 8),
    lambda: torch.zeros(1, 3, 7, 9),
    lambda: torch.zeros(1, 3, 5, 8, 8),
    lambda: torch.Generator().manual_seed(1),
    lambda: torch.float64,
    lambda: torch.device("meta"),
)


def _class_model(world: Path) -> Any:
    from nar import Transformer

    return Transformer.from_pretrained(world / "model")


def _pipe(name: str) -> Callable[[Path], Call]:
    def make(world: Path) -> Call:
        from nar import Pipeline

        given: dict[str, dict[str, Any]] = {
            "model": {"class_labels": ["pear"]},
            "words": {"prompt": "red"},
            "clips": {"prompt": "red", "frames": str(world / "clip/start.gif"), "num_frames": 5},
        }
        every = {"seed": 0, "num_images_per_prompt": 1, "batch_size": 2, "output_type": "np"}
        options = dict.fromkeys(
            (
                "negative_prompt",
                "guidance_scale",
                "guidance_interval",
                "guidance_curve",
                "guidance_power",
                "temperature",
                "top_k",
                "top_p",
                "generator",
                "known",
                "num_frames",
                "frames",
                "prompt",
                "class_labels",
                "callback_on_front_end",
                "size",
            )
        )
        options |= {"particles": 1, "progress": False}
        return Pipeline.from_pretrained(world / name, device="cpu"), options | every | given[name]

    return make


def _method(name: str, **arguments: Any) -> Callable[[Path], Call]:
    def make(world: Path) -> Call:
        from nar import Pipeline

        return getattr(Pipeline.from_pretrained(world / "model", device="cpu"), name), dict(arguments)

    return make


def _edit(world: Path) -> Call:
    from nar import Pipeline

    pipe = Pipeline.from_pretrained(world / "model", device="cpu")
    options = dict.fromkeys(("mask", "prompt", "generator", "guidance_scale", "temperature", "top_k", "top_p"))
    given = {"image": str(world / "captioned/0.png"), "box": (2, 2, 4, 3), "class_labels": ["pear"], "seed": 0}
    return pipe.edit, options | given | {"mode": "fill", "blend": True, "output_type": "np", "num_images_per_prompt": 1}


def _extend(world: Path) -> Call:
    from nar import Pipeline

    pipe = Pipeline.from_pretrained(world / "model", device="cpu")
    options = {"position": (0, 0), "class_labels": ["pear"], "seed": 0, "batch_size": 2, "blend": True}
    return pipe.extend, options | {"image": str(world / "captioned/0.png"), "size": (8, 16), "output_type": "np"}


def _output(world: Path) -> Call:
    from nar import Pipeline

    output = Pipeline.from_pretrained(world / "model", device="cpu")(class_labels=["pear", "plum"], seed=0)
    return output.save, {"path": Path("a.gif") if output.images is None else Path("a.png"), "frame_rate": None}


def _saved(world: Path) -> Call:
    from nar import Pipeline

    pipe = Pipeline.from_pretrained(world / "model", device="cpu")
    return pipe.save_pretrained, {"folder": Path("m"), "dtype": None, "license": None, "diffusers": False}


def _text(world: Path) -> Call:
    from nar.text import TextEncoder, TextEncoderConfig

    encoder = TextEncoder(TextEncoderConfig(str(world / "encoder")))
    return encoder.encode, {"captions": ["red"]}


def _sample_set(world: Path) -> Call:
    from nar import Pipeline
    from nar.evaluation.sets import sample_set

    pipe = Pipeline.from_pretrained(world / "model", device="cpu")
    arguments = {"pipe": pipe, "output": Path("a.npz"), "count": 2, "labels": "balanced", "sampling": None, "seed": 0}
    return sample_set, arguments | {"batch_size": 2, "rank": 0, "num_processes": 1, "settings": None, "prompts": None}


def _refine(world: Path) -> Call:
    from nar import load_tokenizer
    from nar.tokenizer.refine import refine_codes

    tokenizer = load_tokenizer(world / "tokenizer")
    return refine_codes, {"tokenizer": tokenizer, "pixels": torch.zeros(1, 3, 8, 8), "steps": 2, "seed": 0}


def _independence(world: Path) -> Call:
    from nar import ClassCondition
    from nar.evaluation.independence import independence_cost

    codes = torch.randint(0, 8, (4, 4, 4), generator=torch.Generator().manual_seed(0))
    condition = ClassCondition(torch.tensor([0, 1, 2, 0]))
    arguments = {"model": _class_model(world), "codes": codes, "condition": condition, "known": None}
    return independence_cost, arguments | {"seed": 0, "batch_size": 2}


def _diagonal(world: Path) -> Call:
    import dataclasses

    from nar import Transformer
    from nar.convert.initial import to_diagonal

    config = dataclasses.replace(_class_model(world).config, schedule="raster", head_depths=(0,), axis_heads=())
    return to_diagonal, {"model": Transformer(config)}


def _of_files(module: str, function: str, /, **arguments: Any) -> Callable[[Path], Call]:
    """A function whose arguments name examples: {array} is their folder."""

    def make(world: Path) -> Call:
        from importlib import import_module

        given = {
            key: value.format_map({path.name: path for path in world.iterdir()}) if isinstance(value, str) else value
            for key, value in arguments.items()
        }
        return getattr(import_module(module), function), given

    return make


def _generate(name: str) -> Callable[[Path], Call]:
    def make(world: Path) -> Call:
        import nar

        model = _class_model(world)
        arguments = {"condition": nar.ClassCondition(torch.tensor([1])), "sampling": nar.Sampling(), "negative": None}
        arguments |= {"seed": 0, "indices": [0], "known": torch.full((1, 4, 4), -1), "session": None}
        function = getattr(nar, name)
        return lambda **given: [*function(model, **given)], arguments

    return make


def _forward(world: Path) -> Call:
    from nar import ClassCondition

    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    return _class_model(world), {"codes": codes, "condition": ClassCondition(torch.tensor([1])), "dropout": None}


def _of_labels(world: Path) -> Call:
    from nar import ClassCondition, generate

    model = _class_model(world)
    return lambda labels: generate(model, ClassCondition(labels)), {"labels": torch.tensor([1])}


def _of_text(world: Path) -> Call:
    from nar import TextCondition, Transformer, generate

    model = Transformer.from_pretrained(world / "words")
    arguments = {"features": torch.zeros(1, 10, 16), "mask": torch.ones(1, 10, dtype=torch.bool), "null": None}
    return lambda **given: generate(model, TextCondition(**given)), arguments


def _of_prefix(world: Path) -> Call:
    from nar import PrefixCondition, TextCondition, Transformer, generate

    model = Transformer.from_pretrained(world / "clips")
    words = TextCondition(torch.zeros(1, 10, 16), torch.ones(1, 10, dtype=torch.bool))
    codes = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    return lambda **given: generate(model, [words, PrefixCondition(**given)]), {"codes": codes, "mask": None}


def _tokenizer(kind: str, method: str, **arguments: Any) -> Callable[[Path], Call]:
    def make(world: Path) -> Call:
        from nar import load_tokenizer

        return getattr(load_tokenizer(world / kind / "tokenizer"), method), dict(arguments)

    return make


def _config(module: str, name: str, **needed: Any) -> Callable[[Path], Call]:
    def make(_: Path) -> Call:
        import dataclasses
        from importlib import import_module

        kind = getattr(import_module(module), name)
        unset = {
            field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING
        }
        return kind, unset | needed

    return make


def _order(name: str, /, **arguments: Any) -> Callable[[Path], Call]:
    def make(_: Path) -> Call:
        from nar import order

        return getattr(order, name), dict(arguments)

    return make


def _load(module: str, name: str, arguments: Callable[[Path], dict[str, Any]]) -> Callable[[Path], Call]:
    def make(world: Path) -> Call:
        from importlib import import_module

        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return function, arguments(world)

    return make


def _evaluate(_: Path) -> Call:
    from nar.metrics import evaluate

    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    names = ("inception", "detector", "floor", "size", "num_frames", "only_real", "cache", "settings")
    arguments = dict.fromkeys(names) | {"keep": 50, "batch_size": 4, "resamplings": 0, "calibration": 0.0, "seed": 0}
    return evaluate, arguments | {"real": pictures, "fake": pictures[::-1].copy(), "device": "cpu", "progress": False}


def _extract(world: Path) -> Call:
    from nar.data.extract import extract
    from nar.data.open import open_source

    source = open_source(world / "pictures")
    arguments = {"tokenizer_folder": world / "tokenizer", "source": source, "folder": Path("codes"), "size": 8}
    return extract, arguments | {"kind": "centre", "batch_size": 4, "device": "cpu", "threads": 1, "pad": False}


def _bits(world: Path) -> Call:
    from nar import ClassCondition
    from nar.likelihood import bits_per_token

    arguments = {"model": _class_model(world), "codes": torch.zeros(1, 4, 4, dtype=torch.long), "known": None}
    return bits_per_token, arguments | {"condition": ClassCondition(torch.tensor([1])), "batch_size": 3}


def _source(world: Path) -> dict[str, Any]:
    return {"source": world / "pictures", "size": 8, "split": "train", "label": "label", "group": "", "broken": "skip"}


_PIXELS = {"pixels": torch.zeros(1, 3, 8, 8)}
_CODES = {"codes": torch.zeros(1, 4, 4, dtype=torch.long)}
CALLS: dict[str, Callable[[Path], Call]] = {
    "pipe": _pipe("model"),
    "pipe of words": _pipe("words"),
    "pipe of clips": _pipe("clips"),
    "at_grid": _method("at_grid", grid=(4, 4)),
    "label_index": _method("label_index", label=0),
    "pipe.edit": _edit,
    "pipe.decode": _method("decode", **_CODES),
    "pipe.pictures": _method("pictures", output_type="pil", **_CODES),
    "generate": _generate("generate"),
    "generate_fronts": _generate("generate_fronts"),
    "model": _forward,
    "ClassCondition": _of_labels,
    "TextCondition": _of_text,
    "PrefixCondition": _of_prefix,
    "encode": _tokenizer("model", "encode", **_PIXELS),
    "decode": _tokenizer("model", "decode", **_CODES),
    "pixel_shape": _tokenizer("model", "pixel_shape", grid=(4, 4)),
    "encode clips": _tokenizer("clips", "encode", clips=torch.zeros(1, 3, 5, 8, 8)),
    "decode clips": _tokenizer("clips", "decode", codes=torch.zeros(1, 3, 2, 2, dtype=torch.long)),
    "Sampling": _config("nar", "Sampling"),
    "ModelConfig": _config("nar", "ModelConfig", num_classes=3),
    "Dropout": _config("nar.model", "Dropout"),
    "ImageTokenizerConfig": _config("nar.tokenizer.image", "ImageTokenizerConfig"),
    "CausalTokenizerConfig": _config("nar.tokenizer.causal", "CausalTokenizerConfig"),
    "MultiScaleTokenizerConfig": _config("nar.tokenizer.multiscale", "MultiScaleTokenizerConfig"),
    "VideoTokenizerConfig": _config("nar.tokenizer.larp", "VideoTokenizerConfig"),
    "TextEncoderConfig": _config("nar.text", "TextEncoderConfig"),
    "DataConfig": _config("nar.data.config", "DataConfig"),
    "Windows": _config("nar.media.video", "Windows"),
    "Recipe": _config("nar.training.recipe", "Recipe"),
    "Setup": _config("nar.bench", "Setup", pixels=False),
    "manhattan": _order("manhattan", grid=(4, 4)),
    "raster": _order("raster", grid=(4, 4)),
    "par": _order("par", grid=(4, 4), regions=(2, 2)),
    "scales": _order("scales", sides=(1, 2, 4)),
    "build": _order("build", name="par", grid=(4, 4), regions=(2, 2)),
    "from_pretrained": _load(
        "nar",
        "Pipeline.from_pretrained",
        lambda world: {"source": world / "model", "device": "cpu", "dtype": "float32", "text_encoder": None},
    ),
    "Transformer.from_pretrained": _load(
        "nar", "Transformer.from_pretrained", lambda world: {"folder": world / "model"}
    ),
    "load_tokenizer": _load("nar", "load_tokenizer", lambda world: {"folder": world / "tokenizer"}),
    "open_source": _load("nar.data.open", "open_source", _source),
    "load_pictures": _load("nar.data.open", "load_pictures", lambda world: {"source": world / "pictures", "size": 8}),
    "Codes.open": _load("nar.data.codes", "Codes.open", lambda world: {"folder": world / "codes"}),
    "convert": _load(
        "nar.convert",
        "convert",
        lambda world: {
            "kind": "nar-c2i",
            "source": world / "published/model.pt",
            "output": Path("m"),
            "preset": None,
            "weights": "model",
            "num_heads": 2,
            "grid": (3, 4),
            "class_names": (),
            "tokenizer": None,
            "prefix_attention": "causal",
            "l2_norm": True,
        },
    ),
    "read_picture": _load("nar.media.pictures", "read_picture", lambda world: {"file": world / "captioned/0.png"}),
    "preset_model": _load("nar.bench", "preset_model", lambda _: {"name": "x"}),
    "pipe.to": _method("to", device="cpu", dtype=None),
    "with_heads": _method("with_heads", heads="mean"),
    "label_name": _method("label_name", index=0),
    "pipe.extend": _extend,
    "save_pretrained": _saved,
    "Output.save": _output,
    "TextEncoder": _text,
    "sample_set": _sample_set,
    "refine_codes": _refine,
    "independence_cost": _independence,
    "to_diagonal": _diagonal,
    "run_recipe": _of_files(
        "nar.training.tasks",
        "run_recipe",
        name="{recipe}/tiny.yaml",
        overrides=["num_images=8", "batch_size=4"],
        override=False,
        start="",
        metrics=None,
    ),
    "judge_likelihood": _of_files(
        "nar.evaluation.likelihood",
        "judge_likelihood",
        model="{model}",
        real="{array}/set.npz",
        against=None,
        split="test",
        number=4,
        seed=0,
        device="cpu",
        dtype="float32",
    ),
    "judge_tokenizer": _of_files(
        "nar.evaluation.tokenizers",
        "judge_tokenizer",
        folder="{tokenizer}",
        real="{idx}",
        size=8,
        group=None,
        num_frames=None,
        number=4,
        pad=False,
        refine=0,
        seed=0,
        batch_size=4,
        device="cpu",
        inception=None,
        sheet=None,
    ),
    "judge_captions": _of_files(
        "nar.evaluation.words",
        "judge_captions",
        fake="{captioned}",
        captions=None,
        clip=None,
        clip_prefix="",
        retrieval=True,
        size=None,
        seed=0,
        device="cpu",
    ),
    "judge_edits": _of_files(
        "nar.evaluation.edits",
        "judge_edits",
        model="{model}",
        real="{array}/set.npz",
        split="test",
        number=4,
        seed=0,
        seeds=1,
        guidance_scale=1.0,
        temperature=1.0,
        particles=1,
        train=None,
        distances=False,
        samples=None,
        device="cpu",
        dtype="float32",
    ),
    "evaluate": _evaluate,
    "extract": _extract,
    "bits_per_token": _bits,
}


def _given(key: str, value: Any) -> Any:
    """A wrong argument, which is printed; no function where one belongs: its own errors come through, as they must."""
    value = Strange() if key in ("callback_on_front_end", "metrics") and callable(value) else value
    try:
        shown = short(value)
    except Exception:
        shown = type(value).__name__
    print(f"damage: {key} = {shown} ({type(value).__name__})".encode("utf-8", "replace").decode())
    return value


def draw_call(draw: random.Random, world: Path) -> tuple[str, Callable[[Path], Any]]:
    """A call with one or two wrong arguments: its title, and what makes it in a folder."""
    name = draw.choice([*CALLS])
    again = draw.getrandbits(64)
    chosen = random.Random(again)
    # Names are read off the call, which needs no model where sizes say it all; others are asked in the process itself.
    pick, values = chosen.random(), [chosen.choice(VALUES) for _ in range(chosen.choice((1, 1, 1, 2)))]

    def call(_: Path) -> Any:
        torch.manual_seed(0)
        function, arguments = CALLS[name](world)
        names = sorted(arguments)
        for number, value in enumerate(values):
            key = names[int(pick * len(names) + number * 7) % len(names)]
            arguments[key] = _given(key, value())
        return function(**arguments)

    return f"{name}(#{again % 10_000})", call


def every_call(world: Path, kind: str = "") -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Every argument of every call with every odd value, one at a time: titles, and what makes the call."""
    torch.set_num_threads(1)  # threads would be lost in the processes that are forked from this one
    for name in [name for name in CALLS if name.startswith(kind)]:
        function, arguments = CALLS[name](world)
        for key in sorted(arguments):
            for number, value in enumerate(VALUES):

                def call(_: Path, key: str = key, value: Callable[[], Any] = value) -> Any:
                    torch.manual_seed(0)
                    return function(**arguments | {key: _given(key, value())})  # noqa: B023 run before the next one

                yield f"{name}({key} = value {number})", call


def call_together(world: Path, draw: random.Random) -> list[tuple[str, BaseException]]:
    """Call one pipeline from four threads at once; the errors of those with wrong arguments, by what was wrong.

    Raises:
        ValueError: the call whose arguments are right gives other pictures than alone.
    """
    pipe, given = _pipe("model")(world)
    alone = pipe(**given).images
    keys = [draw.choice(sorted(given)) for _ in range(3)]
    wrong: list[dict[str, Any]] = [{}, *({key: _given(key, draw.choice(VALUES)())} for key in keys)]
    with ThreadPoolExecutor(len(wrong)) as pool:
        calls = [pool.submit(pipe, **given | more) for more in wrong]
    if not np.array_equal(calls[0].result().images, alone):
        print("WRONG: other pictures beside other calls")
    errors = [(str([*more]), call.exception()) for more, call in zip(wrong, calls, strict=True)]
    return [(title, error) for title, error in errors if error is not None]
