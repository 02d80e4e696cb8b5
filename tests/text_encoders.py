"""Tiny text encoders with random weights, of every family that is told apart, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ("red", "blue", "green", "apple", "octopus", "a", "the", "circle", "square", "triangle", "cross", ",", "of")
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
KINDS = {  # special tokens before and after a caption's own
    "t5": (0, 1),
    "clip": (1, 1),
    "bert": (1, 1),
    "gemma": (1, 0),
    "bart": (1, 1),
}


def tiny_encoder(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write an encoder of one of KINDS with 16 channels that knows WORDS."""
    sizes: dict[str, Any] = {"vocab_size": len(WORDS) + len(SPECIAL), "pad_token_id": 0, "eos_token_id": 1}
    usual = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(**sizes, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config)  # as published: the decoder is in the file too
    elif kind == "clip":
        text = {**usual, **sizes, "bos_token_id": 2, "max_position_embeddings": 32}
        vision = {**usual, "image_size": 8, "patch_size": 4}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    elif kind == "bart":
        halves = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        config = transformers.BartConfig(**sizes, **halves, d_model=16, max_position_embeddings=32)
        model = transformers.BartModel(config)
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**usual, **sizes, max_position_embeddings=32))
    else:
        config = transformers.GemmaConfig(
            **usual, **sizes, head_dim=8, num_key_value_heads=1, bos_token_id=2, max_position_embeddings=64
        )
        model = transformers.GemmaForCausalLM(config)
    model.save_pretrained(folder)
    _tokenizer(*KINDS[kind]).save_pretrained(folder)
    return folder


def _tokenizer(before: int, after: int) -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate((*SPECIAL, *WORDS))}, "<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.post_processor = processors.TemplateProcessing(
        single=f"{'<s> ' * before}$A{' </s>' * after}", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
