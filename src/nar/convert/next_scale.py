"""VAR's transformer and multi-scale tokenizer: their configs, and what they call their tensors.

Knows which sizes the tensors tell and which they do not; does not know how files are read or written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nar.convert.checkpoint import Checkpoint
from nar.convert.renaming import Origin, Parts, check_kind, rename, respelled
from nar.model import ModelConfig, Transformer
from nar.scales import NUM_SMOOTHERS
from nar.storage.folder import Weights, read_config, without_weights
from nar.storage.presets import Preset
from nar.tokenizer.multiscale import MultiScaleTokenizer, MultiScaleTokenizerConfig

_SPELLINGS = (
    (r"^tokens\.", "word_embed."),
    (r"^classes\.", "class_emb."),
    (r"^levels$", "lvl_embed.weight"),
    (r"^output_bias$", "head.bias"),
    (r"^output\.", "head."),
    (r"^modulation\.last\.", "head_nm.ada_lin.1."),
    (r"\.linear\.", "."),
    (r"\.feed_forward\.up\.", ".ffn.fc1."),
    (r"\.feed_forward\.down\.", ".ffn.fc2."),
    (r"\.attention\.", ".attn."),
    (r"\.qkv\.", ".mat_qkv."),
    (r"\.query_bias$", ".q_bias"),
    (r"\.value_bias$", ".v_bias"),
    (r"\.log_scale$", ".scale_mul_1H11"),
)
_TOKENIZER_SPELLINGS = (
    (r"^quantizer\.sums\.codebook$", "quantize.embedding.weight"),
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
    (r"^encoder\.levels\.(\d+)\.attentions\.", r"encoder.down.\1.attn."),
    (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down.\1.downsample."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.proj\.", ".proj_out."),
)


PUBLISHED_SAMPLING = {"guidance_scale": 2.5, "guidance_curve": "linear", "top_k": 900, "top_p": 0.96}  # of their FID


def tokenizer_sums(folder: str | Path) -> dict[str, Tensor]:
    """Codebook, kernels and biases of a converted tokenizer, which VAR's transformer reads and its file has not."""
    if (kind := read_config(folder).get("kind")) != MultiScaleTokenizer.kind:
        raise ValueError(
            f"{folder} holds a {kind}, not a {MultiScaleTokenizer.kind}; convert VAR's with --kind var-vae"
        )
    with Weights(folder).opened() as file:
        return {name: file.get_tensor(f"quantizer.sums.{name}") for name in ("codebook", "kernels", "biases")}


def next_scale_state(
    checkpoint: Checkpoint, sums: Mapping[str, Tensor], *, preset: Preset | None = None, num_heads: int | None = None
) -> tuple[ModelConfig, dict[str, Parts]]:
    """VAR's transformer. `sums` are the codebook, kernels and biases of its tokenizer, which are not in its file.

    Raises:
        ValueError: another kind of checkpoint, tensors that do not fit, or a number of heads that must be given.
    """
    check_kind(checkpoint, "var", preset)
    vocab_size, dim = checkpoint.shape("head.weight")
    depth = checkpoint.count(r"blocks\.(\d+)\.")
    unit_keys = "blocks.0.attn.scale_mul_1H11" in checkpoint.tensors
    if unit_keys:
        found = checkpoint.shape("blocks.0.attn.scale_mul_1H11").numel()
        if num_heads not in (None, found):
            raise ValueError(f"{checkpoint.origin} has {found} attention heads, not {num_heads}; leave it out")
        num_heads = found
    elif num_heads is None and dim % 64:
        raise ValueError(f"{checkpoint.origin} has dim {dim}, and no number of heads; give it with --num-heads")
    shared = "shared_ada_lin.1.weight" in checkpoint.tensors
    scales = _sides(checkpoint)
    config = ModelConfig(
        grid=(sum(side * side for side in scales),),
        vocab_size=vocab_size,
        dim=dim,
        num_layers=depth,
        num_heads=num_heads or dim // 64,
        hidden_dim=checkpoint.shape("blocks.0.ffn.fc1.weight")[0],
        schedule="scales",
        scales=scales,
        code_dim=checkpoint.shape("word_embed.weight")[1],
        positions="levels",
        norm_eps=1e-6,
        num_classes=checkpoint.shape("class_emb.weight")[0] - 1,
        modulation="shared" if shared else "own",
        unit_keys=unit_keys,
    )
    if preset and (wrong := [n for n, value in preset.config.items() if getattr(config, n) != value]):
        name = wrong[0]
        raise ValueError(
            f"{checkpoint.origin} has {name} {getattr(config, name)}, preset {preset.name} {preset.config[name]}"
        )
    tensors = {**checkpoint.tensors, **{f"sums.{name}": tensor for name, tensor in sums.items()}}
    start, places = (tensors.pop(name) for name in ("pos_start", "pos_1LC") if checkpoint.shape(name))
    # The class stands at the first place; that row by itself is not read, and kept.
    tensors["positions"] = torch.cat([start + places[:, :1], places], 1)
    joined: dict[str, Origin] = {}
    for layer in range(1 if shared else depth):
        for part in ("weight", "bias"):
            name = f"shared_ada_lin.1.{part}" if shared else f"blocks.{layer}.ada_lin.1.{part}"
            joined[f"modulation.blocks.{layer}.{part}"] = Origin((name,))
    if shared:
        joined["modulation.constants"] = Origin(tuple(f"blocks.{layer}.ada_gss" for layer in range(depth)))
    with without_weights():
        module = Transformer(config)
    # What says which scale a place is of, and the mask and the bias of zeros that follow from the rest.
    dropped = r"lvl_1L$|attn_bias_for_masking$|blocks\.\d+\.attn\.zero_k_bias$"
    renamed = rename(
        dataclasses.replace(checkpoint, tensors=tensors), module, _SPELLINGS, joined=joined, dropped=dropped
    )
    return config.complete(), renamed


def multiscale_tokenizer_state(
    checkpoint: Checkpoint, *, preset: Preset | None = None, scales: Sequence[int] | None = None
) -> tuple[MultiScaleTokenizerConfig, dict[str, Parts]]:
    """VAR's tokenizer. Its file tells all sizes but those of the scales, by default those of 256 pixels.

    Raises:
        ValueError: another kind of checkpoint, or tensors that do not fit.
    """
    check_kind(checkpoint, "var-vae", preset)
    channels = checkpoint.shape("encoder.conv_in.weight")[0]
    depth = checkpoint.count(r"encoder\.down\.(\d+)\.")
    widths = [checkpoint.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(depth)]
    vocab_size, code_dim = checkpoint.shape("quantize.embedding.weight")
    config = MultiScaleTokenizerConfig(
        scales=tuple(scales or MultiScaleTokenizerConfig.scales),
        vocab_size=vocab_size,
        code_dim=code_dim,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_blocks=checkpoint.count(r"encoder\.down\.0\.block\.(\d+)\."),
    )
    if preset and config != MultiScaleTokenizerConfig(**preset.config, scales=config.scales):
        raise ValueError(f"{checkpoint.origin} has other sizes than preset {preset.name}: {config}")
    with without_weights():
        module = MultiScaleTokenizer(config)
    # Their decoder counts its levels as the encoder does, finest first.
    decoder = [
        (rf"^decoder\.{ours}\.{level}\.{inner}", f"decoder.up.{depth - 1 - level}.{theirs}.")
        for level in range(depth)
        for ours, inner, theirs in (
            ("levels", r"blocks\.", "block"),
            ("levels", r"attentions\.", "attn"),
            ("upsamples", "", "upsample"),
        )
    ]
    spellings = (*decoder, *_TOKENIZER_SPELLINGS)
    phis = [f"quantize.quant_resi.qresi_ls.{index}" for index in range(NUM_SMOOTHERS)]
    joined: dict[str, Origin] = {
        f"quantizer.sums.{ours}": Origin(tuple(f"{phi}.{theirs}" for phi in phis))
        for ours, theirs in (("kernels", "weight"), ("biases", "bias"))
    }
    for name in module.state_dict():
        layer, _, part = name.rpartition(".")
        owner, _, which = layer.rpartition(".")
        if which in ("query", "key", "value"):
            row = ("query", "key", "value").index(which)
            width = module.state_dict()[name].shape[0]
            published = respelled(f"{owner}.qkv.{part}", spellings)
            joined[name] = Origin((published,), rows=slice(row * width, (row + 1) * width))
    # How often codes were drawn while training, scale by scale.
    return config, rename(checkpoint, module, spellings, joined=joined, dropped=r"quantize\.ema_vocab_hit_SV$")


def _sides(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The sides of the scales, from the number of places that each has."""
    checkpoint.shape("lvl_1L")
    counts = torch.bincount(checkpoint.tensors["lvl_1L"].flatten().long()).tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if any(side * side != count for side, count in zip(sides, counts, strict=True)):
        raise ValueError(f"{checkpoint.origin}: lvl_1L has scales of {counts} places, which are no squares")
    return sides
