"""A model on disk: a folder with `config.json` and `model.safetensors`, read strictly and written atomically.

Knows files and names of tensors; does not know what kind of model they belong to.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nar.storage import files
from nar.storage.fields import Length, Positive, from_dict, suggestion
from nar.storage.files import atomically, read_json, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
BUNDLED = Path(__file__).parents[1] / "bundled"


class _Floating:
    def allows(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point

    def allowed(self) -> str:
        return "one of floating-point numbers"


Floating = Annotated[torch.dtype, _Floating()]  # what weights are kept in


@dataclass(frozen=True)
class _Sections:
    """What `config.json` has beside what only one kind of model knows; whoever reads a section checks what is in it."""

    kind: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    given_frames: tuple[Length, ...] = ()
    frame_rate: Positive | None = None
    converted_from: str | None = None


def write_folder(
    folder: str | Path,
    config: dict[str, Any],
    state: dict[str, Tensor] | Callable[[Path], None],
    *,
    parts: dict[str, Path] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, all or nothing; a model folder that is there is replaced whole.

    `state` may be what writes the weights' file, given its path. `parts` maps a subfolder's name to a model folder to
    copy into it, `texts` the path of a further file to what is in it.

    Raises:
        ValueError: the target holds something else than a model, or a tokenizer that would be lost.
    """
    target = Path(folder)
    check_replaceable(target)
    if (target / "tokenizer").is_dir() and "tokenizer" not in (parts or {}):
        raise ValueError(f"{target} holds a tokenizer, which would be lost; give it too, or choose another folder")

    def write(staged: Path) -> None:
        staged.mkdir()
        write_json(staged / CONFIG, config, indent=2)
        if callable(state):
            state(staged / WEIGHTS)
        else:
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, staged / WEIGHTS)
        (staged / WEIGHTS).chmod(0o644)
        for name, source in (parts or {}).items():
            shutil.copytree(source, staged / name)
        for name, text in (texts or {}).items():
            files.write_text(staged / name, text)

    atomically(target, write, replace_folder=True)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where a model can't be written without losing something that is no model."""
    is_model = (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()
    if folder.exists() and not is_model and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a model folder; choose another folder")


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a bundled name, a local folder, or a hub id such as `someone/nar-l`, which is downloaded.

    A `Path` is a local folder and nothing else. `revision` is a branch, tag or commit of a hub id, and may also stand
    behind it: `someone/nar-l@v1`. What was downloaded before is found again without a network.

    Raises:
        FileNotFoundError: none of these, or not to be had; it says why.
        ValueError: two revisions, or one of what is no hub id.
    """
    name, path, bundled = str(source), Path(source).expanduser(), bundled_names()
    is_path = isinstance(source, Path)
    is_bundled = not is_path and name.removesuffix("/tokenizer") in bundled and (BUNDLED / name / CONFIG).is_file()
    if is_bundled or is_path or Path(name).exists() or name.startswith((".", "/", "~")):
        folder = BUNDLED / name if is_bundled else path
        read_config(folder)
        if revision is not None:
            raise ValueError(f"{name} is no hub id: leave revision {revision!r} out")
        return folder
    repository, _, behind = name.partition("@")
    if behind and revision not in (None, behind):
        raise ValueError(f"{name} names revision {behind!r}, and {revision!r} was asked for: give one")
    if repository.count("/") == 1:
        return _downloaded(repository, behind or revision)
    hint = f"{suggestion(name, bundled)}; bundled: {', '.join(bundled)}"
    raise FileNotFoundError(f"no model {name!r}{hint}; or give a model folder or a hub id")


def _downloaded(repository: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    reasons = {  # in this order: the first two are kinds of others
        errors.RevisionNotFoundError: f"the hub has no revision {revision!r} of it",
        errors.RepositoryNotFoundError: "the hub has none of that name that you may read (`hf auth login`)",
        errors.LocalEntryNotFoundError: f"{revision or 'it'} was not downloaded before, and the hub can't be reached",
    }
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        otherwise = f"it can't be had from the hub ({type(error).__name__})"
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), otherwise)
        raise FileNotFoundError(f"no folder {repository!r} here, and {reason}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a model folder.

    Raises:
        FileNotFoundError: the folder or its config is missing.
        ValueError: the file is not a JSON object, or a section is of the wrong type.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        hint = "published checkpoints become one with `nar convert`"
        raise FileNotFoundError(f"{Path(folder)} is not a model folder: it has no {CONFIG}; {hint}")
    config: dict[str, Any] = read_json(path)
    from_dict(_Sections, {part.name: config[part.name] for part in fields(_Sections) if part.name in config}, path)
    return config


class Weights:
    """The tensors of a model folder, each read when asked for: what was read before need not stay in memory.

    Attributes:
        shapes: by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = _weights_file(folder)
        with self.opened() as file:
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def copy(self, name: str, into: Tensor) -> None:
        """Copy one tensor into another. The file is opened for it alone: pages that were read through a file count as
        this process's memory for as long as it is open."""
        with self.opened() as file:
            into.copy_(self.checked(name, file.get_tensor(name)))

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as it is; raises ValueError where numbers in it are none."""
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN where one is
            if not torch.isfinite(high - low):
                raise ValueError(f"{self._path} holds NaN or infinity in {name}; the file is damaged, copy it again")
        return tensor

    def opened(self) -> Any:
        """The open file, a context."""
        try:
            return safe_open(self._path, "pt")
        except SafetensorError as error:
            what = f"{self._path} is truncated or not a safetensors file ({error})"
            raise ValueError(f"{what}; copy it again, or use `nar convert` on it") from error


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made in this context are on the meta device: they have shapes, but no values.

    `torch.device("meta")` alone imports 800 modules (75 MB) to draw random numbers that nobody sees.
    """
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read `model.safetensors` of a model folder; raises ValueError if it is truncated or of another format.

    Tensors are mapped from the file, but on Windows, where a mapped file can't be replaced.
    """
    weights, copied = Weights(folder), sys.platform == "win32"
    with weights.opened() as file:
        read = {name: weights.checked(name, file.get_tensor(name)) for name in weights.shapes}
        return {name: tensor.clone() for name, tensor in read.items()} if copied else read


def model_digest(folder: str | Path) -> str:
    """SHA-256 of a model folder's weights: what names a tokenizer in the codes that it made."""
    return files.digest(_weights_file(folder))


def _weights_file(folder: str | Path) -> Path:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the model folder is incomplete, copy it again")
    return path


def load_state(module: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Load `state` into `module` strictly: same names, same shapes; the module's dtype is kept.

    Raises:
        ValueError: names the tensors that are missing, left over, or of another shape.
    """
    check_shapes(module, {name: tuple(tensor.shape) for name, tensor in state.items()}, origin)
    module.load_state_dict(state, assign=next(iter(module.state_dict().values())).device.type == "meta")


def check_shapes(module: nn.Module, found: Mapping[str, tuple[int, ...]], origin: str | Path) -> None:
    """Raise a ValueError that names what is missing, left over, or of another shape than `module` has it."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    other = [name for name in sorted(own.keys() & found.keys()) if own[name] != found[name]]
    groups = {
        "missing": sorted(own.keys() - found.keys()),
        "not part of this model": sorted(found.keys() - own.keys()),
        "wrong shape": [f"{name} is {found[name]}, the model needs {own[name]}" for name in other],
    }
    problems = [
        f"{label}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for label, names in groups.items()
        if names
    ]
    if problems:
        raise ValueError(f"the weights in {origin} do not fit this model; {'; '.join(problems)}")
