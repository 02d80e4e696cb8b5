"""The transformer: condition and tokens in, one logit vector per position out.

Tokens stay in generation order inside; the `Schedule` says who sees whom and which prediction each position reads.
Knows codes and conditions; does not know pixels, prompts, sampling or training. Legend: `B` batch, `N` grid positions,
`C` condition tokens, `S` slots fed, `d` dim, `H` prediction heads, `V` vocab_size.

The blocks run as one chain. Head k reads the stream after its own extra blocks, which continue where head k-1's ended
(paper, section 3.3): with `head_depths` (0, 1) the first head reads the end of the trunk, the second one block later.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nar.attention import (
    Block,
    Cache,
    ModulatedBlock,
    Modulation,
    Packed,
    RMSNorm,
    flex_takes,
    modulated,
    rotations,
    sinusoids,
)
from nar.condition import AnyCondition, Condition, PrefixCodes, TextFeatures
from nar.order import MOST_POSITIONS, Schedule, build
from nar.precision import PackedLinear, fill
from nar.scales import ScaleSums
from nar.storage.fields import Length, OneOf, Positive, Range, Share, Size, check, checked, from_dict
from nar.storage.folder import Floating, Weights, check_shapes, find_model, read_config, without_weights, write_folder

SMALLEST_FLEX = 256  # positions; no block of 128x128 is empty up to here


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a transformer. Conditions are those whose size is not zero, in the order class, text, prefix.

    Holds what was written; `complete` gives sizes that were left open their values, which may depend on the grid.

    Attributes:
        grid: codes per axis, (height, width) or (frames, height, width).
        schedule: "manhattan" (NAR), "raster", "par" with its `regions`, or "scales" (VAR) of these sides: the grid is
            the number of all their codes, which are fed as sums of their vectors of `code_dim`, the tokenizer's.
        vocab_size: codes; that of the tokenizer.
        dim, num_layers, num_heads: width, blocks (the heads' own ones aside), attention heads.
        regions, scales, code_dim: of `schedule`.
        hidden_dim: of the feed-forward layers; 0 takes 8/3 of `dim`, rounded up to a multiple of 256.
        head_depths: extra blocks in front of each prediction head, chained; default one for each head but the first.
        axis_heads: for each row of the schedule's predictions (width first), the head that serves it; several may share
            one.
        gate: where several rows predict a token, their shares come from a small network that reads them (the fusion
            gate of FlashAR, arXiv 2605.09430), and begin as equal ones; without it they are equal.
        positions: "rope", "learned" (one embedding a position), "sincos" (the same, fixed), or "levels" (learned, and
            one more for each front).
        modulation: the class scales, shifts and gates each block, by a layer of its "own" or a "shared" one, as in VAR
            (biases, gelu, layer norms without weights); "none": a plain block.
        unit_keys: queries and keys of modulated blocks have length 1, and each head a learned factor; else that is a
            quarter of the usual one.
        rope_base, norm_eps: of rotary positions, and of norms.
        num_classes: those of the data.
        null_class: whether there is a class embedding for "no class", which guidance needs.
        text_dim, text_length: width and number of text features.
        prefix_grid: grid of the codes that come before, those of context frames; a separator follows them.
        prefix_holes: codes of a prefix that are not there are "hidden", no token sees them; or each is a learned
            "token", whose place attention sees, and the codes that are there have a learned role: for edits.
        condition_rotation: "zero" makes all tokens see plain averages of the condition (published image weights);
            "identity" lets attention choose, and gives the codes of a prefix the rotations of their places.
        prefix_attention: whether condition tokens see earlier ones ("causal") or all ("full").
        null_mask: padding of a dropped caption: that of the "caption" (published), or its "own", none.
    """

    grid: tuple[Size, ...] = (16, 16)
    vocab_size: Annotated[int, Range(1, 2**31)] = 16384
    dim: Size = 768
    num_layers: Size = 12
    num_heads: Size = 12
    hidden_dim: Length = 0
    schedule: str = "manhattan"
    regions: tuple[Size, ...] = ()
    scales: tuple[Size, ...] = ()
    code_dim: Length = 0
    head_depths: tuple[Length, ...] = ()
    axis_heads: tuple[Length, ...] = ()
    gate: bool = False
    positions: Annotated[str, OneOf("rope", "learned", "sincos", "levels")] = "rope"
    rope_base: Positive = 10000.0
    norm_eps: Positive = 1e-5
    num_classes: Length = 0
    null_class: bool = True
    text_dim: Length = 0
    text_length: Length = 120
    prefix_grid: tuple[Size, ...] = ()
    prefix_holes: Annotated[str, OneOf("hidden", "token")] = "hidden"
    condition_rotation: Annotated[str, OneOf("zero", "identity")] = "identity"
    prefix_attention: Annotated[str, OneOf("causal", "full")] = "causal"
    null_mask: Annotated[str, OneOf("caption", "own")] = "own"
    modulation: Annotated[str, OneOf("none", "own", "shared")] = "none"
    unit_keys: bool = False

    def __post_init__(self) -> None:
        check(self)
        if math.prod(self.prefix_grid) > MOST_POSITIONS:
            raise ValueError(f"prefix_grid {self.prefix_grid} must have at most {MOST_POSITIONS:,} codes")
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(f"dim {self.dim} must be num_heads {self.num_heads} times an even head size")
        if not (self.num_classes or self.text_dim or self.prefix_grid):
            raise ValueError("a model needs a condition: set num_classes, text_dim or prefix_grid")
        if bool(self.scales) != (self.schedule == "scales") or bool(self.scales) != bool(self.code_dim):
            raise ValueError(
                f"schedule {self.schedule} with scales {list(self.scales)} and code_dim {self.code_dim}: "
                "schedule scales needs both, others neither"
            )
        if self.prefix_holes == "token" and not self.prefix_grid:
            raise ValueError("prefix_holes token is of a prefix: set prefix_grid, or leave it out")
        if self.scales and (self.positions == "rope" or self.prefix_grid):
            raise ValueError("schedule scales needs positions learned, sincos or levels, and has no prefix_grid")
        if self.modulation != "none" and self.num_condition != 1:
            raise ValueError("modulation is by the class: set num_classes, and neither text_dim nor prefix_grid")
        if self.unit_keys and self.modulation == "none":
            raise ValueError("unit_keys is of modulated blocks: set modulation to own or shared")
        rows, (heads, depths) = self.order().num_rows, self._heads
        if len(heads) != rows or set(heads) != set(range(len(depths))):
            raise ValueError(
                f"axis_heads {heads} must name one of the {len(depths)} heads of head_depths "
                f"for each of the {rows} rows of {self.schedule}, and leave none out"
            )
        if self.gate and rows == 1:
            raise ValueError(f"gate weighs rows of predictions, and {self.schedule} has one: set it to false")

    def complete(self) -> ModelConfig:
        """The same with every size written out, as a model and its `config.json` have it."""
        hidden_dim, (heads, depths) = self.hidden_dim or 256 * math.ceil(int(8 * self.dim / 3) / 256), self._heads
        return dataclasses.replace(self, hidden_dim=hidden_dim, head_depths=depths, axis_heads=heads)

    def order(self) -> Schedule:
        """The schedule that is named."""
        return build(self.schedule, self.grid, self.regions, self.scales)

    @property
    def _heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`axis_heads` and `head_depths`: by default each row has a head, and each but the first a block."""
        heads = self.axis_heads or tuple(range(self.order().num_rows))
        return heads, self.head_depths or (0,) + (1,) * max(heads)

    @property
    def num_condition(self) -> int:
        """Condition tokens, C."""
        prefix = math.prod(self.prefix_grid) + 1 if self.prefix_grid else 0
        return (1 if self.num_classes else 0) + (self.text_length if self.text_dim else 0) + prefix

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole chain, the heads' extra ones included."""
        return self.num_layers + sum(self._heads[1])


@dataclass(frozen=True)
class Dropout:
    """Rates of training-time dropout: of embedding elements, of branch elements, of whole branches at the last
    block.

    Attributes:
        token: of elements of embeddings.
        residual: of elements of branches.
        path: of whole branches, at the last block; it rises from 0 at the first.
    """

    token: Share = 0.0
    residual: Share = 0.0
    path: Share = 0.0

    def __post_init__(self) -> None:
        check(self, "dropout.")


@dataclass(frozen=True, eq=False)
class Layout:
    """What the schedule means for tensors, on the model's device and always in float32 or int64."""

    schedule: Schedule
    order: Tensor  # (N,)
    source: Tensor  # (A, N)
    weight: Tensor  # (A, N)
    slots: Tensor  # (S,)
    levels: Tensor  # (S,)
    rows: Tensor  # (C + S,) row of the position table that each sequence position takes
    phases: Tensor | None  # (C + S, P, 2)
    table: Tensor | None  # (C + N, d), for fixed position embeddings
    front_rows: Tensor  # (C + S,) the front that each sequence position comes before, for embeddings of levels

    @classmethod
    def of(cls, config: ModelConfig, row: int | None = None) -> Layout:
        schedule = config.order() if row is None else config.order().decided_by(row)
        count = config.num_condition
        phases = table = None
        if config.positions == "rope":
            head_dim = config.dim // config.num_heads
            tokens = rotations(schedule.coordinates(schedule.places), head_dim, config.rope_base)
            condition = torch.zeros(count, head_dim // 2, 2)
            condition[..., 0] = 1.0 if config.condition_rotation == "identity" else 0.0
            if config.prefix_grid and config.condition_rotation == "identity":  # their codes have places, too
                prefix = build("raster", config.prefix_grid)
                places = rotations(prefix.coordinates(prefix.places), head_dim, config.rope_base)
                condition[count - 1 - len(places) : count - 1] = places
            phases = torch.cat([condition, tokens])
        elif config.positions == "sincos":
            table = sinusoids(torch.arange(count + schedule.num_positions), config.dim).float()
        rows = torch.cat([torch.arange(count), count + schedule.places])
        names = {name: getattr(schedule, name) for name in ("order", "source", "weight", "slots")}
        levels = schedule.slot_levels()
        front_rows = F.pad((levels + 1).clamp_max(schedule.num_steps - 1), (count, 0))  # none follows the last one
        return cls(schedule, **names, levels=levels, rows=rows, phases=phases, table=table, front_rows=front_rows)

    def to(self, device: torch.device) -> Layout:
        tensors: dict[str, Any] = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **{key: value.to(device) for key, value in tensors.items()})


class Feed(NamedTuple):
    """What a cache is fed at once: embedded slots (B, S, d) from `first_slot` on, what they see, and the positions that
    they predict. `average`: with phases of zero."""

    x: Tensor
    mask: Tensor | None
    cache: Cache
    positions: slice
    first_slot: int
    average: bool = False


class Transformer(nn.Module):
    """A neighboring autoregressive transformer, or with another schedule its raster and PAR relatives."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config = config.complete()
        self.row: int | None = None  # of predictions, that decides alone; see `decided_by`
        with torch.device("cpu"):  # also when the parameters are made on the meta device
            self.layout = Layout.of(config)
        dim, num_heads = config.dim, len(config.head_depths)
        self.tokens = nn.Linear(config.code_dim, dim) if config.scales else nn.Embedding(config.vocab_size, dim)
        if config.scales:
            self.sums = ScaleSums(config.scales, config.vocab_size, config.code_dim, learned=False)
        if config.num_classes:
            self.classes = nn.Embedding(config.num_classes + config.null_class, dim)
        if config.text_dim:
            self.text = nn.Sequential(
                nn.Linear(config.text_dim, dim, bias=False),
                nn.GELU(approximate="tanh"),
                nn.Linear(dim, dim, bias=False),
            )
            self.register_buffer("null_text", torch.empty(config.text_length, config.text_dim))
        if config.prefix_grid:
            self.separator = nn.Parameter(torch.empty(dim))
        if config.prefix_holes == "token":
            self.hole, self.role = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        if self.layout.schedule.num_special:
            self.special = nn.Parameter(torch.empty(self.layout.schedule.num_special, dim))
        if config.positions == "levels":
            self.levels = nn.Parameter(torch.empty(self.layout.schedule.num_steps, dim))
        if config.positions in ("learned", "levels"):
            self.positions = nn.Parameter(torch.empty(config.num_condition + self.layout.schedule.num_positions, dim))
        plain = config.modulation == "none"
        if not plain:
            self.modulation = Modulation(dim, config.num_blocks, shared=config.modulation == "shared")
            self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        sizes = (dim, config.num_heads, config.hidden_dim, config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(*sizes) if plain else ModulatedBlock(*sizes, unit_keys=config.unit_keys)
            for _ in range(config.num_blocks)
        )
        self.head_norms = nn.ModuleList(RMSNorm(dim, config.norm_eps) for _ in range(num_heads if plain else 0))
        if config.gate:
            rows, width = len(config.axis_heads), max(64, dim // 8)
            self.gate = nn.Sequential(nn.Linear(rows * dim, width), nn.SiLU(), nn.Linear(width, rows))
        self.output = nn.Linear(num_heads * dim, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Weights and embeddings N(0, 0.02), norms 1, the output and biases 0: the first loss is ln V; null words of
        length 1, and gates of modulated blocks almost closed."""
        for name, parameter in self.named_parameters():
            if not name.endswith(("norm.weight", "bias", "log_scale")) and not name.startswith("head_norms"):
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)
        if self.config.gate:
            for name, parameter in self.gate.named_parameters():
                if name != "0.weight":
                    nn.init.zeros_(parameter)
        if self.config.prefix_holes == "token":
            nn.init.zeros_(self.role)
        if self.config.text_dim:
            nn.init.normal_(cast(Tensor, self.null_text), std=self.config.text_dim**-0.5)

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device.type != "meta":
            self.layout = self.layout.to(self.device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the computation."""
        return self.tokens.weight.dtype

    @property
    def token_vectors(self) -> Tensor:
        """(V, width) what stands for each token in what the model is fed."""
        return self.sums.codebook if self.config.scales else self.tokens.weight

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of cached keys and values: half of the memory beside weights of 16 or 8 bits, whose rounding is no finer."""
        layer = cast(Block, self.blocks[0]).attention.qkv
        smaller = isinstance(layer, PackedLinear) and layer.precision in ("float16", "int8")
        return torch.float16 if smaller else self.dtype

    def forward(self, codes: Tensor, condition: AnyCondition, *, dropout: Dropout | None = None) -> Tensor:
        """Logits (B, *grid, V) in float32 for every position of `codes` (B, *grid), each seeing only earlier fronts."""
        self.check_codes(codes)
        logits = self.logits(self.hidden(codes, condition, dropout=dropout))
        raster = torch.empty_like(logits)
        raster[:, self.layout.order] = logits
        return raster.view(len(raster), *self.config.grid, -1)

    def hidden(
        self, codes: Tensor, condition: AnyCondition, *, dropout: Dropout | None = None, flex: bool | None = None
    ) -> Tensor:
        """What the vocabulary projection reads, (B, N, H * d) in generation order; see `logits`.

        `flex` takes FlexAttention, which skips the blocks of keys that no query of a block sees; None takes it on CUDA
        where there are blocks to skip and its kernels take the size of the heads.
        """
        rates = Dropout() if dropout is None else dropout
        if not isinstance(rates, Dropout):
            raise ValueError(f"dropout must be a nar.model.Dropout, not {type(dropout).__name__}")
        tokens = self.in_order(codes)
        embedded, key_mask = self.embed(condition)
        if len(tokens) != len(embedded):
            raise ValueError(f"{len(tokens)} samples of codes with {len(embedded)} conditions")
        schedule = self.layout.schedule
        # The last front is seen by nobody and predicts nothing: it is not fed.
        x = torch.cat([embedded, self._embed_slots(tokens, range(schedule.num_steps - 1))], 1)  # (B, C + S, d)
        x = self._add_positions(F.dropout(x, rates.token) if rates.token else x, 0)
        if flex is None:
            wide = flex_takes(self.config.dim // self.config.num_heads)
            flex = x.device.type == "cuda" and x.shape[1] > SMALLEST_FLEX and wide
        mask = self.block_mask(x.shape[1], key_mask) if flex else self._mask(x.shape[1], key_mask)
        modulations = self._modulations(embedded)
        states = self._chain(x, self._phases(0, x.shape[1]), mask, modulations, dropout=rates)
        first = self.config.num_condition - 1
        states = [state[:, first:] for state in states]
        return self.readout(states, self.layout.source, self.layout.weight, modulations)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., H * d), heads and guidance in them, to float32 logits (..., V): all is linear."""
        logits = cast(Tensor, self.output(hidden)).float()
        return logits if self.config.modulation == "none" else logits + self.output_bias.float()

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError for what are no codes of this model. It reads them: not for every step on a GPU."""
        size = self.config.vocab_size
        found = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        if found not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(f"codes must be a tensor of whole numbers (B, {str(self.config.grid)[1:-1]}), not {found}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes run from {int(codes.min())} to {int(codes.max())}, this model has 0..{size - 1}")

    def in_order(self, codes: Tensor) -> Tensor:
        """Codes (B, *grid) to tokens (B, N) in generation order; raises ValueError when the grid is another one."""
        grid, found = self.config.grid, tuple(codes.shape[1:])
        if found != grid:
            tokens = f"grid {grid} has {math.prod(grid)} tokens"
            raise ValueError(f"{tokens} but the codes are {found}; were they extracted at another size?")
        return codes.flatten(1)[:, self.layout.order]

    def in_raster(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) in generation order to codes (B, *grid)."""
        codes = torch.empty_like(tokens)
        codes[:, self.layout.order] = tokens
        return codes.view(len(codes), *self.config.grid)

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for one whole generation."""
        config = self.config
        schedule = self.layout.schedule
        length = config.num_condition + schedule.fed(schedule.num_steps - 1).start  # the last front is not fed
        sizes = (config.num_blocks, batch_size, config.num_heads, length, config.dim // config.num_heads)
        return Cache(*sizes, device=self.device, dtype=self.cache_dtype)

    def prefill(self, embedded: Tensor, key_mask: Tensor | None, cache: Cache) -> Tensor:
        """Feed an embedded condition to an emptied `cache`; returns the hidden states (B, n, H * d) of front 0."""
        return self.run([self.condition_feed(embedded, key_mask, cache)])[0]

    def decode(self, tokens: Tensor, fronts: range, cache: Cache) -> Tensor:
        """Feed consecutive `fronts`, given all tokens (B, n) in generation order up to their end.

        Returns the hidden states (B, m, H * d) of the positions that they predict: fronts first + 1 to last + 1.
        """
        return self.run([self.fronts_feed(tokens, fronts, cache)])[0]

    def condition_feed(self, embedded: Tensor, key_mask: Tensor | None, cache: Cache) -> Feed:
        """What `prefill` runs."""
        cache.reset()
        cache.key_mask, cache.modulations = key_mask, self._modulations(embedded)
        mask = self._mask(embedded.shape[1], key_mask)
        average = self.layout.phases is not None and self.config.condition_rotation == "zero"
        positions, first = self.layout.schedule.front(0), 1 - embedded.shape[1]
        return Feed(self._add_positions(embedded, 0), mask, cache, positions, first, average)

    def fronts_feed(self, tokens: Tensor, fronts: range, cache: Cache) -> Feed:
        """What `decode` runs."""
        schedule, count = self.layout.schedule, self.config.num_condition
        slots = slice(schedule.fed(fronts[0]).start, schedule.fed(fronts[-1]).stop)
        if cache.length != count + slots.start:
            needed = f"fed after {count + slots.start} positions"
            raise ValueError(f"front {fronts[0]} must be {needed}, the cache holds {cache.length}")
        x = self._add_positions(self._embed_slots(tokens, fronts), cache.length)
        mask = None
        if len(fronts) > 1:
            levels = self.layout.levels[slots]
            mask = F.pad(levels[:, None] >= levels, (cache.length, 0), value=True)[None, None]
        if cache.key_mask is not None:
            words = F.pad(cache.key_mask, (0, cache.length + x.shape[1] - count), value=True)[:, None, None]
            mask = words if mask is None else words & mask
        positions = slice(schedule.front(fronts[0] + 1).start, schedule.front(fronts[-1] + 1).stop)
        return Feed(x, mask, cache, positions, slots.start + 1)

    def run(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Feed several caches at once; returns the hidden states (B, n, H * d) of the positions that each predicts.

        Linear layers multiply the rows of all together, so that weights are read once; each attends to its own cache.
        Averages and modulated models, whose layers take rows by their batch, are run one by one.
        """
        if len(feeds) > 1 and self.config.modulation == "none" and not any(feed.average for feed in feeds):
            return self._run_packed(feeds)
        hidden = []
        for x, mask, cache, positions, first_slot, average in feeds:
            phases, modulations = self._phases(cache.length, x.shape[1]), cache.modulations
            states = self._chain(x, phases, mask, modulations, cache, average=average)
            cache.commit(x.shape[1])
            source, weight = self.layout.source[:, positions] - first_slot, self.layout.weight[:, positions]
            hidden.append(self.readout(states, source.clamp_min(0), weight, modulations))
        return hidden

    def _run_packed(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """`run` on rows (1, M, d) of all."""
        phases, sources, weights, start = [], [], [], 0
        for x, _, cache, positions, first_slot, _ in feeds:
            batch, length = x.shape[:2]
            if (own := self._phases(cache.length, length)) is not None:
                phases.append(own.repeat(batch, 1, 1))
            rows = start + length * torch.arange(batch, device=x.device)[:, None]
            source = (self.layout.source[:, positions] - first_slot).clamp_min(0)
            sources.append((source[:, None] + rows).flatten(1))
            weights.append(self.layout.weight[:, positions].repeat(1, batch))
            start += batch * length
        caches = [feed.cache for feed in feeds]
        lengths = [feed.x.shape[1] for feed in feeds]
        packed = Packed(caches, lengths, [feed.mask for feed in feeds])
        x = torch.cat([feed.x.flatten(0, 1) for feed in feeds])[None]
        states = self._chain(x, torch.cat(phases) if phases else None, None, [], packed)
        for cache, length in zip(caches, lengths, strict=True):
            cache.commit(length)
        hidden = self.readout(states, torch.cat(sources, 1), torch.cat(weights, 1), [])[0]
        parts = hidden.split([own.shape[1] for own in sources])
        return [part.unflatten(0, (cache.batch_size, -1)) for part, cache in zip(parts, caches, strict=True)]

    def embed(self, condition: AnyCondition) -> tuple[Tensor, Tensor | None]:
        """Embed a condition: (B, C, d), and the mask (B, C) of tokens that are not padding, None when there is none."""
        config, condition = self.config, Condition.of(condition)
        sizes = {"labels": config.num_classes, "text": config.text_dim, "prefix": config.prefix_grid}
        expected = tuple(kind for kind, size in sizes.items() if size)
        if condition.kinds != expected:
            raise ValueError(f"this model's condition is {' and '.join(expected)}, not {' and '.join(condition.kinds)}")
        pieces: list[tuple[Tensor, Tensor | None]] = []
        if condition.labels is not None:
            pieces.append((self._embed_labels(condition.labels), None))
        if condition.text is not None:
            pieces.append(self._embed_text(condition.text))
        if condition.prefix is not None:
            pieces.append(self._embed_prefix(condition.prefix))
        embedded = torch.cat([piece for piece, _ in pieces], 1)
        if all(mask is None for _, mask in pieces):
            return embedded, None
        masks = [piece.new_ones(piece.shape[:2], dtype=torch.bool) if mask is None else mask for piece, mask in pieces]
        return embedded, torch.cat(masks, 1)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ValueError for class labels (B,) that the model does not have.

        To be called before they are moved to a GPU: there a look at them would wait, and a wrong one ends the process.
        """
        if labels.ndim != 1:
            raise ValueError(f"class labels must be (batch,), not {tuple(labels.shape)}")
        low, high = (int(end) for end in labels.aminmax()) if len(labels) else (0, -1)
        if high >= self.config.num_classes:
            raise ValueError(f"class label {high} is not one of 0..{self.config.num_classes - 1}")
        if low < 0 and not self.config.null_class:
            raise ValueError("this model has no null class: it can't be guided or sampled without a class")

    def _embed_labels(self, labels: Tensor) -> Tensor:
        if labels.device.type == "cpu":
            self.check_labels(labels)
        labels = labels.to(self.device)
        return cast(Tensor, self.classes(torch.where(labels < 0, self.config.num_classes, labels)))[:, None]

    def _embed_text(self, text: TextFeatures) -> tuple[Tensor, Tensor]:
        config = self.config
        if text.features.shape[1:] != (config.text_length, config.text_dim):
            raise ValueError(
                f"text features are {tuple(text.features.shape[1:])}, the model takes ({config.text_length}, "
                f"{config.text_dim}); pad the captions, or use the text encoder that the model was trained with"
            )
        features, mask = text.features.to(self.device, self.dtype), text.mask.to(self.device)
        if text.null is not None:
            null = text.null.to(self.device)
            features = torch.where(null[:, None, None], cast(Tensor, self.null_text).to(features.dtype), features)
            if config.null_mask == "own":
                mask = mask | null[:, None]
        return self.text(features), mask

    def _embed_prefix(self, prefix: PrefixCodes) -> tuple[Tensor, Tensor | None]:
        if prefix.codes.shape[1:] != self.config.prefix_grid:
            found = tuple(prefix.codes.shape[1:])
            raise ValueError(f"prefix codes are {found}, the model takes {self.config.prefix_grid}")
        embedded = self.tokens(prefix.codes.to(self.device).flatten(1))
        there = None if prefix.mask is None else prefix.mask.to(self.device).flatten(1)
        if self.config.prefix_holes == "token":
            embedded = (embedded if there is None else torch.where(there[..., None], embedded, self.hole)) + self.role
            there = None
        mask = None if there is None else F.pad(there, (0, 1), value=True)
        return torch.cat([embedded, self.separator.expand(len(embedded), 1, -1)], 1), mask

    def _embed_slots(self, tokens: Tensor, fronts: range) -> Tensor:
        """Embed the slots of consecutive fronts, given all tokens (B, n) up to their end: (B, S, d)."""
        schedule = self.layout.schedule
        if schedule.sides:  # sums of all of them, in place of one each
            return cast(Tensor, self.tokens(self.sums(tokens, fronts).to(self.dtype)))
        if not fronts:
            return cast(Tensor, self.tokens(tokens[:, :0]))
        start, stop = schedule.front(fronts[0]).start, schedule.front(fronts[-1]).stop
        slots = self.layout.slots[schedule.fed(fronts[0]).start : schedule.fed(fronts[-1]).stop]
        if tokens.shape[1] < stop:
            raise ValueError(f"front {fronts[-1]} ends at token {stop}, but {tokens.shape[1]} tokens were given")
        embedded = cast(Tensor, self.tokens(tokens[:, start:stop]))
        if len(slots) == stop - start:
            return embedded
        special = self.special.expand(len(tokens), -1, -1)
        together = torch.cat([embedded, special.to(embedded.dtype)], 1)
        return together[:, torch.where(slots >= 0, slots - start, stop - start - 1 - slots)]

    def _add_positions(self, x: Tensor, start: int) -> Tensor:
        """Add embeddings of the places of `x` (B, S, d), whose first one is sequence position `start`."""
        learned = self.config.positions in ("learned", "levels")
        table, places = self.positions if learned else self.layout.table, slice(start, start + x.shape[1])
        if table is None:
            return x
        if self.config.positions == "levels":
            x = x + self.levels[self.layout.front_rows[places]]
        return x + table[self.layout.rows[places]].to(x.dtype)

    def _modulations(self, embedded: Tensor) -> list[Tensor]:
        """What the class, embedded (B, 1, d) without its place, makes of each block and of the last norm."""
        return [] if self.config.modulation == "none" else cast("list[Tensor]", self.modulation(embedded[:, 0]))

    def _phases(self, start: int, count: int) -> Tensor | None:
        return None if self.layout.phases is None else self.layout.phases[start : start + count]

    def _chain(
        self,
        x: Tensor,
        phases: Tensor | None,
        mask: Tensor | BlockMask | None,
        modulations: list[Tensor],
        cache: Cache | Packed | None = None,
        dropout: Dropout | None = None,
        *,
        average: bool = False,
    ) -> list[Tensor]:
        """Run the blocks on `x` (B, S, d); returns the stream at each head.

        `average` says that all phases are zero, as those of a condition may be.
        """
        rates = dropout or Dropout()
        taps = list(accumulate(self.config.head_depths))
        states: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            path = rates.path * index / max(1, len(self.blocks) - 1)
            if average and not isinstance(mask, BlockMask) and not isinstance(cache, Packed):
                x = cast(Block, block).average(x, mask, cache, index)
            else:
                x = block(x, phases, mask, cache, index, (rates.residual, path), *modulations[index : index + 1])
            states += [x] * taps.count(index + 1 - self.config.num_layers)
        return states

    def readout(self, states: list[Tensor], source: Tensor, weight: Tensor, modulations: list[Tensor]) -> Tensor:
        """Normalise, gather and average the heads' streams (B, S, d), each by `weight` at `source` (A, n): (B, n, H *
        d)."""
        normed = []
        for head, state in enumerate(states):
            if modulations:
                scale, shift = modulations[-1][:, None].unbind(2)
                normed.append(modulated(state, scale, shift, self.config.norm_eps))
            else:
                normed.append(self.head_norms[head](state))
        heads = self.config.axis_heads
        read = [normed[head][:, source[row]] for row, head in enumerate(heads)]
        shares = self._gated(read, weight) if self.config.gate else weight
        columns = []
        for head in range(len(states)):
            column = torch.zeros((), dtype=normed[head].dtype, device=normed[head].device)
            for row in (row for row, served_by in enumerate(heads) if served_by == head):
                column = column + read[row] * shares[row, ..., None].to(column.dtype)
            columns.append(column)
        return torch.cat(columns, -1)

    def _gated(self, read: list[Tensor], weight: Tensor) -> Tensor:
        """Shares (A, B, n) of the rows, whose streams were `read` (B, n, d): of a row without `weight` (A, n) none."""
        there = weight > 0
        rows = [torch.where(there[row, :, None], stream, 0) for row, stream in enumerate(read)]
        scores = cast(Tensor, self.gate(torch.cat(rows, -1))).float()
        return scores.masked_fill(~there.T, -math.inf).softmax(-1).movedim(-1, 0)

    def _mask(self, length: int, key_mask: Tensor | None) -> Tensor | None:
        """Who sees whom among the first `length` positions: (1 or B, 1, length, length) bool, None when all see all."""
        count = self.config.num_condition
        if length == count and key_mask is None and (count == 1 or self.config.prefix_attention == "full"):
            return None
        levels = self._levels(length)
        mask = (levels[:, None] >= levels)[None, None]
        if key_mask is not None:
            mask = mask.repeat(len(key_mask), 1, 1, 1)
            mask[..., :count] &= key_mask[:, None, None]
            mask |= torch.eye(length, dtype=torch.bool, device=self.device)  # padding sees itself: no row is empty
        return mask

    def block_mask(self, length: int, key_mask: Tensor | None) -> BlockMask:
        """The same as a block mask. The condition comes first: with its keys last, the blocks at the end hold both
        words, which all see, and late tokens, and fewer are empty (32x32 tokens: 15 of 64 in place of 21)."""
        levels, rows = self._levels(length), None if key_mask is None else len(key_mask)
        # Indexed by tensors alone: PyTorch 2.6 and 2.7 refuse a number beside them.
        shown = None if key_mask is None else F.pad(key_mask, (0, length - key_mask.shape[1]), value=True)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001 FlexAttention's signature
            earlier = levels[q] >= levels[k]
            return earlier if shown is None else earlier & shown[b, k] | (q == k)

        return create_block_mask(sees, rows, None, length, length, self.device)

    def _levels(self, length: int) -> Tensor:
        """(length,) positions see those of their own level and of lower ones; the condition's are negative."""
        count, device = self.config.num_condition, self.device
        causal = self.config.prefix_attention == "causal"
        index = torch.arange(count, device=device) if causal else torch.zeros(count, dtype=torch.long, device=device)
        return torch.cat([index - count, self.layout.levels[: length - count]])

    def at_grid(self, grid: tuple[int, ...]) -> Transformer:
        """The same weights, shared and not copied, for another grid.

        Raises:
            ValueError: another number of axes, position embeddings that exist for one grid only, or a prefix of context
                frames, which has the size that the model was trained for.
        """
        if tuple(grid) == self.config.grid:
            return self
        whole = self.config.prefix_holes == "token" and self.config.prefix_grid == self.config.grid
        if self.config.prefix_grid and not whole:
            own = f"reads context frames of {self.config.prefix_grid} codes beside a grid of {self.config.grid}"
            raise ValueError(f"grid {tuple(grid)} does not fit this model: it {own}")
        if self.config.positions != "rope" or len(grid) != len(self.config.grid):
            own = f"has {self.config.positions} positions for a grid of {self.config.grid}"
            raise ValueError(f"grid {tuple(grid)} does not fit this model: it {own}")
        other = copy.copy(self)  # the same modules, packed ones too
        prefix = tuple(grid) if whole else ()
        other.config = dataclasses.replace(self.config, grid=tuple(grid), prefix_grid=prefix)
        other.layout = Layout.of(other.config, self.row).to(self.device)
        return other

    def decided_by(self, row: int | None) -> Transformer:
        """The same weights, shared and not copied, with one row of predictions (0: along the width) deciding alone; of
        None their mean."""
        other = copy.copy(self)
        other.row, other.layout = row, Layout.of(self.config, row).to(self.device)
        return other

    @classmethod
    @checked
    def from_pretrained(
        cls, folder: str | Path, precision: str | torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Transformer:
        """Load a bundled name, model folder or hub id, strictly; weights in half precision are read into float32.

        With a `precision` (see `nar.precision`) the model is for inference only, on `device`, and each weight is
        converted as it is read: memory never holds all of them in float32 beside the others.
        """
        folder = find_model(folder)
        config = read_config(folder)
        if config.get("kind") != "transformer":
            raise ValueError(f"{folder} holds {config.get('kind', 'something of unknown kind')!r}, not a transformer")
        with without_weights():
            model = cls(from_dict(ModelConfig, config.get("model"), Path(folder) / "config.json"))
        weights = Weights(folder)
        check_shapes(model, weights.shapes, folder)
        return fill(model, weights.copy, precision, device).eval()

    @checked
    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: Floating | None = None,
        class_names: tuple[str, ...] = (),
        tokenizer: Path | None = None,
        **extra: Any,
    ) -> None:
        """Write the model as a folder, with the tokenizer's folder inside it; `extra` goes into `config.json`.

        A model folder that is there is replaced whole; one with a tokenizer only when a `tokenizer` is given.
        """
        if self.row is not None:
            raise ValueError("one head decides in this model, which a folder does not record: save decided_by(None)")
        model, names = dataclasses.asdict(self.config), list(class_names)
        config = {"kind": "transformer", "model": model, "class_names": names, **extra}
        state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        write_folder(folder, config, state, parts={"tokenizer": tokenizer} if tokenizer else None)
