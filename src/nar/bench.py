"""How fast models draw: schedules side by side on one backbone, against what the machine could do at best.

Knows models, clocks and memory; does not know what is drawn, nor the command line.

Each row times whole generations after warm-ups and keeps the median. *Floors* are the least time that a machine needs,
from its own speed measured in the same run: to read every weight once a step, and to do the multiplications.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from nar.condition import Condition, PrefixCodes, TextFeatures
from nar.model import ModelConfig, Transformer
from nar.precision import PackedLinear, convert, fill
from nar.sampling import Sampling, Session, generate, last_guided
from nar.storage.folder import find_model, from_dict, read_config, without_weights
from nar.storage.presets import PRESETS, find
from nar.tokenizer import Tokenizer, load_tokenizer, new_tokenizer
from nar.tokenizer.causal import CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizerConfig

SCHEDULES = ("raster", "par", "manhattan")
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
IMAGE_GUIDANCE, VIDEO_GUIDANCE = 2.0, 1.25  # what the paper samples with


@dataclass(frozen=True)
class Row:
    """One measurement: a schedule at a batch size. Times are medians for the whole batch.

    Attributes:
        latency_with_pixels_seconds: tokens and the pixel decoder; None where it was left out.
        peak_memory_bytes: of the process (on a GPU: allocated there) while the row ran; None where it can't be told.
        reading_floor_seconds: reading the weights once a step.
        arithmetic_floor_seconds: the multiplications.
        floor_fraction: the larger floor over the latency.
        weights_per_step: matrix weights that one step reads.
    """

    model: str
    schedule: str
    steps: int
    batch_size: int
    latency_seconds: float
    images_per_second: float
    latency_with_pixels_seconds: float | None
    images_per_second_with_pixels: float | None
    peak_memory_bytes: int | None
    reading_floor_seconds: float
    arithmetic_floor_seconds: float
    floor_fraction: float
    weights_per_step: int
    dtype: str
    device: str
    threads: int
    compiled: bool
    guidance_scale: float
    warmups: int
    repetitions: int


@dataclass(frozen=True)
class TokenizerRow:
    """One measurement of a tokenizer: pictures (or clips) to codes, or back.

    Attributes:
        layout: of convolutions' weights, "contiguous" or "channels_last".
        change: against float32 of the contiguous layout: of codes, the share that differs; of pixels, the mean absolute
            difference in units of 1/255.
        fastest: of its operation and batch size.
    """

    tokenizer: str
    operation: str
    dtype: str
    layout: str
    batch_size: int
    latency_seconds: float
    images_per_second: float
    change: float
    fastest: bool
    size: tuple[int, ...]
    device: str
    threads: int
    warmups: int
    repetitions: int


@dataclass(frozen=True)
class Setup:
    """What to measure, and how often."""

    batch_sizes: tuple[int, ...] = (1,)
    guidance_scale: float | None = None
    guidance_interval: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    pixels: bool = True
    compiled: bool = False
    warmups: int = 1
    repetitions: int = 3

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes must be positive, not {self.batch_sizes}")
        if self.warmups < 0 or self.repetitions < 1:
            raise ValueError(f"warmups {self.warmups} must be at least 0, repetitions {self.repetitions} at least 1")


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


def preset_tokenizer(config: ModelConfig) -> Tokenizer:
    """A tokenizer of the published kind with random weights, for the grid of a preset."""
    if len(config.grid) == 2:
        return _random_tokenizer(ImageTokenizerConfig(vocab_size=config.vocab_size))
    return _random_tokenizer(VideoTokenizerConfig(vocab_size=config.vocab_size))


def _random_tokenizer(config: ImageTokenizerConfig | VideoTokenizerConfig) -> Tokenizer:
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    made = new_tokenizer(config)
    torch.random.set_rng_state(generator_state)
    return made.eval().requires_grad_(False)


def _tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a published size, of a tokenizer's folder, or inside a model's folder."""
    preset = PRESETS.get(str(source))
    if preset is not None and "channel_multipliers" in preset.config:
        return _random_tokenizer(ImageTokenizerConfig(**preset.config))
    if preset is not None and preset.kind == "larp-tokenizer":
        return _random_tokenizer(VideoTokenizerConfig(**preset.config))
    if preset is not None:
        raise ValueError(f"preset {source!r} is not a tokenizer; give VQ-16, VQ-8, LARP-L-long, or a folder")
    folder = find_model(source)
    return load_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)


def with_schedule(config: ModelConfig, schedule: str) -> ModelConfig:
    """The same backbone under another schedule; "par" takes four regions, two along each of the last two axes."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if schedule == config.schedule:
        return config
    regions = (1,) * (len(config.grid) - 2) + (2, 2) if schedule == "par" else ()
    return dataclasses.replace(config, schedule=schedule, regions=regions, head_depths=(), axis_heads=())


def bench_preset(
    name: str, setup: Setup, schedules: Sequence[str] = SCHEDULES, *, report: Callable[[Row], None] | None = None
) -> list[Row]:
    """Measure the backbone of a published size, with random weights, under several schedules."""
    config = _preset_config(name)
    tokenizer = preset_tokenizer(config) if setup.pixels else None
    models = ((schedule, partial(preset_model, name, schedule, setup.dtype, setup.device)) for schedule in schedules)
    default = IMAGE_GUIDANCE if len(config.grid) == 2 else VIDEO_GUIDANCE
    return _bench(name, models, tokenizer, setup, default, report)


def bench_folder(
    source: str | Path,
    setup: Setup,
    schedules: Sequence[str] = (),
    *,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure a model folder, a bundled name or a hub id; other schedules than its own run on random weights."""
    folder = find_model(source)
    config = read_config(folder)
    shape = from_dict(ModelConfig, config.get("model"), folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer") if setup.pixels and (folder / "tokenizer").is_dir() else None

    def load(schedule: str) -> Transformer:
        if schedule == shape.schedule:
            return Transformer.from_pretrained(folder, setup.dtype, setup.device)
        return _random(with_schedule(shape, schedule), setup.dtype, setup.device)

    models = ((schedule, partial(load, schedule)) for schedule in schedules or (shape.schedule,))
    default = float(config.get("sampling", {}).get("guidance_scale", 1.0))
    return _bench(str(source), models, tokenizer, setup, default, report)


def bench_tokenizer(
    source: str | Path, setup: Setup, *, report: Callable[[TokenizerRow], None] | None = None
) -> list[TokenizerRow]:
    """Measure a tokenizer, a folder or a published size with random weights, in every dtype and memory layout.

    Pictures have 16x16 codes and random pixels. `setup.dtype` is not used.
    """
    device = torch.device(setup.device)
    tokenizer = _tokenizer(source).to(device)
    config = tokenizer.config
    size: tuple[int, ...] = (16 * config.patch_size,) * 2  # of pixels
    if isinstance(config, VideoTokenizerConfig):
        size = (config.num_frames, config.image_size, config.image_size)
    elif isinstance(config, CausalTokenizerConfig):
        size = (1 + 3 * config.frames_per_code, *size)
    layouts = {"contiguous": torch.contiguous_format}
    if isinstance(tokenizer, ImageTokenizer):
        layouts["channels_last"] = torch.channels_last
    plain: dict[tuple[str, int], Tensor] = {}
    rows = []
    for dtype in ("float32", "bfloat16"):
        for layout, memory_format in layouts.items():
            tokenizer = tokenizer.to(getattr(torch, dtype), memory_format=memory_format)  # type: ignore[call-overload]
            for batch in setup.batch_sizes:
                pixels = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
                if ("encode", batch) not in plain:  # float32 comes first
                    codes = plain["encode", batch] = _inferred(tokenizer.encode, pixels)
                    plain["decode", batch] = _inferred(tokenizer.decode, codes)
                codes, fed = plain["encode", batch], pixels.to(getattr(torch, dtype))
                for operation, run in (
                    ("encode", partial(_inferred, tokenizer.encode, fed)),
                    ("decode", partial(_inferred, tokenizer.decode, codes)),
                ):
                    found, exact = run(), plain[operation, batch]
                    change = (found != exact).float() if operation == "encode" else (found - exact).abs() * 127.5
                    seconds = _median(run, setup, device)
                    row = TokenizerRow(
                        tokenizer=str(source),
                        operation=operation,
                        dtype=dtype,
                        layout=layout,
                        batch_size=batch,
                        latency_seconds=seconds,
                        images_per_second=batch / seconds,
                        change=float(change.mean()),
                        fastest=False,
                        size=size,
                        device=_device_name(device),
                        threads=torch.get_num_threads(),
                        warmups=setup.warmups,
                        repetitions=setup.repetitions,
                    )
                    rows.append(row)
                    if report is not None:
                        report(row)
    best = {
        min(
            (row for row in rows if (row.operation, row.batch_size) == kind),
            key=lambda row: row.latency_seconds,
        )
        for kind in plain
    }
    return [dataclasses.replace(row, fastest=row in best) for row in rows]


def compare(rows: Sequence[Row]) -> list[str]:
    """For each batch size, how much faster the schedule of the fewest steps is, beside what its steps promise.

    The promise is the ratio of weights read, steps times weights a step: extra blocks and heads count.
    """
    lines = []
    for batch in sorted({row.batch_size for row in rows}):
        same = [row for row in rows if row.batch_size == batch]
        best = min(same, key=lambda row: row.steps)
        for row in same:
            if row is not best:
                ratio = row.latency_seconds / best.latency_seconds
                steps = row.steps / best.steps
                promised = steps * row.weights_per_step / best.weights_per_step
                lines.append(
                    f"batch {batch}: {best.schedule} is {ratio:.2f} times as fast as {row.schedule}; "
                    f"ratio of steps {steps:.2f}, with its extra blocks {promised:.2f}, of which "
                    f"{ratio / promised:.0%} is reached"
                )
    return lines


def tokenizer_table(rows: Sequence[TokenizerRow]) -> str:
    """Rows as text, aligned; a star marks the fastest of each operation and batch size."""
    lines = [("operation", "batch", "dtype", "layout", "seconds", "per s", "change", "")]
    for row in sorted(rows, key=lambda row: (row.operation, row.batch_size)):
        change = f"{row.change:.2%} of codes" if row.operation == "encode" else f"{row.change:.2f} of 255"
        lines.append(
            (
                row.operation,
                str(row.batch_size),
                row.dtype,
                row.layout,
                f"{row.latency_seconds:.3f}",
                f"{row.images_per_second:.2f}",
                change,
                "*" if row.fastest else "",
            )
        )
    return _aligned(lines)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, aligned."""
    head = ("schedule", "steps", "batch", "seconds", "per s", "with pixels", "per s", "memory", "floors", "reached")
    lines = [head]
    for row in rows:
        pixels, rate = row.latency_with_pixels_seconds, row.images_per_second_with_pixels
        memory = row.peak_memory_bytes
        lines.append(
            (
                row.schedule,
                str(row.steps),
                str(row.batch_size),
                f"{row.latency_seconds:.3f}",
                f"{row.images_per_second:.2f}",
                "-" if pixels is None else f"{pixels:.3f}",
                "-" if rate is None else f"{rate:.2f}",
                "-" if memory is None else f"{memory / 1e9:.2f} GB",
                f"{row.reading_floor_seconds:.3f} / {row.arithmetic_floor_seconds:.3f}",
                f"{row.floor_fraction:.0%}",
            )
        )
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw latency, memory and throughput over batch sizes, one line a schedule, as in the paper's figure 5."""
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("seconds for a batch", lambda row: row.latency_seconds),
        ("peak memory, GB", lambda row: (row.peak_memory_bytes or 0) / 1e9),
        ("pictures per second", lambda row: row.images_per_second),
    ]
    width, height, colours = 380, 320, ("#c44e52", "#dd8452", "#4c72b0", "#55a868")
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(12), ImageFont.load_default(14)
    batches = sorted({row.batch_size for row in rows})
    names = list(dict.fromkeys(row.schedule for row in rows))
    for number, (title, value) in enumerate(panels):
        left, right, top, bottom = width * number + 56, width * (number + 1) - 16, 36, height - 44
        highest = max(value(row) for row in rows) or 1.0
        draw.text((left, 10), title, fill="black", font=large)
        draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
        for part in range(5):
            y = bottom - (bottom - top) * part / 4
            draw.line([(left, y), (right, y)], fill="#dddddd" if part else "black")
            draw.text((left - 6, y), f"{highest * part / 4:.3g}", fill="black", font=small, anchor="rm")
        span = max(1e-9, math.log(batches[-1] / batches[0]))
        across = {
            batch: (left + right) / 2
            if len(batches) == 1
            else left + 12 + (right - left - 24) * math.log(batch / batches[0]) / span
            for batch in batches
        }
        for batch, x in across.items():
            draw.text((x, bottom + 6), str(batch), fill="black", font=small, anchor="mt")
        draw.text(((left + right) / 2, bottom + 24), "batch size", fill="black", font=small, anchor="mt")
        for index, name in enumerate(names):
            colour = colours[index % len(colours)]
            own = sorted((row for row in rows if row.schedule == name), key=lambda row: row.batch_size)
            points = [(across[row.batch_size], bottom - (bottom - top) * value(row) / highest) for row in own]
            draw.line(points, fill=colour, width=2)
            for x, y in points:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
            if number == 0:
                draw.text((left + 10, top + 4 + 16 * index), name, fill=colour, font=large)
    sheet.save(path)


def _bench(
    name: str,
    models: Iterable[tuple[str, Callable[[], Transformer]]],
    tokenizer: Tokenizer | None,
    setup: Setup,
    default_guidance: float,
    report: Callable[[Row], None] | None,
) -> list[Row]:
    scale = default_guidance if setup.guidance_scale is None else setup.guidance_scale
    sampling = Sampling(guidance_scale=scale, guidance_interval=setup.guidance_interval)
    device = torch.device(setup.device)
    bandwidth, arithmetic = _machine(setup.dtype, device)
    if tokenizer is not None:
        tokenizer = tokenizer.to(device)
    decoding: dict[int, float] = {}  # the same for every schedule
    rows = []
    for schedule, load in models:
        model = load()  # the one before it is gone by now, which the peak memory relies on
        weights, products = _work(model, sampling)
        steps = model.layout.schedule.num_steps
        session = Session(model, compiled=setup.compiled)
        for batch in setup.batch_sizes:
            condition = _condition(model.config, batch)
            _reset_peak(device)
            run = partial(generate, model, condition, sampling, session=session)
            codes = run()  # one more warm-up
            seconds = _median(run, setup, device)
            peak = _peak(device)
            if tokenizer is not None and batch not in decoding:
                decoding[batch] = _median(partial(_inferred, tokenizer.decode, codes), setup, device)
            both = seconds + decoding[batch] if tokenizer is not None else None
            reading = steps * weights * WEIGHT_BYTES[setup.dtype] / bandwidth
            multiplying = batch * 2 * products / arithmetic
            row = Row(
                model=name,
                schedule=schedule,
                steps=steps,
                batch_size=batch,
                latency_seconds=seconds,
                images_per_second=batch / seconds,
                latency_with_pixels_seconds=both,
                images_per_second_with_pixels=None if both is None else batch / both,
                peak_memory_bytes=peak,
                reading_floor_seconds=reading,
                arithmetic_floor_seconds=multiplying,
                floor_fraction=max(reading, multiplying) / seconds,
                weights_per_step=weights,
                dtype=setup.dtype,
                device=_device_name(device),
                threads=torch.get_num_threads(),
                compiled=setup.compiled,
                guidance_scale=scale,
                warmups=setup.warmups,
                repetitions=setup.repetitions,
            )
            rows.append(row)
            if report is not None:
                report(row)
        del model, session, run
    return rows


def _preset_config(name: str) -> ModelConfig:
    preset = find(name)
    if not preset.kind.startswith(("nar-", "llamagen-gpt")):
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


def _condition(config: ModelConfig, batch: int) -> Condition:
    shape = (batch, config.text_length)
    return Condition(
        torch.arange(batch) % config.num_classes if config.num_classes else None,
        TextFeatures(torch.randn(*shape, config.text_dim), torch.ones(shape, dtype=torch.bool))
        if config.text_dim
        else None,
        PrefixCodes(torch.zeros(batch, *config.prefix_grid, dtype=torch.long)) if config.prefix_grid else None,
    )


def _work(model: Transformer, sampling: Sampling) -> tuple[int, int]:
    """Weights that one step reads, and multiplications for one picture, attention's included."""
    config, schedule = model.config, model.layout.schedule
    in_blocks = _num_weights(model.blocks)
    in_output = _num_weights(model.output)
    products, fed, guided = schedule.num_positions * in_output, 0, last_guided(sampling, schedule)
    for front, count in enumerate((config.num_condition, *schedule.slot_fronts[: schedule.num_steps - 1])):
        fed += count
        alone = count * (in_blocks + 2 * config.num_blocks * config.dim * fed)
        products += alone * (2 if front <= guided else 1)
    return in_blocks + in_output, products


def _num_weights(module: nn.Module) -> int:
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | PackedLinear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def _machine(dtype: str, device: torch.device) -> tuple[float, float]:
    """Bytes read per second, and operations per second of a large product in this precision, as measured now."""
    memory = torch.empty(2**26, device=device).fill_(1.0)  # 256 MiB, more than caches hold
    read = min(_time(lambda: memory.sum(), device) for _ in range(5))
    side = 2048 if device.type == "cpu" else 8192
    layer = convert(nn.Sequential(nn.Linear(side, side, bias=False)), dtype, device)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device.type != "cpu":
        kind = getattr(torch, dtype)
    x = torch.randn(side, side, device=device, dtype=kind)
    with torch.inference_mode():
        multiply = min(_time(lambda: layer(x), device) for _ in range(5))
    return memory.numel() * 4 / read, 2 * side**3 / multiply


def _median(run: Callable[[], object], setup: Setup, device: torch.device) -> float:
    for _ in range(setup.warmups):
        run()
    return statistics.median(_time(run, device) for _ in range(setup.repetitions))


def _time(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = perf_counter()
    run()
    _wait(device)
    return perf_counter() - started


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
        Path("/proc/self/clear_refs").write_text("5")  # sets the process's peak to what it uses now


def _peak(device: torch.device) -> int | None:
    """Peak memory in bytes since `_reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return int(found[1]) * 1024 if found else None
    return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return str(device)
