"""Sampling of codes from a transformer, front by front.

Contract: one forward pass a front; picture i of a seed is the same at any batch size and beside any other pictures (on
a CPU; in bfloat16 a product of more rows may round otherwise: 1 code of 256 of `emoji` changed); the result has the
distribution that `Transformer.forward` states. Knows models, conditions and codes; never pixels, prompts or files.
Legend: `B` batch, `N` grid positions, `n` positions of a front, `V` vocab_size.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Annotated, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from nar.attention import Block
from nar.condition import AnyCondition, Condition
from nar.model import Transformer
from nar.order import Schedule
from nar.precision import PackedLinear
from nar.storage.fields import NotNegative, OneOf, Positive, Range, check, checked, holds_whole_numbers

Curve = Callable[[float], float]
Key = TypeVar("Key")
Value = TypeVar("Value")
SMALLEST_TEMPERATURE = 1e-5
LARGEST_GUIDANCE = 1000  # far above what helps (20), far below what overflows
NUM_SEEDS = 2**64
MOST_LOGITS, MOST_LOGITS_CPU = 2**24, 2**17  # sampled from at once, which takes a few copies
SEQUENTIAL_SUMS = ("cpu",)  # devices whose cumsum adds number after number, and is flat where nothing is kept

CURVES: dict[str, Curve] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "power": lambda progress: progress**3,
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled from logits.

    Attributes:
        guidance_scale: strength of classifier-free guidance; 1.0 is off.
        guidance_interval: guidance ends, for good, before the first front that finds more than this number of tokens
            generated; the first front is always guided. None never ends it.
        guidance_curve: "constant"; "linear", "cosine" or "power" (cubic) rise from 1.0 at the first front to
            `guidance_scale` at the last. "linear-tokens" and "cosine-tokens" rise with the share of tokens that are
            sampled before a front, as other models' curves do: a diagonal's early fronts hold few.
        guidance_power: exponent of how far a curve is: "cosine-tokens" with 2.75 is that of RAR-B (arXiv 2411.00776).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens, ties included; 0 keeps all.
        top_p: keep the most likely tokens up to this mass, the one that crosses it included; 1.0 keeps all.
    """

    guidance_scale: Annotated[float, Range(0, LARGEST_GUIDANCE)] = 1.0
    guidance_interval: Annotated[int, Range(0)] | None = None
    guidance_curve: Annotated[str, OneOf(*CURVES, "linear-tokens", "cosine-tokens")] = "constant"
    guidance_power: Positive = 1.0
    temperature: NotNegative = 1.0
    top_k: Annotated[int, Range(0)] = 0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0

    def __post_init__(self) -> None:
        check(self)

    def guidance_at(self, front: int, schedule: Schedule) -> float:
        """The guidance scale of one front."""
        curve, by_tokens, _ = self.guidance_curve.partition("-tokens")
        fronts, tokens = front / max(1, schedule.num_steps - 1), schedule.front(front).start / schedule.num_positions
        progress = (tokens if by_tokens else fronts) ** self.guidance_power
        return 1.0 + (self.guidance_scale - 1.0) * CURVES[curve](progress)


def settings_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `Sampling` among the arguments of a call that are not None."""
    return {field.name: arguments[field.name] for field in fields(Sampling) if arguments[field.name] is not None}


class Front(NamedTuple):
    """What one step gives: its number, and all codes (B, *grid) so far, -1 where nothing is decided yet."""

    number: int
    codes: Tensor


@checked
def generate(
    model: Transformer,
    condition: AnyCondition,
    sampling: Sampling | None = None,
    *,
    negative: AnyCondition | None = None,
    seed: int | Sequence[int] = 0,
    indices: Sequence[int] | None = None,
    known: Tensor | None = None,
    session: Session | None = None,
) -> Tensor:
    """Sample codes (B, *grid); see `generate_fronts` for the arguments."""
    tokens = torch.empty(0)
    for _, tokens in _steps(model, condition, sampling or Sampling(), negative, seed, indices, known, session):  # noqa: B007
        pass
    return model.in_raster(tokens)


@checked
def generate_fronts(
    model: Transformer,
    condition: AnyCondition,
    sampling: Sampling | None = None,
    *,
    negative: AnyCondition | None = None,
    seed: int | Sequence[int] = 0,
    indices: Sequence[int] | None = None,
    known: Tensor | None = None,
    session: Session | None = None,
) -> Iterator[Front]:
    """Sample codes front by front; yields after each.

    Args:
        negative: the condition that guidance leads away from; by default the null condition.
        seed, indices: sample i of the batch has the random numbers of the stream (seed, indices[i]), by default
            (seed, i); with a list of seeds those of (seed[i], indices[i]).
        known: codes (B, *grid), -1 where free; the others are kept as given. Only later fronts take note of them: about
            half of what surrounds a hole in the middle is not seen.
        session: memory and graphs to use again; by default those of this call alone.

    Raises:
        ValueError: guidance without a null condition, `known` of another grid or with codes that the model does not
            have, a condition that it does not take, a seed beyond 2**64 - 1, or weights that give no numbers.
    """
    for front, tokens in _steps(model, condition, sampling or Sampling(), negative, seed, indices, known, session):
        yield Front(front, model.in_raster(tokens))


class Session:
    """What generations of one model need besides its weights, made once and used again by calls of the same shape.

    Holds the caches of the last few shapes and, on CUDA, the graphs recorded for them. One generation at a time.

    Args:
        graphs: whether to record CUDA graphs, one a front; None does so on CUDA. A shape is recorded when it comes for
            the first time, which takes about two generations.
        compiled: compile the feed-forward layers in place (`torch.compile`) at the first generation. Attention is left
            as it is: its cache has another length at every front, and each would be compiled anew.
        num_kept: shapes, and recorded settings of each, that are kept; the ones used longest ago go first.
    """

    def __init__(
        self, model: Transformer, *, graphs: bool | None = None, compiled: bool = False, num_kept: int = 2
    ) -> None:
        self.model = model
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        if self.graphs and model.device.type != "cuda":
            raise ValueError(f"graphs need a model on cuda, this one is on {model.device.type}")
        self.num_kept = num_kept
        self.serial = 0  # of the latest generation
        self._buffers: OrderedDict[tuple[int, int, bool], _Buffers] = OrderedDict()
        if compiled and any(isinstance(module, PackedLinear) for module in model.modules()):
            raise ValueError("compiled is for GPUs: on a CPU weights are packed for kernels that no compiler improves")
        if compiled:
            for block in model.blocks:
                cast(Block, block).feed_forward.compile(dynamic=True)

    def buffers(self, batch: int, rows: int, masked: bool) -> _Buffers:
        """The tensors for `batch` pictures in `rows` rows (twice as many when guided)."""
        key = (batch, rows, masked)
        return _recent(self._buffers, key, lambda: _Buffers(self.model, *key), self.num_kept)

    def stepper(self, buffers: _Buffers, sampling: Sampling) -> Callable[[int], None]:
        """What samples front number x into the filled buffers: a recorded graph, or the step itself."""
        if self.graphs:
            try:
                graphs = _recent(
                    buffers.graphs, sampling, lambda: _record(self.model, buffers, sampling), self.num_kept
                )
                return lambda front: graphs[front].replay()
            except RuntimeError as error:
                advice = (
                    "a smaller batch leaves room" if isinstance(error, torch.OutOfMemoryError) else "please report it"
                )
                warnings.warn(f"no CUDA graphs, going on without, which is slower ({advice}): {error}", stacklevel=2)
                self.graphs = False
        return lambda front: step(self.model, buffers, sampling, front)


class _Buffers:
    """The tensors of one shape of generation, at addresses that stay."""

    def __init__(self, model: Transformer, batch: int, rows: int, masked: bool) -> None:
        config, count = model.config, model.layout.schedule.num_positions
        self.cache = model.new_cache(rows)
        self.embedded = torch.zeros(rows, config.num_condition, config.dim, device=model.device, dtype=model.dtype)
        self.key_mask = (
            torch.ones(rows, config.num_condition, dtype=torch.bool, device=model.device) if masked else None
        )
        self.streams = torch.zeros(batch, count, device=model.device)
        self.known = torch.full((batch, count), -1, device=model.device)
        self.tokens = torch.full((batch, count), -1, device=model.device)
        self.graphs: OrderedDict[Sampling, list[torch.cuda.CUDAGraph]] = OrderedDict()


def step(model: Transformer, buffers: _Buffers, sampling: Sampling, front: int) -> None:
    """Sample one front into `buffers.tokens`. Reads nothing back to the host: a CUDA graph can hold it."""
    schedule, cache, tokens = model.layout.schedule, buffers.cache, buffers.tokens
    batch, positions = len(tokens), schedule.front(front)
    if front == 0:
        hidden = model.prefill(buffers.embedded, buffers.key_mask, cache)
    else:
        if cache.batch_size > batch and front > last_guided(sampling, schedule):
            cache.keep(batch)
        earlier = tokens[:, : positions.start].clamp_min(0)  # -1 stands for logits that are no numbers
        earlier = torch.cat([earlier, earlier]) if cache.batch_size > batch else earlier
        hidden = model.decode(earlier, range(front - 1, front), cache)
    if cache.batch_size > batch:
        scale = sampling.guidance_at(front, schedule)
        hidden = hidden[:batch] if scale == 1.0 else hidden[batch:].lerp(hidden[:batch], scale)
    numbers, given = buffers.streams[:, positions], buffers.known[:, positions]
    sampled = sample_rows(model.logits(hidden).flatten(0, 1), numbers.flatten(), sampling)
    tokens[:, positions] = torch.where(given >= 0, given, sampled.view_as(given))


def _record(model: Transformer, buffers: _Buffers, sampling: Sampling) -> list[torch.cuda.CUDAGraph]:
    """One graph a front, which share their memory; replaying all in order is one generation.

    Raises:
        RuntimeError: out of memory, or the graphs do not sample what the steps do.
    """
    fronts = range(model.layout.schedule.num_steps)
    graphs: list[torch.cuda.CUDAGraph] = []
    with torch.cuda.device(model.device):  # another one may be current
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels and workspaces now, outside of the graphs
            for front in fronts:
                step(model, buffers, sampling, front)
        side.synchronize()
        expected = buffers.tokens.clone()
        for front in fronts:
            graph = torch.cuda.CUDAGraph()
            # Other threads, of a server say, may use the GPU meanwhile.
            pool = graphs[0].pool() if graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                step(model, buffers, sampling, front)
            graphs.append(graph)
        buffers.tokens.fill_(-1)
        for graph in graphs:
            graph.replay()
        if not torch.equal(buffers.tokens, expected):
            raise RuntimeError("the recorded graphs sample other tokens than the steps that they were recorded from")
    return graphs


@torch.inference_mode()
def _steps(
    model: Transformer,
    condition: AnyCondition,
    sampling: Sampling,
    negative: AnyCondition | None,
    seed: int | Sequence[int],
    indices: Sequence[int] | None,
    known: Tensor | None,
    session: Session | None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of each front and the tokens (B, N) so far, which the next step overwrites."""
    session = session or Session(model, graphs=False)
    if session.model is not model:
        raise ValueError("this session belongs to another model")
    schedule = model.layout.schedule
    condition = Condition.of(condition)
    batch, negative = len(condition), None if negative is None else Condition.of(negative)
    for name, rows in (("indices", indices), ("negative", negative), ("known", known)):
        if rows is not None and (count := 0 if getattr(rows, "ndim", 1) == 0 else len(rows)) != batch:
            raise ValueError(f"{name} has {count} rows for a batch of {batch}")
    check_known(model, known)
    guided = last_guided(sampling, schedule) >= 0
    embedded, key_mask = embed_sides(model, condition, negative) if guided else model.embed(condition)
    buffers = session.buffers(batch, len(embedded), key_mask is not None)
    buffers.embedded.copy_(embedded)
    if buffers.key_mask is not None and key_mask is not None:
        buffers.key_mask.copy_(key_mask)
    buffers.streams.copy_(uniforms(seed, range(batch) if indices is None else indices, schedule.num_positions))
    buffers.known.fill_(-1) if known is None else buffers.known.copy_(model.in_order(known.to(model.device)))
    advance = session.stepper(buffers, sampling)
    buffers.tokens.fill_(-1)
    session.serial = serial = session.serial + 1
    for front in range(schedule.num_steps):
        if session.serial != serial:
            raise RuntimeError("this session has begun another generation; use one session for each at a time")
        advance(front)
        # On CUDA a look at values waits for all that was begun: one, at the end.
        looks = model.device.type == "cpu" or front == schedule.num_steps - 1
        if looks and bool((buffers.tokens[:, : schedule.front(front).stop] < 0).any()):
            raise no_numbers(model)
        yield front, buffers.tokens


def check_known(model: Transformer, known: Tensor | None) -> None:
    """Raise ValueError for codes to keep that the model does not have."""
    if known is not None and not holds_whole_numbers(known):
        raise ValueError(f"known must be whole numbers, not {known.dtype}")
    if known is not None and (wrong := known[(known < -1) | (known >= model.config.vocab_size)]).numel():
        raise ValueError(f"known holds {int(wrong[0])}; codes are 0 to {model.config.vocab_size - 1} and -1 where free")


def no_numbers(model: Transformer) -> ValueError:
    """The error for logits that are no distribution."""
    return ValueError(
        "the model's logits are NaN or infinite: its weights are damaged, or overflow in "
        f"{str(model.dtype).removeprefix('torch.')}; copy the model again, or use dtype float32 or bfloat16"
    )


def embed_sides(model: Transformer, condition: Condition, negative: Condition | None) -> tuple[Tensor, Tensor | None]:
    """Embed a condition and, behind it, what guidance leads away from: (2 * B, C, d), with a mask as of `embed`."""
    embedded, key_mask = model.embed(condition)
    other, other_mask = model.embed(_null(model, condition) if negative is None else negative)
    if key_mask is not None or other_mask is not None:
        seen = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        key_mask = torch.cat([seen if mask is None else mask for mask in (key_mask, other_mask)])
    return torch.cat([embedded, other]), key_mask


def _recent(kept: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], num_kept: int) -> Value:
    """The value of `key`, made when it is new; the one used longest ago goes when there are more than `num_kept`."""
    if key not in kept:
        while len(kept) >= num_kept:
            kept.popitem(last=False)
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]


def sample_rows(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """`sample` for rows (R, V) and (R,), some at a time so that memory is bounded."""
    rows = max(1, (MOST_LOGITS_CPU if logits.device.type == "cpu" else MOST_LOGITS) // logits.shape[1])
    sampled = [
        sample(part, number, sampling.temperature, sampling.top_k, sampling.top_p)
        for part, number in zip(logits.split(rows), uniform.split(rows), strict=True)
    ]
    return torch.cat(sampled)


def sample(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token (...) of each distribution of `logits` (..., V), by inverse CDF at `uniform` (...) in [0, 1).

    It has a probability above zero. Logits that are no distribution, NaN or infinite, give -1.
    """
    if temperature == 0 or top_k == 1:
        token = logits.argmax(-1)
        return token.masked_fill(~logits.gather(-1, token[..., None]).squeeze(-1).isfinite(), -1)
    shares = probabilities(logits, temperature, top_k, top_p)
    cumulative = shares.cumsum(-1)
    total = cumulative[..., -1]
    # Below the total even after rounding, so that the token found is one of the V.
    threshold = uniform.clamp(max=1 - 2**-23) * total
    token = torch.searchsorted(cumulative, threshold[..., None], right=True)
    if logits.device.type not in SEQUENTIAL_SUMS:
        # A sum in parts rounds otherwise at every place, and may rise at a token that a filter took out.
        token = token.clamp_max(logits.shape[-1] - 1)
        token = torch.where(shares.gather(-1, token) > 0, token, shares.argmax(-1, keepdim=True))
    return token.squeeze(-1).masked_fill(~total.isfinite(), -1)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution (..., V) in float32 after temperature, then top-k (ties kept), then top-p."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / max(temperature, SMALLEST_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        share = ordered.softmax(-1)
        outside = share.cumsum(-1) - share > top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -math.inf)
    return logits.softmax(-1)


def uniforms(seed: int | Sequence[int], indices: Sequence[int], count: int) -> Tensor:
    """(len(indices), count) float32 numbers in [0, 1): row i comes from the stream (seed, indices[i]) alone, or with a
    list of seeds from (seed[i], indices[i]).

    Raises:
        ValueError: a seed that is not a whole number from 0 to 2**64 - 1, or another number of them.
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(indices)
    if wrong := [value for value in seeds if not isinstance(value, Integral) or not 0 <= value < NUM_SEEDS]:
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, not {wrong[0]!r}")
    if wrong := [index for index in indices if not isinstance(index, Integral) or index < 0]:
        raise ValueError(f"an index must be a whole number of at least 0, not {str(wrong[0])[:80]}")
    if len(seeds) != len(indices):
        raise ValueError(f"{len(seeds)} seeds for {len(indices)} samples: give one number, or one for each")
    streams = [_stream(value, index) for value, index in zip(seeds, indices, strict=True)]
    rows = [np.random.default_rng(stream).random(count, dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count)


def _stream(seed: int, index: int) -> np.random.SeedSequence:
    """What numpy makes a generator of. It cuts numbers into words of 32 bits and fills up with zeros, so that (2**32 +
    5, 0) would be (5, 1): larger seeds fill all four words, and the index comes behind them."""
    return np.random.SeedSequence((seed, index)) if seed < 2**32 else np.random.SeedSequence(seed, spawn_key=(index,))


def last_guided(sampling: Sampling, schedule: Schedule) -> int:
    """The last front whose guidance is not 1.0 and within the interval; -1 when there is none: up to it the
    unconditional half is fed, also at fronts of scale 1.0 before, since later fronts see what those fed."""
    end = math.inf if sampling.guidance_interval is None else sampling.guidance_interval
    guided = [
        front
        for front in range(schedule.num_steps)
        if sampling.guidance_at(front, schedule) != 1.0 and (front == 0 or schedule.front(front).start <= end)
    ]
    return guided[-1] if guided else -1


def _null(model: Transformer, condition: Condition) -> Condition:
    config = model.config
    if config.num_classes and not config.null_class:
        raise ValueError("guidance_scale must be 1.0: this model has no null class to lead away from")
    if not config.num_classes and not config.text_dim:
        raise ValueError(
            "guidance_scale must be 1.0: this model's only condition is given frames, which can't be left out"
        )
    return condition.drop(torch.ones(len(condition), dtype=torch.bool, device=condition.device))
