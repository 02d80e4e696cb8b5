"""What every tokenizer is: pixels to codes and back, checks of both, and a model folder.

Does not know networks or quantisers, nor which kinds there are. Legend: `B` batch, `D` code_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from nar.media.pixels import check_codes, check_values
from nar.storage.fields import checked, from_dict
from nar.storage.folder import CONFIG, Floating, load_state, read_config, read_weights, without_weights, write_folder
from nar.tokenizer.quantize import Quantizer


class Reconstruction(NamedTuple):
    """One pass through a tokenizer for training."""

    pixels: Tensor  # as given
    latents: Tensor  # (B, D, *grid of codes) before quantisation
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class Tokenizer(nn.Module):
    """Pictures (B, 3, H, W) or clips (B, 3, T, H, W) in -1..1 to codes (B, *grid) and back.

    A kind of tokenizer is a subclass that says what it is called in `config.json`, which dataclass holds its sizes,
    what its axes are, and which sizes of pixels it takes; called for training, it gives a `Reconstruction`.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type]
    pixel_axes: ClassVar[tuple[str, ...]]
    code_axes: tuple[str, ...]  # names, or the sizes where there is one grid only
    shows_undecided: ClassVar[bool] = False  # `decode` takes codes of -1, and leaves out what they would add
    config: Any
    quantizer: Quantizer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels: Tensor) -> Reconstruction:
        """Reconstruct pixels, with the quantiser's losses."""
        latents = self.latents(pixels)
        quantized = self.quantizer(latents)
        return Reconstruction(self.decode_latents(quantized.latents), latents, *quantized[1:])

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels, where losses are balanced."""
        raise NotImplementedError

    def encoder_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """What decides the codes."""
        raise NotImplementedError

    def pixel_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The size of what codes of this grid stand for: height and width, of clips with the frames before."""
        raise NotImplementedError

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels to continuous latents (B, D, *grid)."""
        raise NotImplementedError

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to codes (B, *grid) int64; raises ValueError for what `check_pixels` refuses."""
        return self.quantizer.encode(self.latents(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, *grid) to pixels, about -1..1 and not clamped; raises ValueError for what `check_codes` refuses."""
        self.check_codes(codes)
        return self.decode_latents(self.quantizer.decode(codes))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, D, *grid) to pixels; with a gradient."""
        raise NotImplementedError

    def decode_options(self, pixels: Tensor) -> dict[str, Any]:  # noqa: ARG002 most grids say it all
        """Further arguments with which `decode` gives the shape of these pixels."""
        return {}

    def check_pixels(self, pixels: Tensor) -> None:
        """Raise ValueError for no tensor, other axes or sizes, and values that are not finite or far outside -1..1."""
        noun = "pictures" if len(self.pixel_axes) == 2 else "clips"
        wanted = f"(batch, 3, {', '.join(self.pixel_axes)})"
        if not isinstance(pixels, Tensor):
            found = f"{type(pixels).__name__}; nar.media.pixels.as_pixels makes one of uint8 arrays"
            raise ValueError(f"{noun} must be a float tensor {wanted} in -1..1, not {found}")
        if pixels.ndim != 2 + len(self.pixel_axes) or pixels.shape[1] != 3:
            raise ValueError(f"{noun} must be {wanted}, not {tuple(pixels.shape)}; convert to RGB first")
        self._check_size(*pixels.shape[2:])
        if pixels.dtype != (own := next(self.parameters()).dtype) and pixels.is_floating_point():
            raise ValueError(f"{noun} are {pixels.dtype}, this tokenizer computes in {own}; convert one of them")
        check_values(pixels, noun)

    def _check_size(self, *size: int) -> None:
        """Raise ValueError for pixels of a size, along `pixel_axes`, that the encoder can't take."""
        raise NotImplementedError

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError for codes of other axes, or that this tokenizer does not have."""
        if not isinstance(codes, Tensor):
            raise ValueError(f"codes must be a tensor (batch, {', '.join(self.code_axes)}), not {type(codes).__name__}")
        sizes = zip(self.code_axes, map(str, codes.shape[1:]), strict=False)
        if codes.ndim != 1 + len(self.code_axes) or any(axis.isdecimal() and axis != size for axis, size in sizes):
            raise ValueError(f"codes must be (batch, {', '.join(self.code_axes)}), not {tuple(codes.shape)}")
        check_codes(codes, self.config.vocab_size)

    @classmethod
    @checked
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a tokenizer folder, strictly. Weights stored in half precision are read into float32."""
        config = read_config(folder)
        if config.get("kind") != cls.kind:
            raise ValueError(f"{folder} holds {config.get('kind', 'something of unknown kind')!r}, not {cls.kind!r}")
        with without_weights():
            tokenizer = cls(from_dict(cls.config_class, config.get("tokenizer"), Path(folder) / CONFIG))
        load_state(tokenizer, _converted(read_weights(folder), torch.float32), folder)
        return tokenizer.eval()

    @checked
    def save_pretrained(self, folder: str | Path, *, dtype: Floating | None = None, **extra: Any) -> None:
        """Write the tokenizer as a folder; `extra` goes into `config.json` (how it was trained, say)."""
        config = {"kind": self.kind, "tokenizer": dataclasses.asdict(self.config), **extra}
        write_folder(folder, config, _converted(self.state_dict(), dtype))


def check_patches(patch_size: int, size: Sequence[int], noun: str) -> None:
    """Raise ValueError for a height and width that patches of so many pixels a side do not divide."""
    height, width = size
    if height % patch_size or width % patch_size or not height or not width:
        found = f"{noun} of {height}x{width} pixels"
        raise ValueError(f"{found} are not a multiple of the patch size {patch_size}; resize or pad them first")


def _converted(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in another precision; counts, of batch norms say, stay whole numbers."""
    return {name: value.to(dtype) if dtype and value.is_floating_point() else value for name, value in state.items()}
