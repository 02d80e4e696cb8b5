"""What a recipe may say: the data, the tokenizer or model, and its plan, as frozen dataclasses.

Knows keys and their meaning; does not know how anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nar.data.sources import (
    VIEWS,
    Source,
    held_out,
    open_source,
)  # fmt: skip
from nar.model import Dropout, ModelConfig
from nar.sampling import Sampling
from nar.tokenizer import TokenizerConfig
from nar.tokenizer.causal import CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizerConfig
from nar.tokenizer.video import VideoTokenizerConfig
from nar.training.adversary import AdversaryConfig
from nar.training.loop import Plan


@dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    Attributes:
        source: pictures, see `nar.data.sources.open_source`.
        size: pixels a side.
        validation: the split that is held out; "auto" takes the source's own "test" split, or else holds out
            `heldout_share` of the pictures, by `group`.
        label, group: columns of tables; samples of one group are held out together.
        views: of each picture that a model learns codes of: "centre", "flip" or "ten-crop".
        augment: what a tokenizer sees of a picture: its centre ("none"), mirrored half of the time ("flip"), or a
            random crop, mirrored half of the time ("crop"). "loop" is for clips that are loops: mirrored, started
            anywhere and played backwards half of the time.
        codes, heldout_codes: folders that `nar extract` has made, in place of `source`; without the second, part of
            the first is held out.
    """

    source: str = ""
    size: int = 256
    validation: str = "auto"
    heldout_share: float = 0.05
    label: str = "label"
    group: str = ""
    views: str = "centre"
    augment: str = "none"
    codes: str = ""
    heldout_codes: str = ""

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"data.views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        if self.augment not in ("none", "flip", "crop", "loop"):
            raise ValueError(f"data.augment must be none, flip, crop or loop, not {self.augment!r}")
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"data.heldout_share must be between 0 and 1, not {self.heldout_share}")

    def open(self) -> tuple[Source, Source]:
        """The pictures to learn from, and those held out."""
        if not self.source:
            raise ValueError("this recipe needs pictures: data.source=FOLDER (or a .parquet or .tar file, or a hub id)")
        train = open_source(self.source, size=self.size, label=self.label, group=self.group)
        split = "test" if self.validation == "auto" else self.validation
        try:
            return train, open_source(self.source, size=self.size, split=split, label=self.label, group=self.group)
        except FileNotFoundError:
            if self.validation != "auto":
                raise
        if len(train) < 2:
            raise ValueError(f"{self.source} has {len(train)} pictures; at least two are needed, one to be held out")
        out = held_out(train.groups or train.names, self.heldout_share)
        return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the tokenizer's loss, and when unused codes are revived.

    `restart_every` steps, codes that were not used since the last time move onto random latents, until `restart_until`
    (a fraction of the training); 0 turns it off.
    """

    l1: float = 0.0
    l2: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    restart_every: int = 0
    restart_until: float = 0.6


def _open_model() -> ModelConfig:
    """A model's defaults with the sizes left open that follow from what a recipe says."""
    config = ModelConfig(num_classes=1000)
    for name, unset in {"hidden_dim": 0, "head_depths": (), "axis_heads": ()}.items():
        object.__setattr__(config, name, unset)
    return config


@dataclass(frozen=True)
class Recipe(Plan):
    """A whole training run. `about` says what it makes, on which hardware, in which time, to which number.

    The tokenizer to train is of pictures, unless the sizes of `causal_tokenizer` or `video_tokenizer` are given.

    A model needs a tokenizer: that in `tokenizer_path`, or the one that comes with `data.codes`, or one that is first
    trained with `tokenizer_recipe` on the same data, in the folder `tokenizer` of the run.

    `init` is a model folder to start from, with its architecture and tokenizer; the grid and the classes may be others.
    `lora_rank` above 0 trains low-rank additions to it, which the exported model has merged.
    """

    about: str = ""
    task: str = "model"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    causal_tokenizer: CausalTokenizerConfig | None = None
    video_tokenizer: VideoTokenizerConfig | None = None
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    init: str = ""
    train_encoder: bool = True
    tokenizer_path: str = ""
    tokenizer_recipe: str = ""
    lora_rank: int = 0
    model: ModelConfig = field(default_factory=_open_model)
    dropout: Dropout = field(default_factory=Dropout)
    condition_dropout: float = 0.1
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in ("tokenizer", "model"):
            raise ValueError(f"task must be tokenizer or model, not {self.task!r}")
        if self.causal_tokenizer and self.video_tokenizer:
            raise ValueError("one tokenizer is trained: give causal_tokenizer or video_tokenizer, not both")
        if self.lora_rank and not (self.init and self.task == "model"):
            raise ValueError("lora_rank needs init=FOLDER, a model to adapt")
        if self.task == "tokenizer" and self.engine.parallel == "fsdp":
            raise ValueError("tokenizers are small: they train with engine.parallel=ddp or none, not fsdp")

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        """The sizes of the tokenizer to train, of whichever kind."""
        return self.causal_tokenizer or self.video_tokenizer or self.tokenizer
