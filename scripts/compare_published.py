"""Time this package against the decode loop of the published NAR code, side by side, on random weights of one size.

The published code itself is not here. `Published` is our own rewrite of what its description says it does: keys and
values in raster order in a padded cache, a dense boolean mask over all of it whose rows are picked at every step,
attention by the plain (MATH) kernel while decoding, every head on every row, index tensors made step by step, one
`multinomial` a position. It computes what the model computes; only the way is theirs.

    python scripts/compare_published.py --preset NAR-B --batch-sizes 1,8 --rounds 5
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nar import ClassCondition, Sampling, Transformer, generate
from nar.bench import IMAGE_GUIDANCE, VIDEO_GUIDANCE, preset_model
from nar.pipeline.formats import choose_of
from nar.sampling import Session


class Published:
    """The published decode loop for a class-conditional model, on the weights of `model`."""

    def __init__(self, model: Transformer) -> None:
        self.model, config = model, model.config
        self.grid, self.heads = config.grid, config.num_heads
        self.num_positions = math.prod(self.grid)
        self.length = 8 * math.ceil((1 + self.num_positions) / 8)
        # Raster order: position 1 + r holds token r. Phases and learned rows follow.
        index = torch.arange(self.num_positions)
        schedule = model.layout.schedule
        self.distance = schedule.coordinates(index).sum(-1)
        self.phases = None
        if model.layout.phases is not None:
            self.phases = torch.zeros(1 + self.num_positions, *model.layout.phases.shape[1:])
            self.phases[1 + schedule.places] = model.layout.phases[1:]
        outputs = model.output.weight.chunk(len(config.head_depths), 1)
        self.outputs = [part.contiguous() for part in outputs]
        model.output = None  # the heads are separate there, and memory counts

    @torch.no_grad()
    def generate(self, labels: Tensor, scale: float) -> Tensor:
        model, config = self.model, self.model.config
        batch, rows = len(labels), 2 * len(labels)
        shape = (rows, self.heads, self.length, config.dim // self.heads)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.blocks]
        level = torch.full((self.length,), self.length)
        level[0], level[1 : 1 + self.num_positions] = -1, self.distance
        mask = level[None, :] <= level[:, None]
        mask[:, 1 + self.num_positions :] = False
        self.mask = mask.repeat(rows, 1, 1)
        tokens = torch.zeros(batch, self.num_positions, dtype=torch.long)
        null = torch.full_like(labels, config.num_classes)
        x = model.classes(torch.cat([labels, null]))[:, None]
        scores = sum(head[:, -1] for head in self._forward(x, torch.tensor([0]), math_only=False)) / len(self.outputs)
        tokens[:, 0] = self._draw(scores, scale)
        for front in range(1, sum(self.grid) - len(self.grid) + 1):
            fed = (self.distance == front - 1).nonzero().flatten()
            wanted = (self.distance == front).nonzero().flatten().tolist()
            last = tokens[:, fed]
            heads = self._forward(model.tokens(torch.cat([last, last])), 1 + fed, math_only=True)
            place = {int(position): row for row, position in enumerate(fed)}
            for position in wanted:
                found, stride, rest = [], 1, position
                for head, size in zip(heads, reversed(self.grid), strict=True):
                    if rest % size:
                        found.append(head[:, place[position - stride]])
                    rest, stride = rest // size, stride * size
                tokens[:, position] = self._draw(sum(found) / len(found), scale)
        return tokens

    def _forward(self, x: Tensor, positions: Tensor, *, math_only: bool) -> list[Tensor]:
        model, config = self.model, self.model.config
        if config.positions == "learned":
            x = x + model.positions[positions]
        mask, states = self.mask[:, None, positions], []
        for index, block in enumerate(model.blocks):
            q, k, v = block.attention.qkv(_norm(block.attention_norm, x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
            if self.phases is not None:
                phases = self.phases[positions]
                q, k = _rotate(q, phases), _rotate(k, phases)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            keys, values = self.cache[index]
            keys[:, :, positions], values[:, :, positions] = k, v
            with sdpa_kernel(SDPBackend.MATH if math_only else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.attention.proj(y.transpose(1, 2).flatten(2))
            gate, up = block.feed_forward.gate_up.weight.chunk(2)  # two products there
            normed = _norm(block.feed_forward_norm, x)
            x = x + block.feed_forward.down(F.silu(F.linear(normed, gate)) * F.linear(normed, up))
            if index >= config.num_layers - 1:
                states.append(x)
        norms = zip(model.head_norms, states, self.outputs, strict=True)
        return [F.linear(_norm(norm, state), output).float() for norm, state, output in norms]

    def _draw(self, logits: Tensor, scale: float) -> Tensor:
        given, null = logits.chunk(2)
        return torch.multinomial((null + (given - null) * scale).softmax(-1), 1).flatten()


def _norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _rotate(x: Tensor, phases: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = phases[None, :, None, :, 0], phases[None, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(3)


def runner(way: str, preset: str, scale: float):
    """A function of the batch size that draws one batch."""
    if way == "published":
        published = Published(preset_model(preset).requires_grad_(False))
        return lambda batch: published.generate(torch.arange(batch), scale)
    if way == "auto":
        model, _ = choose_of(lambda name: preset_model(preset, precision=name), preset, torch.device("cpu"))
    else:  # plain: this package's decoding on weights that are not packed
        model = preset_model(preset, precision=None if way == "plain" else way)
    model.requires_grad_(False)
    session, sampling = Session(model), Sampling(guidance_scale=scale)
    return lambda batch: generate(model, ClassCondition(torch.arange(batch)), sampling, session=session)


def peak_memory(way: str, preset: str, batch: int) -> float:
    """Peak memory in MB of a process that builds the model and draws one batch."""
    command = [sys.executable, __file__, "--preset", preset, "--batch-sizes", str(batch), "--only", way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def high_water() -> float:
    """Peak memory of this process in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024 / 1e6


def check(preset: str) -> None:
    """The two ways must agree on the logits: compared on the same tokens, front by front."""
    model = preset_model(preset).requires_grad_(False)
    codes = torch.randint(model.config.vocab_size, (1, *model.config.grid))
    with torch.no_grad():
        expected = model(codes, ClassCondition(torch.tensor([3]))).flatten(1, -2)[0]
    published = Published(model)
    seen: list[Tensor] = []

    def follow(logits: Tensor, scale: float) -> Tensor:  # noqa: ARG001 draws the given codes, in the same order
        seen.append(logits[0])
        return codes.flatten()[order[len(seen) - 1]][None]

    order = published.distance.argsort(stable=True)
    published._draw = follow
    published.generate(torch.tensor([3]), 1.0)
    difference = float((torch.stack(seen) - expected[order]).abs().max())
    print(f"largest difference of logits between the two: {difference:.1e}", flush=True)
    assert difference < 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="NAR-B")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread on a busy machine")
    parser.add_argument("--ways", default="published,plain,float32,float16,int8")
    parser.add_argument("--only", help="build one way, draw once, print the process's peak memory in MB")
    given = parser.parse_args()
    scale = VIDEO_GUIDANCE if "video" in given.preset else IMAGE_GUIDANCE
    batches = [int(part) for part in given.batch_sizes.split(",")]
    if given.only:
        run, built = runner(given.only, given.preset, scale), high_water()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again
        run(batches[0])
        print("building, drawing, both:", built, high_water(), max(built, high_water()))
        return
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    check(given.preset)
    ways, clock = given.ways.split(","), process_time if given.clock == "cpu" else perf_counter
    runs = {way: runner(way, given.preset, scale) for way in ways}
    for batch in batches:
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(given.rounds + 1):
            for way in ways:
                started = clock()
                runs[way](batch)
                if turn:
                    times[way].append((clock() - started) / batch)
        for way in ways:
            ratio = statistics.median(a / b for a, b in zip(times[ways[0]], times[way], strict=True))
            spread = f"{min(times[way]):.3f} to {max(times[way]):.3f}"
            print(
                f"batch {batch}, {way}: {statistics.median(times[way]):.3f} s a picture ({spread}), {ratio:.2f} times",
                flush=True,
            )
    del runs
    for batch in batches:
        peaks = {way: peak_memory(way, given.preset, batch) for way in ways}
        print(
            f"batch {batch}, peak MB: " + ", ".join(f"{w} {p:.0f} ({p / peaks[ways[0]]:.2f})" for w, p in peaks.items())
        )


if __name__ == "__main__":
    main()
