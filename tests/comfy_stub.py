"""What of ComfyUI its nodes see, strict where it is: schema, inputs, progress, cancel. Written from its documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image


class InterruptProcessingException(Exception):  # noqa: N818 ComfyUI's name
    """The user has pressed Cancel."""


class Input:
    """An input; options that there are none of are refused."""

    widget, allowed = False, frozenset[str]()
    always = frozenset({"display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link", "advanced"})
    of_widgets = frozenset({"default", "socketless", "force_input"})

    def __init__(self, id: str, **options: Any) -> None:
        known = self.always | self.allowed | (self.of_widgets if self.widget else frozenset())
        assert options.keys() <= known, f"{type(self).__name__} {id}: {options.keys() - known}"
        self.id, self.options, self.optional = id, options, options.get("optional", False)


class Output:
    """An output."""

    def __init__(self, id: str | None = None, display_name: str | None = None, tooltip: str | None = None) -> None:
        self.id, self.display_name, self.tooltip = id, display_name, tooltip


def kind(name: str, *, allowed: str = "", widget: bool = False) -> Any:
    """A type of ComfyUI: its `Input` and `Output`."""
    parts = {"io_type": name, "widget": widget, "allowed": frozenset(allowed.split())}
    return type(name, (), {"Input": type(f"{name}Input", (Input,), parts), "Output": type(name, (Output,), parts)})


@dataclass
class Schema:
    """A node as the editor shows it."""

    node_id: str
    display_name: str
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False
    not_idempotent: bool = False


class NodeOutput:
    """What a node gives."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@dataclass
class VideoComponents:
    """A clip as tensors."""

    images: torch.Tensor
    frame_rate: Any
    audio: Any = None


class VideoFromComponents:
    """A clip as ComfyUI hands it on."""

    def __init__(self, components: VideoComponents) -> None:
        self.components = components

    def get_components(self) -> VideoComponents:
        return self.components


class Comfy:
    """The process around the nodes: models in a folder, progress that is shown, a user who may cancel."""

    def __init__(self, models: Path) -> None:
        self.models, self.folders = models, dict[str, list[str]]()
        self.shown: list[tuple[float, float, Image.Image]] = []
        self.cancelled: Callable[[], bool] = lambda: False

    def set_progress(self, value: float, max_value: float, node_id: str | None = None, **options: Any) -> None:
        assert node_id is None
        assert options.keys() <= {"preview_image", "ignore_size_limit"}
        self.shown.append((value, max_value, options["preview_image"]))

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.cancelled():
            raise InterruptProcessingException

    def modules(self) -> dict[str, ModuleType]:
        """What the nodes import, by name."""
        io = ModuleType("io")
        numbers = "min max step control_after_generate display_mode"
        for name, made in {
            "Int": kind("INT", allowed=numbers, widget=True),
            "Float": kind("FLOAT", allowed=f"{numbers} round", widget=True),
            "String": kind("STRING", allowed="multiline placeholder dynamic_prompts", widget=True),
            "Combo": kind("COMBO", allowed="options control_after_generate upload image_folder", widget=True),
            "Boolean": kind("BOOLEAN", allowed="label_on label_off", widget=True),
            "Image": kind("IMAGE"),
            "Mask": kind("MASK"),
            "Video": kind("VIDEO"),
            "Custom": kind,
            "Schema": Schema,
            "NodeOutput": NodeOutput,
            "ComfyNode": type("ComfyNode", (), {}),
            "Input": Input,
        }.items():
            setattr(io, name, made)
        execution = type("Execution", (), {"set_progress": staticmethod(self.set_progress)})
        api = ModuleType("comfy_api.v0_0_2")
        api.__dict__.update(
            io=io,
            ComfyExtension=type("ComfyExtension", (), {}),
            ComfyAPISync=type("ComfyAPISync", (), {"execution": execution}),
            InputImpl=type("InputImpl", (), {"VideoFromComponents": VideoFromComponents}),
            Types=type("Types", (), {"VideoComponents": VideoComponents}),
        )
        management = ModuleType("comfy.model_management")
        management.__dict__.update(
            get_torch_device=lambda: torch.device("cpu"),
            throw_exception_if_processing_interrupted=self.throw_exception_if_processing_interrupted,
        )
        comfy = ModuleType("comfy")
        comfy.__dict__["model_management"] = management
        paths = ModuleType("folder_paths")
        paths.__dict__.update(
            models_dir=str(self.models),
            add_model_folder_path=lambda name, path: self.folders.setdefault(name, []).append(path),
            get_folder_paths=lambda name: list(self.folders[name]),
        )
        named = {"comfy_api": ModuleType("comfy_api"), "comfy_api.v0_0_2": api, "comfy": comfy}
        return {**named, "comfy.model_management": management, "folder_paths": paths}
