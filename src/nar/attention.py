"""The pieces of a transformer block: norms, rotary positions over any number of axes, attention, feed-forward layers,
the KV cache.

Knows sequences in whatever order they come; does not know grids, fronts or conditions. Legend: `B` batch, `S` queries,
`T` keys, `h` attention heads, `hd` head_dim, `d` dim, `P` rotation pairs = hd / 2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (the order matters in half precision: published
    weights)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:  # one fused kernel; the same numbers
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def rotations(coordinates: Tensor, head_dim: int, base: float) -> Tensor:
    """Rotary phases for coordinates (S, axes): (S, P, 2) holding cos and sin in float32.

    The P pairs are split over the axes as evenly as possible, the remainder to the last axes; axis with p pairs has
    frequencies base ** (-j / p).
    """
    axes = coordinates.shape[-1]
    pairs = head_dim // 2
    parts = []
    for axis in range(axes):
        count = pairs // axes + (axis >= axes - pairs % axes)
        frequencies = base ** (-torch.arange(count, dtype=torch.float32) / max(count, 1))
        parts.append(coordinates[:, axis, None].float() * frequencies)
    angles = torch.cat(parts, -1)
    return torch.stack([angles.cos(), angles.sin()], -1)


def sinusoids(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Positions (n,) to (n, dim) float64: sines, then cosines, of frequencies base ** (-k / (dim / 2))."""
    frequencies = base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Rotate adjacent pairs of `x` (B, S, ..., hd) by `phases` (S, P, 2), in float32.

    As a product of complex numbers: one kernel in place of seven, and the same bits.
    """
    if torch.compiler.is_compiling():  # which fuses real products and has no code for complex ones
        cos, sin = phases.view(len(phases), *(1,) * (x.ndim - 3), -1, 2).unbind(-1)
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, S, ..., P)
    turn = torch.view_as_complex(phases).view(len(phases), *(1,) * (x.ndim - 3), -1)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Cache:
    """Keys and values of everything fed so far: one contiguous prefix per layer, owned by the call that uses it.

    Allocated once for `length` positions; `reset` starts over in the same memory. `extend` writes behind the prefix;
    `commit` makes that part of it once all layers have written. `dtype` may be smaller than the computation's.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        length: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (num_layers, batch_size, num_heads, length, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.key_mask: Tensor | None = None  # (B, C) bool: which condition tokens are not padding
        self.modulations: list[Tensor] = []  # of `Modulation`: they stay the same for a whole generation
        self.length = 0
        self.batch_size = batch_size

    def reset(self) -> None:
        """Forget everything, for another generation in the same memory."""
        self.key_mask, self.modulations, self.length, self.batch_size = None, [], 0, self.keys.shape[1]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, h, S, hd) behind the prefix; returns prefix and new ones together."""
        end = self.length + keys.shape[2]
        all_keys, all_values = self.keys[layer, : self.batch_size], self.values[layer, : self.batch_size]
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def part(self, rows: slice, length: int) -> Cache:
        """Some rows, in the same memory, of which the first `length` positions are a prefix."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        part.length, part.batch_size = length, part.keys.shape[1]
        part.key_mask = None if self.key_mask is None else self.key_mask[rows]
        part.modulations = [own[rows] for own in self.modulations]
        return part

    def commit(self, count: int) -> None:
        """Make the last `count` written positions part of the prefix."""
        self.length += count

    def keep(self, batch_size: int) -> None:
        """Forget all but the first `batch_size` rows (the unconditional half, once guidance ends)."""
        self.batch_size = batch_size
        self.key_mask = None if self.key_mask is None else self.key_mask[:batch_size]
        self.modulations = [part[:batch_size] for part in self.modulations]


class Packed:
    """Several caches that are fed at once, by `lengths` positions each: rows of one sequence (1, M, ...) hold those of
    each row of each cache, one after the other."""

    def __init__(self, caches: Sequence[Cache], lengths: Sequence[int], masks: Sequence[Tensor | None]) -> None:
        self.parts: list[tuple[int, int, int, Tensor | None, tuple[tuple[Tensor, ...], ...]]] = []
        start = 0
        for own, length, mask in zip(caches, lengths, masks, strict=True):
            rows, end = own.batch_size, own.length + length
            keys, values = own.keys[:, :rows, :, :end], own.values[:, :rows, :, :end]
            new = (keys[:, :, :, own.length :], values[:, :, :, own.length :])
            layers = tuple(tensor.unbind() for tensor in (*new, keys, values))  # once, not in each layer
            self.parts.append((start, rows, length, mask, layers))
            start += rows * length

    def extend(self, layer: int, *fed: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """For each cache, of queries, keys and values (1, M, h, hd): its own queries (B, h, S, hd), keys and values of
        its prefix and the new ones, which are written behind it, and its mask."""
        for start, rows, length, mask, layers in self.parts:
            new_keys, new_values, keys, values = (tensors[layer] for tensors in layers)
            q, k, v = (_taken(tensor, start, rows, length) for tensor in fed)
            new_keys.copy_(k)
            new_values.copy_(v)
            yield q, keys, values, mask


def _taken(x: Tensor, start: int, rows: int, length: int) -> Tensor:
    """(1, M, h, hd) from `start` on as (rows, h, length, hd): in one call in place of four, many times a step."""
    _, step, head, element = x.stride()
    strides = (length * step, head, step, element)
    return x.as_strided((rows, x.shape[2], length, x.shape[3]), strides, x.storage_offset() + start * step)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """FlexAttention for a GPU, where it skips blocks.

    It is compiled for the first size of a batch, once more for all others, such as the smaller last one of an
    evaluation, and once for a batch of one.
    """
    return torch.compile(function)


def flex_takes(head_dim: int) -> bool:
    """Whether FlexAttention's kernels take heads of this size: 16 and more, before PyTorch 2.8 powers of two."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return head_dim >= 16 and (version >= (2, 8) or head_dim.bit_count() == 1)


def _attend_smaller(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention to keys and values of a smaller dtype than the queries'.

    Two rows of the batch at a time: their converted copies stay in the processor's cache, which makes it as fast as a
    float32 cache is. PyTorch's own float16 kernel took twice as long, converting all at once a fifth longer.
    """
    parts = []
    for row in range(0, len(q), 2):
        rows = slice(row, row + 2)
        keys, values = k[rows].to(q.dtype), v[rows].to(q.dtype)
        shown = mask if mask is None or len(mask) == 1 else mask[rows]
        parts.append(F.scaled_dot_product_attention(q[rows], keys, values, attn_mask=shown))
    return torch.cat(parts)


def _attend_learning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a training step on a CPU, as matrix products.

    The fused kernel's backward pass is slow there: with the products a whole step took 0.69 to 0.81 of the time (88 to
    1,048 positions, head_dim 64, bfloat16, one core).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    return cast(Tensor, scores.softmax(-1) @ v)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """What queries (B, h, S, hd) gather from keys and values: (B, S, d)."""
    if isinstance(mask, BlockMask):
        # On a CPU as it is: slow, and for tests only.
        attend = flex_attention if q.device.type == "cpu" else _compiled(flex_attention)
        y = cast(Tensor, cast(Any, attend)(q, k, v, block_mask=mask))
    elif q.requires_grad and q.device.type == "cpu":
        y = _attend_learning(q, k, v, mask)
    elif k.dtype == q.dtype:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        y = _attend_smaller(q, k, v, mask)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention without biases; queries, keys and values come from one projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        phases: Tensor | None,
        mask: Tensor | BlockMask | None,
        cache: Cache | Packed | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend from `x` (B, S, d) to itself and, with a cache, to what was fed before.

        `phases` (S, P, 2) rotate queries and keys. `mask` is bool, True where a query may see a key, broadcastable to
        (B, h, S, T); or a FlexAttention block mask, whose empty blocks are skipped; None lets all see all.
        """
        batch, length, dim = x.shape
        qkv = self.project(x).view(batch, length, 3, self.num_heads, -1)  # (B, S, 3, h, hd)
        q, k, v = qkv.unbind(2)
        if phases is not None:
            q, k = rotate(qkv[:, :, :2], phases).unbind(2)
        q, k = self.scaled(q, k)
        if isinstance(cache, Packed):
            y = torch.cat([_attend(*part).view(-1, dim) for part in cache.extend(layer, q, k, v)])[None]
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            k, v = (k, v) if cache is None else cache.extend(layer, k, v)
            y = _attend(q, k, v, mask)
        return cast(Tensor, self.proj(y))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (B, S, 3 * d), one after the other."""
        return cast(Tensor, self.qkv(x))

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, S, h, hd) as they are multiplied, with a factor of hd ** -0.5."""
        return q, k

    def average(self, x: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """`forward` with phases of zero: queries and keys vanish, and a position takes the mean of what it sees.

        Of a weight that is not packed only the third that makes values is multiplied. A prefill of 120 words took 16 %
        less time in float32 and bfloat16, 8 % with packed weights (768 wide, 12 layers, batch 8, one core).
        """
        batch, length, dim = x.shape
        plain = isinstance(self.qkv, nn.Linear)
        v = F.linear(x, self.qkv.weight[2 * dim :]) if plain else self.qkv(x)[..., 2 * dim :]
        v = v.view(batch, length, self.num_heads, -1).transpose(1, 2)  # (B, h, S, hd)
        if cache is not None:
            cache.extend(layer, v.new_zeros(()).expand_as(v), v)
        if mask is None:
            y = v.mean(2, keepdim=True).expand_as(v)
        else:
            y = (mask / mask.sum(-1, keepdim=True)).to(v.dtype) @ v
        return cast(Tensor, self.proj(y.transpose(1, 2).reshape(batch, length, dim)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases; gate and up are one projection."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate) * up))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then SwiGLU, each added to the stream."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = Attention(dim, num_heads)
        self.feed_forward_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = SwiGLU(dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        phases: Tensor | None,
        mask: Tensor | BlockMask | None,
        cache: Cache | Packed | None = None,
        layer: int = 0,
        dropout: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """`dropout` is (residual, path): rates on each branch's elements, and of whole branches per sample."""
        x = x + _drop(self.attention(self.attention_norm(x), phases, mask, cache, layer), *dropout)
        return x + _drop(self.feed_forward(self.feed_forward_norm(x)), *dropout)

    def average(self, x: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """`forward` with phases of zero, see `Attention.average`."""
        x = x + self.attention.average(self.attention_norm(x), mask, cache, layer)
        return cast(Tensor, x + self.feed_forward(self.feed_forward_norm(x)))


class Biased(nn.Module):
    """A linear layer whose bias is a parameter beside it: `nar.precision` packs layers that have none."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x) + self.bias)


class BiasedAttention(Attention):
    """Attention as VAR has it: biases of queries, values and the output, none of keys, and a scale of its own.

    With `unit_keys` queries and keys have length 1 and each head a learned factor, at most 100; else the factor is a
    quarter of the usual one.
    """

    def __init__(self, dim: int, num_heads: int, *, unit_keys: bool) -> None:
        super().__init__(dim, num_heads)
        self.proj = Biased(dim, dim)  # type: ignore[assignment]
        self.query_bias, self.value_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        if unit_keys:
            self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(4)))
        self.unit_keys = unit_keys

    def project(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        return cast(Tensor, self.qkv(x) + bias)

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.unit_keys:
            return 0.25 * q, k
        factor = self.log_scale.clamp_max(math.log(100)).exp() * q.shape[-1] ** 0.5
        return F.normalize(q, dim=-1) * factor[:, None], F.normalize(k, dim=-1)


class GeluLayers(nn.Module):
    """down(gelu(up(x))) with biases, gelu by its tanh approximation."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = Biased(dim, hidden_dim)
        self.down = Biased(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.gelu(self.up(x), approximate="tanh")))


class Modulation(nn.Module):
    """Gates, scales and shifts of every block, and scale and shift of the last norm, from the condition (adaptive
    norms of DiT and VAR).

    A linear layer for each block, or with `shared` one for all and learned constants for each.
    """

    def __init__(self, dim: int, num_blocks: int, *, shared: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(dim, 6 * dim) for _ in range(1 if shared else num_blocks))
        if shared:
            self.constants = nn.Parameter(torch.empty(num_blocks, 6, dim))
        self.last = nn.Linear(dim, 2 * dim)
        self.shared = shared

    def forward(self, condition: Tensor) -> list[Tensor]:
        """(B, d) to (B, 6, d) for each block, in order, then (B, 2, d)."""
        condition = F.silu(condition)
        parts = [layer(condition).unflatten(-1, (6, -1)) for layer in self.blocks]
        if self.shared:
            parts = [parts[0] + constants for constants in self.constants]
        return [*parts, self.last(condition).unflatten(-1, (2, -1))]


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then a scale around 1 and a shift, (B, 1, d)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class ModulatedBlock(nn.Module):
    """Transformer block whose norms are scaled and shifted, and whose branches are gated, by a `Modulation` (VAR)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, norm_eps: float, *, unit_keys: bool) -> None:
        super().__init__()
        self.attention = BiasedAttention(dim, num_heads, unit_keys=unit_keys)
        self.feed_forward = GeluLayers(dim, hidden_dim)
        self.eps = norm_eps

    def forward(
        self,
        x: Tensor,
        phases: Tensor | None,
        mask: Tensor | BlockMask | None,
        cache: Cache | Packed | None,
        layer: int,
        dropout: tuple[float, float],
        modulation: Tensor,
    ) -> Tensor:
        """As `Block`, with its `modulation` (B, 6, d): two gates, two scales, two shifts."""
        gates, scales, shifts = modulation[:, None].unflatten(2, (3, 2)).unbind(2)  # (B, 1, 2, d) each
        y = modulated(x, scales[:, :, 0], shifts[:, :, 0], self.eps)
        x = x + _drop(self.attention(y, phases, mask, cache, layer) * gates[:, :, 0], *dropout)
        y = modulated(x, scales[:, :, 1], shifts[:, :, 1], self.eps)
        return x + _drop(self.feed_forward(y) * gates[:, :, 1], *dropout)


def _drop(branch: Tensor, residual: float, path: float) -> Tensor:
    if residual > 0:
        branch = F.dropout(branch, residual)
    if path > 0:
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= path
        branch = branch * (keep / (1 - path)).to(branch.dtype)
    return branch
