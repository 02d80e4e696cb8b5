"""The command `nar`: one verb a function, heavy imports inside them, errors as one line.

Knows options and files; the work is done by the modules that each verb names.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nar import __version__

if TYPE_CHECKING:
    from nar.pipeline import Output, Pipeline

app = typer.Typer(
    name="nar",
    help="Fast autoregressive image and video generation. Every command has --help with an example.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A bundled name (fashion), a model folder, or a hub id.")]


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2, with a traceback only under --debug."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped", err=True)
        code = 130
    except Exception as error:
        # typer's own usage errors, whichever click they come from, know how to describe themselves.
        describe = getattr(error, "format_message", None)
        expected = describe is not None or isinstance(error, ValueError | OSError | ImportError | ArithmeticError)
        if debug or not expected:
            raise
        typer.echo(f"nar: {' '.join((describe() if describe else str(error)).split())}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[  # noqa: ARG001 main() reads it, wherever it stands
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: nar sample fashion --class-label sneaker -n 8 --seed 1 -o sneakers.png --gif")
def sample(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="A contact sheet (.png), an animation (.gif), an array (.npz), or a folder for PNGs."
        ),
    ],
    class_label: Annotated[
        list[str] | None,
        typer.Option("--class-label", help="Name or number of a class; may be repeated. Default: all, at most ten."),
    ] = None,
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, help="Pictures of each class; in all with --labels.")
    ] = 4,
    drawn_labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="balanced or random, over all classes: a set for evaluation, shared by torchrun's processes.",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of guidance, 1.0 is off. Default: the model's own.")
    ] = None,
    guidance_interval: Annotated[
        int | None, typer.Option(help="End guidance once more than this number of tokens are drawn.")
    ] = None,
    guidance_curve: Annotated[
        str | None, typer.Option(help="constant, linear, cosine or power, over the fronts.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; 0 takes the most likely token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens, 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens up to this mass.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i depends on (seed, i) only.")] = 0,
    gif: Annotated[
        bool, typer.Option("--gif", help="Also write an animation of the pictures growing front by front.")
    ] = False,
    grid: Annotated[
        str | None, typer.Option(metavar="HxW", help="Codes per axis. Default: what it was trained on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 40,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or on a CPU int8.")] = "float32",
) -> None:
    """Draw pictures with a model."""
    if drawn_labels is not None:
        given = {
            "guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "guidance_curve": guidance_curve,
            "temperature": temperature, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip
        if class_label or gif:
            raise ValueError("--labels draws from all classes: it goes with neither --class-label nor --gif")
        _sample_set(model, output, number, drawn_labels, given, seed, grid, batch_size, device, dtype)
        return
    _check_output(output)
    from time import perf_counter

    from tqdm import tqdm

    from nar.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, device=_device(device), dtype=dtype)
    if grid is not None:
        pipe = pipe.at_grid(_sizes(grid))
    labels = class_label or [str(index) for index in range(min(10, pipe.model.config.num_classes))]
    fronts: dict[int, list[Any]] = {}
    animated = gif or output.suffix == ".gif"
    started = perf_counter()
    steps = len(labels) * number * pipe.model.layout.schedule.num_steps
    with tqdm(total=steps, desc="drawing", unit="step", leave=False, disable=None) as bar:

        def report(_: Pipeline, front: int, codes: Any) -> None:
            bar.update(len(codes))
            if animated:
                fronts.setdefault(front, []).append(codes)

        result = pipe(
            labels,
            num_images_per_prompt=number,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_curve=guidance_curve,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            output_type="np" if output.suffix == ".npz" else "pil",
            callback_on_front_end=report,
        )
    seconds = perf_counter() - started
    settings = {
        "model": model,
        "seed": seed,
        "guidance_scale": pipe.sampling.guidance_scale if guidance_scale is None else guidance_scale,
        "guidance_interval": guidance_interval,
        "guidance_curve": guidance_curve or pipe.sampling.guidance_curve,
        "temperature": pipe.sampling.temperature if temperature is None else temperature,
        "top_k": pipe.sampling.top_k if top_k is None else top_k,
        "top_p": pipe.sampling.top_p if top_p is None else top_p,
        "grid": list(pipe.model.config.grid),
        "dtype": dtype,
        "version": __version__,
    }
    _write(output, pipe, result, settings)
    written = [output]
    if animated:
        written = [output] if output.suffix == ".gif" else [output, output.with_suffix(".gif")]
        _write_growth(written[-1], pipe, fronts, result)
    count = len(result.class_labels)
    typer.echo(f"{count} pictures in {seconds:.1f} s, {pipe.model.layout.schedule.num_steps} steps each")
    for path in written:
        typer.echo(f"wrote {path}")


def _sample_set(
    model: str, output: Path, number: int, labels: str, given: dict[str, Any], seed: int, grid: str | None,
    batch_size: int, device: str | None, dtype: str,
) -> None:  # fmt: skip
    import dataclasses

    from nar.folder import digest
    from nar.pipeline import Pipeline, find_model
    from nar.samples import sample_set
    from nar.training.distributed import joined

    with joined(device or "auto") as workers:
        pipe = Pipeline.from_pretrained(model, device=workers.device, dtype=dtype)
        pipe = pipe if grid is None else pipe.at_grid(_sizes(grid))
        sampling = dataclasses.replace(
            pipe.sampling, **{key: value for key, value in given.items() if value is not None}
        )
        sample_set(
            pipe, output, number, labels, sampling=sampling, seed=seed, batch_size=batch_size, rank=workers.rank,
            num_processes=workers.count, wait=workers.wait,
            settings={"model": digest(find_model(model)), "dtype": dtype, "grid": grid or ""},
        )  # fmt: skip
        if workers.first:
            typer.echo(f"{number} pictures, {labels} labels\nwrote {output}")


@app.command(epilog="Example: nar train fashion run=runs/mine batch_size=128")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the recipe's.")
    ] = None,
    override: Annotated[bool, typer.Option("--override", help="Go on with a run whose settings have changed.")] = False,
) -> None:
    """Train a tokenizer or a model from a recipe. The same command again resumes; DIR/model is the result."""
    from nar.training.tasks import run_recipe

    folder = run_recipe(recipe, overrides or [], override=override)
    typer.echo("stopped, and saved: the same command goes on" if folder is None else f"wrote {folder}")


@app.command(epilog="Example: nar extract runs/tokenizer/model --data pictures/ --size 256 --views flip -o codes/")
def extract(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_TOKENIZER", help="A tokenizer folder, or a model that has one inside.")
    ],
    data: Annotated[
        str, typer.Option("--data", help="A folder, .parquet, .tar, hub id, or the word fashion-mnist or toy.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the codes. The same command resumes.")],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side. Default: the model's own, else 256.")] = None,
    views: Annotated[str, typer.Option(help="Of each picture: centre, flip (and mirrored) or ten-crop.")] = "centre",
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    label: Annotated[str, typer.Option(help="Column of a table that holds the class.")] = "label",
    group: Annotated[str, typer.Option(help="Column of a table: samples of one group are held out together.")] = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
) -> None:
    """Turn pictures into the codes of a tokenizer, for training. Under torchrun the processes share the work."""
    from nar.data import extract as extraction
    from nar.data.sources import open_source
    from nar.folder import read_config
    from nar.pipeline import find_model
    from nar.training.distributed import joined

    folder = find_model(model)
    config = read_config(folder)
    if config.get("kind") == "transformer":
        folder = folder / "tokenizer"
        levels = read_config(folder)["tokenizer"].get("channel_multipliers", ())
        size = size or config["model"]["grid"][-1] * 2 ** (len(levels) - 1)
    size = size or 256
    with joined(device or "auto") as workers:
        extraction.extract(
            folder, open_source(data, size=size, split=split, label=label, group=group), output, size=size, kind=views,
            batch_size=batch_size, device=workers.device, threads=threads, rank=workers.rank, count=workers.count,
            wait=workers.wait,
        )  # fmt: skip
        if workers.first:
            manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
            grid = "x".join(map(str, manifest["grid"]))
            typer.echo(
                f"{manifest['num_samples']} pictures, {manifest['num_views']} views of {grid} codes each, "
                f"{manifest['num_broken']} broken"
            )
            typer.echo(f"wrote {output}")


@app.command("eval", epilog="Example: nar eval --real pictures/test --fake samples --json report.json")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to draw the fake pictures with, as --fake MODEL.")
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            help="Real pictures: a folder, .npz with arr_0, .parquet, the word fashion-mnist or a folder with its "
            "files, or a reference .npz (mu, sigma) as ADM's."
        ),
    ] = None,
    fake: Annotated[
        str | None, typer.Option(help="Pictures to judge: a folder, .npz, .parquet; or a model to draw them with.")
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(help="Other real pictures: their score is the floor. Default: one half of --real to the other."),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(help="The 2015 Inception weights (.pth of pytorch-fid or torch-fidelity): FID and ADM's numbers."),
    ] = None,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Bits per token of MODEL on --real, and what its fronts cost.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="Another model of the same tokenizer, for --likelihood: paired by picture.")
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Judge clips with TransNetV2: FD-TransNetV2.")] = False,
    i3d: Annotated[
        Path | None, typer.Option(help="The published i3d_torchscript.pt: FVD of clips, covariances divided by n.")
    ] = None,
    i3d_variant: Annotated[
        str, typer.Option(help="How clips are prepared for I3D: stylegan-v (also LARP's way) or videogpt.")
    ] = "stylegan-v",
    num_frames: Annotated[int | None, typer.Option(min=2, help="Cut clips into pieces of this many frames.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole report here.")] = None,
    write_reference: Annotated[
        Path | None, typer.Option(help="Write the statistics of --real to this .npz, as ADM's, and stop.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of fashion-mnist: train or test.")] = "test",
    size: Annotated[int | None, typer.Option(min=8, help="Crop and resize all pictures to this many pixels.")] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=2, help="Pictures that a model draws.")] = 10_000,
    labels: Annotated[str, typer.Option(help="Classes that a model draws: balanced or random.")] = "balanced",
    guidance_scale: Annotated[float | None, typer.Option(help="Of a model, 1.0 is off. Default: its own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of a model. Default: its own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of a model, 0 is off. Default: its own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of a model. Default: its own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn pictures, halves and resamplings.")] = 0,
    calibration: Annotated[
        float, typer.Option(help="Share of patches exchanged in the row that shows what a defect costs, 0 is off.")
    ] = 0.05,
    resamplings: Annotated[int, typer.Option(min=0, help="For the confidence intervals, 0 is off.")] = 1000,
    cache: Annotated[Path, typer.Option(help="Where features of files are kept, by their hash.")] = Path(
        "~/.cache/nar/features"
    ),
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a model: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Judge pictures against real ones: one table, and a JSON report with all that changes a number."""
    import warnings

    from nar.metrics.evaluate import as_table
    from nar.metrics.evaluate import evaluate as judge
    from nar.metrics.evaluate import write_reference as write

    if real is None:
        raise ValueError("give real pictures to compare with: --real FOLDER (or .npz, .parquet)")
    if write_reference is not None:
        real_pictures = _real_pictures(real, split, size)
        write(write_reference, real_pictures, inception=inception, size=size, seed=seed)
        typer.echo(f"wrote {write_reference}")
        return
    if likelihood:
        if model is None:
            raise ValueError("--likelihood needs MODEL: nar eval MODEL --real PICTURES --likelihood")
        report = _likelihood(model, against, real, split, number, seed, _device(device), dtype)
        _report(report, _likelihood_table(report), json_file)
        return
    if (model is None) == (fake is None):
        raise ValueError("give one of MODEL and --fake: the pictures to judge, or the model that draws them")
    source: Any = fake
    made_with: dict[str, Any] | None = None
    if model is not None or _is_model(str(fake)):
        from nar.folder import WEIGHTS, read_config
        from nar.metrics.pictures import digest
        from nar.pipeline import Pipeline, find_model

        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        pipe = Pipeline.from_pretrained(model or str(fake), device=_device(device), dtype=dtype)
        source, made_with = _drawn_pictures(
            pipe, number, labels, seed, batch_size, {name: value for name, value in given.items() if value is not None}
        )
        folder = find_model(model or str(fake))
        made_with = {"model": model or fake, **made_with, "dtype": dtype, "weights_sha256": digest(folder / WEIGHTS)}
        made_with["training"] = read_config(folder).get("training")
        patch = pipe.tokenizer.config.patch_size
        size = size or pipe.model.config.grid[0] * patch
    detector = None
    if i3d is not None or video:
        from nar.metrics.video import I3DDetector, TransNetDetector

        place = _device(device) or "cpu"
        detector = TransNetDetector(place) if i3d is None else I3DDetector(i3d, i3d_variant, place)
    with warnings.catch_warnings(record=True):  # they are in the report, and printed below
        warnings.simplefilter("always")
        report = judge(
            _real_pictures(real, split, size),
            source,
            inception=inception,
            detector=detector,
            num_frames=num_frames,
            floor=None if floor is None else _real_pictures(floor, split, size),
            size=size,
            calibration=calibration,
            resamplings=resamplings,
            seed=seed,
            cache=cache,
            batch_size=batch_size,
            device=_device(device),
            settings=made_with,
        )
    for text in report["warnings"]:
        typer.echo(f"warning: {text}", err=True)
    _report(report, as_table(report), json_file)


def _report(report: dict[str, Any], table: str, json_file: Path | None) -> None:
    typer.echo(table)
    if json_file is not None:
        text = json.dumps(report, indent=2) + "\n"
        _atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))
        typer.echo(f"wrote {json_file}")


def _likelihood(
    model: str, against: str | None, real: str, split: str, number: int, seed: int, device: str | None, dtype: str
) -> dict[str, Any]:
    """Held-out bits per token of one model, or of two, on the same pictures."""
    import torch

    from nar.data.sources import load_pictures
    from nar.folder import WEIGHTS
    from nar.metrics.evaluate import mean_interval
    from nar.metrics.pictures import digest
    from nar.pipeline import Pipeline, find_model
    from nar.training.likelihood import bits_per_token, independence_cost
    from nar.training.tasks import as_pixels

    names = [model] if against is None else [model, against]
    folders = [find_model(name) for name in names]
    tokenizers = [digest(folder / "tokenizer" / WEIGHTS) for folder in folders if (folder / "tokenizer").is_dir()]
    if len(set(tokenizers)) > 1:
        raise ValueError(f"{model} and {against} have different tokenizers: bits of different codes can't be compared")
    pipes = [Pipeline.from_pretrained(folder, device=device, dtype=dtype) for folder in folders]
    size = pipes[0].model.config.grid[0] * pipes[0].tokenizer.config.patch_size
    pictures = load_pictures(real, size=size, split=split if _is_fashion(real) else "train")
    # Numbers of the classes are those of the model: by name where it has names, else by place.
    classes = [pipes[0].label_index(name) for name in pictures.class_names] if pipes[0].class_names else None
    labels = torch.from_numpy(pictures.labels[:number])
    labels = labels if classes is None else torch.tensor(classes)[labels]
    with torch.inference_mode():
        starts = range(0, len(labels), 250)
        place = next(pipes[0].tokenizer.parameters()).device
        pixels = (as_pixels(pictures.images[start : min(start + 250, len(labels))]).to(place) for start in starts)
        codes = torch.cat([pipes[0].tokenizer.encode(part).cpu() for part in pixels]).clone()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))  # sources are often by class
    codes, labels = codes[order], labels[order]
    bits = [bits_per_token(pipe.model, codes, labels, progress=True).numpy() for pipe in pipes]
    cost = independence_cost(pipes[0].model, codes, labels, seed=seed, progress=True).numpy()
    report: dict[str, Any] = {
        "bits_per_token": float(bits[0].mean()),
        "independence_cost": float(cost.mean()),
        "interval": {
            "bits_per_token": mean_interval(bits[0], seed=seed), "independence_cost": mean_interval(cost, seed=seed)
        },
        "settings": {
            "model": names[0], "against": against, "num_real": len(codes), "seed": seed, "dtype": dtype,
            "schedule": [pipe.model.config.schedule for pipe in pipes], "guidance_scale": 1.0,
            "real": {"name": Path(real).name, "split": split, "codes_of": "the model's own tokenizer"},
            "weights_sha256": [digest(folder / WEIGHTS) for folder in folders], "tokenizer_sha256": tokenizers[0],
            "versions": {"nar": __version__, "torch": torch.__version__},
        },
    }  # fmt: skip
    if against is not None:
        difference = bits[0] - bits[1]
        report |= {"bits_per_token_against": float(bits[1].mean()), "difference": float(difference.mean())}
        report["interval"]["bits_per_token_against"] = mean_interval(bits[1], seed=seed)
        report["interval"]["difference"] = mean_interval(difference, seed=seed)
    return report


def _likelihood_table(report: dict[str, Any]) -> str:
    rows = [
        ("bits_per_token", "held-out bits per token"),
        ("independence_cost", "of which at least, for drawing a front's tokens independently"),
        ("bits_per_token_against", "the other model's bits per token"),
        ("difference", "difference, paired by picture"),
    ]
    lines = [
        f"| {text} | {report[name]:.4f} | {low:.4f} to {high:.4f} |"
        for name, text in rows
        if name in report
        for low, high in [report["interval"][name]]
    ]
    return "\n".join(["| | value | 95 % |", "|---|---|---|", *lines])


def _is_fashion(source: str) -> bool:
    path = Path(source).expanduser()
    return source == "fashion-mnist" or (path.is_dir() and any(path.glob("*-idx3-ubyte*")))


def _is_model(source: str) -> bool:
    from nar.pipeline import bundled_names

    return source in bundled_names() or (Path(source).expanduser() / "config.json").is_file()


def _real_pictures(source: str, split: str, size: int | None) -> Any:
    """What `nar.metrics` reads is passed on; Fashion-MNIST, which only `nar.data` knows, is read here."""
    if not _is_fashion(source):
        return Path(source).expanduser()
    from nar.data.sources import load_pictures

    return [load_pictures(source, size=size or 32, split=split).images]


def _drawn_pictures(
    pipe: Pipeline, number: int, labels: str, seed: int, batch_size: int, changes: dict[str, Any]
) -> tuple[Iterator[Any], dict[str, Any]]:
    """An iterator that draws as it is read, and what it was asked for. Picture i depends on (seed, i) only."""
    import dataclasses

    import torch

    from nar.condition import ClassCondition
    from nar.sampling import generate

    num_classes = pipe.model.config.num_classes
    if labels not in ("balanced", "random"):
        raise ValueError(f"labels must be balanced or random, not {labels!r}")
    sampling = dataclasses.replace(pipe.sampling, **changes)
    chosen = torch.arange(number) % num_classes
    if labels == "random":
        chosen = torch.randint(num_classes, (number,), generator=torch.Generator().manual_seed(seed))

    def draw() -> Iterator[Any]:
        for start in range(0, number, batch_size):
            rows = range(start, min(start + batch_size, number))
            condition = ClassCondition(chosen[rows.start : rows.stop])
            yield pipe.pictures(generate(pipe.model, condition, sampling, seed=seed, indices=rows), "np")

    facts = {"labels": labels, "seed": seed, **dataclasses.asdict(sampling), "grid": list(pipe.model.config.grid)}
    return draw(), facts


@app.command(epilog="Example: nar convert --kind nar-c2i c2i_L_256.pt --tokenizer models/vq-16 -o models/nar-l")
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A published .pt, .pth or .safetensors file, or its folder.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="nar-c2i, nar-t2i, nar-c2v, nar-fp or llamagen-gpt: a model; llamagen-vq or larp-tokenizer: a "
            "tokenizer."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help="Published size, see nar info --presets. Default: recognised by its sizes.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="model, ema, or ema:DECAY, where a file holds several sets of weights.")
    ] = "model",
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of a size without preset.")] = None,
    grid: Annotated[
        str | None, typer.Option(help="Codes along each axis: 24x24 for 384 pixels, 4x16x16 for video.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A converted tokenizer's folder, copied into the model's to make pictures.")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="Names of the classes: a text file with one a line, or a JSON list.")
    ] = None,
    prefix_attention: Annotated[
        str, typer.Option(help="Frame prediction: given codes see earlier ones (causal) or all (full).")
    ] = "causal",
    l2_norm: Annotated[bool, typer.Option(help="Image tokenizers: whether codes are compared by direction.")] = True,
) -> None:
    """Turn a published checkpoint into a model folder. Nothing in the file is run; every tensor is accounted for."""
    from nar.convert import convert as convert_checkpoint

    convert_checkpoint(
        kind,
        source,
        output,
        preset=preset,
        weights=weights,
        num_heads=num_heads,
        grid=_sizes(grid) if grid else None,
        class_names=_names(class_names) if class_names else (),
        tokenizer=tokenizer,
        prefix_attention=prefix_attention,
        l2_norm=l2_norm,
    )
    typer.echo(f"wrote {output}")


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"grid {text!r} must be whole numbers joined by x, such as 16x16 or 4x16x16")
    return tuple(map(int, sizes))


def _names(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} must hold a JSON list of names, in the order of the classes")
    return names


@app.command(
    epilog="Example: nar bench --preset NAR-B --dtype float16 --repetitions 2 --json bench.json --plot bench.png"
)
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A bundled name, a model folder, or a hub id.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A published size with random weights instead; see nar info --presets.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Pictures at once.")] = "1",
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="raster, par (four regions) or manhattan; may be repeated. Default: all for a preset, "
            "a model's own otherwise; its others run on random weights."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1.0 is off. Default: the model's own; 2.0 for image presets, 1.25 for video.")
    ] = None,
    guidance_interval: Annotated[int | None, typer.Option(help="End guidance after this number of tokens.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the feed-forward layers (torch.compile; for GPUs).")
    ] = False,
    pixels: Annotated[bool, typer.Option("--pixels/--tokens-only", help="Also time the pixel decoder.")] = True,
    warmups: Annotated[int, typer.Option(min=0, help="Generations before the clock starts.")] = 1,
    repetitions: Annotated[int, typer.Option(min=1, help="Generations timed; the median counts.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or on a CPU int8.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw latency, memory, throughput over batch sizes (.png).")
    ] = None,
) -> None:
    """Measure how fast models draw: schedules side by side, beside what the machine could do at best."""
    if (model is None) == (preset is None):
        raise ValueError("give either MODEL or --preset NAME (see nar info --presets), not both and not neither")
    try:
        sizes = tuple(int(part) for part in batch_sizes.split(","))
    except ValueError:
        raise ValueError(f"--batch-sizes must be numbers such as 1,8, not {batch_sizes!r}") from None
    if plot_file is not None and plot_file.suffix != ".png":
        raise ValueError(f"--plot {plot_file} must end in .png")
    import dataclasses

    import torch

    from nar import bench as measure

    setup = measure.Setup(
        batch_sizes=sizes,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        dtype=dtype,
        device=_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"),
        pixels=pixels,
        compiled=compiled,
        warmups=warmups,
        repetitions=repetitions,
    )

    def report(row: measure.Row) -> None:
        typer.echo(f"{row.schedule}, batch {row.batch_size}: {row.latency_seconds:.3f} s", err=True)

    if preset is not None:
        rows = measure.bench_preset(preset, setup, schedule or measure.SCHEDULES, report=report)
    else:
        rows = measure.bench_folder(model or "", setup, schedule or (), report=report)
    first = rows[0]
    typer.echo(
        f"{first.model}: {first.dtype} on {first.device}, {first.threads} threads, guidance {first.guidance_scale}, "
        f"medians of {first.repetitions} after {first.warmups + 1} warm-ups"
    )
    typer.echo(measure.table(rows))
    for line in measure.compare(rows):
        typer.echo(line)
    if json_file is not None:
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
        _atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))
    if plot_file is not None:
        _atomically(plot_file, lambda path: measure.plot(rows, path))


@app.command(epilog="Example: nar info fashion")
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A bundled name, a model folder, or a hub id.")
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the published sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model is: parameters, grid, steps, tokenizer, how it was trained."""
    if presets:
        from nar.presets import PRESETS

        if as_json:
            typer.echo(json.dumps({name: vars(preset) for name, preset in PRESETS.items()}, indent=2, default=list))
            return
        for name, preset in PRESETS.items():
            grid = "x".join(map(str, preset.config.get("grid", ()))) or "any"
            typer.echo(f"{name:<16} {preset.kind:<15} {preset.num_parameters:>13,} parameters  grid {grid}")
        return
    if model is None:
        from nar.config import recipe_names
        from nar.pipeline import bundled_names

        typer.echo(
            f"nar {__version__}\nbundled models: {', '.join(bundled_names())}\nrecipes: {', '.join(recipe_names())}"
        )
        return
    facts = _facts(model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        typer.echo(f"{key:<{width}}  {value}")


def _facts(model: str) -> dict[str, Any]:
    from nar.folder import read_config
    from nar.model import Transformer
    from nar.pipeline import find_model
    from nar.tokenizer import load_tokenizer
    from nar.tokenizer.video import VideoTokenizerConfig

    folder = find_model(model)
    config = read_config(folder)
    facts: dict[str, Any] = {"folder": str(folder), "kind": config.get("kind")}
    if config.get("kind") == "transformer":
        transformer = Transformer.from_pretrained(folder)
        shape, schedule = transformer.config, transformer.layout.schedule
        facts |= {
            "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
            "grid": "x".join(map(str, shape.grid)),
            "schedule": shape.schedule,
            "steps": f"{schedule.num_steps} for {schedule.num_positions} tokens",
            "vocabulary": shape.vocab_size,
            "layers": f"{shape.num_blocks} blocks of width {shape.dim}, {shape.num_heads} attention heads",
        }
        if shape.num_classes:
            facts["classes"] = ", ".join(config.get("class_names", [])[:40]) or shape.num_classes
        if shape.text_dim:
            facts["text"] = f"{shape.text_length} features of width {shape.text_dim}"
        if shape.prefix_grid:
            facts["given codes"] = f"{'x'.join(map(str, shape.prefix_grid))}, {shape.prefix_attention}"
        folder = folder / "tokenizer"
        facts["tokenizer"] = f"none: copy a converted tokenizer to {folder} for pictures"
    if folder.is_dir():
        tokenizer = load_tokenizer(folder)
        sizes = tokenizer.config
        patch = [sizes.patch_size] * 2
        if isinstance(sizes, VideoTokenizerConfig):
            patch = [sizes.temporal_patch_size, *patch]
        facts["tokenizer"] = (
            f"{read_config(folder).get('kind')}, {sum(p.numel() for p in tokenizer.parameters()):,} parameters, "
            f"patch {'x'.join(map(str, patch))}, {sizes.vocab_size} codes"
        )
    training = config.get("training", {})
    if training:
        heldout = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["heldout"].items())
        facts["training"] = f"{training['images_seen']:,} images, {training['hours']} h; held-out: {heldout}"
    else:
        source = config.get("converted_from")
        facts["training"] = f"not recorded; converted from {source}" if source else "not recorded"
    return facts


def _device(name: str | None) -> str | None:
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}); try cpu") from error
    return name


def _check_output(output: Path) -> None:
    """Refuse a path that can't be written before any work is done."""
    if output.suffix not in {".png", ".gif", ".npz", ""}:
        raise ValueError(f"output {output} must end in .png, .gif or .npz, or be a folder, not {output.suffix!r}")
    if output.suffix and output.is_dir():
        raise ValueError(f"output {output} is a folder; give a file name")
    if not output.suffix and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output folder {output} must be new or empty")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(
            f"output {output} can't be written: {parent} is not a writable folder ({error.strerror})"
        ) from error


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary name beside `path`, then move it there: `path` is whole or untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".nar-", dir=path.parent))
    try:
        staged = staging / path.name
        write(staged)
        if path.is_dir():
            path.rmdir()
        staged.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(output: Path, pipe: Pipeline, result: Output, settings: dict[str, Any]) -> None:
    import numpy as np

    from nar.sheet import contact_sheet

    names = [pipe.label_name(label) for label in result.class_labels]
    if output.suffix == ".png":
        _atomically(output, contact_sheet(result.images, names).save)
    elif output.suffix == ".npz":
        labels = np.array(result.class_labels)
        _atomically(output, lambda path: np.savez_compressed(path, arr_0=result.images, labels=labels))
    elif not output.suffix:

        def write(folder: Path) -> None:
            folder.mkdir()
            records = []
            for index, (image, name) in enumerate(zip(result.images, names, strict=True)):
                image.save(folder / f"{index:06d}.png")
                records.append({"file": f"{index:06d}.png", "label": name, "index": index, **settings})
            (folder / "samples.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

        _atomically(output, write)


def _write_growth(path: Path, pipe: Pipeline, fronts: dict[int, list[Any]], result: Output) -> None:
    import torch

    from nar.sheet import contact_sheet, save_animation

    names = [pipe.label_name(label) for label in result.class_labels]
    frames = [contact_sheet(pipe.pictures(torch.cat(codes)), names) for _, codes in sorted(fronts.items())]
    _atomically(path, lambda staged: save_animation(frames, staged))
