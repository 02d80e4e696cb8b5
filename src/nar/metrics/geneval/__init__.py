"""Compositional prompts, scenes and the judges of both: GenEval and composed drawings."""
