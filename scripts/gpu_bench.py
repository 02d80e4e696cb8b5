"""Everything about speed that needs a GPU, in one run: correctness first, then the peers' and the paper's protocol.

    python scripts/gpu_bench.py --json gpu.json                    # NAR-L, B, XL and video L; about half an hour
    python scripts/gpu_bench.py --device cpu --presets NAR-video-S --warmups 0 --repetitions 1 --largest 2   # a dry run

1. CUDA graphs draw what eager decoding draws, byte for byte, in bfloat16 and in float32, over shapes and settings.
2. One picture, and batches of 64, tokens only, with 100 warm-ups and 500 runs (the peers' protocol).
3. The largest batch that fits, doubling from 64 (the paper's protocol), 10 runs each.
4. The same with compiled feed-forward layers.
5. Raster, PAR-4x and manhattan side by side at batch 1, with the pixel decoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from nar import ClassCondition, Sampling, generate
from nar.bench import SCHEDULES, Row, Setup, bench_preset, compare, preset_model, table
from nar.precision import convert
from nar.sampling import Session

TARGETS = {("NAR-L", 1): "25 ms", ("NAR-L", 64): "700 pictures/s, 4.7 GB"}


def check(preset: str, device: str) -> None:
    """Raise unless graphs and eager decoding draw the same tokens."""
    settings = (
        Sampling(guidance_scale=2.0),
        Sampling(guidance_scale=2.0, guidance_interval=40, top_k=100),
        Sampling(guidance_scale=1.5, guidance_curve="linear", top_p=0.9),
        Sampling(temperature=0),
    )
    for dtype in ("bfloat16", "float32"):
        model = convert(preset_model(preset), dtype, device)
        session = Session(model, num_kept=len(settings))
        for batch in (1, 3):
            condition = ClassCondition(torch.arange(batch))
            for sampling in settings:
                for seed in (0, 1):
                    graphs = generate(model, condition, sampling, seed=seed, session=session)
                    eager = generate(model, condition, sampling, seed=seed)
                    assert torch.equal(graphs, eager), f"{preset} {dtype} batch {batch} {sampling} seed {seed}"
        assert session.graphs or device == "cpu", "recording failed; see the warning"
        print(f"{preset} {dtype}: graphs == eager", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", default="NAR-L,NAR-B,NAR-XL,NAR-video-L")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warmups", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--largest", type=int, default=4096, help="stop doubling here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[Row] = []

    def measure(preset: str, schedules: tuple[str, ...] = ("manhattan",), **changes: object) -> list[Row]:
        setup = Setup(
            dtype="bfloat16", device=given.device, pixels=False, warmups=given.warmups, repetitions=given.repetitions
        )
        found = bench_preset(preset, dataclasses.replace(setup, **changes), schedules)
        rows.extend(found)
        print(preset, changes, *(TARGETS.get((row.model, row.batch_size), "") for row in found))
        print(table(found), *compare(found), sep="\n", flush=True)
        if given.json:
            given.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return found

    for preset in given.presets.split(","):
        check(preset, given.device)
        measure(preset, batch_sizes=(1,))
        batch = min(64, given.largest)
        measure(preset, batch_sizes=(batch,))
        while (batch := batch * 2) <= given.largest:
            try:
                measure(
                    preset, batch_sizes=(batch,), warmups=min(2, given.warmups), repetitions=min(10, given.repetitions)
                )
            except torch.OutOfMemoryError:
                print(f"{preset}: batch {batch} does not fit")
                break
        measure(preset, batch_sizes=(1, min(64, given.largest)), compiled=True)
        measure(
            preset, SCHEDULES, batch_sizes=(1,), pixels=True, warmups=min(5, given.warmups),
            repetitions=min(20, given.repetitions),
        )  # fmt: skip


if __name__ == "__main__":
    main()
