"""Number formats for inference: casts a model, and packs its matrix products for the kernels that a CPU is good at.

Knows linear layers and kernels; does not know what the model computes. A packed model samples and scores, and neither
trains nor saves.

On a CPU, decoding a few rows at a time reads every weight once a step: the layout and the size of the weights decide.
- "float32": oneDNN's own layout, made once. The same arithmetic, and a row's result does not depend on the other rows.
- "float16": FBGEMM's half-precision weights with float32 arithmetic: half of the memory to read. Also row by row.
- "int8": FBGEMM's 8-bit weights, one scale a row of weights; the inputs of each product are rounded to 8 bits with one
  scale a row. Also row by row.
- "bfloat16": everything in bfloat16; for processors that multiply it. Sums may be taken in another order for another
  number of rows, so that now and then a token depends on the batch.
On other devices "float32" and "bfloat16" are PyTorch's dtypes; float16 would hold the residual stream too, whose
outliers pass its largest number in models of published sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRECISIONS = ("float32", "float16", "int8", "bfloat16")
Module = TypeVar("Module", bound=nn.Module)
Place = TypeVar("Place", bound=torch.device | str | None)
Product = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], Product]
_EXACT_ROWS = 64
Source = Callable[[str, Tensor], None]  # writes the tensor of a name into the given one


def convert(model: Module, precision: str | torch.dtype, device: torch.device | str) -> Module:
    """Move `model` to `device` in a precision, in place; on a CPU its linear layers are packed one after another.

    Raises:
        ValueError: an unknown precision, or one that this device has no kernels for.
    """
    name, dtype, pack = _plan(precision, torch.device(usable_device(device)))
    model = model.to(device, dtype)
    if pack is None:
        return model
    for path in _linear(model)[::-1]:  # the output comes last: it is the largest, and the others have shrunk by then
        _replace(model, path, PackedLinear(model.get_parameter(f"{path}.weight").detach(), name))
    return model.requires_grad_(False)


def fill(model: Module, source: Source, precision: str | torch.dtype | None, device: torch.device | str) -> Module:
    """Give `model`, made on the meta device, its values, and convert each as it comes: memory never holds a whole model
    in two formats. Without a `precision` it stays in float32 and can be trained.

    Raises:
        ValueError: an unknown precision, or one that this device has no kernels for.
    """
    device = torch.device(usable_device(device))
    name, dtype, pack = _plan("float32" if precision is None else precision, device)
    linear = [] if precision is None or pack is None else _linear(model)
    empty = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # One buffer for all: blocks of many sizes that come and go leave holes in the heap, 180 MB for NAR-B.
    buffer = torch.empty(max(tensor.numel() for tensor in empty.values()))
    for path in sorted(empty, key=lambda path: path.count(".")):  # the output, which is the largest, comes early
        values = buffer[: empty[path].numel()].view(empty[path].shape)
        source(path, values)
        owner, _, last = path.rpartition(".")
        if owner in linear:
            _replace(model, owner, PackedLinear(values.to(dtype), name))
            continue
        value = values.to(device, dtype, copy=True)
        is_parameter = isinstance(empty[path], nn.Parameter)
        setattr(model.get_submodule(owner), last, nn.Parameter(value) if is_parameter else value)
    return model.to(device).requires_grad_(not linear)  # `to`: what else the model keeps on its device


def _plan(precision: str | torch.dtype, device: torch.device) -> tuple[str, torch.dtype, Pack | None]:
    """The name of a precision, the dtype of what is not packed, and what packs the rest."""
    name = str(precision).removeprefix("torch.")
    if name not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, not {name!r}")
    if device.type != "cpu":
        if name in ("int8", "float16"):
            raise ValueError(f"dtype {name} is for CPUs only; on {device.type} use bfloat16 or float32")
        return name, getattr(torch, name), None
    if name in ("float16", "int8") and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError(f"dtype {name} needs an x86-64 build of PyTorch on a CPU; use float32")
    return name, torch.bfloat16 if name == "bfloat16" else torch.float32, _pack(name)


def _linear(model: nn.Module) -> list[str]:
    """Where the layers are that can be packed."""
    return [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.bias is None]


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, last = path.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)


class PackedLinear(nn.Module):
    """A linear layer without bias whose weight is held in a kernel's own layout."""

    def __init__(self, weight: Tensor, precision: str) -> None:
        super().__init__()
        pack = _pack(precision)
        assert pack is not None
        self.out_features, self.in_features = weight.shape
        self.precision = precision
        self.product = pack(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.precision}"

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError("a model packed for inference can't be saved; load it again with Transformer.from_pretrained")


def _pack(precision: str) -> Pack | None:
    """What turns a weight (out, in) into its product with rows; None where PyTorch's own is as good."""
    if precision == "float16":
        return _float16
    if precision == "int8":
        return _int8
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()):
        return None
    if precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        return None
    return _reordered


def _reordered(weight: Tensor) -> Product:
    # The layout for 32 rows is within 5 % of the best from 2 to 256 rows; the one for a single row takes twice as long.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)

    def product(x: Tensor) -> Tensor:
        # oneDNN keeps a kernel of its own for each number of rows. 96, 128, 160, ... in place of all between them save
        # 20 MB of NAR-B's 1.2 GB at batch 8, for 3 % of its time.
        rows = x.numel() // x.shape[-1]
        spare = -rows % 32 if rows > _EXACT_ROWS else 0
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            F.pad(x.reshape(rows, -1), (0, 0, 0, spare)) if spare else x, packed, None, "none", [], ""
        )
        return y[:rows].view(*x.shape[:-1], -1) if spare else y

    return product


def _float16(weight: Tensor) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)  # warns of what it clamps to 65,504
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _int8(weight: Tensor) -> Product:
    low, high = torch.aminmax(weight, dim=1)
    scales = (torch.maximum(-low, high) / 127).clamp_min(torch.finfo(torch.float32).tiny).double()
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():  # PyTorch plans to drop this constructor; it is the only way to these kernels yet
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(F.pad(weight, (0, 4)), scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without VNNI two products of 8 bits overflow the 16-bit sum: inputs are rounded to 7 bits there.
    reduce_range = not torch.cpu._is_vnni_supported()
    tiny = torch.finfo(torch.float32).tiny

    def product(x: Tensor) -> Tensor:
        # The kernel rounds all rows with one scale, which goes from the smallest number to the largest. So every row is
        # brought to -1..1, and two columns that have no weight hold both ends (the other two fill up a step of four): a
        # row's result does not depend on the others. That takes 5 to 15 % of NAR-B's time.
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(tiny)
        scaled = torch.cat([x, scale, -scale, scale, scale], -1).div_(scale)
        y: Tensor = torch.ops.quantized.linear_dynamic(scaled, packed, reduce_range)
        return y.mul_(scale)

    return product


def usable_device(name: Place) -> Place:
    """A device, or its name, as it is; raises ValueError where this machine has none such."""
    if name is None:
        return name
    try:
        if torch.empty(0, device=name).is_meta:
            raise NotImplementedError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {str(name)!r} is not usable here ({reason}); try cpu") from error
    return name
