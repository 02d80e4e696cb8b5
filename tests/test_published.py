"""From downloaded files to pictures with the command line: in the small, then with full-size files of random weights.

The published layouts are written out here by name and shape, without help from the converter that reads them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nar import Pipeline, TextCondition, Transformer, generate
from nar.cli import main
from nar.condition import PrefixCondition
from nar.convert import KINDS
from nar.storage.folder import read_config
from nar.storage.presets import PRESETS
from nar.tokenizer import load_tokenizer
from nar.tokenizer.larp import VideoTokenizer, VideoTokenizerConfig
from text_encoders import tiny_encoder

DOCUMENTATION = Path(__file__).parent.parent / "docs" / "howto" / "checkpoints.md"
Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(
    dim: int, num_layers: int, hidden_dim: int, vocab_size: int, num_extra: int, heads: Sequence[tuple[str, str]]
) -> Shapes:
    shapes: Shapes = {"tok_embeddings.weight": (vocab_size, dim)}
    for layer in range(num_layers + num_extra):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * dim, dim),
            f"layers.{layer}.attention.wo.weight": (dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": (hidden_dim, dim),
            f"layers.{layer}.feed_forward.w3.weight": (hidden_dim, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, hidden_dim),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    for norm, output in heads:
        shapes |= {f"{norm}.weight": (dim,), f"{output}.weight": (vocab_size, dim)}
    return shapes


IMAGE_HEADS = (("norm", "output"), ("medusa_norm", "medusa_output"))
VIDEO_HEADS = tuple((f"norm_{name}", f"output_{name}") for name in "RBD")


def class_model_shapes(dim: int, num_layers: int, hidden_dim: int, vocab_size: int, num_classes: int) -> Shapes:
    shapes = transformer_shapes(dim, num_layers, hidden_dim, vocab_size, 1, IMAGE_HEADS)
    return {**shapes, "cls_embedding.embedding_table.weight": (num_classes + 1, dim)}


def tokenizer_shapes(
    channels: int, multipliers: Sequence[int], latent: int, code_dim: int, vocab_size: int, num_blocks: int = 2
) -> Shapes:
    """LlamaGen's VQ, level by level."""
    shapes: Shapes = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, before: int, after: int) -> None:
        layer(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3, 3)
        layer(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            layer(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.0", width, width)
        attention(f"{name}.1", width)
        block(f"{name}.2", width, width)

    last, width = len(multipliers) - 1, channels
    layer("encoder.conv_in", channels, 3, 3, 3)
    for level, multiplier in enumerate(multipliers):
        name = f"encoder.conv_blocks.{level}"
        for index in range(num_blocks):
            block(f"{name}.res.{index}", width, channels * multiplier)
            width = channels * multiplier
            if level == last:
                attention(f"{name}.attn.{index}", width)
        if level != last:
            layer(f"{name}.downsample.conv", width, width, 3, 3)
    middle("encoder.mid", width)
    layer("encoder.norm_out", width)
    layer("encoder.conv_out", latent, width, 3, 3)

    layer("decoder.conv_in", width, latent, 3, 3)
    middle("decoder.mid", width)
    for level, multiplier in enumerate(reversed(multipliers)):
        name = f"decoder.conv_blocks.{level}"
        for index in range(num_blocks + 1):
            block(f"{name}.res.{index}", width, channels * multiplier)
            width = channels * multiplier
            if level == 0:
                attention(f"{name}.attn.{index}", width)
        if level != last:
            layer(f"{name}.upsample.conv", width, width, 3, 3)
    layer("decoder.norm_out", width)
    layer("decoder.conv_out", 3, width, 3, 3)
    layer("quant_conv", code_dim, latent, 1, 1)
    layer("post_quant_conv", latent, code_dim, 1, 1)
    shapes["quantize.embedding.weight"] = (vocab_size, code_dim)
    return shapes


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Norms near 1, matrices that keep the scale of what they read."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 0.02 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = max(1, int(np.prod(shape[1:])))
            state[name] = noise * (fan_in**-0.5 if len(shape) > 1 else 0.02)
    return state


def save_model(state: dict[str, Tensor], path: Path, **settings: Any) -> None:
    """As the trainer of the published class models does."""
    content = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
        "scheduler": {"last_epoch": 3},
        "steps": 1500,
        "args": argparse.Namespace(global_seed=0, lr=1e-4, betas=[0.9, 0.95], **settings),
    }
    torch.save(content, path)


def save_tokenizer(state: dict[str, Tensor], path: Path) -> None:
    state = {**state, "quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": state, "optimizer": {}, "discriminator": {}, "steps": 7, "args": argparse.Namespace()}, path)


class Run(NamedTuple):
    code: Any
    out: str
    err: str


def nar(*arguments: object) -> Run:
    """Run the command, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with patch.object(sys, "argv", ["nar", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Run(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    """Run the command, in this process; returns what it prints."""
    result = nar(*arguments)
    assert result.code == 0, result.err
    return result.out


def measure(*arguments: object) -> tuple[str, float, float]:
    """Run the command as a process of its own, on two cores; returns what it prints, seconds, and peak MiB."""
    report = (  # the system's own count of a child's peak begins with what its parent held
        "import atexit, re; from pathlib import Path; from nar.cli import main; "
        "peak = lambda: re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]; "
        "atexit.register(lambda: print('peak', peak())); main()"
    )
    started = perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", report, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "2", **os.environ},
    )
    assert done.returncode == 0, done.stdout
    text, _, kibibytes = done.stdout.rpartition("peak ")
    return text, perf_counter() - started, int(kibibytes) / 1024


TINY = {"dim": 32, "num_layers": 2, "hidden_dim": 48, "vocab_size": 24}
SIZES = ("--num-heads", 2, "--grid", "4x4")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downloads")
    write_downloads(folder)
    return folder


def write_downloads(folder: Path) -> None:
    """Write small files as they would be downloaded."""
    save_model(random_state(class_model_shapes(**TINY, num_classes=3)), folder / "c2i.pt", model="GPT-B")
    save_tokenizer(random_state(tokenizer_shapes(32, (1, 1), 32, 4, TINY["vocab_size"])), folder / "vq.pt")
    text = transformer_shapes(**TINY, num_extra=1, heads=IMAGE_HEADS) | {
        "cls_embedding.uncond_embedding": (5, 16),
        "cls_embedding.cap_proj.fc1.weight": (TINY["dim"], 16),
        "cls_embedding.cap_proj.fc2.weight": (TINY["dim"], TINY["dim"]),
    }
    save_model(random_state(text), folder / "t2i.pt")
    frames = transformer_shapes(**TINY, num_extra=2, heads=VIDEO_HEADS)
    frames |= {"tok_embeddings.weight": (TINY["vocab_size"] + 1, TINY["dim"]), "abs_pe": (1, 25, TINY["dim"])}
    torch.save(random_state(frames), folder / "fp.pth")
    frames |= {"cls_embedding.embedding_table.weight": (4, TINY["dim"]), "abs_pe": (1, 13, TINY["dim"])}
    frames["tok_embeddings.weight"] = (TINY["vocab_size"], TINY["dim"])
    torch.save(random_state(frames), folder / "c2v.pth")
    (folder / "names.txt").write_text("ant\nbee\ncow\n")


def video_tokenizer() -> VideoTokenizer:
    return VideoTokenizer(
        VideoTokenizerConfig(
            num_frames=6,
            image_size=16,
            patch_size=8,
            temporal_patch_size=2,
            num_tokens=12,
            grid=(3, 2, 2),
            encoder_dim=16,
            num_encoder_layers=1,
            num_encoder_heads=2,
            decoder_dim=16,
            num_decoder_layers=1,
            num_decoder_heads=2,
            vocab_size=TINY["vocab_size"],
            code_dim=4,
        )
    )


def test_class_model_with_tokenizer_from_files_to_picture(downloads: Path, tmp_path: Path) -> None:
    vq, model = tmp_path / "vq", tmp_path / "model"
    assert succeed("convert", "--kind", "llamagen-vq", downloads / "vq.pt", "-o", vq) == f"wrote {vq}\n"
    succeed(
        "convert",
        "--kind",
        "nar-c2i",
        downloads / "c2i.pt",
        "-o",
        model,
        *SIZES,
        "--tokenizer",
        vq,
        "--class-names",
        downloads / "names.txt",
    )
    succeed("sample", model, "--class-label", "bee", "-n", 2, "--guidance-scale", 2, "-o", tmp_path / "bees.npz")
    pictures = np.load(tmp_path / "bees.npz")
    assert pictures["arr_0"].shape == (2, 8, 8, 3)
    assert pictures["labels"].tolist() == [1, 1]
    facts = json.loads(succeed("info", model, "--json"))
    assert (facts["grid"], facts["classes"]) == ("4x4", "ant, bee, cow")
    assert facts["tokenizer"].endswith("patch 2x2, 24 codes")
    assert facts["training"] == "not recorded; converted from c2i.pt"
    assert "image-tokenizer" in succeed("info", vq)


def test_model_without_tokenizer_says_how_to_add_one(downloads: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    succeed("convert", "--kind", "nar-c2i", downloads / "c2i.pt", "-o", model, *SIZES)
    assert "none: copy a converted tokenizer" in succeed("info", model)
    result = nar("sample", model, "-o", tmp_path / "x.png")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "has no tokenizer" in result.err
    assert "--tokenizer FOLDER" in result.err


def test_text_model_in_python(downloads: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    succeed("convert", "--kind", "nar-t2i", downloads / "t2i.pt", "-o", model, *SIZES)
    assert "5 features of width 16, encoder: none is named" in succeed("info", model)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        Pipeline.from_pretrained(model)
    features, mask = torch.randn(1, 5, 16), torch.tensor([[False, False, True, True, True]])
    codes = generate(Transformer.from_pretrained(model), TextCondition(features * mask[..., None], mask))
    assert codes.shape == (1, 4, 4)


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_frame_prediction_in_python(downloads: Path, tmp_path: Path, attention: str) -> None:
    model = tmp_path / "model"
    options = ("--num-heads", 2, "--grid", "3x2x2", "--prefix-attention", attention)
    succeed("convert", "--kind", "nar-fp", downloads / "fp.pth", "-o", model, *options)
    assert f"3x2x2, {attention}" in succeed("info", model)
    given = PrefixCondition(torch.zeros(2, 3, 2, 2, dtype=torch.long))
    assert generate(Transformer.from_pretrained(model), given).shape == (2, 3, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "nar"), "kind 'nar' is unknown; choose one of nar-c2i"),
        (("--kind", "nar-c2i", "--grid", "4by4"), "grid '4by4' must be whole numbers joined by x"),
        (("--kind", "nar-c2i", "--grid", "0x4"), "grid '0x4' must be whole numbers joined by x"),
        (("--kind", "nar-c2i"), "attention heads with --num-heads"),
        (("--kind", "nar-t2i", *SIZES), "use --kind nar-c2i"),
        (("--kind", "nar-c2i", *SIZES, "--weights", "best"), "choose model, ema or ema:DECAY"),
        (("--kind", "nar-c2i", *SIZES, "--prefix-attention", "full"), "prefix_attention does not apply to nar-c2i"),
        (("--kind", "llamagen-vq", "--grid", "4x4"), "grid does not apply to llamagen-vq"),
    ],
)
def test_mistakes_are_one_line(downloads: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    result = nar("convert", downloads / "c2i.pt", "-o", tmp_path / "out", *options)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_class_names_from_json(downloads: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('["ant", "bee", "cow"]')
    options = ("--kind", "nar-c2i", downloads / "c2i.pt", *SIZES, "--class-names", names)
    succeed("convert", *options, "-o", tmp_path / "model")
    assert read_config(tmp_path / "model")["class_names"] == ["ant", "bee", "cow"]
    for wrong in ('{"0": "ant"}', '["ant"'):
        names.write_text(wrong)
        assert "names.json" in nar("convert", *options, "-o", tmp_path / "no").err


def test_presets_are_listed_with_kind_count_and_grid() -> None:
    lines = {line.split()[0]: line for line in succeed("info", "--presets").splitlines()}
    for name, words in {
        "NAR-B": ("nar-c2i", "130,551,552", "16x16"),
        "NAR-XL-t2i": ("nar-t2i", "818,969,600", "16x16"),
        "NAR-video-LP": ("nar-c2v", "693,588,480", "4x16x16"),
        "VQ-16": ("llamagen-vq", "71,883,403"),
        "LARP-L-long": ("larp-tokenizer", "4x16x16"),
    }.items():
        assert all(word in lines[name].split() for word in words), lines[name]


def test_the_documented_lines_run(downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/howto/checkpoints.md, in order, on small models; only the text encoder is a stand-in."""
    monkeypatch.chdir(tmp_path)
    succeed("convert", "--kind", "llamagen-vq", downloads / "vq.pt", "-o", "models/vq")
    for kind, file, name in (("nar-c2i", "c2i.pt", "nar-l"), ("nar-t2i", "t2i.pt", "nar-t2i")):
        options = ("--kind", kind, downloads / file, *SIZES, "--tokenizer", "models/vq", "-o", f"models/{name}")
        succeed("convert", *options)
    video_tokenizer().save_pretrained("models/larp")
    for kind, name in (("nar-c2v", "nar-video"), ("nar-fp", "nar-frames")):
        options = ("--num-heads", 2, "--grid", "3x2x2", "--tokenizer", "models/larp", "-o", f"models/{name}")
        succeed("convert", "--kind", kind, downloads / f"{kind.removeprefix('nar-')}.pth", *options)
    tiny_encoder(tmp_path / "google/flan-t5-xl", "t5")
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("[207]", "[2]").replace("pipe(3,", "pipe(2,"), names)
    with Image.open("dog.png") as dog, Image.open("cat.png") as cat, Image.open("clip.gif") as clip:
        assert (dog.size, cat.size, clip.size) == ((8, 8), (8, 8), (16, 16))
    assert names["pipe"].model.config.num_classes
    assert names["future"][:5] == names["clip"][:5]
    assert len(names["future"]) == 6
    options = ("--text-encoder", "google/flan-t5-xl", "--prompt", "a red apple", "-n", 1)
    assert "1 picture in" in succeed("sample", "models/nar-t2i", *options, "-o", "apple.png")


def test_documented_presets_exist() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    assert all(f"`{kind}`" in text for kind in KINDS)
    assert not [name for name in re.findall(r"--preset ([\w-]+)", text) if name not in PRESETS]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_full_size_class_model_from_files_to_a_256_pixel_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = class_model_shapes(768, 12, 2048, 16384, 1000)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 130_551_552
    save_model(random_state(shapes), tmp_path / "c2i_B_256.pt", gpt_model="GPT-B", image_size=256, downsample_size=16)
    shapes = tokenizer_shapes(128, (1, 1, 2, 2, 4), 256, 8, 16384)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 71_883_403
    save_tokenizer(random_state(shapes), tmp_path / "vq_ds16_c2i.pt")

    vq, model, pictures = tmp_path / "vq-16", tmp_path / "nar-b", tmp_path / "pictures"
    label = ("--class-label", 207, "-n", 1)
    runs = {
        "convert VQ-16": ("convert", "--kind", "llamagen-vq", tmp_path / "vq_ds16_c2i.pt", "-o", vq),
        "convert NAR-B": ("convert", "--kind", "nar-c2i", tmp_path / "c2i_B_256.pt", "--tokenizer", vq, "-o", model),
        "sample": ("sample", model, *label, "-o", tmp_path / "x.png"),
        "sample, guided": ("sample", model, *label, "--guidance-scale", 4, "-o", pictures),
    }
    measured = {name: measure(*arguments) for name, arguments in runs.items()}
    with capsys.disabled():
        for name, (text, seconds, peak) in measured.items():
            print(f"\n{name}: {seconds:.1f} s, peak {peak:.0f} MiB; {text.splitlines()[-2:]}")
    with Image.open(pictures / "000000.png") as image:
        assert image.size == (256, 256)
        assert np.asarray(image).std() > 1
    with Image.open(tmp_path / "x.png") as sheet:  # with a margin and the label
        assert 256 < sheet.width < 300
        assert 256 < sheet.height < 300
    assert "1 picture in" in measured["sample"][0]
    assert "31 steps" in measured["sample"][0]
    assert read_config(model)["model"]["num_heads"] == 12
    assert sum(parameter.numel() for parameter in load_tokenizer(vq).parameters()) == 71_883_403
    for name, file in (("convert VQ-16", "vq_ds16_c2i.pt"), ("convert NAR-B", "c2i_B_256.pt")):
        libraries = 300  # MiB of the interpreter with torch, whatever the file
        assert measured[name][2] < libraries + (tmp_path / file).stat().st_size / 2**20
