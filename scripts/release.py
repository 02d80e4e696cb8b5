"""Build wheel and sdist, check them, and use each in an environment without the checkout: `make release`.

From each a first picture, then with its extras a server that answers and `nar train toy`. Needs a package index, and
takes as long as installing PyTorch twice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
MOST_BYTES = 60e6  # of wheel and sdist
WAIT_SECONDS = 300.0


def run(*command: object, cwd: Path = ROOT, **options: Any) -> str:
    """Run a command and return what it printed; its own words are the error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_version() -> str:
    """The version, which CITATION.cff and the ComfyUI pack must have too; of a tag the changelog a heading."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "src/nar/__init__.py").read_text(encoding="utf-8"))
    version = found[1] if found else ""
    for name in ("CITATION.cff", "integrations/comfyui/pyproject.toml"):
        if not re.search(rf'^version(:| =) "?{re.escape(version)}"?$', (ROOT / name).read_text(encoding="utf-8"), re.M):
            sys.exit(f"{name} has another version than the package, {version}")
    if f"\n## {version}" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        print(f"CHANGELOG.md has no heading for {version}: name what is unreleased before you tag")
    return version


def build(folder: Path, python: Path) -> list[Path]:
    """The wheel and the sdist, no larger than they may be."""
    run(python, "-m", "pip", "install", "--quiet", "build", "twine", "cffconvert", "zizmor")
    run(_command(python, "zizmor"), "--offline", "--no-progress", ROOT / ".github/workflows")
    run(python, "-m", "build", "--outdir", folder)
    run(_command(python, "cffconvert"), "--validate", "-i", ROOT / "CITATION.cff")
    built = sorted(folder.glob("nar_gen-*"))
    print(run(python, "-m", "twine", "check", "--strict", *built).strip())
    for path in built:
        size = path.stat().st_size
        print(f"{path.name}: {size / 1e6:.1f} MB")
        if size > MOST_BYTES:
            sys.exit(f"{path.name} has {size / 1e6:.1f} MB: at most {MOST_BYTES / 1e6:.0f}")
    return built


def environment(folder: Path) -> Path:
    """The Python of a new environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _command(python: Path, name: str) -> Path:
    return python.with_name(f"{name}.exe" if sys.platform == "win32" else name)


def use(artifact: Path, work: Path, *, train: bool) -> None:
    """Install an artifact, and do in an empty folder what the README begins with."""
    began = time.monotonic()
    python = environment(work / "environment")
    limits = ("--constraint", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", *limits, "torch", cwd=work)
    run(python, "-m", "pip", "install", "--quiet", *limits, artifact, cwd=work)
    nar = _command(python, "nar")
    run(nar, "sample", "fashion", "--class-label", "sneaker", "-n", "1", "-o", "first.png", "--seed", "1", cwd=work)
    place = run(python, "-c", "import nar; print(nar.__file__)", cwd=work).strip()
    if ROOT in Path(place).parents and "site-packages" not in place:
        sys.exit(f"{place} is the checkout's")
    print(f"{artifact.name}: first picture after {time.monotonic() - began:.0f} s")
    run(python, "-m", "pip", "install", "--quiet", *limits, f"{artifact}[serve,train]", cwd=work)
    _serve(nar, work)
    if train:
        began = time.monotonic()
        run(nar, "train", "toy", "run=toy", cwd=work)
        run(nar, "sample", "toy/model", "-o", "toy.png", cwd=work)
        print(f"{artifact.name}: nar train toy took {time.monotonic() - began:.0f} s")


def _serve(nar: Path, work: Path) -> None:
    """Start the server, ask it for a picture, and stop it."""
    with (work / "address").open("w", encoding="utf-8") as file:
        server = subprocess.Popen([str(nar), "serve", "fashion", "--port", "0"], cwd=work, stdout=file)
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not (found := re.search(r"http://\S+", (work / "address").read_text(encoding="utf-8"))):
            if server.poll() is not None or time.monotonic() > end:
                sys.exit("nar serve did not start")
            time.sleep(0.2)
        body = json.dumps({"prompt": "sneaker", "seed": 1}).encode()
        request = Request(f"{found[0]}/v1/images/generations", body, {"Content-Type": "application/json"})
        made = json.loads(urlopen(request, timeout=WAIT_SECONDS).read())
        print(f"nar serve: {len(made['data'])} picture of {made['size']} with seed {made['seed']}")
    finally:
        server.terminate()
        server.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and use; what fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-train", action="store_true", help="leave `nar train toy` out")
    options = parser.parse_args(arguments)
    print(f"nar {check_version()}")
    with tempfile.TemporaryDirectory() as work:
        built = build(ROOT / "dist", environment(Path(work) / "build"))
        for artifact in built:
            (Path(work) / artifact.name).mkdir()
            use(artifact, Path(work) / artifact.name, train=not options.no_train and artifact.suffix == ".whl")


if __name__ == "__main__":
    main()
