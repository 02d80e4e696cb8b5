"""Nodes of ComfyUI for models of `nar`; ComfyUI imports this folder from its `custom_nodes`."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
