"""Sets of pictures or clips for evaluation: many, over all classes, shared by processes, resumed where they stopped.

Knows pipelines and `.npz` files; does not know metrics or the command line. The file has the array `arr_0`, uint8
(N, H, W, 3) or (N, T, H, W, 3), as evaluators read it, `labels` (N,), of a model with names of classes `class_names`,
which the labels index, and `settings`, how it was made as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from nar import __version__
from nar.condition import NULL_CLASS
from nar.data.source import Source as DataSource
from nar.media.pixels import as_images
from nar.pipeline import Pipeline, Request
from nar.progress import steps
from nar.sampling import Sampling
from nar.storage.arrays import read_arrays
from nar.storage.fields import Length, Range, Seed, Size, checked
from nar.storage.files import atomically, claim, parse_json
from nar.storage.folder import model_digest, read_config
from nar.storage.text import read_lines

Count = Annotated[int, Range(1, 10_000_000)]
BATCH, CLIP_BATCH = 64, 8  # pictures, clips that are sampled or judged at a time
CHUNK = 500  # frames of a part on disk, 500 pictures: what is lost at most
LABELS = ("balanced", "random")
PAIRING_SEED = 42  # of the published protocol for UCF-101


def paired_places(total: int, count: int) -> list[int]:
    """Which of `total` real pictures are compared with `count` sampled ones: all, or as many, always the same."""
    return sorted(random.Random(PAIRING_SEED).sample(range(total), min(total, count)))


def class_labels(pipe: Pipeline, source: DataSource) -> np.ndarray:
    """The class (N,) int64 of every sample of a source among the model's: by name or number.

    A model without names takes a source's numbers, or its classes in their order where both have as many.

    Raises:
        ValueError: the source names no classes, or others than the model's.
    """
    classes = source.classes(pipe.class_names)
    if not pipe.class_names and source.class_numbers:
        classes = [source.class_numbers[label] for label in source.labels]
    elif not pipe.class_names and len(source.class_names) == pipe.model.config.num_classes:
        classes = source.labels.tolist()
    numbers = {name: pipe.label_index(name) for name in dict.fromkeys(classes)}
    return np.array([numbers[name] for name in classes], np.int64)


def set_labels(pipe: Pipeline, labels: str | Sequence[str | int], count: int, seed: int) -> np.ndarray:
    """The class (N,) int64 of every picture of a set.

    `labels` is "balanced" (every class as often as any other, give or take one), "random" (uniform, from the seed), or
    the classes of real pictures, names as texts and numbers as ints: then picture i has the class of the i-th of
    `paired_places`, from the start again where there are more.

    Raises:
        ValueError: the model has no classes, or not these.
    """
    num_classes = pipe.model.config.num_classes
    if not num_classes:
        raise ValueError(
            "this model has no classes to take labels from; with words: nar sample MODEL --labels prompts "
            "--prompts-file FILE -o set.npz, and then nar eval --fake set.npz"
        )
    if not isinstance(labels, str):
        places = paired_places(len(labels), count)
        numbers = {name: pipe.label_index(name) for name in dict.fromkeys(labels)}
        return np.resize(np.array([numbers[labels[place]] for place in places], np.int64), count)
    if labels not in LABELS:
        raise ValueError(f"labels must be {' or '.join(LABELS)}, or those of real pictures, not {labels!r}")
    if labels == "random":
        return np.random.default_rng((seed, count)).integers(0, num_classes, count)
    return np.arange(count) % num_classes


@dataclass(frozen=True)
class Sampled:
    """Pictures or clips that are sampled when they are read, in batches uint8 (B, [T,] H, W, 3): one of each request.

    Picture i depends on (seed, i) only. The length is the number of pictures.
    """

    pipe: Pipeline
    requests: Sequence[Request]
    sampling: Sampling
    seed: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.part(0, len(self))

    def part(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Those from one place up to another."""
        for first in range(start, end, self.batch_size):
            rows = range(first, min(first + self.batch_size, end))
            pixels = self.pipe.sample(self.requests[rows.start : rows.stop], rows, self.sampling, seed=self.seed)
            yield as_images(torch.stack(pixels))


def trained_on(folder: str | Path) -> dict[str, Any]:
    """What the data were that a model or tokenizer was trained on, by its recipe; empty where none is known."""
    return dict(read_config(folder).get("training", {}).get("config", {}).get("data", {}))


def made_by(folder: Path) -> dict[str, Any]:
    """What a report should say of the model in a folder: the hash of its weights and how they were averaged."""
    training = read_config(folder).get("training") or {}
    digests = {"weights_sha256": model_digest(folder), "tokenizer_sha256": model_digest(folder / "tokenizer")}
    averaged = training.get("config", {}).get("ema_decay")
    return digests | {"ema_decay": averaged, "images_seen": training.get("images_seen")}


@checked
def sample_set(
    pipe: Pipeline,
    output: Path,
    count: Count,
    labels: str | Sequence[str | int],
    *,
    sampling: Sampling | None = None,
    seed: Seed = 0,
    batch_size: Size = 40,
    rank: Length = 0,
    num_processes: Size = 1,
    wait: Callable[[], None] = lambda: None,
    settings: dict[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
) -> Path:
    """Sample `count` pictures or clips into the `.npz` file `output`; returns it. Parts of a stopped call are kept.

    `labels` are as in `set_labels`. Picture i depends on (seed, i) only, not on the number of processes. Process `rank`
    makes every `num_processes`-th part; `wait` must return once all processes have called it, and then the first one
    joins them. The same call twice at once shares its parts too. `settings` are kept in the file beside the others.
    With `prompts`, one for each picture, these are sampled, and `labels` is only what the set is called.

    Raises:
        ValueError: the model has no classes, or reads no words; or the parts on disk were made with other settings.
    """
    if output.suffix != ".npz":
        raise ValueError(f"output {output} must end in .npz for a set of pictures")
    if prompts is None:
        chosen = set_labels(pipe, labels, count, seed)
        requests = [Request(label) for label in chosen.tolist()]
    elif len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for {count} pictures: give one for each")
    else:
        chosen, requests = np.full(count, NULL_CLASS), pipe.requests(prompt=prompts)
    sampled = Sampled(pipe, requests, sampling or pipe.sampling, seed, batch_size)
    chunk = max(1, CHUNK // (pipe.pixel_shape[0] if pipe.makes_clips else 1))
    kind = labels if isinstance(labels, str) else f"real {hashlib.sha256(chosen.tobytes()).hexdigest()[:12]}"
    record = _record(sampled, count, settings, prompts) | {"labels": kind}
    folder = output.with_name(f".{output.name}.parts")
    parts = [folder / f"{start:09d}.npy" for start in range(0, count, chunk)]
    claim(folder, record)
    for part in steps(parts[rank::num_processes], "sampling", f"parts of {chunk}", quiet=rank > 0):
        if not part.is_file():
            start = int(part.stem)
            images = list(sampled.part(start, min(start + chunk, count)))
            claim(folder, record)  # again: another call of the same may have joined and removed it
            atomically(part, partial(np.save, arr=np.concatenate(images)))
    wait()
    if rank == 0:
        arrays = {"labels": chosen.astype(np.int64), "settings": np.array(json.dumps(record))}
        if prompts is None and pipe.class_names:
            arrays["class_names"] = np.array(pipe.class_names)
        try:
            atomically(output, partial(_join, parts, count, arrays))
        except FileNotFoundError:  # the other call was first
            if not output.is_file() or _settings(output) != record:
                raise
        _remove(folder)
    wait()
    return output


def _record(
    sampled: Sampled, count: int, settings: dict[str, Any] | None, prompts: Sequence[str] | None
) -> dict[str, Any]:
    """What must stay the same for the parts of a set to be kept."""
    record = {"count": count, "seed": sampled.seed, "version": __version__, **asdict(sampled.sampling)}
    words = {} if prompts is None else {"prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]}
    return record | (settings or {}) | words


def _join(parts: Sequence[Path], count: int, arrays: dict[str, np.ndarray], output: Path) -> None:
    """Copy the parts into one `.npz`, a part at a time: 50,000 pictures of 256x256 are 10 GB."""
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for part in parts:
                images = np.load(part)
                if part is parts[0]:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)


def _settings(path: Path) -> Any:
    found = read_arrays(path, ["settings"])
    return parse_json(str(found["settings"]), f"settings of {path}") if found else None


def _remove(folder: Path) -> None:
    """Remove a folder of parts: at once for others who look for parts in it, then bit by bit."""
    away = Path(tempfile.mkdtemp(prefix=".nar-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.replace(away / folder.name)
    shutil.rmtree(away, ignore_errors=True)


@checked
def geneval_set(
    pipe: Pipeline,
    output: Path,
    metadata: Path,
    count: Count,
    *,
    sampling: Sampling | None = None,
    seed: Seed = 0,
    batch_size: Size = 40,
    rank: Length = 0,
    num_processes: Size = 1,
    wait: Callable[[], None] = lambda: None,
    settings: dict[str, Any] | None = None,
) -> int:
    """Sample `count` pictures of each prompt of GenEval's `metadata`, laid out as it reads them; returns the prompts.

    Line k of `metadata`, a JSON object with a `prompt`, becomes the folder `output/0000k` with `metadata.jsonl` and
    `samples/0000.png` and on. Prompts that are complete are left alone; process `rank` makes every `num_processes`-th.

    Raises:
        ValueError: a line without a prompt, a model of clips, or an output that is a file or holds pictures of other
            settings.
    """
    if pipe.makes_clips:
        raise ValueError("GenEval judges pictures: this model makes clips")
    if output.is_file():
        raise ValueError(f"output {output} must be a folder, and is a file")
    lines = [line for line in read_lines(metadata) if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        wanted = parse_json(line, f"line {number} of {metadata}")
        if not isinstance(wanted, dict) or not isinstance(wanted.get("prompt"), str):
            raise ValueError(f"line {number} of {metadata} is not a JSON object with a prompt")
        prompts.append(wanted["prompt"])
    requests = [request for request in pipe.requests(prompt=prompts) for _ in range(count)]
    sampled = Sampled(pipe, requests, sampling or pipe.sampling, seed, batch_size)
    claim(output, _record(sampled, count, settings, lines))
    for index in steps(range(rank, len(prompts), num_processes), "sampling", "prompts", quiet=rank > 0):
        if not (folder := output / f"{index:05d}").is_dir():
            images = np.concatenate([*sampled.part(index * count, (index + 1) * count)])
            atomically(folder, partial(_write_prompt, lines[index], images))
    wait()
    return len(prompts)


def _write_prompt(metadata: str, images: np.ndarray, folder: Path) -> None:
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(metadata + "\n", encoding="utf-8")
    for row, image in enumerate(images):
        Image.fromarray(image).save(folder / "samples" / f"{row:04d}.png")
