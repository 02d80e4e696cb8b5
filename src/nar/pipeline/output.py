"""What a call gives back: pictures or clips, their codes and names; saved, shown in notebooks, or used as a list.

Knows pixels and file formats; does not know models. Legend: `B` results, `T H W` frames and pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nar.media.clips import save_clip
from nar.media.pixels import as_images
from nar.media.sheet import contact_sheet, film_strips, moving_sheet
from nar.storage.fields import Positive, checked
from nar.storage.files import atomically

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
STILLS = (".png", ".jpg", ".jpeg", ".webp")
CLIPS = (".gif", ".mp4", ".webp", ".png", ".jpg", ".jpeg")
JPEG_QUALITY = 95


@dataclass(frozen=True, eq=False, repr=False)
class Output:
    """The result of a call: `images` or, of a model that makes clips, `videos`; the other is None.

    By output type they are Pillow pictures (a list of them a clip), uint8 (B, [T,] H, W, 3), float -1..1
    (B, 3, [T,] H, W), or codes (B, *grid). `len`, `in` order and `[i]` are those of the results. In a notebook
    pictures are shown as a sheet, and clips play.

    Attributes:
        names: what each is of: its prompt, or else the name of its class.
        codes: (B, *grid); of clips that took several passes those of the last.
        seed: number i can be sampled again with it at its place in `indices` of `nar.generate`; where it is a list,
            with its own, at place 0.
        frame_rate: of clips, frames per second.
    """

    images: Any
    videos: Any
    names: list[str]
    class_labels: list[int]
    seed: int | list[int]
    codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    frame_rate: float = 8.0

    @property
    def _results(self) -> Any:
        return self.images if self.videos is None else self.videos

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._results)

    def __getitem__(self, index: Any) -> Any:
        return self._results[index]

    def __repr__(self) -> str:
        kind = "picture" if self.videos is None else "clip"
        names = dict.fromkeys(name for name in self.names if name)
        listed = ", ".join(list(names)[:4]) + (", ..." if len(names) > 4 else "")
        shown = [f"{len(self)} {kind}{'s' * (len(self) != 1)}", *([f"of {listed}"] if listed else [])]
        return f"<Output: {' '.join(shown)}, seed {self.seed}>"

    @checked
    def save(self, path: str | Path, *, frame_rate: Positive | None = None) -> Path:
        """Write the results, by the path's ending, and return it; one alone as it is, several on a sheet.

        Pictures: .png, .jpg, .webp. Clips: .gif, .mp4 and .webp play (several side by side), .png and .jpg have one row
        of frames a clip. Both: .npz, and a folder without an ending, of PNGs or of a folder of PNGs for each clip.

        Raises:
            ValueError: another ending, or an output of codes, which have no pixels yet.
            ModuleNotFoundError: .mp4 without PyAV.
        """
        path, clips = Path(path), self.videos is not None
        suffix = path.suffix.lower()
        if suffix not in ("", ".npz", *(CLIPS if clips else STILLS)):
            kinds = ", ".join((CLIPS if clips else STILLS)[:-1])
            noun = "clips" if clips else "pictures"
            raise ValueError(f"{noun} are saved as {kinds}, .npz, or in a folder without a dot, not {path.suffix!r}")
        rate, pictures = frame_rate or self.frame_rate, self.pictures()
        if suffix == ".npz":
            atomically(path, self._write_arrays)
        elif not suffix:
            atomically(path, lambda folder: _write_folder(folder, pictures, rate))
        elif clips and suffix in (".gif", ".mp4", ".webp"):
            moving = pictures[0] if len(pictures) == 1 else moving_sheet(pictures, self.names, columns=self.columns)
            atomically(path, lambda staged: save_clip(moving, staged, frame_rate=rate))
        else:
            picture = self._picture()
            options = {"quality": JPEG_QUALITY} if suffix in (".jpg", ".jpeg") else {"lossless": True}
            atomically(path, lambda staged: picture.save(staged, **options))
        return path

    def pictures(self) -> list[Any]:
        """The results as Pillow pictures, of clips lists of them, whatever their output type.

        Raises:
            ValueError: they are codes.
        """
        made = self._results
        if isinstance(made, list):
            return made
        if not isinstance(made, np.ndarray) and not made.is_floating_point():
            raise ValueError("codes have no pixels: give them to pipe.pictures(codes)")
        if isinstance(made, np.ndarray):
            return [_pillow(one) for one in made]
        return as_output(list(made), "pil")  # type: ignore[no-any-return]

    @property
    def columns(self) -> int | None:
        """Columns of a sheet with a row for each prompt or class, where there are several of each; else None."""
        runs = {len(list(run)) for _, run in groupby(self.names)}
        return runs.pop() if len(runs) == 1 and runs != {1} and runs != {len(self)} else None

    def _picture(self) -> Image.Image:
        pictures = self.pictures()
        if self.videos is not None:
            return film_strips(pictures, self.names)
        if len(pictures) == 1:
            return pictures[0]  # type: ignore[no-any-return]
        return contact_sheet(pictures, self.names, columns=self.columns)

    def _write_arrays(self, path: Path) -> None:
        made = self._results
        pixels = made if isinstance(made, np.ndarray) else np.stack([_array(one) for one in self.pictures()])
        labels = np.array(self.class_labels)
        arrays = {"arr_0": pixels, "names": np.array(self.names)} | ({"labels": labels} if labels.min() >= 0 else {})
        with path.open("wb") as file:  # of a path numpy would make .NPZ.npz
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def _repr_png_(self) -> bytes | None:
        return (
            None
            if self.videos is not None or self._holds_codes
            else _bytes(partial(self._picture().save, format="PNG"))
        )

    def _repr_html_(self) -> str | None:
        if self.videos is None or self._holds_codes:
            return None
        first, *others = moving_sheet(self.pictures(), self.names, columns=self.columns)
        save = partial(first.save, format="WEBP", save_all=True, append_images=others, loop=0, lossless=True)
        encoded = base64.b64encode(_bytes(partial(save, duration=round(1000 / self.frame_rate)))).decode()
        return f'<img alt="{len(self)} clip{"s" * (len(self) != 1)}" src="data:image/webp;base64,{encoded}">'

    @property
    def _holds_codes(self) -> bool:
        return isinstance(self._results, Tensor) and not self._results.is_floating_point()


def as_output(pixels: Sequence[Tensor], output_type: str) -> Any:
    """Pictures (3, H, W) or clips (3, T, H, W) in -1..1 as one of the output types."""
    if output_type == "pt":
        return torch.stack(list(pixels))
    arrays = [as_images(one[None])[0] for one in pixels]
    return np.stack(arrays) if output_type == "np" else [_pillow(array) for array in arrays]


def greyed(pixels: Tensor, hidden: Tensor) -> Tensor:
    """Pixels (B, 3, [T,] H, W) that are mid-grey where the codes (B, *grid) are `hidden`."""
    if not hidden.any():
        return pixels
    mask = hidden[:, None].float().to(pixels.device)
    return pixels.masked_fill(torch.nn.functional.interpolate(mask, size=pixels.shape[2:]).bool(), 0.0)


def _pillow(array: np.ndarray) -> Any:
    return list(map(Image.fromarray, array)) if array.ndim == 4 else Image.fromarray(array)


def _array(one: Any) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in one]) if isinstance(one, list) else np.asarray(one)


def _write_folder(folder: Path, pictures: Sequence[Any], frame_rate: float) -> None:
    folder.mkdir()
    for index, one in enumerate(pictures):
        if isinstance(one, list):
            save_clip(one, folder / f"{index:06d}", frame_rate=frame_rate)
        else:
            one.save(folder / f"{index:06d}.png")


def _bytes(save: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()
