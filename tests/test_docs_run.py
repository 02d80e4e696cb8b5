"""Every command and Python block of the README and of docs/ runs: here, in another test, or it is listed with a reason.

What takes long runs at reduced length, with overrides behind the command, on small stand-ins for the reader's files.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from nar.cli import app
from nar.storage.folder import find_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("src/nar/bundled/**/README.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NO_CODE = ("text", "json", "yaml")

# Blocks of one language on one page that another test takes from the page and runs.
ELSEWHERE = {
    ("README.md", "sh"): "test_readme.py::test_commands",
    ("README.md", "python"): "test_readme.py::test_python",
    ("docs/howto/sampling.md", "sh"): "test_readme.py::test_sampling",
    ("docs/howto/sampling.md", "python"): "test_readme.py::test_sampling",
    ("docs/howto/serving.md", "sh"): "test_serve_docs.py::test_curl",
    ("docs/howto/serving.md", "python"): "test_serve_docs.py::test_python",
    ("docs/howto/integrations.md", "python"): "test_diffusers.py::test_the_page",
    ("docs/howto/checkpoints.md", "python"): "test_published.py::test_the_documented_lines_run",
    ("docs/howto/editing.md", "python"): "test_edit.py::test_the_example_of_the_page_runs",
    ("docs/tutorials/first-pictures.md", "sh"): "test_tutorials.py::test_the_notebooks_run",
    ("docs/tutorials/first-pictures.md", "python"): "test_tutorials.py::test_the_notebooks_run",
    ("docs/tutorials/own-pictures.md", "sh"): "test_tutorials.py::test_the_notebooks_run",
    ("docs/tutorials/own-pictures.md", "python"): "test_tutorials.py::test_the_notebooks_run",
}
# Lines that no test runs as they stand: a pattern, and why.
NOT_RUN = {
    r"make (demo|test)\b": "installs an environment, and runs this suite; the workflow runs both",
    r"pip install ": "installs; `make release` installs wheel and sdist into fresh environments",
    r"(torchrun .* \.\.\. |nar convert --kind KIND |nar info MODEL_FOLDER)": "a pattern, not a command",
    r"torchrun .* nar train c2i-L ": "eight GPUs; two processes train in test_distributed.py",
    r"(#!/bin/bash|#SBATCH|export MASTER_ADDR|srun torchrun|pid=|trap |wait )": "a SLURM cluster",
    r"serve run nar\.serving\.ray": "Ray; test_serve_ray.py runs the deployment",
    r"nar (sample|info) someone/": "the Hugging Face hub; test_hub.py asks a stand-in of it",
    r"nar train fashion init=runs/raster/model ": "a raster model of one's own; test_initial.py trains from one",
    r"nar bench --efficiency ": "an hour; test_bench.py runs it with toy presets",
    r"python scripts/compare_published\.py ": "minutes of an idle core",
    r"python scripts/gpu_bench\.py ": "a GPU",
    r"python scripts/precision_quality\.py ": "codes of a whole run",
    r"nar eval --real VIRTUAL_imagenet256": "weights and statistics of others; test_evaluate.py takes random weights",
    r"nar eval my-clips --real UCF-101 ": "UCF-101; test_metrics_video.py runs the protocol on a stand-in",
    r"nar eval geneval samples-geneval ": "weights of others; test_geneval.py takes random ones",
    r"nar eval captions --fake samples --clip ": "weights of others; test_text_image.py takes random ones",
    r"nar convert --kind (larp-tokenizer|var|var-vae) ": "weights of others; pytest -m golden converts recorded ones",
    r"nar sample models/var-d16 ": "the model of the line before",
}


class Piece(NamedTuple):
    """A Python block, or one command."""

    page: str
    language: str
    text: str


def pieces(page: Path) -> list[Piece]:
    """All that a reader of a page could run, in order."""
    name, found = page.relative_to(ROOT).as_posix(), []
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in ("python", "py"):
            found.append(Piece(name, language, block))
        elif language not in NO_CODE:
            lines = block.replace("\\\n", " ").splitlines()
            found += [Piece(name, language, line.removeprefix("$ ")) for line in lines if line.strip()]
    return found


def reason(piece: Piece) -> str | None:
    """Why a command does not run, or None."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, piece.text)), None)


def here(page: str) -> list[Piece]:
    """What this file runs of a page."""
    found = [piece for piece in pieces(ROOT / page) if (page, piece.language) not in ELSEWHERE]
    return [piece for piece in found if not (piece.language != "python" and reason(piece))]


def test_every_block_runs_somewhere() -> None:
    """A new page needs a row in STAGES; nothing is listed that is no longer there."""
    found = [piece for page in PAGES for piece in pieces(page)]
    assert len(found) > 150
    assert {piece.page for page in PAGES for piece in here(page.relative_to(ROOT).as_posix())} == set(STAGES)
    assert {(piece.page, piece.language) for piece in found} >= set(ELSEWHERE)
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
    for pattern in NOT_RUN:
        assert any(re.match(pattern, piece.text) for piece in found), f"nothing begins with {pattern}"
    for piece in found:
        assert piece.language in ("", "sh", "console", "bash", "python", "py"), f"{piece.page}: {piece.language}"


def pictures(folder: Path, count: int = 24, size: int = 64, *, classes: bool = True, captions: bool = False) -> Path:
    """Circles and squares in a folder, with a folder for each or with captions."""
    rng = np.random.default_rng(0)
    for number in range(count):
        kind = ("circle", "square")[number % 2]
        file = folder / (kind if classes else "") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture, (left, top) = Image.new("RGB", (size, size), "white"), rng.integers(0, size // 2, 2).tolist()
        draw = ImageDraw.Draw(picture)
        colour = tuple(rng.integers(0, 200, 3).tolist())
        box = (left, top, left + size // 3, top + size // 3)
        (draw.ellipse if kind == "circle" else draw.rectangle)(box, fill=colour)
        picture.save(file)
        if captions:
            file.with_suffix(".txt").write_text(f"a {kind}")
    return folder


def clip(file: Path, *, number: int = 0, count: int = 17, size: int = 64) -> Path:
    """A square that moves."""
    file.parent.mkdir(parents=True, exist_ok=True)
    frames = []
    for step in range(count):
        frame = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(frame).rectangle((2 * step, 3 * number, 2 * step + 20, 3 * number + 20), fill="crimson")
        frames.append(frame)
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=100, loop=0)
    return file


def strips(file: Path) -> Path:
    """Clips as the recipe `clips` reads them: strips of frames with words, groups and labels."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, list[Any]] = {"strip": [], "caption": [], "group": [], "hexcode": []}
    for number in range(12):
        with Image.open(clip(file.parent / "strip.gif", number=number, count=16)) as moving:
            sheet = Image.new("RGB", (64, 64 * moving.n_frames))
            for step in range(moving.n_frames):
                moving.seek(step)
                sheet.paste(moving.convert("RGB"), (0, 64 * step))
        data = io.BytesIO()
        sheet.save(data, "png")
        values = data.getvalue(), f"square {number}", ("near", "far")[number % 2], f"1F{number:03X}"
        for column, value in zip(rows, values, strict=True):
            rows[column].append(value)
    pq.write_table(pa.table(rows), file)
    return file


def emoji(folder: Path) -> Path:
    """Some emoji of the tests, as the recipe `emoji` reads them."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    pq.write_table(pq.read_table(ROOT / "tests/data/emoji-mini.parquet").slice(0, 80), folder / "train.parquet")
    return folder


def vq(folder: Path, *, halvings: int = 4) -> Path:
    """A tokenizer of random weights in place of LlamaGen's."""
    import torch

    from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "code_dim": 4, "channels": 8, "num_blocks": 1, "latent_channels": 8, "norm_groups": 4}
    config = ImageTokenizerConfig(channel_multipliers=(1,) * (halvings + 1), **sizes)
    ImageTokenizer(config).save_pretrained(folder)
    return folder


def model(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A model of random weights with that tokenizer."""
    from conftest import make_model

    model = make_model("nar", num_classes=2, vocab_size=64, **changes)
    model.save_pretrained(folder, class_names=("circle", "square"), tokenizer=tokenizer, sampling={})
    return folder


def checkpoints(folder: Path) -> None:
    import test_published
    from text_encoders import tiny_encoder

    test_published.write_downloads(folder)
    names = {"c2i.pt": "c2i_L_256.pt", "t2i.pt": "nar_xl_t2i_stage2.pt", "c2v.pth": "epoch-last.pth"}
    for name, published in names.items():
        (folder / name).rename(folder / published)
    for published in ("vq_ds16_c2i.pt", "vq_ds16_t2i.pt"):
        (folder / published).write_bytes((folder / "vq.pt").read_bytes())
    test_published.video_tokenizer().save_pretrained(folder / "models/larp")
    tiny_encoder(folder / "google/flan-t5-xl", "t5")


def measured(folder: Path) -> None:
    pictures(folder / "CIFAR/train", size=32)
    pictures(folder / "CIFAR/test", size=32)


def study(folder: Path) -> None:
    toy = yaml.safe_load((ROOT / "studies/toy.yaml").read_text(encoding="utf-8"))
    vq(folder / "vq", halvings=2)
    toy |= {"settings": ["tokenizer_path=vq", "batch_size=32", "optim.warmup_images=0", *SMALL], "num_images": 64}
    toy["judging"] = {"number": 32, "num_sampled": 0, "batch_sizes": [1]}
    (folder / "studies").mkdir()
    (folder / "studies/toy.yaml").write_text(yaml.safe_dump(toy))
    shutil.copytree(find_model("fashion"), folder / "runs/raster/model")


def edits(folder: Path) -> None:
    pictures(folder, 2, 32, classes=False)
    (folder / "1.png").rename(folder / "shirt.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(folder / "mask.png")
    Image.new("RGB", (64, 64), "orange").save(folder / "smile.png")


def evaluation(folder: Path) -> None:
    import torch

    from test_metrics_video import ToyI3D

    pictures(folder / "photos/test", 40)
    pictures(folder / "samples", 40, classes=False, captions=True)
    for name in ("my-model", "runs/mine/model"):
        model(folder / name, vq(folder / "vq", halvings=3), grid=(8, 8))
    for number in range(8):
        clip(folder / f"clips/test/{number}.gif", number=number)
        clip(folder / f"clips/samples/{number}.gif", number=8 - number)
    torch.jit.script(ToyI3D()).save(str(folder / "i3d_torchscript.pt"))
    assert CliRunner().invoke(app, ["eval", "composed", "--write-prompts", str(folder / "some.jsonl")]).exit_code == 0
    lines = (folder / "some.jsonl").read_text().splitlines()[:3]
    for number, line in enumerate(lines):
        made = pictures(folder / f"samples-composed/{number:05d}/samples", 1, classes=False)
        (made / "0.png").rename(made / "0000.png")
        (made.parent / "metadata.jsonl").write_text(line)
    for name in ("train", "unseen"):
        (folder / f"{name}.parquet").write_bytes((ROOT / "tests/data/emoji-mini.parquet").read_bytes())


def text(folder: Path) -> None:
    from text_encoders import tiny_encoder

    emoji(folder / "EMOJI")
    pictures(folder / "FOLDER", captions=True)
    pictures(folder / "laion", 4, captions=True, classes=False)
    vq(folder / "models/vq-16")
    tiny_encoder(folder / "google/flan-t5-xl", "t5")


def tokenizers(folder: Path) -> None:
    pictures(folder / "FOLDER", 60)
    for number in range(6):
        clip(folder / f"clips/v_Square_g01_c0{number}.gif", number=number)
    rows = "".join(f"{number},clips/v_Square_g01_c0{number}.gif,Square,0\n" for number in range(6))
    for name in ("k600_train.csv", "ucf101_train.csv"):
        (folder / name).write_text("id,path,action,label\n" + rows)


def training(folder: Path) -> None:
    pictures(folder / "FOLDER")
    pictures(folder / "imagenet", 4, 256)
    for number in range(8):
        clip(folder / f"CLIPS/{number}.gif", number=number)
    clip(folder / "start.gif")
    strips(folder / "clips.parquet")
    model(folder / "models/nar-l", vq(folder / "models/vq-16"), grid=(16, 16))
    model(folder / "runs/c2i-B/model", folder / "models/vq-16")


def own_clips(folder: Path) -> None:
    for number in range(8):
        clip(folder / f"clips/{'ab'[number % 2]}/{number}.gif", number=number)
    clip(folder / "start.gif")


def nothing(folder: Path) -> None:
    pass


class Stage(NamedTuple):
    """What is at hand, and what is written otherwise so that a test has the time for it."""

    prepare: Callable[[Path], None] = nothing
    others: tuple[tuple[str, str], ...] = ()
    names: str = ""  # what the page's Python takes as given


STAGES = {
    "docs/howto/checkpoints.md": Stage(
        checkpoints,
        (
            ("nar-c2i c2i_L_256.pt", "nar-c2i c2i_L_256.pt --num-heads 2 --grid 4x4"),
            ("--grid 32x32", "--num-heads 2 --grid 4x4"),
            ("nar-c2v epoch-last.pth", "nar-c2v epoch-last.pth --num-heads 2 --grid 3x2x2"),
            ("--class-label 207", "--class-label 2"),
            ("--class-label 3 ", "--class-label 2 "),
            ("A cat on a skateboard, oil painting", "a red apple"),
        ),
    ),
    "docs/explanation/measured.md": Stage(measured),
    "docs/explanation/performance.md": Stage(others=(("--preset NAR-B", "fashion"),)),
    "docs/explanation/study.md": Stage(study, (("fashion-mnist", "fashion-mnist -n 16 --sampled 0"),)),
    "docs/howto/editing.md": Stage(edits),
    "docs/howto/evaluation.md": Stage(
        evaluation,
        (
            ("--fake samples --json report.json", "--fake samples --json report.json --calibration 0 --resamplings 9"),
            ("-n 10000 --seed 1", "-n 40 --seed 1 --calibration 0 --resamplings 9"),
            ("--num-frames 16", "--num-frames 16 --calibration 0 --resamplings 9"),
            ("--against other-model", "--against fashion -n 20"),
            ("--nproc-per-node 8", "--nproc-per-node 2"),
            ("-n 10000 --labels", "-n 4 --labels"),
            ("--real pictures/test", "--real photos/test --tuned 8 --sampled 8 --steps 3 --family constant"),
        ),
        "import numpy as np; real, fake = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 32, 3), np.uint8)",
    ),
    "docs/howto/serving.md": Stage(others=(("--loads 0.3,1,2", "--loads 0.5 --seconds 1"),)),
    "docs/howto/text.md": Stage(text),
    "docs/howto/tokenizers.md": Stage(tokenizers),
    "docs/howto/training.md": Stage(
        training,
        (
            ("--nproc-per-node 8", "--nproc-per-node 2"),
            ("-n 50000", "-n 4"),
            ('{"sharpness": ...}', '{"sharpness": 1.0}'),
            ('"run=runs/watched"]', '"run=runs/watched", *SHORT]'),
        ),
        "from test_docs_run import FIRST, SMALL, SHORT; SHORT = [*SHORT, *FIRST, *SMALL]",
    ),
    "docs/index.md": Stage(),
    "docs/tutorials/orders.md": Stage(),
    "docs/tutorials/own-clips.md": Stage(own_clips),
    "src/nar/bundled/clips/README.md": Stage(),
    "src/nar/bundled/clips/tokenizer/README.md": Stage(names="import torch; clips = torch.zeros(1, 3, 16, 64, 64)"),
    "src/nar/bundled/emoji/README.md": Stage(),
    "src/nar/bundled/emoji/tokenizer/README.md": Stage(names="import torch; pixels = torch.zeros(1, 3, 64, 64)"),
    "src/nar/bundled/fashion/README.md": Stage(),
    "src/nar/bundled/fashion-edit/README.md": Stage(edits),
    "src/nar/bundled/emoji-edit/README.md": Stage(edits),
}
FAST = ("docs/howto/editing.md", "docs/index.md")  # the others run with -m slow
SHORT = ["steps=1", "batch_size=4", "optim.warmup_images=0", "engine.device=cpu"]
SMALL = ["model.dim=32", "model.num_heads=2", "model.num_layers=1", "model.hidden_dim=64"]
FIRST = [f"tokenizer_recipe.{word}" for word in SHORT[:3]]
LARP = [f"video_tokenizer.{half}_{name}" for half in ("encoder", "decoder") for name in ("dim=32",)]
LARP += [f"video_tokenizer.num_{half}_{name}=1" for half in ("encoder", "decoder") for name in ("layers", "heads")]
LARP += [f"{group}.{name}" for group in ("adversary", "prior") for name in ("num_layers=1", "num_heads=1")]
LARP += ["adversary.channels=16", "prior.dim=16", "batch_size=2"]
OF_EMOJI = ["data.heldout_styles=[]", "data.heldout_pairs=0", "data.num_composed=8"]  # the small table has one style
TRAININGS = {  # what is written behind a training of each recipe, so that it is one step of a small network
    "toy": [*FIRST, *SMALL],
    "my-data": [*FIRST, *SMALL],
    "my-clips": [*FIRST, *SMALL],
    "my-pictures": [*FIRST, *SMALL],
    "my-pictures-tokenizer": [],
    "cifar10-8x8-tokenizer": [],
    "cifar10-8x8-decoder": ["adversary.channels=8"],
    "cifar10-8x8": SMALL,
    "emoji": [*SMALL, *OF_EMOJI],
    "emoji-8x8": [*SMALL, *OF_EMOJI],
    "clips-tokenizer": ["causal_tokenizer.channels=8"],
    "clips": SMALL,
    "c2i-B": SMALL,
    "c2v-larp-tokenizer": LARP,
}


def run(words: list[str], ended: ExitStack) -> None:
    """Run a command as a reader would; trainings are one step of a small network, a server runs until `ended`."""
    own = Path(sys.executable).parent
    if words[0] == "nar" and words[1] == "train":
        words = [*words, *SHORT, *TRAININGS[words[2]]]
        if any(word.startswith("init=") for word in words):  # tokenizer and sizes are those of what it goes on from
            words = [word for word in words if word not in (*SMALL, *FIRST)]
    if words[:2] == ["nar", "serve"]:
        ended.enter_context(served([str(own / "nar"), *words[1:]]))
    elif words[0] == "nar":
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.exception!r} {done.output}"
    else:
        programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        given = [str(ROOT / word) if word.startswith("scripts/") else word for word in words[1:]]
        ran = subprocess.run([*programs[words[0]], *given], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


@contextmanager
def served(command: list[str]) -> Iterator[None]:
    """A server that answers, at the port of the page."""
    with subprocess.Popen(command) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen("http://127.0.0.1:8000/health").close()
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.1)
            yield
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0


def _param(page: str) -> Any:
    return pytest.param(page, marks=() if page in FAST else pytest.mark.slow)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [*map(_param, STAGES)])
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # features and formats are kept in ~/.cache
    stage, names = STAGES[page], dict[str, Any]()
    stage.prepare(tmp_path)
    exec(stage.names, names)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with ExitStack() as ended:
        for piece in here(page):
            text = piece.text
            for written, other in stage.others:
                text = text.replace(written, other)
            if piece.language in ("python", "py"):
                exec(compile(text, page, "exec"), names)
            elif words := shlex.split(text, comments=True):
                run(words, ended)
