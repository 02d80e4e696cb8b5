"""Labels, words, frames or masks in, pictures or clips out."""

from nar.pipeline.output import Output
from nar.pipeline.pipeline import Pipeline
from nar.pipeline.requests import Request

__all__ = ["Output", "Pipeline", "Request"]
