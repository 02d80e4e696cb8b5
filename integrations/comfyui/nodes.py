"""Four nodes over `nar.Pipeline`: load, sample, edit, clip. Pictures grow in the node, front by front.

Knows ComfyUI's V3 schema and tensors: pictures (B, H, W, 3) and masks (B, H, W) in 0..1, where 1 is made anew. Does not
know how pictures are sampled.
"""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy_api.v0_0_2 import ComfyAPISync, ComfyExtension, InputImpl, Types, io
from PIL import Image

from nar import Pipeline
from nar.storage.folder import CONFIG, bundled_names

CATEGORY = "NAR"
FOLDERS = "nar"  # of ComfyUI's folder `models`
OWN = -1  # of a setting: the model's own
Model = io.Custom("NAR_MODEL")

_loaded: dict[tuple[str, str, str], Pipeline] = {}
_lock = threading.Lock()

folder_paths.add_model_folder_path(FOLDERS, str(Path(folder_paths.models_dir) / FOLDERS))


def model_names() -> list[str]:
    """Bundled models, and model folders in ComfyUI's `models/nar`."""
    found = list(bundled_names())
    for root in map(Path, folder_paths.get_folder_paths(FOLDERS)):
        found += sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    return list(dict.fromkeys(found))


def pipeline(name: str, dtype: str) -> Pipeline:
    """A model by its name in the list, or by a hub id or path; it is read once."""
    device = str(comfy.model_management.get_torch_device())
    source: Any = name
    for root in map(Path, folder_paths.get_folder_paths(FOLDERS)):
        if name not in bundled_names() and (root / name / CONFIG).is_file():
            source = root / name
    with _lock:
        key = (str(source), dtype, device)
        if key not in _loaded:
            _loaded[key] = Pipeline.from_pretrained(source, device=device, dtype=dtype)
        return _loaded[key]


class LoadModel(io.ComfyNode):
    """A model, by name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        return io.Schema(
            node_id="NAR_LoadModel",
            display_name="Load NAR Model",
            category=CATEGORY,
            description="A bundled model, a folder in models/nar, or a model of the hub.",
            search_aliases=["autoregressive", "load nar"],
            inputs=[
                io.Combo.Input("model", options=model_names(), tooltip="Bundled, or a folder in models/nar."),
                io.Combo.Input("dtype", options=["float32", "bfloat16", "float16", "int8"], default="float32"),
                io.String.Input(
                    "hub_id", default="", optional=True, tooltip="Takes the place of model: someone/nar-l, or with @v1."
                ),
            ],
            outputs=[Model.Output("nar_model", display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, dtype: str, hub_id: str = "") -> io.NodeOutput:
        """Read the model."""
        return io.NodeOutput(pipeline(hub_id.strip() or model, dtype))


class Sample(io.ComfyNode):
    """Pictures of a prompt or a class."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        return io.Schema(
            node_id="NAR_Sample",
            display_name="NAR Sample",
            category=CATEGORY,
            description="Pictures of words or of a class; they grow in the node.",
            search_aliases=["autoregressive", "text to image"],
            inputs=[Model.Input("model"), *_settings()],
            outputs=[io.Image.Output("images")],
        )

    @classmethod
    def execute(cls, model: Pipeline, **settings: Any) -> io.NodeOutput:
        """Sample pictures."""
        options = _options(model, **settings)
        out = model(**options, output_type="np", callback_on_front_end=_Growth(model, options))
        if out.images is None:
            raise ValueError("this model makes clips: use the node NAR Clip")
        return io.NodeOutput(_tensor(out.images))


class Edit(io.ComfyNode):
    """A part of a picture made anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        return io.Schema(
            node_id="NAR_Inpaint",
            display_name="NAR Edit",
            category=CATEGORY,
            description="What the mask covers is made anew; the rest stays as it is.",
            search_aliases=["inpaint", "fill"],
            inputs=[
                Model.Input("model"),
                io.Image.Input("image"),
                io.Mask.Input("mask", tooltip="White is made anew."),
                io.Combo.Input("mode", options=["fill", "replace"], default="fill"),
                *_settings(),
            ],
            outputs=[io.Image.Output("images")],
        )

    @classmethod
    def execute(
        cls, model: Pipeline, image: torch.Tensor, mask: torch.Tensor, mode: str, **settings: Any
    ) -> io.NodeOutput:
        """Edit each picture of the batch, with its own mask where there are several."""
        options, edited = _options(model, **settings), []
        if len(mask) not in (1, len(image)):
            raise ValueError(f"{len(mask)} masks for {len(image)} pictures: give one, or one for each")
        for index, picture in enumerate(image):
            hole = mask[index % len(mask)].cpu().numpy()
            growth = _Growth(model, options)
            out = model.edit(
                _array(picture), mask=hole, mode=mode, **options, output_type="np", callback_on_front_end=growth
            )
            edited.append(_tensor(out.images))
        return io.NodeOutput(torch.cat(edited))


class Clip(io.ComfyNode):
    """A clip of words or a class, or what comes after a picture or clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        return io.Schema(
            node_id="NAR_Video",
            display_name="NAR Clip",
            category=CATEGORY,
            description="A clip; with a picture or a clip it is continued.",
            search_aliases=["video", "animation"],
            inputs=[
                Model.Input("model"),
                *_settings(several=False),
                io.Int.Input("num_frames", default=0, min=0, max=2000, tooltip="0: one pass of the model."),
                io.Image.Input("image", optional=True, tooltip="Frames to begin with."),
                io.Video.Input("video", optional=True, tooltip="A clip to continue."),
            ],
            outputs=[io.Video.Output("clip"), io.Image.Output("frames")],
        )

    @classmethod
    def execute(
        cls,
        model: Pipeline,
        num_frames: int = 0,
        image: torch.Tensor | None = None,
        video: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """Sample one clip."""
        if not model.makes_clips:
            raise ValueError("this model makes pictures: use the node NAR Sample")
        if image is not None and video is not None:
            raise ValueError("give image or video, not both")
        given = image if video is None else video.get_components().images
        options = _options(model, **settings) | ({"num_frames": num_frames} if num_frames else {})
        options |= {} if given is None else {"frames": _array(given)}
        out = model(**options, output_type="np", callback_on_front_end=_Growth(model, options))
        frames = _tensor(out.videos[0])
        parts = Types.VideoComponents(
            images=frames, audio=None, frame_rate=Fraction(out.frame_rate).limit_denominator(1000)
        )
        return io.NodeOutput(InputImpl.VideoFromComponents(parts), frames)


class NarExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Its nodes, in the order of the menu."""
        return [LoadModel, Sample, Edit, Clip]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls."""
    return NarExtension()


class _Growth:
    """After each front: the bar of the node, the first picture as far as it is there, and whether to stop."""

    def __init__(self, model: Pipeline, options: dict[str, Any]) -> None:
        self._model, self._done = model, 0
        batches = -(-options["num_images_per_prompt"] // 32)  # a pipeline's batch_size
        self._total = batches * model.num_steps
        self._api = ComfyAPISync()

    def __call__(self, _: Pipeline, __: int, codes: torch.Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += 1
        self._total = max(self._total, self._done)  # clips may take several passes
        first = self._model.pictures(codes[:1])[0]
        picture: Image.Image = first[-1] if isinstance(first, list) else first
        scale = max(1, 256 // max(picture.size))
        shown = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        self._api.execution.set_progress(self._done, self._total, preview_image=shown)


def _settings(*, several: bool = True) -> list[io.Input]:
    """Inputs that the nodes which sample share."""
    own = "-1: the model's own."
    number = [io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures, of one seed.")] if several else []
    return [
        io.String.Input("prompt", default="", multiline=True, tooltip="Words, where the model reads them."),
        io.String.Input("negative_prompt", default="", multiline=True, tooltip="Words that guidance leads away from."),
        io.String.Input("class_label", default="", tooltip="The name or number of a class, where the model has them."),
        io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=True),
        *number,
        io.Float.Input("guidance_scale", default=OWN, min=OWN, max=30.0, step=0.1, tooltip=own),
        io.Float.Input("temperature", default=OWN, min=OWN, max=10.0, step=0.05, tooltip=own),
        io.Int.Input("top_k", default=OWN, min=OWN, max=1_000_000, tooltip=f"{own} 0: off."),
        io.Float.Input("top_p", default=OWN, min=OWN, max=1.0, step=0.01, tooltip=own),
    ]


def _options(
    model: Pipeline,
    *,
    prompt: str = "",
    negative_prompt: str = "",
    class_label: str = "",
    seed: int = 0,
    batch_size: int = 1,
    **settings: float,
) -> dict[str, Any]:
    """Inputs of a node as arguments of a pipeline: what says nothing is left out."""
    options: dict[str, Any] = {"seed": seed, "num_images_per_prompt": batch_size}
    options |= {name: value for name, value in settings.items() if value >= 0}
    if prompt.strip() or (model.config.text_dim and not class_label.strip()):
        options["prompt"] = prompt
    if negative_prompt.strip():
        options["negative_prompt"] = negative_prompt
    if class_label.strip():
        options["class_labels"] = class_label.strip()
    elif model.config.num_classes and not model.config.text_dim and "prompt" in options:
        options["class_labels"] = options.pop("prompt").strip()
    return options


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255


def _array(pixels: torch.Tensor) -> np.ndarray:
    """Pixels 0..1 as uint8, without an alpha channel."""
    return (pixels[..., :3].cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
