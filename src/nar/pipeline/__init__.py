"""Labels, words, frames or masks in, pictures or clips out."""

from nar.pipeline.pipeline import Output, Pipeline, Request

__all__ = ["Output", "Pipeline", "Request"]
