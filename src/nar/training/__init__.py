"""One loop for tokenizers and models."""
