"""Sets of pictures for evaluation: many, over all classes, shared by processes, and resumed where they stopped.

Knows pipelines and `.npz` files; does not know metrics or the command line. The file has the array `arr_0`, uint8
(N, H, W, 3), as evaluators read it, and `labels` (N,).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

from nar import __version__
from nar.condition import ClassCondition
from nar.pipeline import Pipeline
from nar.sampling import Sampling, generate
from nar.tokenizer.pixels import as_pictures

CHUNK = 500  # pictures of a part on disk: what is lost at most
LABELS = ("balanced", "random")


def sample_set(
    pipe: Pipeline,
    output: Path,
    count: int,
    labels: str,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 40,
    rank: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    settings: dict[str, str] | None = None,
) -> Path:
    """Draw `count` pictures into the `.npz` file `output`; returns it. Parts of an earlier, stopped call are kept.

    `labels` is "balanced" (every class as often as any other, give or take one) or "random" (uniform, from the seed).
    Picture i depends on (seed, i) only, not on the number of processes. Process `rank` makes every
    `num_processes`-th part; `wait` must return once all processes have called it, and then the first one joins them.

    Raises:
        ValueError: the model has no classes, or the parts on disk were made with other settings.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
    num_classes = pipe.model.config.num_classes
    if not num_classes:
        raise ValueError("this model has no classes to draw labels from")
    if output.suffix != ".npz":
        raise ValueError(f"output {output} must end in .npz for a set of pictures")
    sampling = sampling or pipe.sampling
    all_labels = np.arange(count) % num_classes
    if labels == "random":
        all_labels = np.random.default_rng((seed, count)).integers(0, num_classes, count)
    parts = output.with_name(f".{output.name}.parts")
    known = {"count": count, "labels": labels, "seed": seed, "version": __version__, **asdict(sampling)}
    _claim(parts, known | (settings or {}))
    mine = range(rank * CHUNK, count, num_processes * CHUNK)
    with tqdm(
        total=sum(min(CHUNK, count - start) for start in mine), unit="img", disable=True if rank else None
    ) as bar:
        for start in mine:
            part, end = parts / f"{start:09d}.npy", min(start + CHUNK, count)
            if not part.is_file():
                images = []
                for first in range(start, end, batch_size):
                    rows = range(first, min(first + batch_size, end))
                    condition = ClassCondition(torch.from_numpy(all_labels[rows.start : rows.stop]))
                    codes = generate(pipe.model, condition, sampling, seed=seed, indices=rows)
                    images.append(pipe.pictures(codes, "np"))
                    bar.update(len(rows))
                staging = part.with_suffix(".tmp")
                with staging.open("wb") as file:
                    np.save(file, np.concatenate(images))
                staging.replace(part)
            else:
                bar.update(end - start)
    wait()
    if rank == 0:
        _join(parts, output, count, all_labels)
    wait()
    return output


def _claim(parts: Path, settings: dict[str, object]) -> None:
    """Make the folder of parts for these settings; raises ValueError when it was made for others."""
    path, text = parts / "settings.json", json.dumps(settings, indent=1)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} {before.get(key)} instead of {value}" for key, value in settings.items() if before.get(key) != value
        ]
        if changed:
            raise ValueError(f"{parts} holds parts of another set: {', '.join(changed)}; delete it to begin anew")
        return
    parts.mkdir(parents=True, exist_ok=True)
    staging = parts / f"settings.{torch.randint(10**9, ()).item()}"  # every process may be the first
    staging.write_text(text + "\n", encoding="utf-8")
    staging.replace(path)


def _join(parts: Path, output: Path, count: int, labels: np.ndarray) -> None:
    """Copy the parts into one `.npz`, a part at a time: 50,000 pictures of 256x256 are 10 GB."""
    staging = output.with_name(f".{output.name}")
    with zipfile.ZipFile(staging, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for start in range(0, count, CHUNK):
                images = np.load(parts / f"{start:09d}.npy")
                if start == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())
        with archive.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, labels.astype(np.int64))
    staging.replace(output)
    shutil.rmtree(parts)


def geneval_set(
    pipe: Pipeline,
    output: Path,
    metadata: Path,
    count: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 40,
    rank: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    settings: dict[str, str] | None = None,
) -> int:
    """Draw `count` pictures of each prompt of GenEval's `metadata` into the layout that it reads; returns the prompts.

    Line k of `metadata`, a JSON object with a `prompt`, becomes the folder `output/0000k` with `metadata.jsonl` and
    `samples/0000.png` and on. Prompts that are complete are left alone; process `rank` makes every `num_processes`-th.

    Raises:
        ValueError: a line without a prompt, or a folder that holds pictures of other settings.
    """
    lines = [line for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {metadata} is not a JSON object with a prompt") from error
    sampling = sampling or pipe.sampling
    known = {"count": count, "seed": seed, "version": __version__, **asdict(sampling), **(settings or {})}
    _claim(output, known | {"prompts": hashlib.sha256("\n".join(lines).encode()).hexdigest()})
    for index in trange(rank, len(prompts), num_processes, unit="prompt", disable=True if rank else None):
        folder = output / f"{index:05d}"
        if folder.is_dir():
            continue
        staging = output / f".{index:05d}"
        (staging / "samples").mkdir(parents=True, exist_ok=True)
        (staging / "metadata.jsonl").write_text(lines[index] + "\n", encoding="utf-8")
        (request,) = pipe.requests(prompt=prompts[index])
        for first in range(0, count, batch_size):
            rows = range(first, min(first + batch_size, count))
            places = [index * count + row for row in rows]
            made = pipe.draw([request] * len(rows), places, sampling, seed=seed)
            for row, picture in zip(rows, as_pictures(torch.stack(made)), strict=True):
                picture.save(staging / "samples" / f"{row:04d}.png")
        staging.replace(folder)
    wait()
    return len(prompts)
