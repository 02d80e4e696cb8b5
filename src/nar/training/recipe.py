"""What a recipe may say: the data, the tokenizer or model, and its plan, as frozen dataclasses.

Knows keys and their meaning; does not know how anything is trained.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from nar.crops import VIEWS
from nar.data.source import Source
from nar.data.sources import open_source
from nar.data.split import held_out
from nar.data.video import Windows
from nar.data.wording import WORDINGS
from nar.model import Dropout, ModelConfig
from nar.sampling import Sampling
from nar.text import TextEncoderConfig
from nar.tokenizer import TokenizerConfig
from nar.tokenizer.causal import CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizerConfig
from nar.tokenizer.video import VideoTokenizerConfig
from nar.training.adversary import AdversaryConfig
from nar.training.codebook import CodebookConfig
from nar.training.loop import Plan
from nar.training.prior import PriorConfig
from nar.training.words import TEXT_FEATURES


@dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    Attributes:
        source: pictures, see `nar.data.sources.open_source`.
        size: pixels a side.
        validation: the split that is held out; "auto" takes the source's own "test" split, or else holds out
            `heldout_share` of the pictures, by `group`.
        label, group: columns of tables; samples of one group are held out together.
        views: of each picture that a model learns codes of: "centre", "flip", "shift" (moved a little in eight
            directions) or "ten-crop"; of clips that are loops also "loop", eight starts and their mirror images.
        augment: what a tokenizer sees of a picture: its centre ("none"), mirrored half of the time ("flip"), or a
            random crop, mirrored half of the time ("crop"). "loop" is for clips that are loops: mirrored, started
            anywhere and played backwards half of the time.
        shift: pixels by which "flip" and "loop" also move a picture or clip at most, either way; its edges are
            repeated.
        num_frames: of a clip; 0 for pictures, or all frames of clips in tables.
        stride: every how many-th frame of a clip is taken.
        frame_rate: frames a second, at which clips are read before that; 0 takes the frames as they are. Strips in
            tables are always taken so; of them it says at what rate the model's clips play.
        windows: where in a longer clip: at the "start", in the "centre", at a "random" place in each step, or "all",
            one sample each.
        wording: what a model with a text encoder reads: the captions ("plain"), or several forms of each, made of
            caption, tags and style ("varied", see `nar.data.wording`).
        heldout_pairs: groups of which one style each is held out, besides the groups that are held out as a whole.
        heldout_styles: styles that are held out whole, for measuring what a model makes of drawings like none it saw.
        text_features: "cached" on disk once, or made "on-the-fly" in each step, where they would be too large.
        composed: share of the samples that are composed scenes ("three cats", "a red car left of a house") of the
            drawings that are learned from; see `nar.data.composed`. For pictures with captions.
        num_composed: how many scenes there are, made at the start of a run.
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
    shift: int = 0
    num_frames: int = 0
    stride: int = 1
    frame_rate: float = 0.0
    windows: str = "centre"
    wording: str = "plain"
    heldout_pairs: int = 0
    heldout_styles: tuple[str, ...] = ()
    text_features: str = "cached"
    composed: float = 0.0
    num_composed: int = 4000
    codes: str = ""
    heldout_codes: str = ""

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"data.views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        if self.augment not in ("none", "flip", "crop", "loop"):
            raise ValueError(f"data.augment must be none, flip, crop or loop, not {self.augment!r}")
        if self.shift and (self.augment not in ("flip", "loop") or not 0 <= self.shift < self.size):
            raise ValueError(
                f"data.shift {self.shift} must be from 0 to {self.size - 1} (data.size), and 0 unless data.augment is "
                "flip or loop"
            )
        if self.wording not in WORDINGS:
            raise ValueError(f"data.wording must be one of {', '.join(WORDINGS)}, not {self.wording!r}")
        if self.text_features not in TEXT_FEATURES:
            raise ValueError(
                f"data.text_features must be one of {', '.join(TEXT_FEATURES)}, not {self.text_features!r}"
            )
        if not 0 <= self.composed < 1 or self.num_composed < 1:
            raise ValueError(
                f"data.composed must be at least 0 and below 1, not {self.composed}, and data.num_composed at least 1, "
                f"not {self.num_composed}"
            )
        Windows(self.num_frames, self.stride, self.frame_rate, self.windows)  # for its checks
        object.__setattr__(self, "heldout_styles", tuple(self.heldout_styles))
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"data.heldout_share must be between 0 and 1, not {self.heldout_share}")

    @property
    def clip_windows(self) -> Windows | None:
        """Which frames of clips are taken; None for pictures, and for clips in tables that are taken whole."""
        return Windows(self.num_frames, self.stride, self.frame_rate, self.windows) if self.num_frames else None

    def open(self) -> tuple[Source, Source]:
        """The pictures to learn from, and those held out."""
        if not self.source:
            raise ValueError("this recipe needs pictures: data.source=FOLDER (or a .parquet or .tar file, or a hub id)")
        opened = partial(
            open_source, self.source, size=self.size, label=self.label, group=self.group, windows=self.clip_windows
        )
        train, split = opened(), "test" if self.validation == "auto" else self.validation
        try:
            return train, opened(split=split)
        except FileNotFoundError:
            if self.validation != "auto":
                raise
        if len(train) < 2:
            raise ValueError(f"{self.source} has {len(train)} pictures; at least two are needed, one to be held out")
        out = held_out(train.groups or train.names, self.heldout_share)
        return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))


@dataclass(frozen=True)
class TokenizerLossConfig(CodebookConfig):
    """Weights of the parts of a tokenizer's loss; the rest is about its codebook.

    Attributes:
        l1, l2: of the difference of pixels on the -1..1 scale.
        perceptual: of the distance of features, those of EfficientNet-Lite0 or, with `lpips`, LPIPS.
        lpips: a folder with VGG16's weights and LPIPS's, see `nar.tokenizer.perceptual.load_lpips`.
        codebook, commitment: of the distance between latents and their codes, as it moves one or the other.
        entropy: for lfq and bsq, of the entropy of single latents minus `entropy_diversity` times that of the mean
            code, in nats; a bit whose latent is at its entry has log-odds of `entropy_sharpness`.
    """

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 0.0
    lpips: str = ""
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.02
    entropy_diversity: float = 1.0
    entropy_sharpness: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1", "l2", "perceptual", "codebook", "commitment", "entropy"):
            if getattr(self, name) < 0:
                raise ValueError(f"tokenizer_loss.{name} must be at least 0, not {getattr(self, name)}")


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

    With a `text_encoder` the model learns from captions instead of classes; `prompts` are what its previews show, by
    default captions that are held out. `given_frames` trains frame prediction: how many of its first frames a clip's
    condition may hold, one of these numbers for each sample, and none for a further share of `frame_dropout`.
    `classes` says whether classes are learned; None: where there are neither captions nor given frames.
    `condition_dropout` is the share of samples that learn without class and words, and never drops frames.
    `mixed_context` shows samples codes of others in place of up to this share of their own, drawn for each sample.
    """

    about: str = ""
    task: str = "model"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    causal_tokenizer: CausalTokenizerConfig | None = None
    video_tokenizer: VideoTokenizerConfig | None = None
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    init: str = ""
    train_encoder: bool = True
    tokenizer_path: str = ""
    tokenizer_recipe: str = ""
    lora_rank: int = 0
    model: ModelConfig = field(default_factory=_open_model)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prompts: tuple[str, ...] = ()
    dropout: Dropout = field(default_factory=Dropout)
    condition_dropout: float = 0.1
    mixed_context: float = 0.0
    classes: bool | None = None
    given_frames: tuple[int, ...] = ()
    frame_dropout: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "given_frames", tuple(sorted(self.given_frames)))
        for name in ("condition_dropout", "frame_dropout", "mixed_context"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")
        if self.frame_dropout and 0 not in self.given_frames:
            raise ValueError(f"frame_dropout {self.frame_dropout} needs 0 among given_frames, such as [0, 1, 6]")
        if self.task not in ("tokenizer", "model"):
            raise ValueError(f"task must be tokenizer or model, not {self.task!r}")
        if self.causal_tokenizer and self.video_tokenizer:
            raise ValueError("one tokenizer is trained: give causal_tokenizer or video_tokenizer, not both")
        if self.lora_rank and not (self.init and self.task == "model"):
            raise ValueError("lora_rank needs init=FOLDER, a model to adapt")
        if self.task == "tokenizer":
            self._check_tokenizer()
        else:
            self._check_model()

    @property
    def tokenizer_group(self) -> str:
        """Which of the groups has the sizes of the tokenizer to train."""
        if self.causal_tokenizer:
            return "causal_tokenizer"
        return "video_tokenizer" if self.video_tokenizer else "tokenizer"

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        """The sizes of the tokenizer to train, of whichever kind."""
        return self.causal_tokenizer or self.video_tokenizer or self.tokenizer

    def _check_model(self) -> None:
        """Refuse settings that the training of a model would pass over."""
        of_tokenizers = (
            "tokenizer", "causal_tokenizer", "video_tokenizer", "tokenizer_loss", "adversary", "prior", "train_encoder"
        )  # fmt: skip
        defaults = {field.name: field for field in dataclasses.fields(Recipe)}
        for name in of_tokenizers:
            made = defaults[name].default_factory
            if getattr(self, name) != (defaults[name].default if made is dataclasses.MISSING else made()):
                raise ValueError(
                    f"{name} has no effect on a model; set it for the tokenizer's own recipe "
                    f"({self.tokenizer_recipe or 'task=tokenizer'}), and give what that trains as tokenizer_path"
                )
        data = self.data
        for name in ("augment", "shift"):
            if getattr(data, name) != getattr(DataConfig, name):
                raise ValueError(f"data.{name} is for tokenizers: models learn the codes of data.views")
        if data.windows == "random":
            raise ValueError(
                "data.windows=random is for tokenizers: codes are made once; take all, or centre, for a model"
            )

    def _check_tokenizer(self) -> None:
        """Refuse settings that the training of a tokenizer would pass over."""
        if self.engine.parallel == "fsdp":
            raise ValueError("tokenizers are small: they train with engine.parallel=ddp or none, not fsdp")
        for name in ("compile", "activation_checkpointing"):
            if getattr(self.engine, name):
                raise ValueError(f"engine.{name} has no effect on tokenizers, which have no blocks; set it to false")
        group, unset = self.tokenizer_group, ImageTokenizerConfig()
        changed = [
            f"tokenizer.{field.name}"
            for field in dataclasses.fields(unset)
            if getattr(self.tokenizer, field.name) != getattr(unset, field.name)
        ]
        if changed and group != "tokenizer":
            raise ValueError(
                f"{', '.join(changed)} would have no effect: this recipe trains the {group}; set its sizes as "
                f"{group}.vocab_size and so on"
            )
        kind = getattr(self.tokenizer_config, "quantizer", "vq")
        for name in ("kmeans_steps", "codebook_decay"):
            if kind != "vq" and getattr(self.tokenizer_loss, name):
                raise ValueError(
                    f"tokenizer_loss.{name} {getattr(self.tokenizer_loss, name)} is of quantizer vq: the codebook of "
                    f"{kind} is fixed; set it to 0"
                )
