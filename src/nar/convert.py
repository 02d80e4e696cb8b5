"""Published checkpoints to model folders: every concession to the file formats and spellings of others is here.

Knows the layouts of LlamaGen, NAR and LARP files; does not know how their models compute. Files are read as data:
nothing in them is run, and every tensor of a file is used, or dropped by a rule that says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pickle
import re
import tempfile
import zipfile
from _codecs import encode as _codecs_encode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nar.folder import CONFIG, WEIGHTS, read_config, write_folder
from nar.model import Layout, ModelConfig, Transformer
from nar.presets import PRESETS, Preset, find
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.video import VideoTokenizer, VideoTokenizerConfig

KINDS = {
    "nar-c2i": "NAR, classes to pictures",
    "nar-t2i": "NAR, text to pictures",
    "nar-c2v": "NAR, classes to video",
    "nar-fp": "NAR, frame prediction",
    "llamagen-gpt": "LlamaGen, classes or text to pictures, token by token",
    "llamagen-vq": "the image tokenizer of LlamaGen and NAR",
    "larp-tokenizer": "the video tokenizer of LARP and NAR",
}

MAPPED_BYTES = 128 * 2**20

AnyConfig = ImageTokenizerConfig | VideoTokenizerConfig | ModelConfig


def convert(
    kind: str,
    source: str | Path,
    output: str | Path,
    *,
    preset: str | None = None,
    weights: str = "model",
    num_heads: int | None = None,
    grid: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    prefix_attention: str = "causal",
    l2_norm: bool = True,
) -> None:
    """Turn the published checkpoint `source`, a file or its folder, into the model folder `output`.

    What the tensors do not tell is taken from the settings stored beside them, from `preset` (a published name), or
    from the arguments: `num_heads`, `grid`, and for image tokenizers `l2_norm`. `tokenizer` is a converted tokenizer's
    folder, copied into the model's so that it makes pictures. Memory stays below the size of the file.

    Raises:
        FileNotFoundError: `source` is not there.
        ValueError: unsafe, damaged, of another kind, or its tensors do not fit; `output` would overwrite other files.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    is_model = kind not in ("llamagen-vq", "larp-tokenizer")
    for option, given, fits in (
        ("num_heads", num_heads, is_model),
        ("grid", grid, kind != "llamagen-vq"),
        ("class_names", class_names, is_model),
        ("tokenizer", tokenizer, is_model),
        ("prefix_attention", prefix_attention != "causal", kind == "nar-fp"),
        ("l2_norm", not l2_norm, kind == "llamagen-vq"),
    ):
        if given and not fits:
            raise ValueError(f"{option} does not apply to {kind}, {KINDS[kind]}; leave it out")
    target, named = _writable(Path(output), Path(source)), find(preset) if preset else None

    def load() -> tuple[AnyConfig, dict[str, Parts]]:
        checkpoint = read_checkpoint(source, weights=weights)
        if kind == "llamagen-vq":
            return image_tokenizer_state(checkpoint, preset=named, l2_norm=l2_norm)
        if kind == "larp-tokenizer":
            return video_tokenizer_state(checkpoint, preset=named, grid=grid)
        return model_state(
            checkpoint, kind, preset=named, num_heads=num_heads, grid=grid, prefix_attention=prefix_attention
        )

    config = load()[0]
    if isinstance(config, ModelConfig):
        if class_names and len(class_names) != config.num_classes:
            raise ValueError(f"{len(class_names)} class names for a model of {config.num_classes} classes")
        description = {"kind": "transformer", "model": dataclasses.asdict(config), "class_names": list(class_names)}
    else:
        name = "image-tokenizer" if isinstance(config, ImageTokenizerConfig) else "video-tokenizer"
        description = {"kind": name, "tokenizer": dataclasses.asdict(config)}
    parts = {"tokenizer": _fitting(Path(tokenizer), config.vocab_size)} if tokenizer else None
    _write(target, {**description, "converted_from": Path(source).name}, lambda: load()[1], parts)


def _writable(output: Path, source: Path) -> Path:
    """Refuse to replace anything but a model folder, and never the source."""
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"output {output} would overwrite the source {source}; choose another folder")
    if output.exists() and not (output / CONFIG).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not a model folder; choose another folder")
    return output


def _fitting(tokenizer: Path, vocab_size: int) -> Path:
    found = read_config(tokenizer).get("tokenizer", {}).get("vocab_size")
    if found != vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer} has {found} codes, the model {vocab_size}; they do not belong together"
        )
    return tokenizer


def _write(
    target: Path, config: dict[str, Any], load: Callable[[], dict[str, Parts]], parts: dict[str, Path] | None
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".safetensors", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _stream_safetensors(file, load)
        Path(staged).chmod(0o644)
        write_folder(target, config, {}, parts=parts)
        Path(staged).replace(target / WEIGHTS)
    finally:
        Path(staged).unlink(missing_ok=True)


_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def _stream_safetensors(file: BinaryIO, load: Callable[[], dict[str, Parts]]) -> None:
    """Write what `load` maps from the source, mapping it anew every `MAPPED_BYTES`.

    Pages of a mapped file count as memory once they are read, so that one pass would take the size of the file, and
    the library's own writer twice that.
    """
    state = load()
    for name, part in state.items():
        if part.dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"{name} is {part.dtype}; float32, float16 and bfloat16 weights can be converted")
    sizes = {name: part.shape.numel() * part.dtype.itemsize for name, part in state.items()}
    order = sorted(state, key=lambda name: -state[name].dtype.itemsize)  # widest first: all are aligned
    header: dict[str, Any] = {}
    start = 0
    for name in order:
        part, end = state[name], start + sizes[name]
        kind = _SAFETENSORS_NAMES[part.dtype]
        header[name] = {"dtype": kind, "shape": list(part.shape), "data_offsets": [start, end]}
        start = end
    del part  # it would keep the first mapping
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    mapped = 0
    for name in order:
        if mapped > MAPPED_BYTES:
            state, mapped = {}, 0
            state = load()
        file.write(state[name].tensor().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        mapped += sizes[name]


@dataclass(frozen=True)
class Checkpoint:
    """What a published file holds: tensors under their published names, and the settings stored beside them."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    origin: str


def read_checkpoint(source: str | Path, *, weights: str = "model") -> Checkpoint:
    """Read a `.pt`, `.pth` or `.safetensors` file, or the folder around it, without running anything in it.

    `weights` "ema" takes the averaged weights, "ema:0.999" those of one decay, where a file holds several sets.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds none.
        ValueError: damaged, of another format, holds types that checkpoints do not need, or no such weights.
    """
    path, settings_path = _locate(Path(source))
    settings = _read_json(settings_path) if settings_path else {}
    if settings.get("kind") in ("transformer", "image-tokenizer", "video-tokenizer"):
        raise ValueError(f"{path.parent} is a model folder already: it needs no conversion")
    if path.suffix == ".safetensors":
        if weights != "model":
            raise ValueError(f"{path} holds one set of weights; --weights {weights} is for trainer checkpoints")
        return Checkpoint(_without_wrappers(_load_safetensors(path), path), settings, str(path))
    tensors, found = _unwrap(_load_pickle(path), weights, path)
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
    found = [path for suffix in ("safetensors", "pth", "pt") for path in sorted(source.glob(f"*.{suffix}"))]
    if not found:
        raise FileNotFoundError(f"{source} holds no .safetensors, .pth or .pt file; point at the downloaded weights")
    if len(found) > 1:
        raise ValueError(f"{source} holds {', '.join(path.name for path in found)}; give the path of one of them")
    settings = sorted(source.glob("*.json"))
    if len(settings) > 1:
        settings = [path for path in settings if path.name == "config.json"]
    return found[0], settings[0] if settings else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(settings).__name__}")
    return settings


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
    stand_ins = [(OrderedDict, "easydict.EasyDict")]  # its package need not be there
    return [argparse.Namespace, np.ndarray, np.dtype, _codecs_encode, *dtypes, *rebuilders, *stand_ins]


def _load_pickle(path: Path) -> Any:
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path} is not a checkpoint: .pt, .pth and .safetensors files are")
    with torch.serialization.safe_globals(_harmless()):
        try:
            # Mapped, not read: only the tensors that are used come into memory. Old files cannot be mapped.
            mapped = zipfile.is_zipfile(path) or None
            return _plain(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named:
                raise ValueError(
                    f"{path} is refused: it asks for {named[1]}, which no checkpoint needs and which could run code"
                ) from None
            reason = next((line for line in str(error).splitlines() if "rror:" in line), "its pickle is malformed")
            raise ValueError(f"{path} is refused: {reason.split('rror:')[-1].strip() or 'malformed'}") from None
        except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is truncated or not a checkpoint ({reason}); download it again") from error


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
        sets |= {f"ema:{key}": {**model["sd"], **state} for key, state in (model.get("ema_sd") or {}).items()}
        settings = {"name": model.get("name"), **(model.get("args") or {})}
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
    return isinstance(value, dict) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _without_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what DDP, FSDP and torch.compile put before them; caches that leaked into the state are dropped."""
    cleaned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if re.search(r"(^|\.)(kv_cache\.|freqs_cis$|causal_mask$)", name):
            continue
        short = re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
        short = re.sub(r"^(module\.)+", "", short)
        if short in cleaned:
            raise ValueError(f"{path} holds {short} twice, once as {name}; keep one of them")
        cleaned[short] = tensor
    return cleaned


@dataclass(frozen=True)
class Origin:
    """Where a tensor of ours comes from: published tensors joined along `axis`, or some `rows` of one."""

    names: tuple[str, ...]
    axis: int = 0
    rows: slice | None = None


@dataclass(frozen=True)
class Parts:
    """A tensor that still lies in the published file; `tensor()` brings it into memory."""

    sources: tuple[Tensor, ...]
    axis: int
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    def tensor(self) -> Tensor:
        joined = self.sources[0] if len(self.sources) == 1 else torch.cat(self.sources, self.axis)
        return joined.reshape(self.shape)


Renaming = dict[str, Origin]


def _rename(
    checkpoint: Checkpoint, renaming: Renaming, module: nn.Module, *, dropped: str = r"(?!)"
) -> dict[str, Parts]:
    """Match the published tensors with the state dict of `module` (on the meta device), accounting for all of them.

    `dropped` matches the published names that have no counterpart here. Shapes may differ in axes of size 1.

    Raises:
        ValueError: published tensors that are missing, left over or of another shape, by their published names.
    """
    tensors, problems, renamed = checkpoint.tensors, [], {}
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if expected.keys() != renaming.keys():
        raise AssertionError(f"the renaming does not cover the model: {sorted(expected.keys() ^ renaming.keys())}")
    used = {name for origin in renaming.values() for name in origin.names}
    missing = sorted(used - tensors.keys())
    extra = sorted(name for name in tensors.keys() - used if not re.match(dropped, name))
    for name, origin in renaming.items():
        wanted = list(expected[name])
        if len(origin.names) > 1:
            wanted[origin.axis] //= len(origin.names)
        sources = tuple(tensors[source] for source in origin.names if source in tensors)
        if origin.rows is not None:
            sources = tuple(tensor[origin.rows] for tensor in sources)
        for source, tensor in zip(origin.names, sources, strict=False):
            if [size for size in tensor.shape if size != 1] != [size for size in wanted if size != 1]:
                problems.append(f"{source} is {tuple(tensors[source].shape)}, {tuple(wanted)} is expected")
        renamed[name] = Parts(sources, origin.axis, expected[name])
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if extra:
        problems.append(f"not part of this model: {_listed(extra)}")
    if problems:
        raise ValueError(f"{checkpoint.origin} does not fit; {'; '.join(problems[:8])}")
    return renamed


def _shape(checkpoint: Checkpoint, name: str) -> torch.Size:
    if name not in checkpoint.tensors:
        raise ValueError(f"{checkpoint.origin} does not fit; missing: {name}")
    return checkpoint.tensors[name].shape


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _linear(target: str, source: str, *, bias: bool = True) -> Renaming:
    return {f"{target}.{part}": _same(f"{source}.{part}") for part in (("weight", "bias") if bias else ("weight",))}


def _same(name: str) -> Origin:
    return Origin((name,))


def recognise(tensors: Iterable[str]) -> str | None:
    """The kind of checkpoint that has tensors of these names; None when it is none of `KINDS`."""
    names = set(tensors)
    if "quantize.embedding.weight" in names:
        return "llamagen-vq"
    if "bottleneck.regularizer.embedding.weight" in names:
        return "larp-tokenizer"
    classes, text = "cls_embedding.embedding_table.weight" in names, "cls_embedding.uncond_embedding" in names
    if "output_R.weight" in names:
        return "nar-c2v" if classes else "nar-fp"
    if "medusa_output.weight" in names:
        return "nar-t2i" if text else "nar-c2i"
    if "tok_embeddings.weight" in names and "output.weight" in names and (classes or text) and "abs_pe" not in names:
        return "llamagen-gpt"
    return None


def _check_kind(checkpoint: Checkpoint, kind: str) -> None:
    found = recognise(checkpoint.tensors)
    if found == kind:
        return
    if found is None:
        some = _listed(sorted(checkpoint.tensors))
        raise ValueError(
            f"{checkpoint.origin} is no checkpoint of {KINDS[kind]}, nor of another kind known here; it has {some}"
        )
    reason = ""
    if found == "llamagen-gpt" and kind.startswith("nar-"):
        reason = ": it has one prediction head, where NAR has one for each axis (medusa_output or output_R is missing)"
    raise ValueError(
        f"{checkpoint.origin} is a {found} checkpoint ({KINDS[found]}), not {kind}{reason}; use --kind {found}"
    )


def image_tokenizer_state(
    checkpoint: Checkpoint, *, preset: Preset | None = None, l2_norm: bool = True
) -> tuple[ImageTokenizerConfig, dict[str, Parts]]:
    """LlamaGen's VQ tokenizer; sizes and patch size are read off the tensors. `l2_norm` is not in them."""
    _check_kind(checkpoint, "llamagen-vq")
    tensors = checkpoint.tensors
    channels = _shape(checkpoint, "encoder.conv_in.weight")[0]
    widths = [
        _shape(checkpoint, f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0]
        for level in range(_count(tensors, r"encoder\.conv_blocks\.(\d+)\."))
    ]
    vocab_size, code_dim = _shape(checkpoint, "quantize.embedding.weight")
    config = ImageTokenizerConfig(
        vocab_size=vocab_size,
        code_dim=code_dim,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_blocks=_count(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        latent_channels=_shape(checkpoint, "encoder.conv_out.weight")[0],
        l2_norm=l2_norm,
    )
    if preset:
        _check_preset(preset, "llamagen-vq")
        if config != ImageTokenizerConfig(**preset.config, l2_norm=l2_norm):
            raise ValueError(f"{checkpoint.origin} has other sizes than preset {preset.name}: {config}")
    with torch.device("meta"):
        module = ImageTokenizer(config)
    renaming = {name: _same(_published_image_name(name)) for name in module.state_dict()}
    # `codebook_used` counts how often codes were drawn while training.
    return config, _rename(checkpoint, renaming, module, dropped=r"quantize\.codebook_used$")


def _published_image_name(name: str) -> str:
    for pattern, published in (
        (r"^quantizer\.", "quantize."),
        (r"^to_code\.", "quant_conv."),
        (r"^from_code\.", "post_quant_conv."),
        (r"\.levels\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
        (r"\.levels\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
        (r"\.(down|up)samples\.(\d+)\.", r".conv_blocks.\2.\1sample."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.(q|k|v)(uery|ey|alue)\.", r".\1."),
        (r"\.proj\.", ".proj_out."),
    ):
        name = re.sub(pattern, published, name)
    return name


def _count(tensors: Iterable[str], pattern: str) -> int:
    """How many different numbers `pattern` captures in the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


_NORMS = {None: "none", "no": "none", "none": "none"} | {
    "ln_d": "layer", "ln_nd": "layer_all", "bn_bn": "batch", "bn_b": "batch_all",
    "ln_d_na": "none",  # accepted upstream, but never applied
}  # fmt: skip
_NAMES_OF_NOTHING = (None, "", "none", "no", "null")
_DEFAULT_TRANSFORMER = "transformer_encoder_parallel"


def video_tokenizer_state(
    checkpoint: Checkpoint, *, grid: Sequence[int] | None = None, preset: Preset | None = None
) -> tuple[VideoTokenizerConfig, dict[str, Parts]]:
    """LARP's tokenizer, with all its flags; `grid` is the shape codes are read in, by default that of its patches."""
    _check_kind(checkpoint, "larp-tokenizer")
    if preset:
        _check_preset(preset, "larp-tokenizer")
        config = VideoTokenizerConfig(**preset.config | ({"grid": tuple(grid)} if grid else {}))
    else:
        config = _video_tokenizer_config(checkpoint, grid)
    with torch.device("meta"):
        module = VideoTokenizer(config)
    # The prior shaped the codes while training; nothing needs it later.
    return config, _rename(checkpoint, _video_tokenizer_renaming(config), module, dropped=r"prior_model\.")


def _video_tokenizer_config(checkpoint: Checkpoint, grid: Sequence[int] | None) -> VideoTokenizerConfig:
    settings = dict(checkpoint.settings)
    if "bottleneck" not in settings and isinstance(settings.get("args"), dict):
        settings = settings["args"]
    if "bottleneck" not in settings:
        raise ValueError(
            f"{checkpoint.origin} comes without the tokenizer's settings; put its config.json into the same folder "
            "and convert the folder, or name a preset (LARP-L-long)"
        )
    bottleneck = settings["bottleneck"].get("args", settings["bottleneck"])
    regularizer = bottleneck.get("regularizer") or {}
    quantizer = regularizer.get("args", {})
    patch_size = int(settings.get("patch_size", 8))
    temporal_patch_size = int(settings.get("temporal_patch_size", 4))
    transformer = settings.get("transformer_name", _DEFAULT_TRANSFORMER)
    names = [settings.get(f"{side}_name") for side in ("encoder", "decoder")]
    names = [transformer if str(name or "").lower() in _NAMES_OF_NOTHING else name for name in names]
    refused = {
        "regularizer": (str(regularizer.get("name")).lower(), "vq"),
        "encoder": (names[0], _DEFAULT_TRANSFORMER),
        "decoder": (names[1], _DEFAULT_TRANSFORMER),
        "in_channels": (int(settings.get("in_channels", 3)), 3),
        "decoder_patch_size": (int(settings.get("decoder_patch_size", 8)), patch_size),
        "decoder_temporal_patch_size": (int(settings.get("decoder_temporal_patch_size", 4)), temporal_patch_size),
    }
    for name, (found, supported) in refused.items():
        if found != supported:
            raise ValueError(f"{checkpoint.origin}: {name} {found!r} is not supported; {supported!r} is")
    norm = bottleneck.get("norm")
    norm = norm.lower() if isinstance(norm, str) else norm
    if norm not in _NORMS:
        raise ValueError(f"{checkpoint.origin}: norm {norm!r} is unknown; known: {', '.join(map(str, _NORMS))}")
    stochastic = bool(quantizer.get("stochastic", False))
    temperature = float(quantizer.get("stochastic_temperature", 1.0))
    encoder_dim = int(settings.get("encoder_hidden_size", 768))
    num_tokens = int(settings.get("bottleneck_token_num", 1024))
    num_frames, image_size = int(settings.get("frame_num", 16)), int(settings.get("input_size", 128))
    if grid is None:
        side = image_size // patch_size
        grid = (num_frames // temporal_patch_size, side, side)
        grid = grid if math.prod(grid) == num_tokens else (num_tokens,)
    flags = {
        "learned_patch_positions": "learned_encoder_patch_pe",
        "learned_code_positions": "learned_decoder_latent_pe",
        "learned_pixel_queries": "learned_decoder_patch_query_embed",
        "patch_type": "use_encoder_patch_token_type_embed",
        "query_type": "use_encoder_latent_query_token_type_embed",
        "code_type": "use_decoder_latent_token_type_embed",
        "pixel_query_type": "use_decoder_patch_query_token_type_embed",
    }
    code_dim = int(bottleneck.get("bottleneck_dim", -1))
    return VideoTokenizerConfig(
        num_frames=num_frames,
        image_size=image_size,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        encoder_dim=encoder_dim,
        num_encoder_layers=int(settings.get("encoder_depth", 6)),
        num_encoder_heads=int(settings.get("encoder_num_heads", 12)),
        decoder_dim=int(settings.get("decoder_hidden_size", 768)),
        num_decoder_layers=int(settings.get("decoder_depth", 6)),
        num_decoder_heads=int(settings.get("decoder_num_heads", 12)),
        num_tokens=num_tokens,
        grid=tuple(grid),
        vocab_size=int(quantizer["codebook_size"]),
        code_dim=code_dim if code_dim > 0 else encoder_dim,
        norm=_NORMS[norm],
        l2_norm=bool(quantizer.get("l2_normalized", False)),
        stochastic=stochastic,
        temperature=(temperature if temperature > 0 else None) if stochastic else 1.0,
        learned_queries=bool(settings.get("learned_encoder_latent_query_embed", True)),
        position_base=float(settings.get("latent_pe_scale_factor", 10000)),
        **{ours: bool(settings.get(theirs, False)) for ours, theirs in flags.items()},
    )


def _video_tokenizer_renaming(config: VideoTokenizerConfig) -> Renaming:
    renaming = (
        _linear("patch_embed", "x_embedder.proj")
        | _linear("to_code", "bottleneck.in_linear")
        | _linear("from_code", "bottleneck.out_linear")
        | _linear("quantizer.embedding", "bottleneck.regularizer.embedding", bias=False)
        | _linear("norm_out", "final_layer.norm_final")
        | _linear("to_pixels", "final_layer.linear")
        | {"queries.table": _same("encoder_latent_query_embed"), "code_positions.table": _same("decoder_latent_pe")}
    )
    if config.norm != "none":
        renaming |= _linear("code_norm.norm", "bottleneck.norm_layer")
    if config.norm.startswith("batch"):
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            renaming[f"code_norm.norm.{statistic}"] = _same(f"bottleneck.norm_layer.{statistic}")
    if config.stochastic and config.temperature is None:
        renaming["inverse_temperature"] = _same("bottleneck.regularizer.stochastic_temperature_inv")
    for ours, theirs, learned, table in (
        ("patch_positions", "encoder", config.learned_patch_positions, "encoder_patch_pe"),
        ("pixel_queries", "decoder", config.learned_pixel_queries, "decoder_patch_query_embed"),
    ):
        if learned:
            column = "encode_w_embed" if theirs == "encoder" else "decoder_w_embed"  # sic
            renaming[f"{ours}.time"] = _same(f"{theirs}_t_embed")
            renaming[f"{ours}.row"] = _same(f"{theirs}_h_embed")
            renaming[f"{ours}.column"] = _same(column)
        else:
            renaming[f"{ours}.table"] = _same(table)
    for ours, theirs, present in (
        ("patch_positions", "encoder_patch", config.patch_type),
        ("queries", "encoder_latent_query", config.query_type),
        ("code_positions", "decoder_latent", config.code_type),
        ("pixel_queries", "decoder_patch_query", config.pixel_query_type),
    ):
        if present:
            renaming[f"{ours}.shift"] = _same(f"{theirs}_token_type_embed")
    for side, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for layer in range(layers):
            ours, theirs = f"{side}.{layer}", f"{side}.blocks.{layer}"
            renaming |= (
                _linear(f"{ours}.attention_norm", f"{theirs}.norm1")
                | _linear(f"{ours}.qkv", f"{theirs}.attn.qkv", bias=False)
                | _linear(f"{ours}.attention_out", f"{theirs}.attn.proj")
                | _linear(f"{ours}.mlp_norm", f"{theirs}.norm2")
                | _linear(f"{ours}.mlp_in", f"{theirs}.mlp.fc1")
                | _linear(f"{ours}.mlp_out", f"{theirs}.mlp.fc2")
            )
    return renaming


_HEADS = {  # norm and matrix of each prediction head, along the width first
    "nar-c2i": (("norm", "output"), ("medusa_norm", "medusa_output")),
    "nar-t2i": (("norm", "output"), ("medusa_norm", "medusa_output")),
    "nar-c2v": (("norm_R", "output_R"), ("norm_D", "output_D"), ("norm_B", "output_B")),
    "nar-fp": (("norm_R", "output_R"), ("norm_D", "output_D"), ("norm_B", "output_B")),
    "llamagen-gpt": (("norm", "output"),),
}


def model_state(
    checkpoint: Checkpoint,
    kind: str,
    *,
    preset: Preset | None = None,
    num_heads: int | None = None,
    grid: Sequence[int] | None = None,
    prefix_attention: str = "causal",
) -> tuple[ModelConfig, dict[str, Parts]]:
    """A published transformer; sizes are read off the tensors, `num_heads` and `grid` are not in them.

    Raises:
        ValueError: another kind of checkpoint, tensors that do not fit, or a size that must be given.
    """
    _check_kind(checkpoint, kind)
    tensors, heads = checkpoint.tensors, _HEADS[kind]
    vocab_size, dim = _shape(checkpoint, f"{heads[0][1]}.weight")
    num_blocks = _count(tensors, r"layers\.(\d+)\.")
    known: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": num_blocks - len(heads) + 1,
        "hidden_dim": _shape(checkpoint, "layers.0.feed_forward.w1.weight")[0],
        "schedule": "raster" if kind == "llamagen-gpt" else "manhattan",
    }
    preset = _matching_preset(checkpoint, kind, known, preset)
    known["num_heads"] = _num_heads(checkpoint, known, preset, num_heads)
    if kind in ("nar-c2v", "nar-fp"):
        known |= _video_settings(checkpoint, kind, grid)
        known["prefix_attention"] = prefix_attention
    else:
        known |= _image_settings(checkpoint, preset, grid)
    config, dropped = ModelConfig(**known), r"(?!)"
    if config.positions == "learned":
        fixed = dataclasses.replace(config, positions="sincos")
        computed = Layout.of(fixed).table
        if computed is not None and torch.allclose(tensors["abs_pe"].float().view(computed.shape), computed, atol=1e-4):
            config, dropped = fixed, r"abs_pe$"
    with torch.device("meta"):
        module = Transformer(config)
    return config, _rename(checkpoint, _model_renaming(config, heads), module, dropped=dropped)


def _model_renaming(config: ModelConfig, heads: tuple[tuple[str, str], ...]) -> Renaming:
    renaming = {
        "tokens.weight": _same("tok_embeddings.weight"),
        "output.weight": Origin(tuple(f"{matrix}.weight" for _, matrix in heads), axis=1),
    }
    for index, (norm, _) in enumerate(heads):
        renaming[f"head_norms.{index}.weight"] = _same(f"{norm}.weight")
    if config.num_classes:
        renaming["classes.weight"] = _same("cls_embedding.embedding_table.weight")
    if config.text_dim:
        renaming["text.0.weight"] = _same("cls_embedding.cap_proj.fc1.weight")
        renaming["text.2.weight"] = _same("cls_embedding.cap_proj.fc2.weight")
        renaming["null_text"] = _same("cls_embedding.uncond_embedding")
    if config.prefix_grid:  # the separator is the token after the last code
        renaming["tokens.weight"] = Origin(("tok_embeddings.weight",), rows=slice(0, config.vocab_size))
        renaming["separator"] = Origin(("tok_embeddings.weight",), rows=slice(config.vocab_size, None))
    if config.positions == "learned":
        renaming["positions"] = _same("abs_pe")
    for block in range(config.num_blocks):
        ours, theirs = f"blocks.{block}", f"layers.{block}"
        gate, up = (f"{theirs}.feed_forward.{name}.weight" for name in ("w1", "w3"))
        renaming |= {
            f"{ours}.attention_norm.weight": _same(f"{theirs}.attention_norm.weight"),
            f"{ours}.attention.qkv.weight": _same(f"{theirs}.attention.wqkv.weight"),
            f"{ours}.attention.proj.weight": _same(f"{theirs}.attention.wo.weight"),
            f"{ours}.feed_forward_norm.weight": _same(f"{theirs}.ffn_norm.weight"),
            f"{ours}.feed_forward.gate_up.weight": Origin((gate, up)),
            f"{ours}.feed_forward.down.weight": _same(f"{theirs}.feed_forward.w2.weight"),
        }
    return renaming


def _check_preset(preset: Preset, kind: str) -> None:
    if preset.kind != kind and not (preset.kind == "nar-c2v" and kind == "nar-fp"):
        raise ValueError(f"preset {preset.name} is of kind {preset.kind}, not {kind}")


def _matching_preset(checkpoint: Checkpoint, kind: str, known: dict[str, Any], preset: Preset | None) -> Preset | None:
    """The preset that was asked for, if its sizes are those of the file, or the one whose sizes they are."""
    sizes = ("dim", "num_layers")
    if preset is None:
        family = ("nar-c2v", "nar-fp") if kind in ("nar-c2v", "nar-fp") else ("nar-c2i", "nar-t2i", "llamagen-gpt")
        fitting = [found for found in PRESETS.values() if found.kind in family]
        fitting = [found for found in fitting if all(found.config[size] == known[size] for size in sizes)]
        return next((found for found in fitting if found.kind == kind), fitting[0] if fitting else None)
    _check_preset(preset, kind)
    for size in sizes:
        if preset.config[size] != known[size]:
            raise ValueError(
                f"{checkpoint.origin} has {size} {known[size]}, preset {preset.name} {preset.config[size]}"
            )
    return preset


def _num_heads(checkpoint: Checkpoint, known: dict[str, Any], preset: Preset | None, asked: int | None) -> int:
    if asked is not None:
        return asked
    if checkpoint.settings.get("n_head"):
        return int(checkpoint.settings["n_head"])
    if preset:
        return int(preset.config["num_heads"])
    dim, layers = known["dim"], known["num_layers"]
    raise ValueError(
        f"{checkpoint.origin} has dim {dim} and {layers} layers, which is no published size, and the number of "
        f"attention heads is not in the tensors; give it with --num-heads (dim / 64 = {dim / 64:g} is the usual one)"
    )


def _image_settings(checkpoint: Checkpoint, preset: Preset | None, grid: Sequence[int] | None) -> dict[str, Any]:
    tensors, settings = checkpoint.tensors, checkpoint.settings
    if grid is None:
        side = int(settings.get("image_size") or 0) // int(settings.get("downsample_size") or 16)
        grid = (side, side) if side else preset.config["grid"] if preset else None
    if grid is None:
        raise ValueError(f"{checkpoint.origin}: the grid of codes is not in the tensors; give it, such as --grid 16x16")
    known: dict[str, Any] = {"grid": tuple(grid), "condition_rotation": "zero", "null_mask": "caption"}
    if "cls_embedding.uncond_embedding" in tensors:
        known["text_length"], known["text_dim"] = tensors["cls_embedding.uncond_embedding"].shape
        return known
    return known | _class_settings(checkpoint)


def _class_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    rows = _shape(checkpoint, "cls_embedding.embedding_table.weight")[0]
    # Without class dropout there is no null row; the settings tell, the tensors do not.
    null_class = int(checkpoint.settings.get("num_classes") or 0) != rows
    return {"num_classes": rows - null_class, "null_class": null_class}


def _video_settings(checkpoint: Checkpoint, kind: str, grid: Sequence[int] | None) -> dict[str, Any]:
    tensors, settings = checkpoint.tensors, checkpoint.settings
    _shape(checkpoint, "abs_pe")
    table = tensors["abs_pe"].flatten(0, -2)
    # Frame prediction: as many given codes as new ones, and a separator.
    num_positions = len(table) - 1 if kind == "nar-c2v" else (len(table) - 1) // 2
    grid = tuple(grid or settings.get("latent_shape") or (4, 16, 16))
    if math.prod(grid) != num_positions:
        raise ValueError(
            f"{checkpoint.origin} has {num_positions} positions, grid {grid} has {math.prod(grid)}; "
            "give the right one, such as --grid 4x16x16"
        )
    known: dict[str, Any] = {"grid": grid, "positions": "learned"}
    return known | (_class_settings(checkpoint) if kind == "nar-c2v" else {"prefix_grid": grid})
