"""`nar tune`: guidance and temperature of a model, chosen on one half of real samples and reported on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from nar.cli import options as shared
from nar.cli.app import app, echo


@app.command(epilog="Example: nar tune runs/mine/model --real pictures/test --json tuned.json --write")
def tune(
    model: shared.Model,
    real: Annotated[str, Option(help="Real pictures or clips that it did not learn from: a folder, .npz, .parquet.")],
    number: Annotated[int, Option("--number", "-n", min=8, help="Real samples, at most; in two halves.")] = 10_000,
    tuned: Annotated[int, Option(min=8, help="Samples of each setting that is tried.")] = 2_000,
    sampled: Annotated[int, Option(min=8, help="Samples of each setting that is reported.")] = 5_000,
    steps: Annotated[int, Option(min=3, help="Strengths that are tried of each family.")] = 6,
    least: Annotated[
        float, Option(min=0, callback=shared.finite, help="The least strength: the mean guidance scale of a token.")
    ] = 1.0,
    most: Annotated[float, Option(min=0, callback=shared.finite, help="The largest one.")] = 3.0,
    family: Annotated[
        list[str] | None,
        Option(help="constant, linear-tokens, cosine-tokens-2.75, ...; again for more. Default: all."),
    ] = None,
    metric: Annotated[str, Option(help="What chooses: KID, or of 2,000 samples and more FD.")] = "KID",
    write: Annotated[bool, Option("--write", help="Make what is chosen the model's own settings.")] = False,
    seed: Annotated[int, Option(min=0, help="Of the halves and of sampling; the same for all settings.")] = 0,
    cache: Annotated[Path, Option(help="Features of real samples, by their hash.")] = Path("~/.cache/nar/features"),
    device: shared.Device = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the whole report here.")] = None,
) -> None:
    """Choose guidance and temperature of a model on one half of real samples, and report them on the other."""
    from nar.precision import usable_device
    from nar.storage.files import check_output, write_json
    from nar.study import tune as tuning
    from nar.study.plan import Judging

    if json_file is not None:
        check_output(json_file)
    folder = tuning.own_folder(model) if write else None
    families = tuning.chosen_families(family or ())
    how = Judging(number, sampled, (least, most), steps, tuned, independence=False, batch_sizes=(), seed=seed)
    report = tuning.tune(model, real, how, families, metric, device=usable_device(device), cache=cache)
    echo(tuning.table(report))
    if folder is not None:
        tuning.write_defaults(folder, report)
        echo(f"wrote {folder / 'config.json'}")
    if json_file is not None:
        write_json(json_file, report)
        echo(f"wrote {json_file}")
