"""From captions to the features that text models condition on. The only importer of transformers."""

from nar.text.cleaning import clean_caption, prepare_caption
from nar.text.encoder import TextEncoder, TextEncoderConfig, left_pad

__all__ = ["TextEncoder", "TextEncoderConfig", "clean_caption", "left_pad", "prepare_caption"]
