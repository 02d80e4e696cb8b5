"""Published checkpoints become model folders: safely, strictly, from every wrapper they come in."""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_fixtures import Fixture, fixtures
from nar.condition import ClassCondition
from nar.convert import KINDS, Checkpoint, convert, read_checkpoint, recognise
from nar.convert.tokenizers import video_tokenizer_state
from nar.model import ModelConfig, Transformer
from nar.storage.folder import read_config, read_weights
from nar.storage.presets import PRESETS, find
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig
from nar.tokenizer.multiscale import MultiScaleTokenizer, MultiScaleTokenizerConfig

DIM, HIDDEN, VOCAB, CLASSES = 16, 24, 12, 5
SIZES = {"num_heads": 2, "grid": (3, 4)}


def transformer(num_blocks: int, heads: tuple[str, ...], **extra: tuple[int, ...]) -> dict[str, Tensor]:
    """A published state dict of a tiny transformer with random weights."""
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB, DIM), **extra}
    for block in range(num_blocks):
        shapes |= {
            f"layers.{block}.attention.wqkv.weight": (3 * DIM, DIM),
            f"layers.{block}.attention.wo.weight": (DIM, DIM),
            f"layers.{block}.feed_forward.w1.weight": (HIDDEN, DIM),
            f"layers.{block}.feed_forward.w3.weight": (HIDDEN, DIM),
            f"layers.{block}.feed_forward.w2.weight": (DIM, HIDDEN),
            f"layers.{block}.attention_norm.weight": (DIM,),
            f"layers.{block}.ffn_norm.weight": (DIM,),
        }
    for head in heads:
        shapes |= {f"{head.replace('output', 'norm')}.weight": (DIM,), f"{head}.weight": (VOCAB, DIM)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def image_model() -> dict[str, Tensor]:
    table = {"cls_embedding.embedding_table.weight": (CLASSES + 1, DIM)}
    return transformer(3, ("output", "medusa_output"), **table)


def llamagen_model() -> dict[str, Tensor]:
    return transformer(3, ("output",), **{"cls_embedding.embedding_table.weight": (CLASSES + 1, DIM)})


def video_model() -> dict[str, Tensor]:
    table = {"cls_embedding.embedding_table.weight": (CLASSES + 1, DIM), "abs_pe": (1, 13, DIM)}
    return transformer(4, ("output_R", "output_D", "output_B"), **table)


class Touch:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["args", "model"])
def test_a_pickle_cannot_run_code(tmp_path: Path, place: str, zipped: bool) -> None:
    trap = tmp_path / "touched"
    content = {"model": image_model(), "args": argparse.Namespace(seed=0)}
    content[place] = Touch(trap)
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pt is refused: it asks for \w+\.system") as caught:
        convert("nar-c2i", tmp_path / "bad.pt", tmp_path / "out", **SIZES)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("function", [eval, exec, __import__, getattr, torch.load, Path], ids=lambda f: f.__name__)
def test_other_callables_are_refused_too(tmp_path: Path, function: Any) -> None:
    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return function, ("1",)

    torch.save({"model": image_model(), "args": Call()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"it asks for .*{function.__name__}"):
        read_checkpoint(tmp_path / "bad.pt")


WRAPPERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=0.1)},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "ordered": lambda state: collections.OrderedDict(state),
    "ema only": lambda state: {"ema": state},
    "model beside ema": lambda state: {"ema": {name: 0 * tensor for name, tensor in state.items()}, "model": state},
    "ddp": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled": lambda state: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
    "caches": lambda state: {
        "model": {**state, "freqs_cis": torch.ones(3), "layers.0.attention.kv_cache.k_cache": torch.ones(2)}
    },
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_gives_the_same_folder(tmp_path: Path, wrapper: str) -> None:
    torch.save(WRAPPERS[wrapper](image_model()), tmp_path / "wrapped.pt")
    save_file(image_model(), tmp_path / "plain.safetensors")
    for source in ("wrapped.pt", "plain.safetensors"):
        convert("nar-c2i", tmp_path / source, tmp_path / Path(source).stem, **SIZES)
    wrapped, plain = (read_weights(tmp_path / name) for name in ("wrapped", "plain"))
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)
    assert read_config(tmp_path / "wrapped")["model"] == read_config(tmp_path / "plain")["model"]


def test_consolidated_folder_and_legacy_file(tmp_path: Path) -> None:
    folder = tmp_path / "0050000"
    folder.mkdir()
    torch.save(image_model(), folder / "consolidated.pth", _use_new_zipfile_serialization=False)
    torch.save({}, folder / "optimizer.00000-of-00001.pth")
    convert("nar-c2i", folder, tmp_path / "out", **SIZES)
    model = Transformer.from_pretrained(tmp_path / "out")
    assert (model.config.num_classes, model.config.num_layers, model.config.grid) == (CLASSES, 2, (3, 4))
    assert model(torch.zeros(2, 3, 4, dtype=torch.long), ClassCondition(torch.tensor([0, -1]))).shape == (
        2,
        3,
        4,
        VOCAB,
    )


def test_averaged_weights_on_request(tmp_path: Path) -> None:
    state = image_model()
    torch.save({"model": state, "ema": {name: tensor + 1 for name, tensor in state.items()}}, tmp_path / "both.pt")
    convert("nar-c2i", tmp_path / "both.pt", tmp_path / "model", **SIZES)
    convert("nar-c2i", tmp_path / "both.pt", tmp_path / "ema", weights="ema", **SIZES)
    model, ema = (read_weights(tmp_path / name)["tokens.weight"] for name in ("model", "ema"))
    torch.testing.assert_close(model + 1, ema)
    torch.save({"model": state}, tmp_path / "one.pt")
    with pytest.raises(ValueError, match="holds the weights model"):
        convert("nar-c2i", tmp_path / "one.pt", tmp_path / "none", weights="ema", **SIZES)


def test_image_trainer_arguments_give_the_grid(tmp_path: Path) -> None:
    args = argparse.Namespace(gpt_model="GPT-B", image_size=384, downsample_size=16, num_classes=CLASSES)
    torch.save({"model": image_model(), "args": args}, tmp_path / "trained.pt")
    convert("nar-c2i", tmp_path / "trained.pt", tmp_path / "out", num_heads=2)
    assert read_config(tmp_path / "out")["model"]["grid"] == [24, 24]


@pytest.fixture
def easydict() -> Any:
    """A class that pickles as `easydict.EasyDict`, whether or not that package is there."""

    class EasyDict(dict):  # as upstream: entries are attributes too
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__.update(values)

    EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
    module, before = types.ModuleType("easydict"), sys.modules.get("easydict")
    module.EasyDict = EasyDict  # type: ignore[attr-defined]
    sys.modules["easydict"] = module
    yield EasyDict
    del sys.modules["easydict"]
    if before:
        sys.modules["easydict"] = before


def test_video_trainer_checkpoint(tmp_path: Path, easydict: Any) -> None:
    import numpy as np

    state = video_model()
    args = easydict({"num_classes": CLASSES, "n_head": 2, "latent_shape": [1, 3, 4]})
    content = {
        "model": {
            "name": "llama-abs-tiny",
            "args": args,
            "sd": state,
            "ema_sd": {0.9: {"abs_pe": state["abs_pe"] + 1}, 0.99: state},
        },
        "cfg": easydict({"model": easydict({"name": "x"})}),
        "rng_states_per_rank": {
            0: {"numpy_rng_state": np.random.default_rng(0).bit_generator.state, "old": np.arange(3)}
        },
    }
    torch.save(content, tmp_path / "epoch-last.pth")
    del sys.modules["easydict"]
    try:
        convert("nar-c2v", tmp_path / "epoch-last.pth", tmp_path / "out")
        convert("nar-c2v", tmp_path / "epoch-last.pth", tmp_path / "ema", weights="ema:0.9")
        with pytest.raises(ValueError, match=r"ema:0\.9, ema:0\.99; choose one"):
            convert("nar-c2v", tmp_path / "epoch-last.pth", tmp_path / "no", weights="ema")
    finally:
        sys.modules["easydict"] = types.ModuleType("easydict")
    config = Transformer.from_pretrained(tmp_path / "out").config
    assert (config.grid, config.num_heads, config.num_layers, config.positions) == ((1, 3, 4), 2, 2, "learned")
    positions = [read_weights(tmp_path / name)["positions"] for name in ("out", "ema")]
    torch.testing.assert_close(positions[0] + 1, positions[1])


def test_hub_layout(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(video_model(), hub / "model.safetensors")
    settings = {"n_head": 2, "latent_shape": [3, 2, 2], "num_classes": CLASSES}
    (hub / "config.json").write_text(json.dumps(settings))
    convert("nar-c2v", hub, tmp_path / "out", class_names=[f"class {index}" for index in range(CLASSES)])
    assert Transformer.from_pretrained(tmp_path / "out").config.grid == (3, 2, 2)
    assert read_config(tmp_path / "out")["class_names"][-1] == "class 4"
    with pytest.raises(ValueError, match="3 class names for a model of 5 classes"):
        convert("nar-c2v", hub, tmp_path / "no", class_names=["a", "b", "c"])


def test_llamagen_models_decode_token_by_token(tmp_path: Path) -> None:
    torch.save({"model": llamagen_model()}, tmp_path / "c2i.pt")
    convert("llamagen-gpt", tmp_path / "c2i.pt", tmp_path / "out", **SIZES)
    model = Transformer.from_pretrained(tmp_path / "out")
    assert (model.config.schedule, model.config.num_layers, model.layout.schedule.num_steps) == ("raster", 3, 12)


def test_wrong_kinds_are_named(tmp_path: Path) -> None:
    torch.save(llamagen_model(), tmp_path / "llamagen.pt")
    with pytest.raises(
        ValueError, match=r"is a llamagen-gpt checkpoint .*one prediction head.*use --kind llamagen-gpt"
    ):
        convert("nar-c2i", tmp_path / "llamagen.pt", tmp_path / "out", **SIZES)
    torch.save(video_model(), tmp_path / "video.pt")
    with pytest.raises(ValueError, match="is a nar-c2v checkpoint"):
        convert("nar-c2i", tmp_path / "video.pt", tmp_path / "out", **SIZES)
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no checkpoint of .*it has conv\.weight"):
        convert("llamagen-vq", tmp_path / "other.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="kind 'nar' is unknown; choose one of nar-c2i"):
        convert("nar", tmp_path / "other.pt", tmp_path / "out")


def _without(state: dict[str, Tensor]) -> None:
    del state["layers.1.attention.wo.weight"]


def _with_more(state: dict[str, Tensor]) -> None:
    state["layers.1.attention.q_norm.weight"] = torch.zeros(2)


def _with_other_shape(state: dict[str, Tensor]) -> None:
    state["layers.1.attention.wo.weight"] = torch.zeros(DIM, DIM + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"missing: layers\.1\.attention\.wo\.weight"),
        (_with_more, r"not part of this model: layers\.1\.attention\.q_norm\.weight"),
        (_with_other_shape, r"layers\.1\.attention\.wo\.weight is \(16, 17\), \(16, 16\) is expected"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: Any, message: str) -> None:
    state = image_model()
    change(state)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        convert("nar-c2i", tmp_path / "odd.pt", tmp_path / "out", **SIZES)
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_joined_may_differ_in_axes_of_size_one(tmp_path: Path) -> None:
    for name, changed in (("plain", False), ("odd", True)):
        state = image_model()
        if changed:
            state["layers.1.feed_forward.w3.weight"] = state["layers.1.feed_forward.w3.weight"][..., None]
        torch.save(state, tmp_path / f"{name}.pt")
        convert("nar-c2i", tmp_path / f"{name}.pt", tmp_path / name, **SIZES)
    plain, odd = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "odd"))
    assert all(torch.equal(plain[name], odd[name]) for name in plain)


def test_what_is_not_in_the_file_is_asked_for(tmp_path: Path) -> None:
    torch.save(image_model(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="attention heads with --num-heads"):
        convert("nar-c2i", tmp_path / "model.pt", tmp_path / "out", grid=(3, 4))
    with pytest.raises(ValueError, match="give it, such as --grid 16x16"):
        convert("nar-c2i", tmp_path / "model.pt", tmp_path / "out", num_heads=2)
    with pytest.raises(ValueError, match="has dim 16, preset NAR-L 1024"):
        convert("nar-c2i", tmp_path / "model.pt", tmp_path / "out", preset="NAR-L")
    with pytest.raises(ValueError, match="did you mean NAR-"):
        convert("nar-c2i", tmp_path / "model.pt", tmp_path / "out", preset="NAR-Large")
    torch.save(video_model(), tmp_path / "video.pt")
    with pytest.raises(ValueError, match=r"has 12 positions, grid \(4, 16, 16\) has 1024"):
        convert("nar-c2v", tmp_path / "video.pt", tmp_path / "out", num_heads=2)
    with pytest.raises(ValueError, match=r"grid \(3, 4\) has 2 axes, nar-c2v 3"):
        convert("nar-c2v", tmp_path / "video.pt", tmp_path / "out", num_heads=2, grid=(3, 4))
    settings = {"bottleneck": {"regularizer": {"name": "vq", "args": {}}}}
    larp = Checkpoint({"bottleneck.regularizer.embedding.weight": torch.zeros(2, 2)}, settings, "larp.pth")
    with pytest.raises(ValueError, match=r"larp\.pth: codebook_size is missing"):
        video_tokenizer_state(larp)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    torch.save(image_model(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    save_file(image_model(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("cut.pt", "cut.safetensors", "text.pt"):
        with pytest.raises(ValueError, match=name):
            convert("nar-c2i", tmp_path / name, tmp_path / "out", **SIZES)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nothing.pt", "loop"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            convert("nar-c2i", tmp_path / name, tmp_path / "out")
    with pytest.raises(ValueError, match="give the path of one of them"):
        convert("nar-c2i", tmp_path, tmp_path / "out")


def test_output_replaces_model_folders_only(tmp_path: Path) -> None:
    source = tmp_path / "model.pt"
    torch.save(image_model(), source)
    with pytest.raises(ValueError, match="would overwrite the source"):
        convert("nar-c2i", source, tmp_path, **SIZES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="is not a model folder"):
        convert("nar-c2i", source, tmp_path / "mine", **SIZES)
    for _ in range(2):
        convert("nar-c2i", source, tmp_path / "out", **SIZES)
    with pytest.raises(ValueError, match="is a model folder already"):
        convert("nar-c2i", tmp_path / "out", tmp_path / "again", **SIZES)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_tokenizer_is_copied_if_it_fits(tmp_path: Path) -> None:
    sizes = {"channels": 8, "channel_multipliers": (1, 1), "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    torch.save(image_model(), tmp_path / "model.pt")
    for vocab_size in (VOCAB, VOCAB + 1):
        tokenizer = ImageTokenizer(ImageTokenizerConfig(vocab_size=vocab_size, code_dim=4, **sizes))
        tokenizer.save_pretrained(tmp_path / f"vq{vocab_size}")
    convert("nar-c2i", tmp_path / "model.pt", tmp_path / "out", tokenizer=tmp_path / f"vq{VOCAB}", **SIZES)
    ImageTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    with pytest.raises(ValueError, match="has 13 codes, the model 12"):
        convert("nar-c2i", tmp_path / "model.pt", tmp_path / "no", tokenizer=tmp_path / f"vq{VOCAB + 1}", **SIZES)


def test_half_precision_is_kept_and_read(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in image_model().items()}
    torch.save(state, tmp_path / "half.pt")
    convert("nar-c2i", tmp_path / "half.pt", tmp_path / "out", **SIZES)
    assert read_weights(tmp_path / "out")["output.weight"].dtype == torch.bfloat16
    assert Transformer.from_pretrained(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_parameter_counts_of_published_sizes(preset: Any) -> None:
    with torch.device("meta"):
        if preset.kind == "llamagen-vq":
            module = ImageTokenizer(ImageTokenizerConfig(**preset.config))
        elif preset.kind == "larp-tokenizer":
            module = VideoTokenizer(VideoTokenizerConfig(**preset.config))
        elif preset.kind == "var-vae":
            module = MultiScaleTokenizer(MultiScaleTokenizerConfig(**preset.config))
        else:
            module = Transformer(ModelConfig(**preset.config))
    assert sum(parameter.numel() for parameter in module.parameters()) == preset.num_parameters
    assert preset.kind in KINDS
    assert find(preset.name) is preset


def test_recognise_needs_only_names() -> None:
    assert recognise(image_model()) == "nar-c2i"
    assert recognise(llamagen_model()) == "llamagen-gpt"
    assert recognise(video_model()) == "nar-c2v"
    assert recognise([]) is None


@pytest.mark.golden
@pytest.mark.parametrize("fixture", fixtures("video-trainer"), ids=str)
@pytest.mark.parametrize("moment", ["final", "mid"])
def test_checkpoints_written_by_the_published_trainer(tmp_path: Path, fixture: Fixture, moment: str) -> None:
    source = fixture.path(f"_{moment}.pth")
    if not source.is_file():
        pytest.skip(f"{source.name} is not there")
    for weights in ("model", "ema", "ema:0.9"):
        convert("nar-c2v", source, tmp_path / weights, weights=weights)
    config = Transformer.from_pretrained(tmp_path / "model").config
    assert config.grid == tuple(fixture.meta["model_args"]["latent_shape"])
    assert config.num_classes == fixture.meta["model_args"]["num_classes"]
    ema, same = (read_weights(tmp_path / weights)["output.weight"] for weights in ("ema", "ema:0.9"))
    assert torch.equal(ema, same)
