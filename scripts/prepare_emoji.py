"""Build the emoji pictures that the recipe `emoji` learns from, out of the npm packages that hold the drawings.

    npm pack @iconify/json@2.2.535 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    mkdir iconify fluent-3d emojibase
    tar xzf iconify-json-2.2.535.tgz -C iconify --strip-components=1
    tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C fluent-3d --strip-components=1
    tar xzf emojibase-data-17.0.0.tgz -C emojibase --strip-components=1
    pip install resvg_py==0.5.0 'nar-gen[train]'
    python scripts/prepare_emoji.py --iconify iconify --fluent-3d fluent-3d --emojibase emojibase -o emoji/train.parquet

`emoji_icons.tsv` beside this script lists what is taken: a line for each thing with its code points, caption, and the
names of its icons in each set. Other things and another set are left out on purpose, to have something unseen to test
with. Drawings are put on white at 128x128 and stored as WebP, lossless under 6 KB, otherwise lossless or at quality 92,
whichever is smaller. Tags and groups are emojibase's. `--check FILE` compares the pictures with those of another such
file, thing by thing; `--limit N` takes N drawings from all over the list.

The drawings keep their licences, named in the column `licence`: keep the notices of the packages with what you pass on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE = 128
LOSSLESS_BYTES = 6000
# Column of the list, the name in Iconify: style word, licence.
VENDORS = {
    "noto": ("noto", "Apache-2.0"),
    "twemoji": ("twemoji", "CC-BY-4.0"),
    "fluent-emoji": ("fluent", "MIT"),
    "fluent-emoji-flat": ("fluent flat", "MIT"),
    "fluent-emoji-3d": ("fluent 3d", "MIT"),
    "noto-v1": ("noto classic", "Apache-2.0"),
    "fxemoji": ("firefox", "Apache-2.0"),
    "streamline-emojis": ("outlined", "CC-BY-4.0"),
}
FILE = "webp:"  # an icon with this prefix is a file of the package of 3-D drawings
ICONS = Path(__file__).with_name("emoji_icons.tsv")


def listed(path: Path = ICONS) -> Iterator[dict[str, str]]:
    """The drawings to make: vendor, icon, hexcode ("" where there is none) and caption of each."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            for vendor in VENDORS:
                for icon in row[vendor].split():
                    yield {"vendor": vendor, "icon": icon, "hexcode": row["hexcode"], "caption": row["caption"]}


def svg(icons: dict[str, Any], name: str) -> str:
    """The drawing of an icon of an Iconify set as an SVG document; aliases may mirror their parent."""
    alias = {} if name in icons["icons"] else icons["aliases"][name]
    icon = icons["icons"][alias.get("parent", name)]
    left, top = (int(icon.get(key, icons.get(key, 0))) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    body = icon["body"].replace("currentColor", "black")
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{body}</svg>'


def rasterised(document: str) -> Image.Image:
    """An SVG document as a picture whose longer side is SIZE."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing SVG needs resvg_py: pip install resvg_py==0.5.0") from error
    width, height = map(float, document.split('viewBox="')[1].split('"')[0].split()[2:])
    side = {"width": SIZE} if width >= height else {"height": SIZE}
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=document, **side))))


def on_white(picture: Image.Image) -> Image.Image:
    """A picture in the middle of a white square, SIZE x SIZE; on white first and then made smaller."""
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture.convert("RGBA"))
    small = ground.convert("RGB")
    if max(picture.size) != SIZE:
        scale = SIZE / max(picture.size)
        small = small.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(small, ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
    return square


def encoded(picture: Image.Image) -> bytes:
    """WebP: lossless where that is small, else the smaller of lossless and quality 92."""
    exact, lossy = io.BytesIO(), io.BytesIO()
    picture.save(exact, "webp", lossless=True, method=6)
    if exact.tell() < LOSSLESS_BYTES:
        return exact.getvalue()
    picture.save(lossy, "webp", quality=92, method=6)
    return min(exact.getvalue(), lossy.getvalue(), key=len)


class Packages:
    """The unpacked packages, read where they are needed."""

    def __init__(self, iconify: Path, fluent_3d: Path, emojibase: Path) -> None:
        self._iconify, self._fluent_3d = iconify, fluent_3d
        self.versions = {
            folder: "npm {name} {version}".format(**json.loads((folder / "package.json").read_text("utf-8")))
            for folder in (iconify, fluent_3d, emojibase)
        }
        names = json.loads((emojibase / "en/messages.json").read_text("utf-8"))
        self._groups = {group["order"]: group["key"] for group in names["groups"]}
        self._subgroups = {group["order"]: group["key"] for group in names["subgroups"]}
        entries = json.loads((emojibase / "en/data.json").read_text("utf-8"))
        self._known = {entry["hexcode"]: entry for entry in entries}

    @cache  # noqa: B019 as many entries as there are sets
    def _icons(self, vendor: str) -> dict[str, Any]:
        path = self._iconify / f"json/{vendor}.json"
        icons: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return icons

    def picture(self, vendor: str, icon: str) -> Image.Image:
        """A drawing on white, SIZE x SIZE."""
        if icon.startswith(FILE):
            with Image.open(self._fluent_3d / f"assets/{icon.removeprefix(FILE)}.webp") as picture:
                return on_white(picture)
        return on_white(rasterised(svg(self._icons(vendor), icon)))

    def row(self, drawing: dict[str, str]) -> dict[str, Any]:
        """A row of the table."""
        vendor, icon = drawing["vendor"], drawing["icon"]
        style, licence = VENDORS[vendor]
        source = self.versions[self._fluent_3d if icon.startswith(FILE) else self._iconify]
        if icon.startswith(FILE) and vendor == "noto":
            source += " (flag drawn in Noto style)"
        known = self._known.get(drawing["hexcode"], {})
        return {
            "image": {"bytes": encoded(self.picture(vendor, icon)), "path": None},
            "caption": drawing["caption"],
            "tags": known.get("tags", []),
            "vendor": vendor,
            "style": style,
            "hexcode": drawing["hexcode"] or None,
            "group": self._groups.get(known.get("group")),
            "subgroup": self._subgroups.get(known.get("subgroup")),
            "licence": licence,
            "source": source,
        }


def check(rows: list[dict[str, Any]], other: Path) -> str:
    """How the pictures of `rows` differ from those of the same things in another file."""
    import pyarrow.parquet as pq

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["vendor"], row["hexcode"] or "", row["caption"]

    def pixels(row: dict[str, Any]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), np.int16)

    theirs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in pq.read_table(other).to_pylist():
        theirs.setdefault(key(row), []).append(row)
    both, differences = [], []
    for row in rows:
        if key(row) in theirs:  # the nearest, where a set has several drawings of one thing
            found = [(float(np.abs(pixels(row) - pixels(their)).mean()), their) for their in theirs[key(row)]]
            difference, nearest = min(found, key=lambda pair: pair[0])
            both.append((row, nearest))
            differences.append(difference)
    fields = ("tags", "style", "group", "subgroup", "licence", "source")
    worded = sum(all(mine[name] == their[name] for name in fields) for mine, their in both)
    return (
        f"{len(rows)} drawings, {len(both)} of them also in {other}: "
        f"{sum(value == 0 for value in differences)} with equal pixels, mean difference "
        f"{statistics.fmean(differences or [0]):.3f}/255, largest {max(differences, default=0):.2f}/255; "
        f"{worded} with equal tags, style, group, licence and source"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("iconify", "fluent-3d", "emojibase"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="the unpacked package")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .parquet file")
    parser.add_argument("--check", type=Path, help="compare with this file")
    parser.add_argument("--limit", type=int, default=0, help="only so many drawings")
    options = parser.parse_args()
    import pyarrow as pa
    import pyarrow.parquet as pq

    packages = Packages(options.iconify, options.fluent_3d, options.emojibase)
    drawings = list(listed())
    random.Random(0).shuffle(drawings)
    rows = [packages.row(drawing) for drawing in tqdm(drawings[: options.limit or None], unit="drawing", disable=None)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": features})
    pq.write_table(table, options.output, row_group_size=300, compression="zstd")
    print(f"wrote {options.output}: {len(rows)} drawings")
    if options.check:
        print(check(rows, options.check))


if __name__ == "__main__":
    main()
