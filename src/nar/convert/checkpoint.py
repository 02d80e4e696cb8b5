"""Files that others wrote: tensors under their published names, and the settings stored beside them.

Knows formats and wrappers; does not know kinds of models. Files are read as data: nothing in them is run.
"""

from __future__ import annotations

import argparse
import re
from _codecs import encode as _codecs_encode
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nar.storage.files import read_json
from nar.storage.pickled import load_pickle


@dataclass(frozen=True)
class Checkpoint:
    """What a published file holds: tensors under their published names, and the settings stored beside them."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    origin: str

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; raises ValueError if it is missing."""
        if name not in self.tensors:
            raise ValueError(f"{self.origin} does not fit; missing: {name}")
        return self.tensors[name].shape

    def count(self, pattern: str) -> int:
        """How many different numbers `pattern` captures in the tensors' names."""
        return len({match[1] for name in self.tensors if (match := re.match(pattern, name))})


def read_checkpoint(source: str | Path, *, weights: str = "model") -> Checkpoint:
    """Read a `.pt`, `.pth` or `.safetensors` file, or the folder around it, without running anything in it.

    `weights` "ema" takes the averaged weights, "ema:0.999" those of one decay, where a file holds several sets.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds none.
        ValueError: damaged, of another format, holds types that checkpoints do not need, or no such weights.
    """
    path, settings_path = _locate(Path(source))
    settings: dict[str, Any] = read_json(settings_path) if settings_path else {}
    if settings.get("kind") in (
        "transformer",
        "image-tokenizer",
        "video-tokenizer",
        "causal-tokenizer",
        "multiscale-tokenizer",
    ):
        raise ValueError(f"{path.parent} is a model folder already: it needs no conversion")
    if path.suffix == ".safetensors":
        if weights != "model":
            raise ValueError(f"{path} holds one set of weights; --weights {weights} is for trainer checkpoints")
        return Checkpoint(_without_wrappers(_load_safetensors(path), path), settings, str(path))
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path} is not a checkpoint: .pt, .pth and .safetensors files are")
    tensors, found = _unwrap(_plain(load_pickle(path, allowed=_harmless())), weights, path)
    return Checkpoint(_without_wrappers(tensors, path), {**found, **settings}, str(path))


def _locate(source: Path) -> tuple[Path, Path | None]:
    """The weights' file and, if there is one, the json with the model's settings."""
    if source.is_file():
        beside = source.parent / "config.json"
        return source, beside if source.suffix == ".safetensors" and beside.is_file() else None
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist; give a .pt, .pth or .safetensors file, or its folder")
    if (source / "consolidated.pth").is_file():  # a sharded trainer's folder; optimizer files stand beside it
        return source / "consolidated.pth", None
    found = [
        path for suffix in ("safetensors", "pth", "pt") for path in sorted(source.glob(f"*.{suffix}")) if path.is_file()
    ]
    if not found:
        raise FileNotFoundError(f"{source} holds no .safetensors, .pth or .pt file; point at the downloaded weights")
    if len(found) > 1:
        raise ValueError(f"{source} holds {', '.join(path.name for path in found)}; give the path of one of them")
    settings = sorted(source.glob("*.json"))
    if len(settings) > 1:
        settings = [path for path in settings if path.name == "config.json"]
    return found[0], settings[0] if settings else None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); download it again") from error


def _harmless() -> list[Any]:
    """The types that trainers put beside their tensors, and that cannot do anything when they are rebuilt."""
    dtypes = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    # Random states hold arrays; numpy has moved the two functions that rebuild them.
    rebuilders = [
        (value.__reduce__()[0], f"numpy.{module}.multiarray.{name}")
        for value, name in ((np.empty(0), "_reconstruct"), (np.float64(0), "scalar"))
        for module in ("core", "_core")
    ]
    stand_in = (OrderedDict, "easydict.EasyDict")  # its package need not be there
    return [argparse.Namespace, np.ndarray, np.dtype, _codecs_encode, *dtypes, *rebuilders, stand_in]


def _plain(tree: Any) -> Any:
    """Namespaces and their like as dicts, all the way down."""
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _unwrap(tree: Any, weights: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The chosen state dict inside a trainer's wrapper, and the model's settings if they are stored."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a state dict")
    wanted, _, decay = weights.partition(":")
    if wanted not in ("model", "ema"):
        raise ValueError(f"weights {weights!r} is unknown; choose model, ema or ema:DECAY")
    if _is_state(tree):
        sets, settings = {"model": tree}, {}
    elif isinstance(tree.get("model"), dict) and _is_state(tree["model"].get("sd")):  # the video trainers
        model = tree["model"]
        sets = {"model": model["sd"]}
        # Averages cover parameters; what is not averaged (fixed position tables) is the model's own.
        averages, args = model.get("ema_sd") or {}, model.get("args") or {}
        if not (isinstance(args, dict) and isinstance(averages, dict) and all(map(_is_state, averages.values()))):
            raise ValueError(
                f"{path} has args or ema_sd of another form than the trainers of video write; download it again"
            )
        sets |= {f"ema:{key}": {**model["sd"], **state} for key, state in averages.items()}
        settings = {"name": model.get("name"), **args}
    else:
        sets = {key: tree[key] for key in ("model", "module", "state_dict", "ema") if _is_state(tree.get(key))}
        settings = tree["args"] if isinstance(tree.get("args"), dict) else {}
    if wanted == "ema":
        chosen = [key for key in sets if key.startswith("ema") and (not decay or key == f"ema:{decay}")]
    else:
        chosen = [key for key in sets if not key.startswith("ema")][:1] or list(sets)[:1]
    if len(chosen) == 1:
        return sets[chosen[0]], settings
    if not sets:
        listed = ", ".join(map(str, list(tree)[:8])) or "nothing"
        raise ValueError(f"{path} holds no weights under model, module, state_dict or ema; it holds {listed}")
    raise ValueError(f"{path} holds the weights {', '.join(sets)}; choose one of them with --weights")


def _is_state(value: Any) -> bool:
    """Whether a value is tensors by their names."""
    pairs = value.items() if isinstance(value, dict) else ()
    return bool(pairs) and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in pairs)


def _without_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what DDP, FSDP and torch.compile put before them; caches that leaked into the state are dropped."""
    cleaned: dict[str, Tensor] = {}
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta or tensor.layout != torch.strided]:
        raise ValueError(f"{path} holds {empty[0]} without its numbers, or as a sparse tensor; download it again")
    for name, tensor in tensors.items():
        if re.search(r"(^|\.)(kv_cache\.|freqs_cis$|causal_mask$)", name):
            continue
        short = re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
        short = re.sub(r"^(module\.)+", "", short)
        if short in cleaned:
            raise ValueError(f"{path} holds {short} twice, once as {name}; keep one of them")
        cleaned[short] = tensor
    return cleaned
