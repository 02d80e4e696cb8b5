"""From captions to the features that text models condition on. The only importer of transformers."""

from nar.text.cleaning import clean_caption, prepare_caption
from nar.text.encoder import TextEncoder, TextEncoderConfig, left_pad, load_pretrained
from nar.text.features import Features, cached, found

__all__ = [
    "Features",
    "TextEncoder",
    "TextEncoderConfig",
    "cached",
    "clean_caption",
    "found",
    "left_pad",
    "load_pretrained",
    "prepare_caption",
]
