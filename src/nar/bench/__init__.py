"""Sampling speed of models and tokenizers, beside the least time that the machine needs.

Knows models, clocks and memory; does not know what is sampled, nor the command line.

Each row times whole generations after warm-ups and keeps the median. *Floors* are the least time that a machine needs,
from its own speed measured in the same run: to read every weight once a step, and to do the multiplications.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nar.bench.jacobi import jacobi
from nar.bench.report import Row
from nar.model import ModelConfig, Transformer
from nar.pipeline.formats import AUTO, any_condition, choose_of
from nar.precision import PackedLinear, convert, fill, usable_device
from nar.sampling import Sampling, Session, generate, last_guided
from nar.storage.fields import OneOf, Range, Size, check, checked, from_dict
from nar.storage.folder import find_model, model_digest, read_config, without_weights
from nar.storage.presets import PRESETS, find
from nar.tokenizer import Tokenizer, load_tokenizer, new_tokenizer
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizerConfig
from nar.tokenizer.multiscale import MultiScaleTokenizerConfig

SCHEDULES = ("raster", "par", "manhattan")
Result = TypeVar("Result")
CLOCKS = {"wall": perf_counter, "cpu": process_time}
JACOBI = "jacobi"  # a way to decode, and no schedule: beside them in rows
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
TOKENIZERS = ("llamagen-vq", "larp-tokenizer", "var-vae")  # kinds of presets
IMAGE_GUIDANCE, VIDEO_GUIDANCE = 2.0, 1.25  # what the paper samples with


@dataclass(frozen=True)
class Setup:
    """What to measure, how often, and by which clock: "cpu" is processor time, of one thread where others are busy."""

    batch_sizes: tuple[Size, ...] = (1,)
    guidance_scale: float | None = None
    guidance_interval: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    pixels: bool = True
    compiled: bool = False
    warmups: Annotated[int, Range(0)] = 2
    repetitions: Annotated[int, Range(1)] = 3
    clock: Annotated[str, OneOf(*CLOCKS)] = "wall"

    def __post_init__(self) -> None:
        check(self)
        usable_device(self.device)

    def row(self, name: str, operation: str, batch_size: int, times: list[float], dtype: str, **facts: Any) -> Row:
        """A measurement in this setup, and what else is known of it."""
        device, seconds = device_name(torch.device(self.device)), statistics.median(times)
        setup = (dtype, device, torch.get_num_threads(), self.warmups, self.repetitions)
        facts |= {"clock": self.clock, "latency_shortest_seconds": min(times), "latency_longest_seconds": max(times)}
        return Row(name, operation, batch_size, seconds, batch_size / seconds, *setup, **facts)


class Work(NamedTuple):
    """Arithmetic of sampling one picture."""

    weights_per_step: int
    products: int
    """Multiplications, attention's included."""
    weights_once: int
    """Weights that a generation reads once: of the layer that modulates blocks."""


@checked
def preset_model(
    name: str,
    schedule: str | None = None,
    precision: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A model of a published size with random weights; `schedule` puts its backbone under another one.

    `precision` and `device` as in `Transformer.from_pretrained`; the weights before conversion are always the same.
    """
    config = _preset_config(name)
    return _random(config if schedule is None else with_schedule(config, schedule), precision, device)


def preset_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a published size, or of the published kind for a model's, with random weights."""
    preset = find(name)
    clips = len(preset.config.get("grid", ())) == 3
    kind: Any = VideoTokenizerConfig if clips else ImageTokenizerConfig
    kind = MultiScaleTokenizerConfig if preset.kind.startswith("var") else kind
    wanted = ("vocab_size", "scales")  # of a model's: the other sizes are those of the published kind
    config = kind(**{key: value for key, value in preset.config.items() if preset.kind in TOKENIZERS or key in wanted})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_tokenizer(config).eval().requires_grad_(False)


def with_schedule(config: ModelConfig, schedule: str) -> ModelConfig:
    """The same backbone under another schedule; "par" takes four regions, two along each of the last two axes."""
    if schedule == config.schedule:
        return config
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if config.scales:
        raise ValueError(f"a model of scales has no grid for {schedule}; measure it under its own schedule")
    regions = (1,) * (len(config.grid) - 2) + (2, 2) if schedule == "par" else ()
    return dataclasses.replace(config, schedule=schedule, regions=regions, head_depths=(), axis_heads=(), gate=False)


def bench_preset(
    name: str, setup: Setup, schedules: Sequence[str] = SCHEDULES, *, report: Callable[[Row], None] | None = None
) -> list[Row]:
    """Measure the backbone of a published size, with random weights, under several schedules."""
    if JACOBI in schedules:
        raise ValueError(
            f"how many passes {JACOBI} takes depends on what a model has learned: give a folder of weights"
        )
    config = _preset_config(name)
    default = Sampling(VIDEO_GUIDANCE if len(config.grid) == 3 else IMAGE_GUIDANCE)
    schedules = (config.schedule,) if config.scales else schedules
    tokenizer = preset_tokenizer(name) if setup.pixels else None

    def load(schedule: str, dtype: str) -> Transformer:
        return preset_model(name, schedule, dtype, setup.device)

    return _bench(name, load, schedules, tokenizer, _decided(setup, load, schedules[0], name), default, report)


def bench_folder(
    source: str | Path,
    setup: Setup,
    schedules: Sequence[str] = (),
    *,
    sampling: Sampling | None = None,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure a model folder, a bundled name or a hub id; other schedules than its own run on random weights.

    Sampled as `sampling` says, by default with the model's own scale of guidance, where the setup has none.
    "jacobi" decodes a raster model's own weights in parallel, with Gumbel numbers; its steps are the passes it took.
    """
    folder = find_model(source)
    config = read_config(folder)
    shape = from_dict(ModelConfig, config.get("model"), folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer") if setup.pixels and (folder / "tokenizer").is_dir() else None

    def load(schedule: str, dtype: str) -> Transformer:
        if schedule == JACOBI and shape.schedule != "raster":
            raise ValueError(f"{JACOBI} is of raster models; the schedule of {source} is {shape.schedule}")
        if schedule in (shape.schedule, JACOBI):
            return Transformer.from_pretrained(folder, dtype, setup.device)
        return _random(with_schedule(shape, schedule), dtype, setup.device)

    default = sampling or Sampling(float(config.get("sampling", {}).get("guidance_scale", 1.0)))
    schedules = schedules or (shape.schedule,)
    setup = _decided(setup, load, schedules[0], model_digest(folder))
    return _bench(str(source), load, schedules, tokenizer, setup, default, report)


def bench_tokenizer(source: str | Path, setup: Setup, *, report: Callable[[Row], None] | None = None) -> list[Row]:
    """Measure a tokenizer, a folder or a published size with random weights, in every dtype and memory layout.

    Pictures have 16x16 codes and random pixels. `setup.dtype` is not used.
    """
    device, name = torch.device(setup.device), str(source)
    if name not in PRESETS:
        folder = find_model(source)
        tokenizer = load_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder).to(device)
    elif PRESETS[name].kind in TOKENIZERS:
        tokenizer = preset_tokenizer(name).to(device)
    else:
        raise ValueError(f"preset {name!r} is not a tokenizer; give VQ-16, VQ-8, LARP-L-long, or a folder")
    size = tokenizer.pixel_shape((4, 16, 16)[-len(tokenizer.code_axes) :])
    layouts = {"contiguous": torch.contiguous_format}
    if isinstance(tokenizer, ImageTokenizer):
        layouts["channels_last"] = torch.channels_last
    exact: dict[tuple[str, int], Tensor] = {}  # float32, contiguous
    rows = []
    for dtype, (layout, memory_format) in itertools.product((torch.float32, torch.bfloat16), layouts.items()):
        tokenizer = tokenizer.to(dtype, memory_format=memory_format)  # type: ignore[call-overload]
        for batch, operation in itertools.product(setup.batch_sizes, ("encode", "decode")):
            pixels = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
            fed = pixels.to(dtype) if operation == "encode" else exact["encode", batch]
            run = partial(_inferred, getattr(tokenizer, operation), fed)
            result = run()
            right = exact.setdefault((operation, batch), result)
            change = (result != right).float() if operation == "encode" else (result - right).abs() * 127.5
            if not torch.isfinite(change).all():
                raise ValueError(f"{name} decodes to numbers that are none in {dtype}; its weights are damaged")
            facts = {"layout": layout, "change": float(change.mean()), "size": size}
            times, _ = _times(run, setup, device)
            rows.append(setup.row(name, operation, batch, times, str(dtype).removeprefix("torch."), **facts))
            if report is not None:
                report(rows[-1])
    best = {kind: min(row.latency_seconds for row in rows if (row.operation, row.batch_size) == kind) for kind in exact}
    fastest = [row.latency_seconds == best[row.operation, row.batch_size] for row in rows]
    return [dataclasses.replace(row, fastest=is_best) for row, is_best in zip(rows, fastest, strict=True)]


def work(model: Transformer, sampling: Sampling) -> Work:
    """What one picture takes; of a model with or without values."""
    config, schedule = model.config, model.layout.schedule
    in_blocks = _num_weights(model.blocks)
    in_output = _num_weights(model.output) + (_num_weights(model.gate) if config.gate else 0)
    once = _num_weights(model.modulation) if config.modulation != "none" else 0
    guided = last_guided(sampling, schedule)
    products, fed = schedule.num_positions * in_output + once * (1 if guided < 0 else 2), 0
    for front, count in enumerate((config.num_condition, *schedule.slot_fronts[: schedule.num_steps - 1])):
        fed += count
        alone = count * (in_blocks + 2 * config.num_blocks * config.dim * fed)
        products += alone * (2 if front <= guided else 1)
    return Work(in_blocks + in_output, products, once)


def _decided(setup: Setup, load: Callable[[str, str], Transformer], schedule: str, weights: str) -> Setup:
    """The setup with a number format in place of "auto"."""
    if setup.dtype != AUTO:
        return setup
    _, choice = choose_of(partial(load, schedule), f"{weights} {schedule}", torch.device(setup.device))
    return dataclasses.replace(setup, dtype=choice.dtype)


def _bench(
    name: str,
    load: Callable[[str, str], Transformer],
    schedules: Sequence[str],
    tokenizer: Tokenizer | None,
    setup: Setup,
    sampling: Sampling,
    report: Callable[[Row], None] | None,
) -> list[Row]:
    given = {name: getattr(setup, name) for name in ("guidance_scale", "guidance_interval")}
    sampling = dataclasses.replace(sampling, **{name: value for name, value in given.items() if value is not None})
    device = torch.device(setup.device)
    bandwidth, arithmetic = _machine(setup.dtype, device, setup.clock)
    if tokenizer is not None:
        tokenizer = tokenizer.to(device)
    decoding: dict[int, float] = {}  # the same for every schedule
    rows = []
    for schedule in schedules:
        model = load(schedule, setup.dtype)  # the one before it is gone by now, which the peak memory relies on
        needed = work(model, sampling)
        steps: float = model.layout.schedule.num_steps
        session = Session(model, compiled=setup.compiled)
        for batch in setup.batch_sizes:
            condition = any_condition(model.config, batch)
            _reset_peak(device)
            run: Callable[[], Any] = partial(generate, model, condition, sampling, session=session)
            if schedule == JACOBI:
                run = partial(jacobi, model, condition, sampling, noise="gumbel")
            times, made = _times(run, setup, device)
            codes, steps = made if schedule == JACOBI else (made, steps)
            seconds, peak = statistics.median(times), _peak(device)
            if tokenizer is not None and batch not in decoding:
                decoding[batch] = statistics.median(
                    _times(partial(_inferred, tokenizer.decode, codes), setup, device)[0]
                )
            both = seconds + decoding[batch] if tokenizer is not None else None
            read = steps * needed.weights_per_step + needed.weights_once
            reading = read * WEIGHT_BYTES[setup.dtype] / bandwidth
            multiplying = batch * 2 * needed.products / arithmetic
            facts = {
                "schedule": schedule,
                "steps": steps,
                "latency_with_pixels_seconds": both,
                "images_per_second_with_pixels": None if both is None else batch / both,
                "peak_memory_bytes": peak,
                "reading_floor_seconds": reading,
                "arithmetic_floor_seconds": multiplying,
                "floor_fraction": max(reading, multiplying) / seconds,
                "weights_per_step": needed.weights_per_step,
                "compiled": setup.compiled,
                "guidance_scale": sampling.guidance_scale,
                "guidance_interval": sampling.guidance_interval,
            }
            rows.append(setup.row(name, "sample", batch, times, setup.dtype, **facts))
            if report is not None:
                report(rows[-1])
        del model, session, run
    return rows


def _preset_config(name: str) -> ModelConfig:
    preset = find(name)
    if preset.kind in TOKENIZERS:
        raise ValueError(f"preset {name!r} is a tokenizer; give one of the models, such as NAR-B")
    return ModelConfig(**preset.config)


def _random(config: ModelConfig, precision: str | torch.dtype | None, device: torch.device | str) -> Transformer:
    """A model with random weights, the same every time; the output, which starts at zero, is random too."""
    generator = torch.Generator().manual_seed(0)
    with without_weights():
        model = Transformer(config)

    def draw(name: str, into: Tensor) -> None:
        into.fill_(1.0) if "norm" in name else into.normal_(std=0.02, generator=generator)

    return fill(model, draw, precision, device).eval()


def _num_weights(module: nn.Module) -> int:
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | PackedLinear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def _machine(dtype: str, device: torch.device, clock: str) -> tuple[float, float]:
    """Bytes read per second, and operations per second of a large product in this precision, as measured now."""
    memory = torch.empty(2**26, device=device).fill_(1.0)  # 256 MiB, more than caches hold
    read = min(_time(lambda: memory.sum(), device, clock) for _ in range(5))
    side = 2048 if device.type == "cpu" else 8192
    layer = convert(nn.Sequential(nn.Linear(side, side, bias=False)), dtype, device)
    kind = getattr(torch, dtype) if device.type != "cpu" or dtype == "bfloat16" else torch.float32
    x = torch.randn(side, side, device=device, dtype=kind)
    with torch.inference_mode():
        multiply = min(_time(lambda: layer(x), device, clock) for _ in range(5))
    return memory.numel() * 4 / read, 2 * side**3 / multiply


def _times(run: Callable[[], Result], setup: Setup, device: torch.device) -> tuple[list[float], Result]:
    """The seconds of each repetition, and what `run` gave."""
    given: list[Result] = []

    def once() -> None:
        given[:] = [run()]

    for _ in range(setup.warmups):
        once()
    return [_time(once, device, setup.clock) for _ in range(setup.repetitions)], given[0]


def _time(run: Callable[[], object], device: torch.device, clock: str) -> float:
    now = CLOCKS[clock]
    _wait(device)
    started = now()
    run()
    _wait(device)
    return now() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.inference_mode()
def _inferred(function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    return function(given)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the process's peak to what it uses now


def _peak(device: torch.device) -> int | None:
    """Peak memory in bytes since `_reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return int(found[1]) * 1024 if found else None
    return None


def device_name(device: torch.device) -> str:
    """What rows call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return str(device)
