"""LlamaGen's image tokenizer and LARP's video tokenizer: their configs, and what they call their tensors.

Knows settings and spellings; does not know how files are read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nar.convert.checkpoint import Checkpoint
from nar.convert.renaming import Parts, check_kind, rename
from nar.storage.folder import without_weights
from nar.storage.presets import Preset
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig

IMAGE_SPELLINGS = (
    (r"^quantizer\.", "quantize."),
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"\.levels\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
    (r"\.levels\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
    (r"\.(down|up)samples\.(\d+)\.", r".conv_blocks.\2.\1sample."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.(q|k|v)(uery|ey|alue)\.", r".\1."),
    (r"\.proj\.", ".proj_out."),
)
VIDEO_SPELLINGS = (
    (r"^patch_embed\.", "x_embedder.proj."),
    (r"^to_code\.", "bottleneck.in_linear."),
    (r"^from_code\.", "bottleneck.out_linear."),
    (r"^quantizer\.", "bottleneck.regularizer."),
    (r"^inverse_temperature$", "bottleneck.regularizer.stochastic_temperature_inv"),
    (r"^code_norm\.norm\.", "bottleneck.norm_layer."),
    (r"^norm_out\.", "final_layer.norm_final."),
    (r"^to_pixels\.", "final_layer.linear."),
    (r"^queries\.table$", "encoder_latent_query_embed"),
    (r"^queries\.shift$", "encoder_latent_query_token_type_embed"),
    (r"^code_positions\.table$", "decoder_latent_pe"),
    (r"^code_positions\.shift$", "decoder_latent_token_type_embed"),
    (r"^patch_positions\.table$", "encoder_patch_pe"),
    (r"^patch_positions\.shift$", "encoder_patch_token_type_embed"),
    (r"^patch_positions\.time$", "encoder_t_embed"),
    (r"^patch_positions\.row$", "encoder_h_embed"),
    (r"^patch_positions\.column$", "encode_w_embed"),  # sic
    (r"^pixel_queries\.table$", "decoder_patch_query_embed"),
    (r"^pixel_queries\.shift$", "decoder_patch_query_token_type_embed"),
    (r"^pixel_queries\.time$", "decoder_t_embed"),
    (r"^pixel_queries\.row$", "decoder_h_embed"),
    (r"^pixel_queries\.column$", "decoder_w_embed"),
    (r"^(en|de)coder\.(\d+)\.", r"\1coder.blocks.\2."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.qkv\.", ".attn.qkv."),
    (r"\.attention_out\.", ".attn.proj."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.mlp_in\.", ".mlp.fc1."),
    (r"\.mlp_out\.", ".mlp.fc2."),
)


def image_tokenizer_state(
    checkpoint: Checkpoint, *, preset: Preset | None = None, l2_norm: bool = True
) -> tuple[ImageTokenizerConfig, dict[str, Parts]]:
    """LlamaGen's VQ tokenizer; sizes and patch size are read off the tensors. `l2_norm` is not in them."""
    check_kind(checkpoint, "llamagen-vq", preset)
    channels = checkpoint.shape("encoder.conv_in.weight")[0]
    widths = [
        checkpoint.shape(f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0]
        for level in range(checkpoint.count(r"encoder\.conv_blocks\.(\d+)\."))
    ]
    vocab_size, code_dim = checkpoint.shape("quantize.embedding.weight")
    config = ImageTokenizerConfig(
        vocab_size=vocab_size,
        code_dim=code_dim,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_blocks=checkpoint.count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        latent_channels=checkpoint.shape("encoder.conv_out.weight")[0],
        l2_norm=l2_norm,
    )
    if preset and config != ImageTokenizerConfig(**preset.config, l2_norm=l2_norm):
        raise ValueError(f"{checkpoint.origin} has other sizes than preset {preset.name}: {config}")
    with without_weights():
        module = ImageTokenizer(config)
    # `codebook_used` counts how often codes were drawn while training.
    return config, rename(checkpoint, module, IMAGE_SPELLINGS, dropped=r"quantize\.codebook_used$")


_SIZES = {  # the published setting, and its value where it is not stored
    "num_frames": ("frame_num", 16),
    "image_size": ("input_size", 128),
    "num_tokens": ("bottleneck_token_num", 1024),
    "patch_size": ("patch_size", 8),
    "temporal_patch_size": ("temporal_patch_size", 4),
    "encoder_dim": ("encoder_hidden_size", 768),
    "decoder_dim": ("decoder_hidden_size", 768),
    "num_encoder_layers": ("encoder_depth", 6),
    "num_decoder_layers": ("decoder_depth", 6),
    "num_encoder_heads": ("encoder_num_heads", 12),
    "num_decoder_heads": ("decoder_num_heads", 12),
}
_FLAGS = {
    "learned_patch_positions": "learned_encoder_patch_pe",
    "learned_code_positions": "learned_decoder_latent_pe",
    "learned_pixel_queries": "learned_decoder_patch_query_embed",
    "patch_type": "use_encoder_patch_token_type_embed",
    "query_type": "use_encoder_latent_query_token_type_embed",
    "code_type": "use_decoder_latent_token_type_embed",
    "pixel_query_type": "use_decoder_patch_query_token_type_embed",
}
_NORMS = {"ln_d": "layer", "ln_nd": "layer_all", "bn_bn": "batch", "bn_b": "batch_all"}
_NORMS |= dict.fromkeys(("no", "none", "ln_d_na"), "none")  # the last is accepted upstream, but never applied
_DEFAULT_TRANSFORMER = "transformer_encoder_parallel"


def video_tokenizer_state(
    checkpoint: Checkpoint, *, grid: Sequence[int] | None = None, preset: Preset | None = None
) -> tuple[VideoTokenizerConfig, dict[str, Parts]]:
    """LARP's tokenizer, with all its flags; `grid` is the shape codes are read in, by default that of its patches."""
    check_kind(checkpoint, "larp-tokenizer", preset)
    if preset:
        config = VideoTokenizerConfig(**preset.config | ({"grid": tuple(grid)} if grid else {}))
    else:
        config = _video_tokenizer_config(checkpoint, grid)
    with without_weights():
        module = VideoTokenizer(config)
    # The prior shaped the codes while training; nothing needs it later.
    return config, rename(checkpoint, module, VIDEO_SPELLINGS, dropped=r"prior_model\.")


def _video_tokenizer_config(checkpoint: Checkpoint, grid: Sequence[int] | None) -> VideoTokenizerConfig:
    settings = checkpoint.settings
    if "bottleneck" not in settings and isinstance(settings.get("args"), dict):
        settings = settings["args"]
    if "bottleneck" not in settings:
        raise ValueError(
            f"{checkpoint.origin} comes without the tokenizer's settings; put its config.json into the same folder "
            "and convert the folder, or name a preset (LARP-L-long)"
        )
    bottleneck = settings["bottleneck"].get("args", settings["bottleneck"])
    regularizer = bottleneck.get("regularizer") or {}
    quantizer = regularizer.get("args", {})
    sizes: dict[str, Any] = {ours: int(settings.get(theirs, usual)) for ours, (theirs, usual) in _SIZES.items()}
    patch_size, temporal_patch_size = sizes["patch_size"], sizes["temporal_patch_size"]
    transformer = settings.get("transformer_name", _DEFAULT_TRANSFORMER)
    sides = [settings.get(f"{side}_name") or "none" for side in ("encoder", "decoder")]
    sides = [transformer if str(name).lower() in ("none", "no", "null") else name for name in sides]
    for name, found, supported in (
        ("regularizer", str(regularizer.get("name")).lower(), "vq"),
        ("encoder", sides[0], _DEFAULT_TRANSFORMER),
        ("decoder", sides[1], _DEFAULT_TRANSFORMER),
        ("in_channels", int(settings.get("in_channels", 3)), 3),
        ("decoder_patch_size", int(settings.get("decoder_patch_size", 8)), patch_size),
        ("decoder_temporal_patch_size", int(settings.get("decoder_temporal_patch_size", 4)), temporal_patch_size),
    ):
        if found != supported:
            raise ValueError(f"{checkpoint.origin}: {name} {found!r} is not supported; {supported!r} is")
    norm = str(bottleneck.get("norm")).lower()
    if norm not in _NORMS:
        raise ValueError(f"{checkpoint.origin}: norm {norm!r} is unknown; known: {', '.join(_NORMS)}")
    if "codebook_size" not in quantizer:
        raise ValueError(
            f"{checkpoint.origin}: codebook_size is missing in the settings of the regularizer; take the config.json "
            "that was published with these weights, or name a preset (LARP-L-long)"
        )
    if grid is None:
        side = sizes["image_size"] // patch_size
        grid = (sizes["num_frames"] // temporal_patch_size, side, side)
        grid = grid if math.prod(grid) == sizes["num_tokens"] else (sizes["num_tokens"],)
    code_dim = int(bottleneck.get("bottleneck_dim", -1))
    stochastic = bool(quantizer.get("stochastic", False))
    temperature = float(quantizer.get("stochastic_temperature", 1.0))
    return VideoTokenizerConfig(
        **sizes,
        grid=tuple(grid),
        vocab_size=int(quantizer["codebook_size"]),
        code_dim=code_dim if code_dim > 0 else sizes["encoder_dim"],
        norm=_NORMS[norm],
        l2_norm=bool(quantizer.get("l2_normalized", False)),
        stochastic=stochastic,
        temperature=(temperature if temperature > 0 else None) if stochastic else 1.0,
        learned_queries=bool(settings.get("learned_encoder_latent_query_embed", True)),
        position_base=float(settings.get("latent_pe_scale_factor", 10000)),
        **{ours: bool(settings.get(theirs, False)) for ours, theirs in _FLAGS.items()},
    )
