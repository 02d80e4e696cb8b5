"""What there is to learn from in a folder or file, and the command that learns it.

Knows how sources are opened and the names of the recipes for data of one's own; does not know what those recipes say.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from nar.data.open import open_source
from nar.media.video import Windows

ANY = "my-data"  # the recipe that stands for whichever of these fits
RECIPES = {"pictures": "my-pictures", "clips": "my-clips"}
WORDS = ("text_encoder.source=minilm", "text_encoder.max_length=24")
FEWEST_CAPTIONS = 0.5  # share of the pictures with one, below which words are not learned
NUM_FRAMES = 16  # of clips, to look at them


@dataclass(frozen=True)
class Findings:
    """What a source holds: `kind` is "pictures" or "clips", `example` one of the captions."""

    source: str
    kind: str
    count: int
    class_names: tuple[str, ...]
    num_captions: int
    example: str

    @property
    def recipe(self) -> str:
        """The recipe that learns it."""
        return RECIPES[self.kind]

    @property
    def overrides(self) -> tuple[str, ...]:
        """What that recipe sets for it: words where most have a caption, and classes beside them."""
        if self.num_captions < FEWEST_CAPTIONS * self.count:
            return ()
        return (*WORDS, "classes=true") if len(self.class_names) > 1 else WORDS

    def command(self, run: str) -> str:
        """The command that learns it, as a shell reads it."""
        return shlex.join(["nar", "train", self.recipe, f"data={self.source}", f"run={run}", *self.overrides])

    @property
    def summary(self) -> str:
        """All of it in one line, for people."""
        parts = [f"{self.count:,} {self.kind}"]
        if (number := len(self.class_names)) > 1:
            names = ", ".join(self.class_names[:4]) + (", ..." if number > 4 else "")
            parts.append(f"{number} classes ({names})")
        if self.num_captions:
            few = "" if self.overrides else f", too few to learn words from (fewer than {FEWEST_CAPTIONS:.0%})"
            parts.append(f"{self.num_captions:,} captions such as {self.example!r}{few}")
        return "; ".join(parts)


def look(source: str, **options: Any) -> Findings:
    """Open the training part of a source, as pictures or else as clips; `options` are those of `open_source`."""
    try:
        found, kind = open_source(source, **options), "pictures"
    except (ValueError, FileNotFoundError) as no_pictures:  # animations, say
        try:
            found, kind = open_source(source, windows=Windows(NUM_FRAMES), **options), "clips"
        except (ValueError, OSError):
            raise no_pictures from None
    captions = [caption for caption in found.captions or () if caption]
    return Findings(source, kind, len(found), tuple(found.class_names), len(captions), captions[0] if captions else "")
