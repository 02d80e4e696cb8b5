"""Numbers that judge pictures and clips, whoever made them."""

from nar.metrics.evaluate import evaluate

__all__ = ["evaluate"]
