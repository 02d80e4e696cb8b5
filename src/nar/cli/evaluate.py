"""`nar eval`: two sets of pictures or clips, or a model and real pictures, to one table and a JSON report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nar import __version__
from nar.cli.app import SETTINGS, app, given_settings
from nar.evaluation.real import BATCH, CLIP_BATCH, load_part, real_classes, real_pictures
from nar.storage.files import atomically

if TYPE_CHECKING:
    from nar.evaluation.sets import Drawn
    from nar.metrics.defects import Defect
    from nar.pipeline import Pipeline

TOKEN_SHARES = (0.0, 0.02, 0.05, 0.1)  # of the calibration with a tokenizer; 0: only encoded and decoded
NUMBER = 10_000  # pictures that a model draws
# What the ways of judging read that need few of all options.
OF_REFERENCE = {"real", "split", "size", "inception", "seed", "batch_size", "device", "write_reference"}
OF_TOKENIZER = {
    "tokenizer", "real", "size", "group", "number", "num_frames", "pad", "refine", "sheet", "inception", "seed",
    "batch_size", "device", "json_file",
}  # fmt: skip
OF_LIKELIHOOD = {"model", "likelihood", "against", "real", "split", "number", "seed", "device", "dtype", "json_file"}
OF_WORDS = {
    "fake", "captions", "clip", "clip_prefix", "retrieval", "geneval", "detector_folder", "composed", "geneval_prompts",
    "composed_prompts", "near_copies", "real", "split", "size", "seed", "device", "json_file",
}  # fmt: skip
OF_SETS = {
    "model", "real", "fake", "floor", "inception", "tokenizer", "video", "i3d", "num_frames", "protocol", "json_file",
    "split", "size", "seed", "calibration", "resamplings", "cache", "batch_size", "device",
}  # fmt: skip
OF_DRAWING = {"number", "labels", "dtype", *SETTINGS}
PROTOCOLS = {"ucf101": {"num_frames": 16, "size": 128}}


@app.command("eval", epilog="Example: nar eval --real pictures/test --fake samples --json report.json")
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to draw the fake pictures with, as --fake MODEL.")
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            help="Real pictures: a folder, .npz with arr_0, .parquet, the word fashion-mnist or a folder with its "
            "files, or a reference .npz (mu, sigma) as ADM's. Clips: see --num-frames."
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
        typer.Option(
            help="A tokenizer folder, or emoji/tokenizer. Alone: what it leaves of the held-out part of --real, beside "
            "baselines. Beside drawn pictures: real ones with 2, 5, 10 % of their tokens redrawn; default: MODEL's."
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Of --tokenizer: the column whose samples are held out together. Default: as trained."),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Of --tokenizer: repeat edges up to a multiple of its patch.")
    ] = False,
    refine: Annotated[
        int,
        typer.Option(min=0, help="Of --tokenizer: also search better codes than its encoder's, in so many steps; 100."),
    ] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Of --tokenizer: write real and coded pictures, in pairs.")] = None,
    video: Annotated[bool, typer.Option("--video", help="Judge clips with TransNetV2: FD-TransNetV2.")] = False,
    i3d: Annotated[
        Path | None, typer.Option(help="The published i3d_torchscript.pt: FVD of clips, covariances divided by n.")
    ] = None,
    i3d_variant: Annotated[
        str, typer.Option(help="How clips are prepared for I3D: stylegan-v (also LARP's way) or videogpt.")
    ] = "stylegan-v",
    clip: Annotated[
        Path | None,
        typer.Option(help="CLIP score of --fake and its captions: a local transformers folder of a CLIP model."),
    ] = None,
    clip_prefix: Annotated[str, typer.Option(help="Put before captions; published: 'A photo depicts '.")] = "",
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="R@1, R@5 and concept accuracy of --fake, emoji with captions; offline.")
    ] = False,
    captions: Annotated[Path | None, typer.Option(help="Captions of --fake, one a line. Default: its own.")] = None,
    near_copies: Annotated[
        str | None, typer.Option(help="Training pictures: the share of --fake closer to them than 99 % of --real are.")
    ] = None,
    geneval: Annotated[
        Path | None, typer.Option(help="Judge a folder laid out as GenEval's; needs --detector and --clip.")
    ] = None,
    detector_folder: Annotated[
        Path | None, typer.Option("--detector", help="A local transformers folder of a Mask2Former, for --geneval.")
    ] = None,
    composed: Annotated[
        Path | None, typer.Option(help="Judge composed drawings in a folder laid out as GenEval's; offline.")
    ] = None,
    geneval_prompts: Annotated[Path | None, typer.Option(help="Write GenEval's prompts (.jsonl), and stop.")] = None,
    composed_prompts: Annotated[
        Path | None, typer.Option(help="Write the prompts of composed drawings (.jsonl), and stop.")
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(min=2, help="Cut clips into pieces of this many frames; a folder of pictures is then one clip."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="ucf101: pieces of 16 frames at 128x128, drawn clips with the classes of the real ones."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole report here.")] = None,
    write_reference: Annotated[
        Path | None, typer.Option(help="Write the statistics of --real to this .npz, as ADM's, and stop.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of sources that have both: train or test.")] = "test",
    size: Annotated[int | None, typer.Option(min=8, help="Crop and resize all pictures to this many pixels.")] = None,
    number: Annotated[
        int | None, typer.Option("--number", "-n", min=2, help="Pictures that a model draws. Default: 10000.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes that a model draws: balanced, random, or real: those of the real pictures."),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Of a model, 1.0 is off. Default: its own.")] = None,
    guidance_interval: Annotated[
        int | None, typer.Option(help="Of a model: guidance ends once more than this number of tokens are drawn.")
    ] = None,
    guidance_curve: Annotated[
        str | None, typer.Option(help="Of a model: constant, linear, cosine or power, over the fronts.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of a model. Default: its own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of a model, 0 is off. Default: its own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of a model. Default: its own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn pictures, halves and resamplings.")] = 0,
    calibration: Annotated[
        float,
        typer.Option(help="Share of patches exchanged, where there is no tokenizer; 0: no rows of known defects."),
    ] = 0.05,
    resamplings: Annotated[int, typer.Option(min=0, help="For the confidence intervals, 0 is off.")] = 1000,
    cache: Annotated[Path, typer.Option(help="Where features of files are kept, by their hash.")] = Path(
        "~/.cache/nar/features"
    ),
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 64 pictures, 8 clips.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a model: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Judge pictures against real ones: one table, and a JSON report with all that changes a number."""
    import warnings

    from nar.evaluation.words import TextOptions, text_report
    from nar.metrics.defects import motion_defects, swapped_patches
    from nar.metrics.evaluate import as_table
    from nar.metrics.evaluate import evaluate as judge
    from nar.metrics.reference import write_reference as write
    from nar.precision import usable_device
    from nar.storage.folder import find_model

    words = TextOptions(
        fake=fake, captions=captions, clip=clip, clip_prefix=clip_prefix, retrieval=retrieval, geneval=geneval,
        detector=detector_folder, composed=composed, geneval_prompts=geneval_prompts,
        composed_prompts=composed_prompts, near_copies=near_copies, real=real, split=split, size=size, seed=seed,
        device=device,
    )  # fmt: skip
    if words.wanted:
        _refuse_others(context, OF_WORDS, "judging pictures by words, or as near-copies,")
        report, table = text_report(words)
        _report(report, table, json_file if report else None)
        return
    if real is None:
        raise ValueError("give real pictures to compare with: --real FOLDER (or .npz, .parquet)")
    if write_reference is not None:
        _refuse_others(context, OF_REFERENCE, "--write-reference")
    of_tokenizer = tokenizer is not None and model is None and fake is None
    if of_tokenizer:
        _refuse_others(context, OF_TOKENIZER, "--tokenizer without --fake")
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be {' or '.join(PROTOCOLS)}, not {protocol!r}")
    fixed = PROTOCOLS.get(protocol or "", {})
    size, num_frames = size or fixed.get("size"), num_frames or fixed.get("num_frames")
    labels = labels or ("balanced" if protocol is None else "real")
    place, progress = usable_device(device), sys.stderr.isatty()
    if write_reference is not None:
        write(
            write_reference, real_pictures(real, split, size), inception=inception, size=size, seed=seed,
            batch_size=batch_size or BATCH, device=place, progress=progress,
        )  # fmt: skip
        typer.echo(f"wrote {write_reference}")
        return
    if of_tokenizer:
        from nar.evaluation.tokenizers import as_table as tokenizer_table
        from nar.evaluation.tokenizers import judge_tokenizer

        report = judge_tokenizer(
            str(tokenizer), real, size=size, group=group, num_frames=num_frames, number=number or NUMBER, pad=pad,
            refine=refine, seed=seed, batch_size=batch_size, device=place, inception=inception, sheet=sheet,
        )  # fmt: skip
        for text in report["warnings"]:
            typer.echo(f"warning: {text}", err=True)
        _report(report, tokenizer_table(report), json_file)
        return
    if likelihood:
        if model is None:
            raise ValueError("--likelihood needs MODEL: nar eval MODEL --real PICTURES --likelihood")
        _refuse_others(context, OF_LIKELIHOOD, "--likelihood")
        report = _likelihood(model, against, real, split, number or NUMBER, seed, place, dtype)
        _report(report, _likelihood_table(report), json_file)
        return
    if (model is None) == (fake is None):
        raise ValueError("give one of MODEL and --fake: the pictures to judge, or the model that draws them")
    pipe, source, made_with = None, None, None
    only_real: list[int] | None = None
    draws = model is not None or _is_model(str(fake))
    used = OF_SETS | (OF_DRAWING if draws else set()) | ({"number"} if protocol else set())
    _refuse_others(context, used | ({"i3d_variant"} if i3d else set()), "judging a set" if draws else "--fake FOLDER")
    if draws:
        import dataclasses

        from nar.evaluation.sets import made_by
        from nar.pipeline import Pipeline

        model = model or str(fake)
        pipe = Pipeline.from_pretrained(model, device=place, dtype=dtype)
        length = pipe.pixel_shape[0] if pipe.makes_clips else None
        num_frames, video = num_frames or length, video or length is not None
        size = size or pipe.pixel_shape[-1]
        given = given_settings(guidance_scale, guidance_interval, guidance_curve, temperature, top_k, top_p)
        sampling = dataclasses.replace(pipe.sampling, **given)
        batch_size = batch_size or (BATCH if length is None else CLIP_BATCH)
        names = real_classes(real, split, num_frames) if labels == "real" else None
        source, only_real = _drawn(pipe, number, names or labels, sampling, seed, batch_size)
        tokenizer = tokenizer or str(find_model(model) / "tokenizer")
        made_with = {
            "model": model, "labels": labels, "seed": seed, **dataclasses.asdict(sampling), "dtype": dtype,
            "grid": list(pipe.model.config.grid), **made_by(find_model(model)),
        }  # fmt: skip
    elif protocol is not None:
        from nar.evaluation.sets import paired_places

        only_real = paired_places(len(real_classes(real, split, num_frames)), number or NUMBER)
    detector = None
    if i3d is not None or video:
        from nar.metrics.video import I3DDetector, TransNetDetector

        detector = TransNetDetector(place or "cpu") if i3d is None else I3DDetector(i3d, i3d_variant, place or "cpu")
        batch_size = batch_size or CLIP_BATCH
    known: float | list[Defect] = calibration
    if calibration and (tokenizer or detector):
        known = _defects(find_model(tokenizer), place, seed) if tokenizer else [swapped_patches(calibration, seed)]
        known += motion_defects(seed) if detector else []
    with warnings.catch_warnings(record=True):  # they are in the report, and printed below
        warnings.simplefilter("always")
        report = judge(
            real_pictures(real, split, size),
            source if source is not None else str(fake),
            inception=inception,
            detector=detector,
            num_frames=num_frames,
            only_real=only_real,
            floor=None if floor is None else real_pictures(floor, split, size),
            size=size,
            calibration=known,
            resamplings=resamplings,
            seed=seed,
            cache=cache,
            batch_size=batch_size or BATCH,
            device=place,
            progress=progress,
            settings=made_with,
        )
    report["settings"]["protocol"] = protocol
    for text in report["warnings"]:
        typer.echo(f"warning: {text}", err=True)
    _report(report, as_table(report), json_file)


def _refuse_others(context: typer.Context, used: set[str], what: str) -> None:
    """Raise ValueError with the options that were given and that this way of judging does not read."""
    unused = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name not in used
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
    if unused:
        raise ValueError(f"{what} does not use {', '.join(unused)}; leave {'it' if len(unused) == 1 else 'them'} out")


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

    from nar.likelihood import bits_per_token, independence_cost
    from nar.media.pixels import as_pixels
    from nar.metrics.pictures import digest
    from nar.metrics.scores import mean_interval
    from nar.pipeline import Pipeline
    from nar.storage.folder import WEIGHTS, find_model

    names = [model] if against is None else [model, against]
    folders = [find_model(name) for name in names]
    tokenizers = [digest(folder / "tokenizer" / WEIGHTS) for folder in folders if (folder / "tokenizer").is_dir()]
    if len(set(tokenizers)) > 1:
        raise ValueError(f"{model} and {against} have different tokenizers: bits of different codes can't be compared")
    pipes = [Pipeline.from_pretrained(folder, device=device, dtype=dtype) for folder in folders]
    for name, pipe in zip(names, pipes, strict=True):
        if not pipe.model.config.num_classes or pipe.model.config.text_dim or pipe.makes_clips:
            raise ValueError(
                f"--likelihood is for models of classes and pictures, which {name} is not; "
                "held-out bits of words and clips are measured while training (heldout_bits_per_token in metrics.jsonl)"
            )
    size = pipes[0].model.config.grid[0] * pipes[0].tokenizer.config.patch_size
    pictures = load_part(real, split, size)
    # Numbers of the classes are those of the model: by name where it has names, else by place.
    classes = [pipes[0].label_index(name) for name in pictures.class_names] if pipes[0].class_names else None
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:number]  # not by class
    labels = torch.from_numpy(pictures.labels)[order]
    labels = labels if classes is None else torch.tensor(classes)[labels]
    with torch.inference_mode():
        place = next(pipes[0].tokenizer.parameters()).device
        pixels = (as_pixels(pictures.images[rows.numpy()]).to(place) for rows in order.split(250))
        codes = torch.cat([pipes[0].tokenizer.encode(part).cpu() for part in pixels]).clone()
    bits = [bits_per_token(pipe.model, codes, labels, progress=sys.stderr.isatty()).numpy() for pipe in pipes]
    cost = independence_cost(pipes[0].model, codes, labels, seed=seed, progress=sys.stderr.isatty()).numpy()
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


def _is_model(source: str) -> bool:
    from nar.storage.folder import bundled_names

    return source in bundled_names() or (Path(source).expanduser() / "config.json").is_file()


def _drawn(
    pipe: Pipeline, number: int | None, labels: str | Sequence[str], sampling: Any, seed: int, batch_size: int
) -> tuple[Drawn, list[int] | None]:
    """Pictures that are drawn as they are read, and which real ones they are paired with, where they are."""
    from nar.evaluation.sets import Drawn, paired_places, set_labels
    from nar.pipeline import Request

    paired = None if isinstance(labels, str) else paired_places(len(labels), number or NUMBER)
    count = number or (NUMBER if paired is None else len(paired))
    requests = [Request(label) for label in set_labels(pipe, labels, count, seed).tolist()]
    drawn = Drawn(pipe, requests, sampling, seed=seed, batch_size=batch_size)
    return drawn, paired if paired is not None and len(paired) < len(labels) else None


def _defects(tokenizer_folder: Path, device: str | None, seed: int) -> list[Defect]:
    """Real pictures with some of their tokens resampled."""
    import torch

    from nar.evaluation.resampling import resample_tokens
    from nar.metrics.defects import Defect
    from nar.storage.folder import digest
    from nar.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights = digest(tokenizer_folder)

    def defect(share: float) -> Defect:
        return Defect(
            f"{100 * share:.3g} % of tokens resampled" if share else "encoded and decoded",
            f"tokens {share} {seed} {weights}",
            lambda images, first: resample_tokens(tokenizer, images, share, seed + first),
        )

    return [defect(share) for share in TOKEN_SHARES]
