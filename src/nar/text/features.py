"""Features of captions on disk, so that each caption is encoded once, whatever is trained how often.

Knows files and arrays, and when to ask an encoder; does not know models or training. A folder holds the features of one
encoder at one length: parts of float16 token states without padding, memory-mapped, and their captions.
Dimensions: B captions, T token positions, C feature channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nar.progress import Progress
from nar.storage.fields import from_dict
from nar.storage.files import atomically, write_json
from nar.storage.folder import CONFIG, read_config
from nar.text.encoder import TextEncoder, TextEncoderConfig, padded

PART_SIZE = 4096  # captions encoded, and then written, at a time
_LARGEST = torch.finfo(torch.float16).max


class Features:
    """Features of captions in a folder that `cached` has written; they are read when asked for."""

    def __init__(self, folder: Path) -> None:
        values = read_config(folder)
        self.folder, self.dim = folder, int(values.pop("dim"))
        self.config = from_dict(TextEncoderConfig, values, folder / CONFIG)
        self._parts: list[Tensor] = []
        self._places: dict[str, tuple[int, int, int]] = {}  # part, first token, end
        for path in sorted(folder.glob("part-*.safetensors")):
            self._add(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, caption: str) -> bool:
        return caption in self._places

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, T, C) float32, left-padded with zeros, and their mask (B, T) bool: as `TextEncoder.encode`."""
        places = [self._places[caption] for caption in captions]
        return padded([self._parts[part][start:end] for part, start, end in places], self.config.max_length, self.dim)

    def _add(self, path: Path) -> None:
        try:
            tensors = load_file(path)  # memory-mapped
            captions: list[str] = json.loads(tensors["captions"].numpy().tobytes())
            ends: list[int] = tensors["ends"].tolist()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} can't be read ({error}); delete it, it is made again") from error
        places = [(len(self._parts), *place) for place in zip([0, *ends], ends, strict=False)]
        self._places |= zip(captions, places, strict=True)
        self._parts.append(tensors["states"])

    def write(self, captions: Sequence[str], states: Sequence[Tensor]) -> None:
        """Add the token states (tokens, C) of captions."""
        ends = torch.tensor([len(state) for state in states]).cumsum(0)
        text = json.dumps(list(captions)).encode()
        # Named by what is in it: processes that write at the same time need not agree on numbers.
        path = self.folder / f"part-{hashlib.sha256(text).hexdigest()[:16]}.safetensors"
        tensors = {
            "states": torch.cat(list(states)).clamp(-_LARGEST, _LARGEST).half().cpu(),
            "ends": ends,
            "captions": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }
        atomically(path, lambda staged: save_file(tensors, staged))
        self._add(path)


def cached(encoder: TextEncoder, captions: Iterable[str], folder: str | Path, *, quiet: bool = False) -> Features:
    """The features of captions, from the part of `folder` that is this encoder's; those not there are encoded first.

    The encoder is known by its digest, length and cleaning. Each caption is encoded once, in pieces that are kept when
    the process ends early. Several processes may write at the same time, each a share of the captions.
    """
    config = encoder.config
    kept = Path(folder) / f"{config.digest[:16]}-{config.max_length}{'-clean' if config.clean else ''}"
    if not (kept / CONFIG).is_file():
        write_json(kept / CONFIG, dataclasses.asdict(config) | {"dim": encoder.dim})
    features = Features(kept)
    missing = [caption for caption in dict.fromkeys(captions) if caption not in features]
    with Progress("encoding captions", len(missing), "captions", quiet=quiet or not missing) as bar:
        for start in range(0, len(missing), PART_SIZE):
            piece = missing[start : start + PART_SIZE]
            features.write(piece, encoder.states(piece))
            bar.update(len(piece))
    return features


def found(config: TextEncoderConfig, folder: str | Path) -> list[Features]:
    """What `folder` has of this encoder, which itself is not needed for these captions.

    A `max_length` of 0 and a `digest` of "" in `config` stand for any: then there may be several.
    """
    kept = [Features(path.parent) for path in sorted(Path(folder).glob(f"*/{CONFIG}"))]
    own = {name: value for name, value in vars(config).items() if value or name in ("source", "clean")}
    return [features for features in kept if own.items() <= vars(features.config).items()]
