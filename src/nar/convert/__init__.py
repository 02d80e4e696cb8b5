"""Published checkpoints to model folders: every concession to the file formats and spellings of others is here.

Knows what a model folder needs; does not know layouts (`tokenizers`, `models`), how every tensor is accounted for
(`renaming`), how files are read (`checkpoint`), nor how models compute.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nar.convert.checkpoint import Checkpoint, read_checkpoint
from nar.convert.initial import to_diagonal
from nar.convert.models import model_state
from nar.convert.next_scale import (
    PUBLISHED_SAMPLING,
    multiscale_tokenizer_state,
    next_scale_state,
    tokenizer_sums,
)
from nar.convert.renaming import KINDS, Parts, recognise
from nar.convert.tokenizers import image_tokenizer_state, video_tokenizer_state
from nar.model import ModelConfig
from nar.storage.fields import Size, checked
from nar.storage.folder import check_replaceable, read_config, write_folder
from nar.storage.presets import find
from nar.tokenizer import KINDS as TOKENIZERS
from nar.tokenizer import TokenizerConfig

__all__ = ["KINDS", "Checkpoint", "convert", "read_checkpoint", "recognise", "to_diagonal"]

MAPPED_BYTES = 128 * 2**20
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@checked
def convert(
    kind: str,
    source: str | Path,
    output: str | Path,
    *,
    preset: str | None = None,
    weights: str = "model",
    num_heads: Size | None = None,
    grid: Sequence[Size] | None = None,
    class_names: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    prefix_attention: str = "causal",
    l2_norm: bool = True,
    scales: Sequence[int] = (),
) -> None:
    """Turn the published checkpoint `source`, a file or its folder, into the model folder `output`.

    What the tensors do not tell is taken from the settings stored beside them, from `preset` (a published name), or
    from the arguments: `num_heads`, `grid`, for image tokenizers `l2_norm` and for VAR's its `scales`. `tokenizer` is a
    converted tokenizer's folder, copied into the model's so that it makes pictures; VAR's model needs it. Memory stays
    below the size of the file.

    Raises:
        FileNotFoundError: `source` is not there.
        ValueError: unsafe, damaged, of another kind, or its tensors do not fit; `output` would overwrite other files.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    _check_options(
        kind,
        num_heads=num_heads,
        grid=grid,
        scales=scales,
        class_names=class_names,
        tokenizer=tokenizer,
        prefix_attention=prefix_attention != "causal",
        l2_norm=not l2_norm,
    )
    output, named = Path(output), find(preset) if preset else None
    if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(output)):  # also of a link to itself
        raise ValueError(f"output {output} would overwrite the source {source}; choose another folder")
    check_replaceable(output)  # before the source is read

    def load() -> tuple[TokenizerConfig | ModelConfig, dict[str, Parts]]:
        checkpoint = read_checkpoint(source, weights=weights)
        if kind == "llamagen-vq":
            return image_tokenizer_state(checkpoint, preset=named, l2_norm=l2_norm)
        if kind == "larp-tokenizer":
            return video_tokenizer_state(checkpoint, preset=named, grid=grid)
        if kind == "var-vae":
            return multiscale_tokenizer_state(checkpoint, preset=named, scales=scales)
        if kind == "var":
            return next_scale_state(checkpoint, tokenizer_sums(tokenizer or ""), preset=named, num_heads=num_heads)
        return model_state(
            checkpoint, kind, preset=named, num_heads=num_heads, grid=grid, prefix_attention=prefix_attention
        )

    config = load()[0]
    sizes, origin = dataclasses.asdict(config), {"converted_from": Path(source).name}
    if isinstance(config, ModelConfig):
        if class_names and len(class_names) != config.num_classes:
            raise ValueError(f"{len(class_names)} class names for a model of {config.num_classes} classes")
        description = {"kind": "transformer", "model": sizes, "class_names": list(class_names), **origin}
        if kind == "var":
            description["sampling"] = PUBLISHED_SAMPLING
    else:
        written = next(name for name, made in TOKENIZERS.items() if made.config_class is type(config))
        description = {"kind": written, "tokenizer": sizes, **origin}
    parts = {"tokenizer": Path(tokenizer)} if tokenizer else {}
    if tokenizer:
        _check_tokenizer(Path(tokenizer), config)
    write_folder(output, description, lambda path: _stream_safetensors(path, lambda: load()[1]), parts=parts)


def _check_options(kind: str, **given: Any) -> None:
    """Raise ValueError for options that are given and say nothing of this kind, and for one that it lacks."""
    models = {name for name in KINDS if name not in ("llamagen-vq", "larp-tokenizer", "var-vae")}
    fits = {
        "num_heads": models,
        "grid": KINDS.keys() - {"llamagen-vq", "var", "var-vae"},
        "scales": {"var-vae"},
        "class_names": models,
        "tokenizer": models,
        "prefix_attention": {"nar-fp"},
        "l2_norm": {"llamagen-vq"},
    }
    if strange := [name for name, value in given.items() if value and kind not in fits[name]]:
        raise ValueError(f"{strange[0]} does not apply to {kind}, {KINDS[kind]}; leave it out")
    if kind == "var" and not given["tokenizer"]:
        raise ValueError(
            "kind var needs tokenizer, the folder of its converted tokenizer: its codebook is fed to the model"
        )


def _check_tokenizer(folder: Path, config: TokenizerConfig | ModelConfig) -> None:
    """Raise ValueError for a tokenizer of other codes or scales than the model's."""
    found = read_config(folder).get("tokenizer", {})
    if found.get("vocab_size") != config.vocab_size:
        fit = f"{found.get('vocab_size')} codes, the model {config.vocab_size}"
        raise ValueError(f"the tokenizer in {folder} has {fit}; give its own")
    if found.get("scales", []) != (wanted := list(getattr(config, "scales", ()))):
        fit = f"scales {found.get('scales', [])}, the model {wanted}"
        raise ValueError(f"the tokenizer in {folder} has {fit}; convert it with --scales of the model")


def _stream_safetensors(path: Path, load: Callable[[], dict[str, Parts]]) -> None:
    """Write what `load` maps from the source, mapping it anew every `MAPPED_BYTES`.

    Pages of a mapped file count as memory once they are read, so that one pass would take the size of the file, and
    the library's own writer twice that.
    """
    state = load()
    if wrong := [f"{name} is {part.dtype}" for name, part in state.items() if part.dtype not in _DTYPES]:
        raise ValueError(f"{wrong[0]}; float32, float16 and bfloat16 weights can be converted")
    order = sorted(state, key=lambda name: -state[name].dtype.itemsize)  # widest first: all are aligned
    sizes = [state[name].shape.numel() * state[name].dtype.itemsize for name in order]
    header = {
        name: {"dtype": _DTYPES[state[name].dtype], "shape": list(state[name].shape), "data_offsets": [end - size, end]}
        for name, size, end in zip(order, sizes, itertools.accumulate(sizes), strict=True)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    mapped = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in zip(order, sizes, strict=True):
            if mapped > MAPPED_BYTES:
                state, mapped = {}, 0  # before the file is mapped anew
                state = load()
            file.write(state[name].tensor().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            mapped += size
