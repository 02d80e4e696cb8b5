"""A pipeline's model on disk and on devices: read from a folder, moved, written with its tokenizer, uploaded.

Knows model folders and packed weights; does not know conditions or sampling.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nar.model import Transformer
from nar.pipeline.card import CARD, card, for_diffusers
from nar.pipeline.formats import AUTO, Choice, choose
from nar.precision import PackedLinear, convert, usable_device
from nar.sampling import Sampling
from nar.storage.fields import checked, from_dict
from nar.storage.folder import CONFIG, Floating, find_model, read_config, read_weights, write_folder
from nar.storage.text import read_text
from nar.text import TextEncoder, TextEncoderConfig
from nar.tokenizer import load_tokenizer


def read(
    source: str | Path,
    device: torch.device | str | None,
    dtype: str,
    text_encoder: str | Path | None,
    revision: str | None,
) -> tuple[Path, dict[str, Any], Choice | None]:
    """The folder of a model, the arguments of the pipeline that it makes, and the choice where `dtype` is "auto"; see
    `Pipeline.from_pretrained`."""
    folder = find_model(source, revision)
    config = read_config(folder)
    if config.get("kind") == "transformer" and not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{folder} has no tokenizer to make pictures with; copy a converted one to {folder / 'tokenizer'}, "
            "or convert the model again with --tokenizer FOLDER"
        )
    usable_device(device)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    choice = None
    if dtype == AUTO:
        model, choice = choose(folder, place)
    else:
        model = Transformer.from_pretrained(folder, dtype, place)
    if text_encoder and not model.config.text_dim:
        raise ValueError(f"{source} reads no words: leave the text encoder out")
    # Features of published models are those of cleaned captions; only they keep a caption's padding when it drops.
    text = {"source": "", "max_length": model.config.text_length, "clean": model.config.null_mask == "caption"}
    text |= config.get("text_encoder", {}) | ({"source": str(text_encoder)} if text_encoder else {})
    parts = {
        "model": model,
        "tokenizer": load_tokenizer(folder / "tokenizer").to(place),
        "class_names": config.get("class_names", ()),
        "sampling": from_dict(Sampling, config.get("sampling", {}), folder / CONFIG),
        "text": from_dict(TextEncoderConfig, text, folder / CONFIG) if model.config.text_dim else None,
        "given_frames": config.get("given_frames", ()),
        "frame_rate": config.get("frame_rate"),
    }
    return folder, parts, choice


def format_facts(model: Transformer, choice: Choice | None) -> dict[str, Any]:
    """What reports say of a model's number format, and why where it was chosen by measurement."""
    return {"dtype": number_format(model), **({"dtype_choice": dataclasses.asdict(choice)} if choice else {})}


def number_format(model: Transformer) -> str:
    """The name of the number format of a model's weights, packed ones too."""
    packed = next((layer.precision for layer in model.modules() if isinstance(layer, PackedLinear)), None)
    return packed or str(model.dtype).removeprefix("torch.")


def moved(model: Transformer, device: torch.device, dtype: str, source: Path | None, *, shared: bool) -> Transformer:
    """The model on a device in a number format, a copy where its weights are `shared`; what is packed is read again
    from `source`, the folder it came from.

    Raises:
        ValueError: a format that the device has no kernels for, or a packed model that came from no folder.
    """
    if _is_packed(model):
        model, grid, row = Transformer.from_pretrained(_needed(source), dtype, device), model.config.grid, model.row
        return model.at_grid(grid).decided_by(row)
    model = copy.deepcopy(model) if shared else model
    if dtype in ("float32", "bfloat16"):
        return model.to(device, getattr(torch, dtype))
    return convert(model, dtype, device)


@checked
def save(
    self: Any,
    folder: str | Path,
    *,
    dtype: Floating | None = None,
    license: str | None = None,
    diffusers: bool = False,
) -> None:
    """Write the pipeline as a model folder, which `from_pretrained` and every verb of the command take.

    Weights are written as they are, those of a model packed for a CPU as in the folder that it was read from;
    `dtype` converts them. A model folder that is there is replaced whole. The text encoder is named and not copied.
    README.md is a card for the hub, with the `license` (a name of the hub's, such as "apache-2.0"): the one of the
    folder that the model was read from, where that has one. With `diffusers` the folder also loads there, by
    `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`.

    Raises:
        ValueError: the folder holds something else, one head decides alone, or the model is packed and was not read
            from a folder.
    """
    model, source = self.model, self.folder
    if model.row is not None:
        raise ValueError("one head decides here, which a folder does not record: save pipe.with_heads('mean')")
    text = self.text.config if isinstance(self.text, TextEncoder) else self.text
    state = read_weights(_needed(source)) if _is_packed(model) else model.state_dict()
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    known = read_config(source) if source else {}
    if known.get("model", {}).get("grid") != list(model.config.grid):
        known.get("training", {}).pop("heldout", None)  # results of another grid
    config = known | {
        "kind": "transformer",
        "model": dataclasses.asdict(model.config),
        "class_names": list(self.class_names),
        "sampling": dataclasses.asdict(self.sampling),
        **({"text_encoder": dataclasses.asdict(text)} if text is not None else {}),
        **({"given_frames": list(self.continuation.counts)} if any(self.continuation.counts) else {}),
        **({"frame_rate": self._trained_rate} if self._trained_rate else {}),
    }
    written = read_text(source / CARD) if source and (source / CARD).is_file() else ""
    about = card(Path(folder).name, config, self.described(), written, license=license, diffusers=diffusers)
    texts = {CARD: about} | (for_diffusers() if diffusers else {})
    with TemporaryDirectory() as work:
        self.tokenizer.save_pretrained(Path(work) / "tokenizer")
        write_folder(folder, config, state, parts={"tokenizer": Path(work) / "tokenizer"}, texts=texts)


@checked
def upload(self: Any, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any) -> str:
    """Save the pipeline to a repository of the Hugging Face hub, made if it is not there; returns its address.

    `options` are those of `save_pretrained`. A card that is there stays: people write them on the hub.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as work:
        folder = Path(work) / repo_id.rpartition("/")[2]
        self.save_pretrained(folder, **options)
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        kept = [CARD] if api.file_exists(repo_id, CARD) else None
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model", ignore_patterns=kept)
    return str(address)


def _is_packed(model: Transformer) -> bool:
    return any(isinstance(layer, PackedLinear) for layer in model.modules())


def _needed(source: Path | None) -> Path:
    if source is None:
        advice = "load it again with Pipeline.from_pretrained(FOLDER, device=..., dtype=...)"
        raise ValueError(f"this model is packed for a CPU, and was read from no folder: {advice}")
    return source
