"""Extracted codes on disk: Arrow tables, memory-mapped and read in batches, with a manifest that says what made them.

Knows files and arrays; does not know pixels, tokenizers or training. A folder of codes is also a data set that
`datasets.load_from_disk` opens. Legend: `M` samples, `v` views of each, `N` codes of a view.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nar.data.source import WORDS
from nar.data.wording import WORDINGS, wordings
from nar.storage.fields import Size, checked, from_dict, kinds
from nar.storage.files import check_file, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _Manifest:
    """What a manifest must say for its codes to be read."""

    tokenizer: str
    views: str
    num_views: Size
    num_samples: int
    grid: tuple[Size, ...]
    shards: tuple[str, ...]
    class_names: tuple[str, ...]
    captions: bool


@dataclass(frozen=True)
class Codes:
    """Codes of M samples in `v` views each, with labels (M,), and where there are any captions, tags and styles.

    `rows` picks samples of the folder, None all of them.
    """

    folder: Path
    manifest: dict[str, Any]
    labels: np.ndarray
    groups: tuple[str, ...]
    captions: tuple[str, ...] | None
    _shards: tuple[np.ndarray, ...]
    _ends: tuple[int, ...]
    rows: np.ndarray | None = None
    tags: tuple[tuple[str, ...], ...] | None = None
    styles: tuple[str, ...] | None = None
    rewordings: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    @checked
    def open(cls, folder: str | Path) -> Codes:
        """Map a folder that `nar extract` has completed.

        Raises:
            FileNotFoundError: it is not one, or the extraction has not ended.
            ValueError: a shard is damaged or missing.
        """
        try:
            import pyarrow as pa
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("reading codes needs pyarrow: pip install nar-gen[train]") from error
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished codes (no {MANIFEST}); run the same `nar extract` command to its end"
            )
        manifest: dict[str, Any] = read_json(path)
        from_dict(_Manifest, {key: manifest[key] for key in kinds(_Manifest) if key in manifest}, path)
        width = manifest["num_views"] * int(np.prod(manifest["grid"]))
        shards, columns = list[np.ndarray](), defaultdict[str, list[Any]](list)
        for name in manifest["shards"]:
            try:
                check_file(folder / name)
                with pa.memory_map(str(folder / name)) as source:
                    table = pa.ipc.open_stream(source).read_all()
                    table.validate(full=True)  # lengths of texts too, which nobody else checks
                    table = table.combine_chunks()
                flat = table.column("codes").combine_chunks().flatten().to_numpy()
                shards.append(flat.reshape(len(table), width))
                np.array(table.column("label").to_pylist(), np.int64)  # whole numbers
                for column in {"label", "group", "caption", *table.column_names} - {"codes"}:
                    columns[column] += table.column(column).to_pylist()
            except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"shard {folder / name} can't be read ({reason}); delete it and run the same `nar extract` again"
                ) from error
        ends = tuple(np.cumsum([len(shard) for shard in shards]).tolist())
        if not ends or ends[-1] != manifest["num_samples"]:
            raise ValueError(
                f"{folder} has {ends[-1] if ends else 0} samples but {MANIFEST} says {manifest['num_samples']}; "
                "run the same `nar extract` again"
            )
        return cls(
            folder,
            manifest,
            np.array(columns["label"], np.int64),
            tuple(columns["group"]),
            tuple(columns["caption"]) if manifest["captions"] else None,
            tuple(shards),
            ends,
            tags=tuple(map(tuple, columns["tags"])) or None,
            styles=tuple(columns["style"]) or None,
            rewordings=tuple(map(tuple, columns["rewordings"])) or None,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def grid(self) -> tuple[int, ...]:
        """Codes per axis of a view."""
        return tuple(self.manifest["grid"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that the labels index."""
        return tuple(self.manifest["class_names"])

    def read(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Codes (b, *grid) int64 of some samples; `views` (b,) in [0, 1) picks one of each sample's, None the first."""
        rows = np.asarray(indices if self.rows is None else self.rows[indices])
        order = np.argsort(rows, kind="stable")
        count, length = self.manifest["num_views"], int(np.prod(self.grid))
        starts = np.zeros(len(rows), np.int64) if views is None else (np.asarray(views) * count).astype(np.int64)
        columns = starts[:, None] * length + np.arange(length)
        made = np.empty((len(rows), length), np.int64)
        begin = 0
        while begin < len(rows):  # one gather for each shard, not for each sample
            shard = bisect.bisect_right(self._ends, rows[order[begin]])
            end = int(np.searchsorted(rows[order], self._ends[shard]))
            part = order[begin:end]
            first = self._ends[shard - 1] if shard else 0
            made[part] = self._shards[shard][(rows[part] - first)[:, None], columns[part]]
            begin = end
        return made.reshape(len(rows), *self.grid)

    def take(self, rows: np.ndarray) -> Codes:
        """The samples at these rows, still on disk."""
        columns = {name: getattr(self, name) for name in WORDS}
        taken: dict[str, Any] = {name: tuple(of[row] for row in rows) for name, of in columns.items() if of is not None}
        taken |= {"labels": self.labels[rows], "rows": rows if self.rows is None else self.rows[rows]}
        return dataclasses.replace(self, **taken)

    def beside(self, folder: str | Path) -> Codes:
        """The same samples as another folder has them: codes of the same source, otherwise seen.

        Raises:
            FileNotFoundError: there are no codes.
            ValueError: they are of other samples, or in other views.
        """
        whole, other = Codes.open(self.folder), Codes.open(folder)
        same = np.array_equal(whole.labels, other.labels) and whole.groups == other.groups
        if not same or any(whole.manifest[key] != other.manifest[key] for key in ("tokenizer", "views", "grid")):
            raise ValueError(
                f"{folder} does not hold the samples, views and tokenizer of {self.folder}; extract both from one "
                "source with the same settings"
            )
        return dataclasses.replace(
            self, folder=other.folder, manifest=other.manifest, _shards=other._shards, _ends=other._ends
        )

    def wordings(self, kind: str) -> list[tuple[str, ...]]:
        """What may be said of each sample: its captions ("plain"), or several forms of each ("varied").

        Raises:
            ValueError: there are no captions, or `kind` is unknown.
        """
        if kind not in WORDINGS:
            raise ValueError(f"wording must be one of {', '.join(WORDINGS)}, not {kind!r}")
        if self.captions is None:
            raise ValueError(f"the codes in {self.folder} have no captions; extract them from a source that has some")
        further = self.rewordings or [()] * len(self)
        said = [(caption, *more) for caption, more in zip(self.captions, further, strict=True)]
        if kind == "plain":
            return said
        tags, styles = self.tags or [()] * len(self), self.styles or [""] * len(self)
        return [
            tuple(dict.fromkeys(form for caption in captions for form in wordings(caption, tag, style)))
            for captions, tag, style in zip(said, tags, styles, strict=True)
        ]
