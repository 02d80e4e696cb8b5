"""The transformers of NAR and LlamaGen: their configs, and what they call their tensors.

Knows which sizes the tensors tell and which they do not; does not know how files are read or written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from nar.convert.checkpoint import Checkpoint
from nar.convert.renaming import Origin, Parts, check_kind, rename
from nar.model import Layout, ModelConfig, Transformer
from nar.storage.folder import without_weights
from nar.storage.presets import PRESETS, Preset

_VIDEO = ("nar-c2v", "nar-fp")
_HEADS = {  # norm and matrix of each prediction head, along the width first
    "llamagen-gpt": (("norm", "output"),),
    **dict.fromkeys(("nar-c2i", "nar-t2i"), (("norm", "output"), ("medusa_norm", "medusa_output"))),
    **dict.fromkeys(_VIDEO, (("norm_R", "output_R"), ("norm_D", "output_D"), ("norm_B", "output_B"))),
}
_SPELLINGS = (
    (r"^tokens\.", "tok_embeddings."),
    (r"^classes\.", "cls_embedding.embedding_table."),
    (r"^text\.0\.", "cls_embedding.cap_proj.fc1."),
    (r"^text\.2\.", "cls_embedding.cap_proj.fc2."),
    (r"^null_text$", "cls_embedding.uncond_embedding"),
    (r"^positions$", "abs_pe"),
    (r"^blocks\.", "layers."),
    (r"\.attention\.qkv\.", ".attention.wqkv."),
    (r"\.attention\.proj\.", ".attention.wo."),
    (r"\.feed_forward_norm\.", ".ffn_norm."),
    (r"\.feed_forward\.down\.", ".feed_forward.w2."),
)


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
    check_kind(checkpoint, kind, preset)
    heads = _HEADS[kind]
    vocab_size, dim = checkpoint.shape(f"{heads[0][1]}.weight")
    known: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": checkpoint.count(r"layers\.(\d+)\.") - len(heads) + 1,
        "hidden_dim": checkpoint.shape("layers.0.feed_forward.w1.weight")[0],
        "schedule": "raster" if kind == "llamagen-gpt" else "manhattan",
    }
    preset = _matching_preset(checkpoint, kind, known, preset)
    known["num_heads"] = _num_heads(checkpoint, known, preset, num_heads)
    if kind in _VIDEO:
        known |= _video_settings(checkpoint, kind, grid) | {"prefix_attention": prefix_attention}
    else:
        known |= _image_settings(checkpoint, preset, grid)
    if 1 < len(heads) != len(known["grid"]):
        raise ValueError(f"grid {known['grid']} has {len(known['grid'])} axes, {kind} {len(heads)}; give all of them")
    config, dropped = ModelConfig(**known), r"(?!)"
    if config.positions == "learned":
        fixed = dataclasses.replace(config, positions="sincos")
        computed, stored = Layout.of(fixed).table, checkpoint.tensors["abs_pe"].float()
        if computed is not None and torch.allclose(stored.view(computed.shape), computed, atol=1e-4):
            config, dropped = fixed, r"abs_pe$"
    with without_weights():
        module = Transformer(config)
    return config, rename(checkpoint, module, _SPELLINGS, joined=_joined(config, heads), dropped=dropped)


def _joined(config: ModelConfig, heads: tuple[tuple[str, str], ...]) -> dict[str, Origin]:
    joined = {f"head_norms.{index}.weight": Origin((f"{norm}.weight",)) for index, (norm, _) in enumerate(heads)}
    joined["output.weight"] = Origin(tuple(f"{matrix}.weight" for _, matrix in heads), axis=1)
    for block in range(config.num_blocks):
        gate, up = (f"layers.{block}.feed_forward.{name}.weight" for name in ("w1", "w3"))
        joined[f"blocks.{block}.feed_forward.gate_up.weight"] = Origin((gate, up))
    if config.prefix_grid:  # the separator is the token after the last code
        joined["tokens.weight"] = Origin(("tok_embeddings.weight",), rows=slice(0, config.vocab_size))
        joined["separator"] = Origin(("tok_embeddings.weight",), rows=slice(config.vocab_size, None))
    return joined


def _matching_preset(checkpoint: Checkpoint, kind: str, known: dict[str, Any], preset: Preset | None) -> Preset | None:
    """The preset that was asked for, if its sizes are those of the file, or the one whose sizes they are."""
    sizes = ("dim", "num_layers")
    if preset is None:
        family = [found for found in PRESETS.values() if (found.kind in _VIDEO) == (kind in _VIDEO)]
        fitting = [found for found in family if all(found.config.get(size) == known[size] for size in sizes)]
        return min(fitting, key=lambda found: found.kind != kind, default=None)
    for size in sizes:
        if (wanted := preset.config[size]) != known[size]:
            raise ValueError(f"{checkpoint.origin} has {size} {known[size]}, preset {preset.name} {wanted}")
    return preset


def _num_heads(checkpoint: Checkpoint, known: dict[str, Any], preset: Preset | None, asked: int | None) -> int:
    if asked is None:
        asked = checkpoint.settings.get("n_head") or (preset.config["num_heads"] if preset else None)
    if asked is not None:
        return int(asked)
    dim, layers = known["dim"], known["num_layers"]
    raise ValueError(
        f"{checkpoint.origin} has dim {dim} and {layers} layers, which is no published size: give the number of "
        f"attention heads with --num-heads (dim / 64 = {dim / 64:g} is the usual one)"
    )


def _image_settings(checkpoint: Checkpoint, preset: Preset | None, grid: Sequence[int] | None) -> dict[str, Any]:
    settings = checkpoint.settings
    if grid is None:
        side = int(settings.get("image_size") or 0) // int(settings.get("downsample_size") or 16)
        grid = (side, side) if side else preset.config["grid"] if preset else None
    if grid is None:
        raise ValueError(f"{checkpoint.origin}: the grid of codes is not in the tensors; give it, such as --grid 16x16")
    known: dict[str, Any] = {"grid": tuple(grid), "condition_rotation": "zero", "null_mask": "caption"}
    if "cls_embedding.uncond_embedding" not in checkpoint.tensors:
        return known | _class_settings(checkpoint)
    text_length, text_dim = checkpoint.shape("cls_embedding.uncond_embedding")
    return known | {"text_length": text_length, "text_dim": text_dim}


def _class_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    rows = checkpoint.shape("cls_embedding.embedding_table.weight")[0]
    # Without class dropout there is no null row; the settings tell, the tensors do not.
    null_class = int(checkpoint.settings.get("num_classes") or 0) != rows
    return {"num_classes": rows - null_class, "null_class": null_class}


def _video_settings(checkpoint: Checkpoint, kind: str, grid: Sequence[int] | None) -> dict[str, Any]:
    # One position is the condition's; frame prediction has as many given codes as new ones, and a separator.
    num_positions = (math.prod(checkpoint.shape("abs_pe")[:-1]) - 1) // (1 if kind == "nar-c2v" else 2)
    grid = tuple(grid or checkpoint.settings.get("latent_shape") or (4, 16, 16))
    if math.prod(grid) != num_positions:
        found = f"{num_positions} positions, grid {grid} has {math.prod(grid)}"
        raise ValueError(f"{checkpoint.origin} has {found}; give the right one, such as --grid 4x16x16")
    given = _class_settings(checkpoint) if kind == "nar-c2v" else {"prefix_grid": grid}
    return {"grid": grid, "positions": "learned", **given}
