"""`nar eval`: two sets of pictures or clips, or a model and real pictures, to one table and a JSON report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nar import __version__
from nar.cli.app import app, atomically, usable_device

if TYPE_CHECKING:
    from nar.pipeline import Pipeline


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
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer folder: what it leaves of the held-out part of --real, beside baselines."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Of --tokenizer: the column whose samples are held out together. Default: as trained."),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Of --tokenizer: repeat edges up to a multiple of its patch.")
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="Of --tokenizer: write real and coded pictures, in pairs.")] = None,
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
    if tokenizer is not None:
        from nar.cli.reconstruct import as_table as tokenizer_table
        from nar.cli.reconstruct import judge_tokenizer

        report = judge_tokenizer(
            tokenizer, real, size=size, group=group, number=number, pad=pad, seed=seed, batch_size=batch_size,
            device=usable_device(device), inception=inception, sheet=sheet,
        )  # fmt: skip
        for text in report["warnings"]:
            typer.echo(f"warning: {text}", err=True)
        _report(report, tokenizer_table(report), json_file)
        return
    if likelihood:
        if model is None:
            raise ValueError("--likelihood needs MODEL: nar eval MODEL --real PICTURES --likelihood")
        report = _likelihood(model, against, real, split, number, seed, usable_device(device), dtype)
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
        pipe = Pipeline.from_pretrained(model or str(fake), device=usable_device(device), dtype=dtype)
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

        place = usable_device(device) or "cpu"
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
            device=usable_device(device),
            settings=made_with,
        )
    for text in report["warnings"]:
        typer.echo(f"warning: {text}", err=True)
    _report(report, as_table(report), json_file)


def _report(report: dict[str, Any], table: str, json_file: Path | None) -> None:
    typer.echo(table)
    if json_file is not None:
        text = json.dumps(report, indent=2) + "\n"
        atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))
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
    from nar.tokenizer.pixels import as_pixels
    from nar.training.likelihood import bits_per_token, independence_cost

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
