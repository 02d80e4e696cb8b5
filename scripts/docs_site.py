"""What `make docs` adds to the pages of docs/: cards of what is bundled, the changelog, and every command's help.

A hook of mkdocs. Pages have the links of the repository; those that leave docs/ are led to the page, or the file,
that the site has of it.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "src/nar/bundled"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def pages() -> dict[str, str]:
    """The pages from elsewhere: the path of each in the repository, and in the site."""
    cards = sorted(BUNDLED.rglob("README.md"))
    named = {card.relative_to(ROOT).as_posix(): "-".join(card.relative_to(BUNDLED).parts[:-1]) for card in cards}
    return {path: f"cards/{name}.md" for path, name in named.items()} | {"CHANGELOG.md": "changelog.md"}


def commands() -> str:
    """The help of every verb, as Typer writes it."""
    typer = [sys.executable, "-m", "typer", "nar.cli", "utils", "docs", "--name", "nar", "--title", "Commands"]
    return subprocess.run(typer, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the files that links name."""
    moved, linked = pages(), set[str]()
    for source, target in moved.items():
        text = led(ROOT / source, target, moved, linked)
        files.append(File.generated(config, target, content=text))
    for file in files.documentation_pages():
        if file.abs_src_path is not None:
            led(Path(file.abs_src_path), file.src_uri, moved, linked)
    for path in sorted(linked):
        aside = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path), inclusion=aside))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page of docs/ to where the site has what they name."""
    if page.file.abs_src_path is None:  # one of those above
        return markdown
    return led(Path(page.file.abs_src_path), page.file.src_uri, pages(), set())


def led(path: Path, target: str, moved: dict[str, str], linked: set[str]) -> str:
    """The text of a page at `target` in the site; files outside of docs/ that it links to are added to `linked`."""

    def place(found: re.Match[str]) -> str:
        named = posixpath.normpath(posixpath.join(path.parent.relative_to(ROOT).as_posix(), found[0]))
        inside = moved.get(named, named.removeprefix("docs/"))
        if inside == named:  # neither a page of the site nor in docs/
            if not (ROOT / named).is_file():
                return found[0]  # mkdocs says that it leads nowhere
            linked.add(named)
            inside = f"files/{named}"
        return posixpath.relpath(inside, posixpath.dirname(target))

    return LINK.sub(place, path.read_text(encoding="utf-8"))
