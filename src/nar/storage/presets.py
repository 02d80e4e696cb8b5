"""Published models by name: their sizes as plain numbers, so that listing them needs no torch.

Knows configurations; does not know how they are built or loaded. `config` has the fields of `ModelConfig`,
`ImageTokenizerConfig`, `VideoTokenizerConfig` or `MultiScaleTokenizerConfig`, by `kind` as in `nar convert`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published size. `published` is what its authors' code calls it; `num_parameters` leaves fixed tables out."""

    name: str
    kind: str
    published: str
    num_parameters: int
    config: dict[str, Any]


def find(name: str) -> Preset:
    """The preset called `name`; raises ValueError with the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, cutoff=0.4) or PRESETS
    raise ValueError(f"preset {name!r} is unknown; did you mean {', '.join(near)}?")


# What all published image models share; the condition's tokens are not rotated but zeroed, see `ModelConfig`.
_IMAGE = {"grid": (16, 16), "vocab_size": 16384, "condition_rotation": "zero", "null_mask": "caption"}
_CLASSES = {**_IMAGE, "num_classes": 1000}
_TEXT = {**_IMAGE, "text_dim": 2048, "text_length": 120}
_VIDEO = {"grid": (4, 16, 16), "vocab_size": 8192, "num_classes": 101, "positions": "learned"}


def _sizes(dim: int, num_layers: int, num_heads: int) -> dict[str, int]:
    return {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}


_SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _next_scale(depth: int, scales: tuple[int, ...] = _SCALES_256) -> dict[str, Any]:
    grid = (sum(side * side for side in scales),)
    order = {"grid": grid, "schedule": "scales", "scales": scales, "code_dim": 32, "positions": "levels"}
    block = {"hidden_dim": 256 * depth, "modulation": "own", "unit_keys": True, "norm_eps": 1e-6}
    return _sizes(64 * depth, depth, depth) | order | block | {"vocab_size": 4096, "num_classes": 1000}


_B, _M, _L = _sizes(768, 12, 12), _sizes(1024, 18, 16), _sizes(1024, 24, 16)
_XL, _XXL, _3B = _sizes(1280, 36, 20), _sizes(1536, 48, 24), _sizes(3200, 24, 32)

_ALL = (
    Preset("NAR-B", "nar-c2i", "GPT-B", 130_551_552, _CLASSES | _B),
    Preset("NAR-M", "nar-c2i", "GPT-M", 295_453_696, _CLASSES | _M),
    Preset("NAR-L", "nar-c2i", "GPT-L", 372_536_320, _CLASSES | _L),
    Preset("NAR-XL", "nar-c2i", "GPT-XL", 815_991_040, _CLASSES | _XL),
    Preset("NAR-XXL", "nar-c2i", "GPT-XXL", 1_464_454_656, _CLASSES | _XXL),
    Preset("NAR-XL-t2i", "nar-t2i", "GPT-XL", 818_969_600, _TEXT | _XL),
    Preset("NAR-video-S", "nar-c2v", "llama-abs-S", 37_800_192, _VIDEO | _sizes(384, 12, 6)),
    Preset("NAR-video-B", "nar-c2v", "llama-abs-B", 125_145_600, _VIDEO | _B),
    Preset("NAR-video-L", "nar-c2v", "llama-abs-L", 368_736_256, _VIDEO | _L),
    Preset("NAR-video-LP", "nar-c2v", "llama-abs-LP", 693_588_480, _VIDEO | _sizes(1280, 30, 20)),
    Preset("NAR-video-XL", "nar-c2v", "llama-abs-XL", 815_500_800, _VIDEO | _XL),
    Preset("LlamaGen-B", "llamagen-gpt", "GPT-B", 110_888_448, _CLASSES | _B | {"schedule": "raster"}),
    Preset("LlamaGen-L", "llamagen-gpt", "GPT-L", 342_910_976, _CLASSES | _L | {"schedule": "raster"}),
    Preset("LlamaGen-XL", "llamagen-gpt", "GPT-XL", 774_699_520, _CLASSES | _XL | {"schedule": "raster"}),
    Preset("LlamaGen-XXL", "llamagen-gpt", "GPT-XXL", 1_410_972_672, _CLASSES | _XXL | {"schedule": "raster"}),
    Preset("LlamaGen-3B", "llamagen-gpt", "GPT-3B", 3_096_659_200, _CLASSES | _3B | {"schedule": "raster"}),
    Preset("LlamaGen-XL-t2i", "llamagen-gpt", "GPT-XL", 777_678_080, _TEXT | _XL | {"schedule": "raster"}),
    Preset("VAR-d12", "var", "VAR-d12", 133_186_960, _next_scale(12)),
    Preset("VAR-d16", "var", "VAR-d16", 310_283_520, _next_scale(16)),
    Preset("VAR-d20", "var", "VAR-d20", 600_917_136, _next_scale(20)),
    Preset("VAR-d24", "var", "VAR-d24", 1_033_399_360, _next_scale(24)),
    Preset("VAR-d30", "var", "VAR-d30", 2_010_020_356, _next_scale(30)),
    Preset("VAR-d36", "var", "VAR-d36", 2_353_893_904, _next_scale(36, _SCALES_512) | {"modulation": "shared"}),
    Preset("VAR-VAE", "var-vae", "vae_ch160v4096z32", 108_948_355, {}),
    Preset("VQ-16", "llamagen-vq", "VQ-16", 71_883_403, {"channel_multipliers": (1, 1, 2, 2, 4)}),
    Preset("VQ-8", "llamagen-vq", "VQ-8", 70_109_835, {"channel_multipliers": (1, 2, 2, 4)}),
    Preset("LARP-L-long", "larp-tokenizer", "larp_tokenizer", 172_179_984, {"grid": (4, 16, 16)}),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
