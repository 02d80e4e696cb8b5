"""The files of a model folder that are for others: a card for people and the hub, and what diffusers loads it by.

Knows `config.json`, names of the hub and of diffusers; does not know weights, and imports neither.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
_TRIED = "0.42.1"  # of diffusers
# No import statement: from those diffusers concludes that `pip install nar` is missing, which is another package.
_STUB = '''"""{what} The package nar-gen does all the work (pip install nar-gen): this file only names it."""

import importlib

try:
    {name} = importlib.import_module("nar.pipeline.for_diffusers").{name}
except ImportError as error:
    raise ImportError("this model needs: pip install --upgrade nar-gen diffusers") from error
'''
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_ELSEWHERE = re.compile(r"!?\[([^]]*)\]\(\.\.?/[^)]*\)")  # a link to what is beside a folder, and not in it


def for_diffusers() -> dict[str, str]:
    """The texts, by path, with which `DiffusionPipeline.from_pretrained` loads a model folder."""
    index = {
        "_class_name": ["pipeline", "NARPipeline"],
        "_diffusers_version": _TRIED,
        "tokenizer": ["loader", "Loader"],
    }
    return {
        "model_index.json": json.dumps(index, indent=2) + "\n",
        "pipeline.py": _STUB.format(what="This model as a pipeline of diffusers.", name="NARPipeline"),
        "tokenizer/loader.py": _STUB.format(what="What loads this model for diffusers.", name="Loader"),
    }


def card(name: str, config: dict[str, Any], makes: str, written: str, *, license: str | None, diffusers: bool) -> str:
    """The model card: metadata for the hub, then what was `written` about the model, else what `config` tells.

    Metadata that were `written` stay as they are, but for `license`, where it is given. `makes` says in a few words
    what is sampled from what.
    """
    found = _FRONT.match(written)
    data = _metadata(name, config, diffusers=diffusers) | (yaml.safe_load(found[1]) or {} if found else {})
    data |= {"license": license} if license else {}
    body = _ELSEWHERE.sub(r"\1", written[found.end() :] if found else written).strip()
    body = body or _body(name, config, makes, data, diffusers=diffusers)
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def _metadata(name: str, config: dict[str, Any], *, diffusers: bool) -> dict[str, Any]:
    model = config["model"]
    kind = "video" if len(model["grid"]) == 3 else "image"
    task = "unconditional-image-generation" if kind == "image" else "image-to-video"
    data: dict[str, Any] = {
        "library_name": "diffusers" if diffusers else "nar",
        "pipeline_tag": f"text-to-{kind}" if model.get("text_dim") else task,
        "tags": ["nar", "autoregressive", f"{kind}-generation"],
    }
    if results := _heldout(config):
        metrics = [{"type": metric, "name": metric.replace("_", " "), "value": value} for metric, value in results]
        source = {"name": f"{_data(config)}, held-out", "type": _data(config)}
        data["model-index"] = [
            {"name": name, "results": [{"task": {"type": data["pipeline_tag"]}, "dataset": source, "metrics": metrics}]}
        ]
    return data


def _heldout(config: dict[str, Any]) -> list[tuple[str, float]]:
    return list(config.get("training", {}).get("heldout", {}).items())


def _data(config: dict[str, Any]) -> str:
    """The name of the data that a model learned from, without the folders above it."""
    return Path(str(config.get("training", {}).get("config", {}).get("data", {}).get("source") or "unknown")).name


def _body(name: str, config: dict[str, Any], makes: str, data: dict[str, Any], *, diffusers: bool) -> str:
    names, training = config.get("class_names", ()), config.get("training", {})
    asked = names[0] if names and not config["model"].get("text_dim") else "a red apple"
    asked = "" if not config["model"].get("num_classes") and not config["model"].get("text_dim") else repr(asked)
    clips = len(config["model"]["grid"]) == 3
    save = 'out.save("clip.gif")' if clips else 'out.save("picture.png")'
    use = (
        f"from nar import Pipeline  # pip install nar-gen\n\nout = Pipeline.from_pretrained(FOLDER)({asked}, seed=0)\n"
    )
    parts = [
        f"# {name}",
        f"A model of [nar](https://arxiv.org/abs/2503.10696): {makes}.",
        f"```python\n{use}{save}\n```",
    ]
    if diffusers:
        loaded = "pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)"
        shown = "frames" if clips else "images"
        use = f"from diffusers import DiffusionPipeline\n\n{loaded}\nresult = pipe({asked}, seed=0).{shown}[0]"
        parts += [f"In diffusers, with the same pixels:\n\n```python\n{use}\n```"]
    if names:
        parts += [f"Classes: {', '.join(names[:40])}{', ...' if len(names) > 40 else ''}."]
    parts += ["## Training"]
    source = f"converted from {config['converted_from']}" if config.get("converted_from") else "not recorded"
    if "images_seen" in training:
        source = f"{training['images_seen']:,} samples of `{_data(config)}`, {training.get('hours', '?')} hours"
    parts += [f"{source[0].upper()}{source[1:]}; `config.json` has all settings that are known."]
    if results := _heldout(config):
        parts += ["| held-out | |\n|---|---|\n" + "\n".join(f"| {k.replace('_', ' ')} | {v:.4g} |" for k, v in results)]
    licence = data.get("license") or "not stated; that of the data counts too"
    return "\n\n".join([*parts, f"## Licence\n\n{licence}"])
