"""Find and read the golden fixtures: numbers recorded from the published code with small random weights.

Looks in `tests/golden`, or in `NAR_GOLDEN_DIR` when that is set; does not know what a kind means.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

asked_kinds: set[str] = set()  # by all test modules that were imported


@dataclass(frozen=True)
class Fixture:
    """One recorded run: what it is (`meta`), the published state dict (`weights`), inputs and outputs (`io`)."""

    name: str
    folder: Path

    def __str__(self) -> str:
        return self.name

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads(self.path(".json").read_text(encoding="utf-8"))

    @cached_property
    def weights(self) -> dict[str, Tensor] | None:
        return load_file(self.path(".safetensors")) if self.path(".safetensors").is_file() else None

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.path(".io.safetensors")) if self.path(".io.safetensors").is_file() else {}

    def changed(self, **parts: Any) -> Fixture:
        """The same fixture with other contents of `meta`, `weights` or `io`."""
        copy = replace(self)
        copy.__dict__.update({"meta": self.meta, "weights": self.weights, "io": self.io, **parts})
        return copy


def folder() -> Path:
    return Path(os.environ.get("NAR_GOLDEN_DIR") or Path(__file__).parent / "golden")


def fixtures(*kinds: str) -> list[Fixture]:
    """All fixtures whose json says one of `kinds`, by name; empty when there is none."""
    asked_kinds.update(kinds)
    found = [Fixture(path.stem, path.parent) for path in sorted(folder().glob("*.json"))]
    return [fixture for fixture in found if fixture.meta.get("kind") in kinds]
