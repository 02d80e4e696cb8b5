"""Model folders in diffusers: the same pixels, its habits, revisions of its hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from hub_server import commit_of, hub, use
from nar import Pipeline
from nar.pipeline.card import for_diffusers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install nar-gen[diffusers]")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of code go into the test's folder."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.fixture(scope="module")
def folder(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("diffusers") / "toy"
    Pipeline.from_pretrained(toy_folder, device="cpu").save_pretrained(made, diffusers=True)
    return made


@pytest.fixture
def pipe(folder: Path) -> Any:
    loaded = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn(seed: int) -> int:
    """The number that a generator with this seed gives first."""
    return int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(seed)))


def test_the_same_pixels(pipe: Any, folder: Path) -> None:
    ours = Pipeline.from_pretrained(folder, device="cpu")
    expected = ours(["pear", "plum"], num_images_per_prompt=2, seed=drawn(7), temperature=0.9)
    made = pipe(
        class_labels=["pear", "plum"],
        num_images_per_prompt=2,
        temperature=0.9,
        generator=torch.Generator().manual_seed(7),
    )
    assert made.seed == drawn(7)
    assert made["images"] is made[0] is made.images
    assert [one.tobytes() for one in made.images] == [one.tobytes() for one in expected.images]
    images, seed = pipe("pear", seed=3, return_dict=False)
    assert (images[0].tobytes(), seed) == (ours("pear", seed=3).images[0].tobytes(), 3)
    several = pipe(["pear", "pear"], generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    assert several.seed == [drawn(1), drawn(2)]
    assert [one.tobytes() for one in several.images] == [
        one.tobytes() for one in ours(["pear", "pear"], seed=[drawn(1), drawn(2)]).images
    ]


def test_output_types(pipe: Any) -> None:
    pixels = np.asarray(pipe("pear", seed=1).images[0]) / 255
    arrays, tensors = (pipe("pear", seed=1, output_type=kind).images for kind in ("np", "pt"))
    assert (arrays.shape, tensors.shape) == ((1, 8, 8, 3), (1, 3, 8, 8))
    assert np.abs(arrays[0] - pixels).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(tensors, torch.from_numpy(arrays).movedim(-1, 1))
    codes = pipe("pear", seed=1, output_type="latent").images
    assert torch.equal(codes, pipe.nar("pear", seed=1).codes)


def test_callback_and_progress(pipe: Any) -> None:
    seen: list[tuple[int, int, int]] = []

    def after(given: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert given is pipe
        seen.append((step, timestep, int((tensors["codes"] >= 0).sum())))
        return tensors

    pipe("pear", seed=1, callback_on_step_end=after)
    assert [step for step, _, _ in seen] == list(range(7))
    assert seen[-1] == (6, 6, 16)
    with pytest.raises(ValueError, match="may name codes, not latents"):
        pipe("pear", callback_on_step_end=after, callback_on_step_end_tensor_inputs=["latents"])
    with pytest.raises(TypeError, match="'num_inference_steps': steps follow from the grid"):
        pipe("pear", num_inference_steps=20)


def test_moved_saved_and_loaded_in_a_format(pipe: Any, folder: Path, tmp_path: Path) -> None:
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    expected = pipe("pear", seed=1).images[0].tobytes()
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.dtype == pipe.nar.dtype == torch.bfloat16
    load = diffusers.DiffusionPipeline.from_pretrained
    assert load(str(folder), trust_remote_code=True, dtype=torch.bfloat16).dtype == torch.bfloat16
    load(str(folder), trust_remote_code=True).save_pretrained(tmp_path / "again")
    again = load(str(tmp_path / "again"), custom_pipeline=str(tmp_path / "again"), trust_remote_code=True)
    assert again("pear", seed=1).images[0].tobytes() == expected
    assert Pipeline.from_pretrained(tmp_path / "again", device="cpu")("pear", seed=1).images[0].tobytes() == expected
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(folder))


def test_an_edit_and_clips(pipe: Any, clips_folder: Path, tmp_path: Path) -> None:
    picture = pipe("pear", seed=1).images[0]
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    edited = pipe(image=picture, mask_image=mask, class_labels="plum", seed=2).images[0]
    assert edited.tobytes() == pipe.nar.edit(picture, mask=mask, class_labels="plum", seed=2).images[0].tobytes()
    Pipeline.from_pretrained(clips_folder, device="cpu").save_pretrained(tmp_path / "clips", diffusers=True)
    clips = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "clips"), trust_remote_code=True)
    frames = clips("cross", seed=1).frames
    assert [one.tobytes() for one in frames[0]] == [one.tobytes() for one in clips.nar("cross", seed=1).videos[0]]
    assert clips("cross", seed=1, output_type="np").frames.shape == (1, 5, 8, 8, 3)
    assert clips("cross", seed=1, output_type="pt").frames.shape == (1, 5, 3, 8, 8)


def test_revisions_of_the_hub(folder: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Pipeline.from_pretrained(toy_folder, device="cpu").to(torch.bfloat16)
    other.save_pretrained(tmp_path / "other", diffusers=True, dtype=torch.float32)
    load = diffusers.DiffusionPipeline.from_pretrained
    with hub({"v1": tmp_path / "other", "main": folder}) as (address, asked):
        use(monkeypatch, address, tmp_path / "cache")
        first = load("me/toy", revision="v1", trust_remote_code=True, cache_dir=str(tmp_path / "cache"))
        assert str(first.nar.folder).endswith(commit_of("v1"))
        newest = load("me/toy", trust_remote_code=True, cache_dir=str(tmp_path / "cache"))
        assert str(newest.nar.folder).endswith(commit_of("main"))
        assert f"me/toy/resolve/{commit_of('main')}/tokenizer/model.safetensors" in asked
        found = huggingface_hub.snapshot_download("me/toy", revision="v1")
    use(monkeypatch, address, tmp_path / "cache", offline=True)
    assert huggingface_hub.snapshot_download("me/toy", revision="v1") == found
    assert load(found, trust_remote_code=True).nar.folder == Path(found)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of docs/howto/integrations.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/howto/integrations.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "integrations.md", "exec"), names)
    ours = Pipeline.from_pretrained("fashion", device="cpu")
    assert names["image"].tobytes() == ours("sneaker", seed=drawn(0)).images[0].tobytes()


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's `nar` is another package: nothing may send people there."""
    from diffusers.utils import dynamic_modules_utils

    code = for_diffusers()["pipeline.py"]
    (tmp_path / "pipeline.py").write_text(code, encoding="utf-8")
    assert len(code.splitlines()) <= 30
    said: list[str] = []
    monkeypatch.setattr(dynamic_modules_utils.logger, "warning", said.append)
    monkeypatch.setitem(sys.modules, "nar.pipeline.for_diffusers", None)
    dynamic_modules_utils.check_imports(tmp_path / "pipeline.py")
    assert said == []
    with pytest.raises(ImportError, match="pip install --upgrade nar-gen"):
        exec(compile(code, "pipeline.py", "exec"), {})
