"""Small random models that the tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nar import ClassCondition, ModelConfig, PrefixCondition, TextCondition, Transformer, cli
from nar.condition import Condition
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig

LAYOUTS = {
    "nar": {"grid": (4, 4), "num_classes": 10},
    "nar-wide": {"grid": (2, 5), "num_classes": 10, "condition_rotation": "zero"},
    "nar-deep-heads": {"grid": (4, 3), "num_classes": 10, "head_depths": (1, 2), "axis_heads": (1, 0)},
    "nar-shared-head": {"grid": (4, 4), "num_classes": 10, "axis_heads": (0, 0), "positions": "learned"},
    "gated": {"grid": (3, 4), "num_classes": 10, "gate": True},
    "gated-video": {"grid": (2, 3, 2), "num_classes": 10, "gate": True, "axis_heads": (0, 1, 0), "positions": "sincos"},
    "raster": {"grid": (3, 4), "num_classes": 10, "schedule": "raster"},
    "par": {"grid": (4, 4), "num_classes": 10, "schedule": "par", "regions": (2, 2)},
    "par-learned": {"grid": (4, 6), "num_classes": 10, "schedule": "par", "regions": (2, 3), "positions": "learned"},
    "scales": {"grid": (14,), "num_classes": 10, "schedule": "scales", "scales": (1, 2, 3), "positions": "learned"},
    "var": {"grid": (14,), "num_classes": 10, "schedule": "scales", "scales": (1, 2, 3), "positions": "levels"},
    "var-shared": {"grid": (21,), "num_classes": 10, "schedule": "scales", "scales": (1, 2, 4), "positions": "levels"},
    "text": {"grid": (3, 3), "text_dim": 12, "text_length": 5},
    "text-published": {
        "grid": (3, 3),
        "text_dim": 12,
        "text_length": 5,
        "condition_rotation": "zero",
        "null_mask": "caption",
    },
    "video": {"grid": (2, 3, 4), "num_classes": 10, "positions": "sincos"},
    "frames": {"grid": (2, 2, 3), "num_classes": 10, "prefix_grid": (1, 2, 3), "positions": "learned"},
    "frames-full": {"grid": (2, 2, 3), "prefix_grid": (2, 2, 3), "prefix_attention": "full", "positions": "learned"},
    "modulated": {"grid": (4, 3), "num_classes": 10, "modulation": "own", "unit_keys": True},
    "edits": {
        "grid": (3, 2),
        "num_classes": 10,
        "prefix_grid": (3, 2),
        "prefix_holes": "token",
        "prefix_attention": "full",
    },
    "words-and-frames": {"grid": (2, 2, 2), "text_dim": 12, "text_length": 5, "prefix_grid": (1, 2, 2)},
}

for _name in ("scales", "var", "var-shared"):
    LAYOUTS[_name] |= {"code_dim": 6}
LAYOUTS["var"] |= {"modulation": "own", "unit_keys": True}
LAYOUTS["var-shared"] |= {"modulation": "shared"}


def load_script(name: str) -> ModuleType:
    """Import a file of the folder `scripts`, which is no package."""
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(layout: str, **changes: object) -> Transformer:
    """A random model whose logits are far from uniform."""
    torch.manual_seed(7)
    config = {
        "vocab_size": 24,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 48,
        **LAYOUTS[layout],
        **changes,
    }
    model = Transformer(ModelConfig(**config)).eval()
    with torch.no_grad():
        norms = model.config.modulation == "none"  # else vectors are biases, beside which the rest would say little
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 and norms else 0.0, 0.2)
        if model.config.scales:
            model.sums.codebook.normal_()
    return model


def make_condition(model: Transformer, batch: int) -> Condition:
    """A condition of every kind that the model takes, with padded captions of different lengths."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    found: list[Condition] = []
    if config.num_classes:
        found.append(ClassCondition(torch.arange(batch) % config.num_classes))
    if config.text_dim:
        lengths = 1 + torch.arange(batch) % config.text_length
        mask = torch.arange(config.text_length) >= config.text_length - lengths[:, None]
        features = torch.randn(batch, config.text_length, config.text_dim, generator=generator) * mask[..., None]
        found.append(TextCondition(features, mask))
    if config.prefix_grid:
        codes = torch.randint(config.vocab_size, (batch, *config.prefix_grid), generator=generator)
        there = codes % 3 > 0 if config.prefix_holes == "token" else None
        found.append(PrefixCondition(codes, there))
    return Condition.of(found)


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> Transformer:
    """One model of every layout."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its tokenizer: three classes, 8x8 pixels, 4x4 codes of 32."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(1)
    sizes = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    ImageTokenizer(ImageTokenizerConfig(vocab_size=32, code_dim=4, **sizes)).save_pretrained(folder / "tokenizer")
    make_model("nar", num_classes=3, vocab_size=32).save_pretrained(
        folder / "model",
        class_names=("red apple", "pear", "plum"),
        tokenizer=folder / "tokenizer",
        sampling={"guidance_scale": 1.5},
    )
    return folder / "model"


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 that knows thirteen words."""
    from text_encoders import tiny_encoder  # imports transformers, for the tests that need it

    return tiny_encoder(tmp_path_factory.mktemp("encoder"), "t5")


@pytest.fixture(scope="session")
def words_folder(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    """A model folder of words to pictures, with its encoder's name."""
    from toy_models import words_folder

    model = make_model("text", grid=(4, 4), text_dim=16, text_length=10, vocab_size=32)
    return words_folder(tmp_path_factory.mktemp("words"), model, encoder_folder)


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    """A model folder of words, and none, one or three given frames, to clips of five frames."""
    from toy_models import clips_folder

    model = make_model("words-and-frames", grid=(3, 2, 2), prefix_grid=(2, 2, 2), text_dim=16, text_length=10)
    return clips_folder(tmp_path_factory.mktemp("clips"), model, encoder_folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command in this process; returns what it prints, or with a `code` its one line on stderr."""

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["nar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert stopped.value.code == code, err
        if code:
            assert err.count("\n") == 1, err
            return err
        return out + err

    return run
