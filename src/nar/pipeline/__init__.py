"""Labels, words, frames or masks in, pictures or clips out."""

from nar.pipeline.pipeline import Output, Pipeline
from nar.pipeline.requests import Request

__all__ = ["Output", "Pipeline", "Request"]
