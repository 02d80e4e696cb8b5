"""Weights of a finished model as the start of another: of NAR's order, with holes, with low-rank additions.

Knows which parameters stand for which; does not know how the new model is trained, nor files.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any, cast

import torch
from torch import Tensor

from nar.model import Transformer
from nar.storage.fields import checked


@checked
def to_diagonal(model: Transformer) -> Transformer:
    """A raster or PAR model with the order of NAR: a start, to be trained on.

    Every further head gets a copy of the last block and of its norm, and all heads the one output, as FlashAR begins
    (arXiv 2605.09430, with its branch after the last block as in NAR). Along the width the first head predicts what the
    model did, as long as both see the same tokens: in a single row. The weights are copies; special slots of PAR go.

    Raises:
        ValueError: a model of another order, of several heads or their own blocks, or whose blocks are modulated.
    """
    config, last = model.config, model.config.num_layers - 1
    if config.schedule not in ("raster", "par") or config.head_depths != (0,) or config.modulation != "none":
        raise ValueError(
            f"to_diagonal takes raster and par models with one head, without modulation; this one's schedule is "
            f"{config.schedule} with head_depths {list(config.head_depths)}, modulation {config.modulation}"
        )
    made = Transformer(dataclasses.replace(config, schedule="manhattan", regions=(), head_depths=(), axis_heads=()))
    old = model.state_dict()

    def start(name: str) -> Tensor:
        if name == "output.weight":
            return torch.cat([old[name]] * len(made.config.head_depths), 1)
        name = re.sub(r"^blocks\.(\d+)", lambda found: f"blocks.{min(int(found[1]), last)}", name)
        own: Tensor = old[re.sub(r"^head_norms\.\d+", "head_norms.0", name)]
        return own

    made.load_state_dict({name: start(name) for name in made.state_dict()})
    return made.to(model.device, model.dtype).train(model.training)


def trunk(model: Transformer) -> frozenset[str]:
    """Names of the parameters of `model` that its first head alone would need, but for the output."""
    own = "|".join(map(str, range(model.config.num_layers, model.config.num_blocks)))
    further = re.compile(rf"output|gate|head_norms\.(?!0\.)|blocks\.(?:{own or 'none'})\.")
    return frozenset(name for name, _ in model.named_parameters() if not further.match(name))


def with_holes(model: Transformer, sizes: dict[str, Any]) -> Transformer:
    """A model that has no prefix with one of the whole grid: the same weights, and three vectors more.

    The separator, which takes the place of the condition's last token before the first code, begins as the mean of the
    classes, or of the null words.
    """
    if model.config.positions != "rope":
        raise ValueError(f"init has {model.config.positions} positions, of one length; edit needs one with rope")
    names = ("prefix_grid", "prefix_holes", "prefix_attention", "condition_rotation")
    made = Transformer(dataclasses.replace(model.config, **{name: sizes[name] for name in names}))
    made.load_state_dict(made.state_dict() | model.state_dict())
    with torch.no_grad():
        last = model.classes.weight if model.config.num_classes else model.text(cast(Tensor, model.null_text))
        made.separator.copy_(last.mean(0))
    return made


def with_gate(model: Transformer) -> Transformer:
    """A model whose rows of predictions have equal shares with a gate, which begins with these."""
    made = Transformer(dataclasses.replace(model.config, gate=True))
    made.load_state_dict(made.state_dict() | model.state_dict())
    return made


def with_larger_patches(state: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Weights of a picture tokenizer that folds `old` pixels a side, for one that folds `new`, a multiple: of pictures
    as many times larger it begins with what it made of them at the size of before, each pixel a square of them."""
    times = new // old

    def spread(weight: Tensor, axis: int) -> Tensor:
        squares: Tensor = weight.unflatten(axis, (3, old, old))
        return squares.repeat_interleave(times, axis + 1).repeat_interleave(times, axis + 2).flatten(axis, axis + 2)

    first = {"encoder.conv_in.weight": spread(state["encoder.conv_in.weight"], 1) / times**2}
    last = {name: spread(state[name], 0) for name in ("decoder.conv_out.weight", "decoder.conv_out.bias")}
    return state | first | last


def with_lora(model: Transformer, rank: int, *, heads: bool) -> None:
    """Add low-rank layers in place, and let them alone learn beside classes and a gate; with `heads` all but the trunk.

    Raises:
        ModuleNotFoundError: no peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("lora_rank needs peft: pip install nar-gen[lora]") from error
    targets = ["qkv", "proj", "gate_up", "down"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    shared = trunk(model)
    for name, parameter in model.named_parameters():
        if name.startswith(("classes.", "gate.")) or (heads and name not in shared):
            parameter.requires_grad_(True)


def merged(module: Transformer) -> Transformer:
    """A plain model with the low-rank additions of `module` added to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = copy.deepcopy(module)
    for part in adapted.modules():
        if isinstance(part, BaseTunerLayer):
            part.merge()
    plain, state = Transformer(module.config), adapted.state_dict().items()
    plain.load_state_dict({k.replace(".base_layer.", "."): tensor for k, tensor in state if ".lora_" not in k})
    return plain
