"""Everything about speed that needs a GPU, in one run of under nine minutes: correctness first, then the numbers.

    python scripts/gpu_bench.py --json gpu.json                                       # NAR-L, B, XL and video L
    python scripts/gpu_bench.py --figure figure6.png --presets NAR-M                  # the paper's figure 6 alone
    python scripts/gpu_bench.py --device cpu --presets tiny --quick --json dry.json   # a dry run of every part

Correctness, on the first preset of pictures:
- CUDA graphs draw what eager decoding draws, byte for byte, in bfloat16 and in float32, over shapes and settings.
- The same on a device that is not the current one, and while another thread computes.
- No token that a filter took out is sampled; NaN weights are one error; codes are the same with and without TF32.
- bfloat16 against float32: logits, and how often the likeliest token is the same.
- FlexAttention against the dense mask: forward, and gradients, at 32x32 tokens; several sizes of a batch.
- A training step under autocast with either attention: the same loss, and its time.
Numbers: one picture and batches of 64 with 100 warm-ups and 500 runs (the peers' protocol; fewer for all presets but
the first), the largest batch that fits (the paper's), compiled feed-forward layers, schedules side by side with pixels.

A part that fails is reported, and the others run. Parts that would begin after `--minutes` are left out, and say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import torch
import torch._dynamo.utils
import torch.nn.functional as F

from nar import ClassCondition, ModelConfig, Sampling, Transformer, generate
from nar.bench import SCHEDULES, Setup, bench_preset, efficiency, preset_model
from nar.bench.report import Row, compare, table
from nar.sampling import Session, sample
from nar.storage.presets import PRESETS, Preset, find
from nar.tokenizer.quantize import VectorQuantizer

TARGETS = {("NAR-L", 1): "target 25 ms", ("NAR-L", 64): "target 700 pictures/s in 4.7 GB"}
SETTINGS = (
    Sampling(guidance_scale=2.0),
    Sampling(guidance_scale=2.0, guidance_interval=40, top_k=100),
    Sampling(guidance_scale=1.5, guidance_curve="linear", top_p=0.9),
    Sampling(temperature=0),
)
_TINY = {"grid": (4, 4), "vocab_size": 64, "num_classes": 1000, "dim": 32, "num_layers": 2, "num_heads": 2}
PRESETS["tiny"] = Preset("tiny", "nar-c2i", "none", 0, _TINY)


def graphs_equal_eager(preset: str, device: str) -> dict[str, object]:
    """Raise unless graphs and eager decoding draw the same tokens."""
    compared = 0
    for dtype in ("bfloat16", "float32"):
        model = preset_model(preset, precision=dtype, device=device)
        session = Session(model, num_kept=len(SETTINGS))
        for batch in (1, 3):
            condition = ClassCondition(torch.arange(batch))
            for sampling in SETTINGS:
                for seed in (0, 1):
                    recorded = generate(model, condition, sampling, seed=seed, session=session)
                    eager = generate(model, condition, sampling, seed=seed)
                    assert torch.equal(recorded, eager), f"{dtype}, batch {batch}, {sampling}, seed {seed}"
                    compared += 1
        assert session.graphs or device == "cpu", "recording failed; see the warning"
    return {"generations compared": compared, "graphs": session.graphs}


def graphs_beside_others(preset: str, device: str) -> dict[str, object]:
    """Raise unless graphs are right on a device that is not the current one, and while another thread computes."""
    last = f"cuda:{torch.cuda.device_count() - 1}" if device == "cuda" else device
    model = preset_model(preset, precision="bfloat16", device=last)
    busy, done = torch.ones(64, 64, device=device), Event()

    def compute() -> None:
        while not done.is_set():
            torch.zeros(1, device=device).add_((busy @ busy).sum())  # allocates and launches

    other = Thread(target=compute)
    other.start()
    try:
        session = Session(model)
        condition = ClassCondition(torch.arange(2))
        recorded = generate(model, condition, SETTINGS[1], seed=0, session=session)
        assert session.graphs or device == "cpu", "recording failed; see the warning"
        assert torch.equal(recorded, generate(model, condition, SETTINGS[1], seed=0))
    finally:
        done.set()
        other.join()
    return {"device of the model": last}


def filters_on_the_gpu(preset: str, device: str) -> dict[str, object]:  # noqa: ARG001 as the others
    """Raise unless every token sampled is one that the filters keep; and logits that are NaN are a ValueError."""
    logits = torch.randn(512, 16384, device=device, generator=torch.Generator(device).manual_seed(0))
    kept = logits >= logits.topk(50).values[:, -1:]
    for seed in range(64):
        uniform = torch.rand(512, generator=torch.Generator().manual_seed(seed)).to(device)
        assert kept.gather(1, sample(logits, uniform, top_k=50)[:, None]).all(), f"seed {seed}"
    model = preset_model("tiny", device=device)
    model.output.weight.data[3, 3] = math.nan
    try:
        generate(model, ClassCondition(torch.arange(2)), session=Session(model))
    except ValueError as error:
        return {"tokens": 64 * 512, "NaN": str(error)[:40]}
    raise AssertionError("weights that are NaN were sampled from")


@torch.inference_mode()
def codes_under_tf32(preset: str, device: str) -> dict[str, object]:  # noqa: ARG001 as the others
    """Raise unless a quantiser's codes are the same with TF32 on and off, and but for ties those of a CPU."""
    quantizer, latents = (
        VectorQuantizer(16384, 8),
        torch.randn(8, 8, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    expected = quantizer.encode(latents)
    quantizer, latents, before = quantizer.to(device), latents.to(device), torch.get_float32_matmul_precision()
    found = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        found.append(quantizer.encode(latents).cpu())
    torch.set_float32_matmul_precision(before)
    changed = [int((codes != expected).sum()) for codes in found]
    assert max(changed) <= 8, f"{changed} of {expected.numel()} codes differ from those of a CPU"
    return {"codes that differ from those of a CPU": changed, "of": expected.numel()}


@torch.inference_mode()
def half_against_single(preset: str, device: str) -> dict[str, object]:
    """Logits in bfloat16 beside those in float32, given the same codes."""
    condition, found = ClassCondition(torch.arange(2)), {}
    for dtype in ("float32", "bfloat16"):
        model = preset_model(preset, precision=dtype, device=device)
        codes = torch.randint(
            model.config.vocab_size, (2, *model.config.grid), generator=torch.Generator().manual_seed(0)
        )
        found[dtype] = model(codes.to(device), condition)
    single, half = found["float32"], found["bfloat16"]
    error = float((half - single).std() / single.std())
    assert error < 0.05, f"error {error:.3f} of the logits' spread"
    same = float((half.argmax(-1) == single.argmax(-1)).float().mean())
    return {"error in units of the logits' spread": error, "likeliest token is the same": same}


def _wide(preset: str, device: str) -> Transformer:
    """The size of a preset at 32x32 tokens, in float32 and trainable."""
    torch.manual_seed(0)
    config = ModelConfig(**{**find(preset).config, "grid": (32, 32)})
    model = Transformer(config).to(device)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def _batch(model: Transformer, count: int) -> tuple[torch.Tensor, ClassCondition]:
    codes = torch.randint(model.config.vocab_size, (count, *model.config.grid), device=model.device)
    return codes, ClassCondition(torch.arange(count))


def flex_equals_dense(preset: str, device: str) -> dict[str, object]:
    """FlexAttention against the dense mask: outputs, and, where it has them, gradients of all weights."""
    model = _wide(preset, device)
    codes, condition = _batch(model, 2)
    outputs, gradients = [], []
    for flex in (False, True):
        with torch.set_grad_enabled(device != "cpu"):  # it has no backward on a CPU
            hidden = model.hidden(codes, condition, flex=flex)
        outputs.append(hidden.detach())
        if device != "cpu":
            model.zero_grad()
            hidden.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in model.blocks.parameters()])
    error = float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
    assert error < 5e-3, f"outputs differ by {error:.1e} of the largest"
    worst = (
        max((float((b - a).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(*gradients, strict=True)), default=None)
        if gradients
        else None
    )
    assert worst is None or worst < 2e-2, f"gradients differ by {worst:.1e}"
    return {"outputs differ by": error, "gradients differ by": worst}


@torch.inference_mode()
def flex_of_several_batches(preset: str, device: str) -> dict[str, object]:
    """FlexAttention against the dense mask at several sizes of a batch, and how often it was compiled."""
    model = _wide(preset, device)
    torch._dynamo.utils.counters.clear()
    for count in (4, 4, 3, 1, 2, 4):
        codes, condition = _batch(model, count)
        dense, flex = (model.hidden(codes, condition, flex=choice) for choice in (False, True))
        error = float((flex - dense).abs().max() / dense.abs().max())
        assert error < 5e-3, f"outputs of {count} differ by {error:.1e} of the largest"
    compiled = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    assert compiled <= 3, f"compiled {compiled} times"
    return {"compiled": compiled}


def training_step(preset: str, device: str) -> dict[str, object]:
    """A step of AdamW under autocast at 32x32 tokens, by either attention: loss and seconds."""
    found: dict[str, object] = {}
    losses = []
    for flex in (False, True) if device != "cpu" else (False,):
        model = _wide(preset, device)
        codes, condition = _batch(model, 8 if device != "cpu" else 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device != "cpu")
        tokens, times = model.in_order(codes), []
        for number in range(4):
            started = perf_counter()
            with torch.autocast(device, torch.bfloat16):
                logits = model.logits(model.hidden(codes, condition, flex=flex))
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = float(loss)  # waits
            times.append(perf_counter() - started)
            if number == 0:
                losses.append(value)
        assert value < losses[-1], f"the loss rose from {losses[-1]} to {value}"
        found["flex" if flex else "dense"] = {"first loss": losses[-1], "last loss": value, "seconds": min(times[1:])}
    assert max(losses) - min(losses) < 0.02, f"first losses {losses}"
    return found


def figure(names: list[str], setup: Setup, path: Path) -> dict[str, object]:
    """The paper's figure 6, as PATH and beside it as JSON, for the batches that fit; see `nar bench --efficiency`."""
    batches, comparison = setup.batch_sizes, efficiency.Comparison([], [])
    for count in range(1, len(batches) + 1):
        try:
            some = dataclasses.replace(setup, batch_sizes=batches[:count])
            comparison = efficiency.compare(names, some, comparison.rows)
        except torch.OutOfMemoryError as error:
            print(f"batch {batches[count - 1]} does not fit: {error}")
            break
        path.with_suffix(".json").write_text(json.dumps(comparison.as_json(), indent=1))
        efficiency.plot(comparison, path)
    print(efficiency.table(comparison), flush=True)
    return {"rows": len(comparison.rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", default="NAR-L,NAR-B,NAR-XL,NAR-video-L")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5, help="parts that would begin later are left out")
    parser.add_argument("--largest", type=int, default=4096, help="stop doubling the batch here")
    parser.add_argument("--quick", action="store_true", help="batches of 2 and single runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="compare the first preset with models of its FID, and nothing else")
    given = parser.parse_args()
    began = perf_counter()
    rows: list[Row] = []
    report: dict[str, object] = {"torch": torch.__version__, "parts": (parts := []), "rows": []}
    if given.device == "cuda":
        report["device"] = torch.cuda.get_device_name()
    many = 2 if given.quick else 64

    def measure(
        preset: str, batch: int, runs: tuple[int, int], schedules: tuple[str, ...] = ("manhattan",), **changes: object
    ) -> None:
        warmups, repetitions = (0, 1) if given.quick else runs
        setup = Setup((batch,), dtype="bfloat16", device=given.device, pixels=False)
        setup = dataclasses.replace(setup, warmups=warmups, repetitions=repetitions, **changes)
        found = bench_preset(preset, setup, schedules)
        rows.extend(found)
        print(TARGETS.get((preset, batch), ""), table(found), *compare(found), sep="\n", flush=True)

    def doubled(preset: str) -> None:
        batch = 2 * many
        while batch <= (2 * many if given.quick else given.largest) and perf_counter() - began < 60 * given.minutes:
            try:
                measure(preset, batch, (1, 3))
            except torch.OutOfMemoryError:
                print(f"{preset}: batch {batch} does not fit")
                return
            batch *= 2

    def attempt(name: str, part: Callable[[], dict[str, object] | None]) -> None:
        started = perf_counter()
        outcome: dict[str, object] = {"part": name}
        if started - began > 60 * given.minutes:
            outcome["status"] = "left out: no time"
        else:
            try:
                outcome |= {"status": "passed", **(part() or {})}
            except Exception as error:
                traceback.print_exc()
                outcome |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        outcome["part_seconds"] = round(perf_counter() - started, 1)
        print(f"== {json.dumps(outcome)}", flush=True)
        parts.append(outcome)
        report["rows"] = [dataclasses.asdict(row) for row in rows]
        if given.json:
            given.json.write_text(json.dumps(report, indent=1))
        if given.device == "cuda":
            torch.cuda.empty_cache()

    presets = given.presets.split(",")
    if given.figure:
        names = [presets[0], *efficiency.rivals(presets[0])]
        sizes = (1, 2) if given.quick else (1, 4, 16, 64, 256)
        setup = Setup(sizes, dtype="bfloat16", device=given.device, repetitions=2 if given.quick else 5)
        attempt(f"{presets[0]}: figure 6", partial(figure, names, setup, given.figure))
        presets = []
    pictures = [preset for preset in presets if len(find(preset).config["grid"]) == 2]
    if pictures:
        smallest = "NAR-B" if "NAR-B" in pictures else pictures[0]
        checks = graphs_equal_eager, graphs_beside_others, filters_on_the_gpu, codes_under_tf32, half_against_single
        for check in (*checks, flex_equals_dense, flex_of_several_batches, training_step):
            attempt(f"{smallest}: {check.__name__}", partial(check, smallest, given.device))
    for number, preset in enumerate(presets):
        runs = (100, 500) if number == 0 else (5, 20)
        attempt(f"{preset}: one", partial(measure, preset, 1, runs))
        attempt(f"{preset}: batch of {many}", partial(measure, preset, many, runs))
    for preset in presets[:1]:
        if given.device != "cpu":
            attempt(f"{preset}: compiled", partial(measure, preset, 1, (5, 50), compiled=True))
        attempt(f"{preset}: schedules with pixels", partial(measure, preset, 1, (3, 10), SCHEDULES, pixels=True))
    for preset in presets:
        attempt(f"{preset}: largest batch", partial(doubled, preset))
    print("\n" + "\n".join(f"{row.model:>12}  {line}" for row in rows for line in table([row]).splitlines()[1:]))
    failed = [str(outcome["part"]) for outcome in parts if outcome["status"] != "passed"]
    print(f"{len(parts) - len(failed)} of {len(parts)} parts passed" + "".join(f"\nnot: {name}" for name in failed))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
