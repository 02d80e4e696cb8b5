"""Samples or encodes, then judges: the only room that sees pipelines and metrics together."""
