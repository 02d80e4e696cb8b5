"""The tensors of a published checkpoint under our names: which kind it is, and that every one is used or dropped.

Knows what tells kinds apart; does not know how a kind spells its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor, nn

from nar.convert.checkpoint import Checkpoint
from nar.storage.presets import Preset

KINDS = {
    "nar-c2i": "NAR, classes to pictures",
    "nar-t2i": "NAR, text to pictures",
    "nar-c2v": "NAR, classes to video",
    "nar-fp": "NAR, frame prediction",
    "llamagen-gpt": "LlamaGen, classes or text to pictures, token by token",
    "llamagen-vq": "the image tokenizer of LlamaGen and NAR",
    "larp-tokenizer": "the video tokenizer of LARP and NAR",
    "var": "VAR, classes to pictures, scale by scale",
    "var-vae": "the multi-scale image tokenizer of VAR",
}


def recognise(tensors: Iterable[str]) -> str | None:
    """The kind of checkpoint that has tensors of these names; None when it is none of `KINDS`."""
    names = set(tensors)
    if any(name.startswith("quantize.quant_resi.") for name in names):
        return "var-vae"
    if {"pos_1LC", "word_embed.weight"} <= names:
        return "var"
    if "quantize.embedding.weight" in names:
        return "llamagen-vq"
    if "bottleneck.regularizer.embedding.weight" in names:
        return "larp-tokenizer"
    classes, text = "cls_embedding.embedding_table.weight" in names, "cls_embedding.uncond_embedding" in names
    if "output_R.weight" in names:
        return "nar-c2v" if classes else "nar-fp"
    if "medusa_output.weight" in names:
        return "nar-t2i" if text else "nar-c2i"
    if {"tok_embeddings.weight", "output.weight"} <= names and (classes or text) and "abs_pe" not in names:
        return "llamagen-gpt"
    return None


def check_kind(checkpoint: Checkpoint, kind: str, preset: Preset | None) -> None:
    """Raise a ValueError if the checkpoint or the preset is of another kind, with the one that it is of."""
    found, one_head = recognise(checkpoint.tensors), ""
    if found is None:
        some = f"nor of another kind known here; it has {_listed(sorted(checkpoint.tensors))}"
        raise ValueError(f"{checkpoint.origin} is no checkpoint of {KINDS[kind]}, {some}")
    if found == "llamagen-gpt" and kind.startswith("nar-"):
        one_head = ": it has one prediction head, NAR has one for each axis (medusa_output or output_R is missing)"
    if found != kind:
        found_kind = f"{found} checkpoint ({KINDS[found]})"
        raise ValueError(f"{checkpoint.origin} is a {found_kind}, not {kind}{one_head}; use --kind {found}")
    if preset and preset.kind != kind and not (preset.kind == "nar-c2v" and kind == "nar-fp"):
        raise ValueError(f"preset {preset.name} is of kind {preset.kind}, not {kind}")


@dataclass(frozen=True)
class Origin:
    """Where a tensor of ours comes from: published tensors joined along `axis`, or some `rows` of one."""

    names: tuple[str, ...]
    axis: int = 0
    rows: slice | EllipsisType = ...


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


def rename(
    checkpoint: Checkpoint,
    module: nn.Module,
    spellings: Sequence[tuple[str, str]],
    *,
    joined: Mapping[str, Origin] | None = None,
    dropped: str = r"(?!)",
) -> dict[str, Parts]:
    """Match the published tensors with the state dict of `module` (on the meta device), accounting for all of them.

    `spellings` are patterns in our names and what others write there; `joined` holds the tensors that are not one of
    theirs as it is, `dropped` matches names of theirs that nothing here needs. Shapes may differ in axes of size 1.

    Raises:
        ValueError: published tensors that are missing, left over or of another shape, by their published names.
    """
    tensors, problems, renamed, used = checkpoint.tensors, [], {}, set()
    for name, ours in module.state_dict().items():
        origin = (joined or {}).get(name) or Origin((respelled(name, spellings),))
        used |= {*origin.names}
        wanted = list(ours.shape)
        if len(origin.names) > 1:
            wanted[origin.axis] //= len(origin.names)
        sources = {source: tensors[source][origin.rows] for source in origin.names if source in tensors}
        for source, tensor in sources.items():
            if [size for size in tensor.shape if size != 1] != [size for size in wanted if size != 1]:
                problems.append(f"{source} is {tuple(tensors[source].shape)}, {tuple(wanted)} is expected")
            elif tensor.is_floating_point() != ours.is_floating_point():
                problems.append(f"{source} is of {tensor.dtype}, {ours.dtype} is expected")
            else:
                sources[source] = tensor.reshape(wanted)  # joined ones may differ in axes of size 1
        renamed[name] = Parts(tuple(sources.values()), origin.axis, ours.shape)
    if missing := sorted(used - tensors.keys()):
        problems.append(f"missing: {_listed(missing)}")
    if extra := sorted(name for name in tensors.keys() - used if not re.match(dropped, name)):
        problems.append(f"not part of this model: {_listed(extra)}")
    if problems:
        raise ValueError(f"{checkpoint.origin} does not fit; {'; '.join(problems[:8])}")
    return renamed


def respelled(name: str, spellings: Sequence[tuple[str, str]]) -> str:
    """What replacing every pattern, one after the other, makes of a name."""
    for pattern, published in spellings:
        name = re.sub(pattern, published, name)
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
