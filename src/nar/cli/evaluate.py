"""`nar eval` and its sub-verbs: options to reports, each printed as one table and written as JSON.

Knows options, which are called like the arguments of the functions in `nar.evaluation` that judge.
"""

# ruff: noqa: ARG001 options are passed on by their names

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nar.cli import options as shared
from nar.cli.app import Verbs, app, echo, refuse_unused

# Options that moved into sub-verbs, those first that were given together with others of them.
MOVED = {
    "geneval FOLDER --detector FOLDER --clip FOLDER": ("--geneval", "--detector"),
    "geneval --write-prompts FILE": ("--geneval-prompts",),
    "composed FOLDER": ("--composed",),
    "composed --write-prompts FILE": ("--composed-prompts",),
    "copies --fake F --of TRAINING --real R": ("--near-copies",),
    "captions --fake F [--clip FOLDER] [--retrieval]": ("--clip", "--retrieval", "--captions", "--clip-prefix"),
    "likelihood MODEL --real R [--against OTHER]": ("--likelihood", "--against"),
    "reference --real R -o FILE": ("--write-reference",),
    "tokenizer T --real R": ("--sheet", "--refine", "--pad", "--group"),
}

COMPOSITIONS = {"score": "score, mean of the tasks", "prompts": "prompts with a right picture"}  # rows of the table
Report = dict[str, Any]
Real = Annotated[str, Option(help="Real pictures: a folder, .npz with arr_0, .parquet, fashion-mnist or its folder.")]
Split = Annotated[str, Option(help="Of real pictures that have both: train or test.")]
Unseen = Annotated[str, Option(help="train, or test: without one, what the model's training held out.")]
Inception = Annotated[
    Path | None, Option(help="The Inception of 2015 (.pth of pytorch-fid or torch-fidelity): FID and ADM's numbers.")
]
Size = Annotated[int | None, Option(min=8, help="Crop and resize all pictures to this many pixels.")]
Batch = Annotated[int | None, Option("--batch-size", min=1, help="Default: 64 pictures, 8 clips.")]
Seed = Annotated[int, Option(min=0, help="Of what is chosen and resampled at random.")]
Dtype = Annotated[str, Option(help="Of a model: float32, bfloat16, on a CPU float16, int8; auto measures.")]
Json = Annotated[Path | None, Option("--json", help="Write the whole report here.")]
Prompts = Annotated[Path | None, Option(help="Write the prompts (.jsonl), a JSON object a line, and stop.")]


class _Verbs(Verbs):
    """Those of `nar eval`, which says where options went that moved."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = {arg.partition("=")[0] for arg in args}
        for verb, options in MOVED.items() if not args or args[0] not in self.commands else ():
            if found := [option for option in options if option in given]:
                raise ValueError(f"{found[0]} has moved: nar eval {verb}")
        return super().parse_args(ctx, args)


verbs = typer.Typer(cls=_Verbs, rich_markup_mode=None, subcommand_metavar="| COMMAND ...")
app.add_typer(verbs, name="eval")


@verbs.callback(
    invoke_without_command=True,
    epilog="Example: nar eval --real pictures/test --fake samples --json report.json. "
    "A model folder that is called like a command is given as ./NAME.",
)
def evaluate(
    context: typer.Context,
    model: Annotated[str | None, Argument(metavar="MODEL", help="Samples the fake pictures, as --fake MODEL.")] = None,
    real: Annotated[
        str | None, Option(help="Real pictures: folder, .npz, .parquet, fashion-mnist; or ADM's .npz with mu, sigma.")
    ] = None,
    fake: Annotated[str | None, Option(help="Judged: a folder, .npz, .parquet, or a model that samples them.")] = None,
    floor: Annotated[
        str | None, Option(help="Other real pictures; their score is the floor. Default: one half of --real.")
    ] = None,
    inception: Inception = None,
    tokenizer: Annotated[
        str | None, Option(help="Adds real pictures with 2, 5, 10 % of its tokens resampled. Default: MODEL's.")
    ] = None,
    video: Annotated[bool, Option("--video", help="Judge clips with TransNetV2: FD-TransNetV2.")] = False,
    i3d: Annotated[
        Path | None, Option(help="The published i3d_torchscript.pt: FVD, with covariances divided by n.")
    ] = None,
    i3d_variant: Annotated[
        str, Option(help="Preparation for I3D: stylegan-v (also LARP's) or videogpt.")
    ] = "stylegan-v",
    num_frames: Annotated[
        int | None, Option(min=2, help="Cut clips into pieces of so many frames; a folder of pictures is then a clip.")
    ] = None,
    protocol: Annotated[
        str | None, Option(help="ucf101: pieces of 16 frames at 128x128, sampled clips of the real ones' classes.")
    ] = None,
    json_file: Json = None,
    split: Split = "test",
    size: Size = None,
    number: Annotated[int | None, Option("--number", "-n", min=2, help="Of a model. Default: 10000.")] = None,
    labels: Annotated[str | None, Option(help="Of a model: balanced, random, or real: those of --real.")] = None,
    guidance_scale: shared.GuidanceScale = None,
    guidance_interval: shared.GuidanceInterval = None,
    guidance_curve: shared.GuidanceCurve = None,
    guidance_power: shared.GuidancePower = None,
    temperature: shared.Temperature = None,
    top_k: shared.TopK = None,
    top_p: shared.TopP = None,
    seed: Annotated[int, Option(min=0, help="Of sampled pictures, halves and resamplings.")] = 0,
    calibration: Annotated[float, Option(help="Share of patches exchanged, without tokenizer; 0: no defects.")] = 0.05,
    resamplings: Annotated[int, Option(min=0, help="For the confidence intervals, 0 is off.")] = 1000,
    cache: Annotated[Path, Option(help="Features of files, by their hash.")] = Path("~/.cache/nar/features"),
    batch_size: Batch = None,
    device: shared.Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Judge pictures or clips against real ones: one table, and a JSON report with all that changes a number."""
    if context.invoked_subcommand is not None:
        return
    if real is None:
        raise ValueError("give real pictures to compare with: --real FOLDER (or .npz, .parquet)")
    if tokenizer is not None and model is None and fake is None:
        raise ValueError(f"a tokenizer alone is judged by: nar eval tokenizer {tokenizer} --real {real}")
    if (model is None) == (fake is None):
        raise ValueError("give one of MODEL and --fake: the pictures to judge, or the model that samples them")
    from nar.evaluation.models import Comparison, is_model, judge_model, judge_set
    from nar.sampling import Sampling, settings_among

    of_sampling = [field.name for field in dataclasses.fields(Sampling)]
    source = str(model if fake is None else fake)
    samples = model is not None or is_model(source)
    if not samples:
        refuse_unused(context, "--fake FOLDER", "labels", "dtype", *of_sampling, *([] if protocol else ["number"]))
    if i3d is None:
        refuse_unused(context, "judging without --i3d", "i3d_variant")
    if i3d is not None or video:
        refuse_unused(context, "--i3d" if i3d else "--video", "inception", *(["video"] if i3d else []))
    if not calibration:
        refuse_unused(context, "--calibration 0", "tokenizer")
    elif samples or tokenizer is not None:
        refuse_unused(context, "judging with a tokenizer", "calibration")
    how = Comparison(**_options(context, *of_sampling, "model", "fake", "labels", "dtype"), progress=True)
    settings = settings_among(context.params)

    of_model = partial(judge_model, labels=labels, settings=settings, dtype=dtype)
    _report(lambda: (of_model if samples else judge_set)(how, source), json_file)


@verbs.command(epilog="Example: nar eval tokenizer runs/tokenizer/model --real pictures --sheet pairs.png")
def tokenizer(
    context: typer.Context,
    folder: Annotated[str, Argument(metavar="TOKENIZER", help="A tokenizer folder, or emoji/tokenizer.")],
    real: Real,
    size: Size = None,
    group: Annotated[str | None, Option(help="Column of what is held out together. Default: as trained.")] = None,
    num_frames: Annotated[int | None, Option(min=2, help="Of each clip. Default: as trained.")] = None,
    number: Annotated[int, Option("--number", "-n", min=2, help="Held-out pictures, at most.")] = 10_000,
    pad: Annotated[bool, Option("--pad", help="Repeat edges up to a multiple of its patch.")] = False,
    refine: Annotated[int, Option(min=0, help="Also search better codes than the encoder's, in 100 steps, say.")] = 0,
    sheet: Annotated[Path | None, Option(help="Write real and reconstructed pictures, in pairs.")] = None,
    inception: Inception = None,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: shared.Device = None,
    json_file: Json = None,
) -> None:
    """Reconstruction quality of a tokenizer on pictures or clips held out in its training, beside baselines."""
    from nar.evaluation.tokenizers import judge_tokenizer

    _report(lambda: judge_tokenizer(**_options(context)), json_file, "tokenizer")


@verbs.command(epilog="Example: nar eval likelihood fashion --real fashion-mnist --against runs/raster/model")
def likelihood(
    context: typer.Context,
    model: Annotated[str, Argument(metavar="MODEL", help="A bundled name, a model folder, or a hub id.")],
    real: Real,
    against: Annotated[str | None, Option(help="Another model of the same tokenizer: paired differences.")] = None,
    split: Unseen = "test",
    number: Annotated[int, Option("--number", "-n", min=4, help="Pictures, at most.")] = 10_000,
    seed: Seed = 0,
    device: shared.Device = None,
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """Bits per token of held-out pictures or clips, and what a front's independence costs of them."""
    from nar.evaluation.likelihood import ROWS, judge_likelihood

    _report(lambda: judge_likelihood(**_options(context)), json_file, "value", ROWS)


@verbs.command(epilog="Example: nar eval locality fashion --real fashion-mnist")
def locality(
    context: typer.Context,
    model: Annotated[str, Argument(metavar="MODEL | CODES", help="A model, or a folder of extracted codes.")],
    real: Annotated[str | None, Option(help="Of a model: real pictures or clips, which its tokenizer reads.")] = None,
    split: Unseen = "test",
    number: Annotated[int, Option("--number", "-n", min=2, help="Pictures or clips, at most.")] = 10_000,
    distance: Annotated[int, Option(min=1, help="Offsets up to this Manhattan distance.")] = 4,
    seed: Seed = 0,
    device: shared.Device = None,
    json_file: Json = None,
) -> None:
    """Bits that two codes of a picture or clip tell of each other by their offset, above those of other ones."""
    from nar.evaluation.locality import judge_locality

    _report(lambda: judge_locality(**_options(context)), json_file, "bits above shuffled")


@verbs.command(epilog="Example: nar eval edit fashion --real fashion-mnist -n 400 --samples completed")
def edit(
    context: typer.Context,
    model: Annotated[str, Argument(metavar="MODEL", help="A bundled name, a model folder, or a hub id.")],
    real: Real,
    split: Unseen = "test",
    number: Annotated[int, Option("--number", "-n", min=4, help="Pictures, at most.")] = 400,
    guidance_scale: Annotated[float, Option(help="Strength of guidance, 1.0 is off.")] = 1.0,
    temperature: Annotated[float, Option(help="Divides the logits.")] = 1.0,
    particles: Annotated[
        int, Option(min=1, help="Of models not trained to edit: samples weighted by what is kept.")
    ] = 1,
    train: Annotated[str | None, Option(help="Training pictures, for floors and classes.")] = None,
    distances: Annotated[
        bool, Option("--distances", help="KID and FD of completed pictures from the true ones.")
    ] = False,
    samples: Annotated[
        str | None, Option(help="A folder for the completed pictures, a .npz a mask, and the true ones.")
    ] = None,
    seed: Seed = 0,
    seeds: Annotated[int, Option(min=1, help="Seeds of sampling, from --seed on, of the same pictures and masks.")] = 1,
    device: shared.Device = None,
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """How well a model fills five holes in held-out pictures: PSNR, its diversity, seams, bits per token."""
    from nar.evaluation.edits import EXTENDED, ROWS, judge_edits
    from nar.media.masks import FIXED

    rows = {f"{mask}: {key}": f"{mask}: {said}" for mask in (*FIXED, EXTENDED) for key, said in ROWS.items()}
    _report(lambda: judge_edits(**_options(context)), json_file, "value", rows)


@verbs.command(epilog="Example: nar eval captions --fake samples --clip clip-vit-base-patch32")
def captions(
    context: typer.Context,
    fake: Annotated[str, Option(help="Pictures with captions: a folder, .npz, .parquet or .tar.")],
    captions: Annotated[Path | None, Option(help="Captions, one a line. Default: the pictures' own.")] = None,
    clip: Annotated[Path | None, Option(help="CLIP score: a local transformers folder of a CLIP model.")] = None,
    clip_prefix: Annotated[str, Option(help="Put before captions; published: 'A photo depicts '.")] = "",
    retrieval: Annotated[bool, Option("--retrieval", help="R@1, R@5 and concept accuracy, of emoji; offline.")] = False,
    size: Size = None,
    seed: Seed = 0,
    device: shared.Device = None,
    json_file: Json = None,
) -> None:
    """Judge whether pictures show what their captions say: CLIP score, retrieval."""
    from nar.evaluation.words import judge_captions

    if clip is None:
        refuse_unused(context, "judging without --clip", "clip_prefix", "size")
    _report(lambda: judge_captions(**_options(context)), json_file)


@verbs.command(epilog="Example: nar eval geneval samples --detector mask2former --clip clip-vit-large-patch14")
def geneval(
    context: typer.Context,
    folder: Annotated[Path | None, Argument(help="Pictures laid out as GenEval's.")] = None,
    detector: Annotated[Path | None, Option(help="A local transformers folder of a Mask2Former.")] = None,
    clip: Annotated[Path | None, Option(help="A local transformers folder of a CLIP model.")] = None,
    write_prompts: Prompts = None,
    seed: Seed = 0,
    device: shared.Device = None,
    json_file: Json = None,
) -> None:
    """Judge compositions by GenEval's published rules; or write its 553 prompts."""
    from nar.metrics.geneval import judge, prompts
    from nar.precision import usable_device

    if write_prompts is not None:
        refuse_unused(context, "--write-prompts", "folder", "detector", "clip", "seed", "device", "json_file")
        wanted = prompts.composition_prompts(plural=prompts.add_s)
        _written(lambda path: prompts.write_prompts(path, wanted), write_prompts)
    elif folder is None or detector is None or clip is None:
        raise ValueError("geneval needs FOLDER, --detector and --clip: local folders of Mask2Former and CLIP")
    else:
        place = usable_device(device) or "cpu"
        load = partial(judge.Mask2FormerJudge, detector, clip, device=place)
        _report(lambda: judge.judge_folder(folder, load(), seed=seed), json_file, "share right", COMPOSITIONS)


@verbs.command(epilog="Example: nar eval composed samples")
def composed(
    context: typer.Context,
    folder: Annotated[Path | None, Argument(help="Composed drawings laid out as GenEval's.")] = None,
    write_prompts: Prompts = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Judge composed drawings of emoji, GenEval's six tasks, offline; or write their prompts."""
    from nar.metrics.geneval import composed, judge, prompts, scenes

    if write_prompts is not None:
        refuse_unused(context, "--write-prompts", "folder", "seed", "json_file")
        _written(lambda path: prompts.write_prompts(path, scenes.scene_prompts()), write_prompts)
    elif folder is None:
        raise ValueError("composed needs FOLDER, laid out as GenEval's: 00000/metadata.jsonl, 00000/samples/0000.png")
    else:
        detector = composed.ComposedJudge()
        _report(lambda: judge.judge_folder(folder, detector, seed=seed), json_file, "share right", COMPOSITIONS)


@verbs.command(epilog="Example: nar eval copies --fake samples --of train.parquet --real unseen.parquet")
def copies(
    context: typer.Context,
    fake: Annotated[str, Option(help="Pictures to judge.")],
    of: Annotated[str, Option(help="Training pictures that may have been copied.")],
    real: Annotated[str, Option(help="Pictures that were not trained on; they set the threshold.")],
    split: Split = "test",
    size: Annotated[int, Option(min=8, help="Compare at this many pixels.")] = 64,
    json_file: Json = None,
) -> None:
    """Share of pictures that are closer to a training picture than 99 % of unseen real ones are."""
    from nar.evaluation.words import judge_copies

    _report(lambda: judge_copies(**_options(context)), json_file)


@verbs.command(epilog="Example: nar eval reference --real pictures/train -o reference.npz")
def reference(
    context: typer.Context,
    real: Real,
    output: Annotated[Path, Option("--output", "-o", help="The .npz file to write.")],
    split: Split = "test",
    size: Size = None,
    inception: Inception = None,
    seed: Seed = 0,
    batch_size: Batch = None,
    device: shared.Device = None,
) -> None:
    """Write the statistics of real pictures as ADM's files hold them, for --real."""
    from nar.evaluation.sets import BATCH
    from nar.metrics.pictures import opened
    from nar.metrics.reference import write_reference
    from nar.precision import usable_device

    options = _options(context, "real", "split", "output")
    options |= {"batch_size": batch_size or BATCH, "device": usable_device(device), "progress": True}
    pictures = opened(real, split=split, size=size)
    _written(lambda path: write_reference(path, pictures, **options), output)


def _options(context: typer.Context, *without: str) -> dict[str, Any]:
    """All options of a verb by name, without that for the report and some others."""
    return {name: value for name, value in context.params.items() if name not in ("json_file", *without)}


def _report(
    judge: Callable[[], Report], json_file: Path | None, value: str = "fake", names: dict[str, str] | None = None
) -> None:
    """Judge, say what was warned of, print the table, and write the report."""
    from nar.metrics.tables import as_table
    from nar.storage.files import check_output, write_json

    if json_file is not None:
        check_output(json_file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = judge()
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    report["warnings"] = list(dict.fromkeys([*texts, *report.get("warnings", ())]))
    for text in report["warnings"]:
        echo(f"warning: {text}", err=True)
    echo(as_table(report, value, names))
    if json_file is not None:
        write_json(json_file, report, indent=2)
        echo(f"wrote {json_file}")


def _written(write: Callable[[Path], None], path: Path) -> None:
    from nar.storage.files import check_output

    check_output(path)
    write(path)
    echo(f"wrote {path}")
