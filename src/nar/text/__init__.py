"""From captions to the features that text models condition on. The only importer of transformers."""

from nar.text.cleaning import clean_caption, prepare_caption
from nar.text.encoder import TextEncoder, TextEncoderConfig, load_pretrained
from nar.text.features import Features, cached, found

__all__ = ["Features", "TextEncoder", "TextEncoderConfig", "cached", "found", "load_pretrained"]
__all__ += ["clean_caption", "prepare_caption"]
