"""Fast autoregressive image and video generation: Neighboring Autoregressive Modeling (arXiv 2503.10696)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nar import order
    from nar.condition import ClassCondition, PrefixCondition, TextCondition
    from nar.model import ModelConfig, Transformer
    from nar.pipeline import Pipeline
    from nar.sampling import Sampling, generate, generate_fronts
    from nar.tokenizer import load_tokenizer

_HOMES = {
    "ClassCondition": "condition",
    "ModelConfig": "model",
    "Pipeline": "pipeline",
    "PrefixCondition": "condition",
    "Sampling": "sampling",
    "TextCondition": "condition",
    "Transformer": "model",
    "generate": "sampling",
    "generate_fronts": "sampling",
    "load_tokenizer": "tokenizer",
    "order": "",
}

__all__ = [
    "ClassCondition",
    "ModelConfig",
    "Pipeline",
    "PrefixCondition",
    "Sampling",
    "TextCondition",
    "Transformer",
    "generate",
    "generate_fronts",
    "load_tokenizer",
    "order",
]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import nar` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nar' has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(import_module(f"nar.{home}"), name) if home else import_module(f"nar.{name}")


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return [*__all__, "__version__"]
