"""The part of `nar eval` that judges pictures by their words: CLIP score, retrieval, near-copies, GenEval, composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nar.evaluation.real import load_part
from nar.precision import usable_device


@dataclass(frozen=True)
class TextOptions:
    """What of `nar eval` concerns words; None and False are not asked for."""

    fake: str | None = None
    captions: Path | None = None
    clip: Path | None = None
    clip_prefix: str = ""
    retrieval: bool = False
    geneval: Path | None = None
    detector: Path | None = None
    composed: Path | None = None
    geneval_prompts: Path | None = None
    composed_prompts: Path | None = None
    near_copies: str | None = None
    real: str | None = None
    split: str = "test"
    size: int | None = None
    seed: int = 0
    device: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything here is asked for."""
        asked = (
            self.clip, self.geneval, self.composed, self.geneval_prompts, self.composed_prompts, self.near_copies
        )  # fmt: skip
        return self.retrieval or any(option is not None for option in asked)


def text_report(options: TextOptions) -> tuple[dict[str, Any], str]:
    """The report and its table; for `--geneval-prompts` and `--composed-prompts` nothing but which file was written."""
    if options.geneval_prompts is not None or options.composed_prompts is not None:
        return {}, _write_prompts(options)
    if options.geneval is not None or options.composed is not None:
        return _compositions(options)
    return _captions(options)


def _write_prompts(options: TextOptions) -> str:
    from nar.metrics.geneval.prompts import add_s, composition_prompts, write_prompts
    from nar.metrics.geneval.scenes import scene_prompts

    lines = []
    if options.geneval_prompts is not None:
        write_prompts(options.geneval_prompts, composition_prompts(plural=add_s))
        lines.append(f"wrote {options.geneval_prompts}")
    if options.composed_prompts is not None:
        write_prompts(options.composed_prompts, scene_prompts())
        lines.append(f"wrote {options.composed_prompts}")
    return "\n".join(lines)


def _compositions(options: TextOptions) -> tuple[dict[str, Any], str]:
    from nar.metrics.geneval.composed import ComposedJudge
    from nar.metrics.geneval.judge import Judge, Mask2FormerJudge, as_table, judge_folder

    if options.geneval is not None and options.composed is not None:
        raise ValueError("give one of --geneval and --composed: they judge with different detectors")
    folder = options.composed or options.geneval
    assert folder is not None
    judge: Judge
    if options.composed is not None:
        judge = ComposedJudge()
    elif options.detector is None or options.clip is None:
        raise ValueError("--geneval needs --detector and --clip: local transformers folders of Mask2Former and CLIP")
    else:
        judge = Mask2FormerJudge(options.detector, options.clip, device=usable_device(options.device) or "cpu")
    report = judge_folder(folder, judge, seed=options.seed)
    return report, as_table(report)


def _captions(options: TextOptions) -> tuple[dict[str, Any], str]:
    """CLIP score, retrieval and near-copies of one set of pictures."""
    if options.fake is None:
        raise ValueError("give the pictures to judge: --fake FOLDER (or .parquet, .tar)")
    device = usable_device(options.device) or "cpu"
    report: dict[str, Any] = {"interval": {}, "settings": {"fake": Path(options.fake).name, "seed": options.seed}}
    if options.clip is not None or options.retrieval:
        pictures, captions = _captioned(options.fake, options.captions)
    if options.clip is not None:
        from nar.metrics.text_image import ClipScorer, clip_score, weights_digest

        found = clip_score(
            (pictures.picture(index) for index in range(len(pictures))), captions,
            ClipScorer(options.clip, device=device), prefix=options.clip_prefix, size=options.size,
            seed=options.seed,
        )  # fmt: skip
        _merge(report, found, clip_sha256=weights_digest(options.clip), clip_prefix=options.clip_prefix)
    if options.retrieval:
        from nar.metrics.text_image import RetrievalScorer

        found = RetrievalScorer(device=device).score(
            (pictures.picture(index) for index in range(len(pictures))), captions, seed=options.seed
        )
        _merge(report, found)
    if options.near_copies is not None:
        from nar.metrics.text_image import near_copies

        if options.real is None:
            raise ValueError("--near-copies TRAINING needs --real: pictures that were not trained on set the threshold")
        parts = ((options.fake, "train"), (options.near_copies, "train"), (options.real, options.split))
        sets = [load_part(source, split, options.size or 64).images for source, split in parts]
        _merge(report, near_copies(*sets), near_copies_of=Path(options.near_copies).name, size=options.size or 64)
    lines = ["| | value | 95 % | real, scorer has not seen |", "|---|---|---|---|"]
    real = report.get("real", {}).get("vendor left out", {})
    for name, value in report.items():
        if isinstance(value, float):
            interval = report["interval"].get(name)
            ends = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
            lines.append(f"| {name} | {value:.4g} | {ends} | {f'{real[name]:.4g}' if name in real else ''} |")
    return report, "\n".join(lines)


def _merge(report: dict[str, Any], found: dict[str, Any], **settings: Any) -> None:
    report["interval"] |= found.pop("interval", {})
    report["settings"] |= found.pop("settings", {}) | settings
    report |= found


def _captioned(source: str, file: Path | None) -> tuple[Any, Sequence[str]]:
    """A source of pictures and a caption for each, its own or the lines of a file."""
    from nar.data.open import open_source

    pictures = open_source(source, size=64)
    captions = pictures.captions
    if file is not None:
        captions = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if captions is None or len(captions) != len(pictures):
        number = "no" if captions is None else str(len(captions))
        raise ValueError(
            f"{source} has {len(pictures)} pictures and {number} captions; give --captions FILE with one a line in the "
            "order of the names, a .txt beside each picture, a metadata.jsonl, or a .parquet with `caption`"
        )
    return pictures, captions
