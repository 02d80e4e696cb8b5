"""The nodes of ComfyUI, over a stub of its API: schemas, pixels, growth, cancel, and the example workflow."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comfy_stub import Comfy, InterruptProcessingException, VideoComponents, VideoFromComponents
from nar import Pipeline, __version__
from nar.pipeline import Pipeline as Type

PACK = Path(__file__).parents[1] / "integrations/comfyui"


@pytest.fixture(scope="module")
def comfy(toy_folder: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    models = tmp_path_factory.mktemp("models")
    for name, folder in {"toy": toy_folder, "toy-clips": clips_folder}.items():
        Pipeline.from_pretrained(folder, device="cpu").save_pretrained(models / "nar" / name)
    return Comfy(models)


@pytest.fixture(scope="module")
def nodes(comfy: Comfy) -> dict[str, Any]:
    """The nodes by id, as ComfyUI finds them in `custom_nodes`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in comfy.modules().items():
            patch.setitem(sys.modules, name, module)
        place = [str(PACK)]
        spec = importlib.util.spec_from_file_location(
            "nar_pack", PACK / "__init__.py", submodule_search_locations=place
        )
        assert spec is not None
        assert spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "nar_pack", pack)
        spec.loader.exec_module(pack)
        patch.delitem(sys.modules, "nar_pack.nodes", raising=False)
        extension = asyncio.run(pack.comfy_entrypoint())
        return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture
def toy(nodes: dict[str, Any]) -> Type:
    return run(nodes, "NAR_LoadModel", model="toy", dtype="float32")[0]  # type: ignore[no-any-return]


def run(nodes: dict[str, Any], name: str, **inputs: Any) -> tuple[Any, ...]:
    """Execute a node with the defaults of its widgets, as ComfyUI does."""
    schema = nodes[name].define_schema()
    known = {one.id: one for one in schema.inputs}
    assert inputs.keys() <= known.keys()
    missing = [one.id for one in schema.inputs if not one.widget and not one.optional and one.id not in inputs]
    assert missing == []
    defaults = {one.id: one.options["default"] for one in schema.inputs if "default" in one.options}
    outputs = nodes[name].execute(**(defaults | inputs)).args
    assert len(outputs) == len(schema.outputs)
    return tuple(outputs)


def pixels(images: torch.Tensor) -> np.ndarray:
    """As ComfyUI's nodes save and show them."""
    assert images.dtype == torch.float32
    return np.clip(255.0 * images.numpy(), 0, 255).astype(np.uint8)


def test_schemas(nodes: dict[str, Any]) -> None:
    assert list(nodes) == ["NAR_LoadModel", "NAR_Sample", "NAR_Inpaint", "NAR_Video"]  # saved workflows name these
    for node in nodes.values():
        schema = node.define_schema()
        names = [one.id for one in schema.inputs]
        assert len(set(names)) == len(names)
        assert len({one.id for one in schema.outputs}) == len(schema.outputs)
        assert schema.category == "NAR"
    [models] = [one for one in nodes["NAR_LoadModel"].define_schema().inputs if one.id == "model"]
    assert {"fashion", "emoji", "clips", "toy", "toy-clips"} <= set(models.options["options"])


def test_the_same_pixels(nodes: dict[str, Any], toy: Type, toy_folder: Path, comfy: Comfy) -> None:
    assert run(nodes, "NAR_LoadModel", model="toy", dtype="float32")[0] is toy  # read once
    ours = Pipeline.from_pretrained(toy_folder, device="cpu")
    comfy.shown.clear()
    images = run(nodes, "NAR_Sample", model=toy, class_label="pear", seed=7, batch_size=2, temperature=0.8)[0]
    expected = ours("pear", seed=7, num_images_per_prompt=2, temperature=0.8, output_type="np")
    assert np.array_equal(pixels(images), expected.images)
    assert [(value, most) for value, most, _ in comfy.shown] == [(step, 7) for step in range(1, 8)]
    last = np.asarray(comfy.shown[-1][2])
    assert last.shape == (256, 256, 3)
    assert np.array_equal(last[::32, ::32], expected.images[0])  # it has grown to what comes out
    assert not np.array_equal(np.asarray(comfy.shown[2][2]), last)
    by_prompt = run(nodes, "NAR_Sample", model=toy, prompt="pear", seed=7, batch_size=2, temperature=0.8)[0]
    assert torch.equal(by_prompt, images)  # no words are read: the prompt names a class


def test_cancel(nodes: dict[str, Any], toy: Type, comfy: Comfy) -> None:
    comfy.shown.clear()
    comfy.cancelled = lambda: len(comfy.shown) == 3
    try:
        with pytest.raises(InterruptProcessingException):
            run(nodes, "NAR_Sample", model=toy, class_label="1", seed=1)
    finally:
        comfy.cancelled = lambda: False
    assert len(comfy.shown) == 3
    assert run(nodes, "NAR_Sample", model=toy, class_label="1", seed=1)[0].shape == (1, 8, 8, 3)  # nothing is stuck


def test_edit(nodes: dict[str, Any], toy: Type, comfy: Comfy) -> None:
    image = run(nodes, "NAR_Sample", model=toy, class_label="pear", seed=1, batch_size=2)[0]
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 2:6] = 1  # 1 is made anew
    comfy.shown.clear()
    edited = run(nodes, "NAR_Inpaint", model=toy, image=image, mask=mask, class_label="plum", seed=2)[0]
    expected = toy.edit(pixels(image)[1], mask=mask[0].numpy(), class_labels="plum", seed=2, output_type="np").images
    assert np.array_equal(pixels(edited)[1:], expected)
    assert torch.equal(edited[:, mask[0] == 0], image[:, mask[0] == 0])
    assert len(comfy.shown) == 14
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        run(nodes, "NAR_Inpaint", model=toy, image=image, mask=mask.expand(3, 8, 8))


def test_clips(nodes: dict[str, Any], toy: Type, clips_folder: Path) -> None:
    [model] = run(nodes, "NAR_LoadModel", model="toy-clips", dtype="float32")
    ours = Pipeline.from_pretrained(clips_folder, device="cpu")
    clip, frames = run(nodes, "NAR_Video", model=model, prompt="cross", seed=3)
    assert np.array_equal(pixels(frames), ours("cross", seed=3, output_type="np").videos[0])
    components = clip.get_components()
    assert components.images is frames
    assert float(components.frame_rate) == ours.frame_rate
    given = VideoFromComponents(VideoComponents(frames, components.frame_rate))
    longer = run(nodes, "NAR_Video", model=model, prompt="cross", seed=4, video=given, num_frames=7)[1]
    assert len(longer) == 7
    assert np.array_equal(pixels(longer)[:5], pixels(frames))
    with pytest.raises(ValueError, match="makes clips: use the node NAR Clip"):
        run(nodes, "NAR_Sample", model=model, prompt="cross")
    with pytest.raises(ValueError, match="makes pictures: use the node NAR Sample"):
        run(nodes, "NAR_Video", model=toy)


def test_example_workflow(nodes: dict[str, Any]) -> None:
    """The file is executed link by link; the nodes of ComfyUI in it are two masks and a preview."""
    workflow = json.loads((PACK / "example_workflows/sample_and_edit.json").read_text(encoding="utf-8"))
    links = {link[0]: link for link in workflow["links"]}
    made: dict[tuple[int, int], Any] = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        given = {one["name"]: made[tuple(links[one["link"]][1:3])] for one in node["inputs"]}
        values = list(node["widgets_values"])
        if node["type"] == "SolidMask":
            value, width, height = values
            results: tuple[Any, ...] = (torch.full((1, height, width), value),)
        elif node["type"] == "MaskComposite":
            left, top, _ = values
            results = (given["destination"].clone(),)
            height, width = given["source"].shape[1:]
            results[0][:, top : top + height, left : left + width] += given["source"]
        elif node["type"] == "PreviewImage":
            assert given["images"].shape == (4, 32, 32, 3)
            results = ()
        else:
            schema = nodes[node["type"]].define_schema()
            for one in schema.inputs:
                if one.widget:
                    given[one.id] = values.pop(0)
                    if one.options.get("control_after_generate"):
                        assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
            assert values == []
            assert [one["type"] for one in node["outputs"]] == [one.io_type for one in schema.outputs]
            results = run(nodes, node["type"], **given)
        for slot, result in enumerate(results):
            made[node["id"], slot] = result
    expected = Pipeline.from_pretrained("fashion-edit", device="cpu")
    sneakers = expected("sneaker", seed=0, num_images_per_prompt=4, output_type="np").images
    assert np.array_equal(pixels(made[2, 0]), sneakers)


def test_registry_metadata() -> None:
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    assert "comfyui" not in project["project"]["name"].lower()
    assert len(project["project"]["version"].split(".")) == 3
    assert project["project"]["version"] == __version__
    assert project["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName", "Icon"}
    assert project["project"]["urls"].keys() >= {"Repository"}
    requirements = (PACK / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements == project["project"]["dependencies"]  # ComfyUI's manager reads the one, the registry the other
