"""What a recipe may say: the data, the tokenizer or model, and its plan, as frozen dataclasses.

Knows keys and their meaning; does not know how anything is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from nar.data.config import DataConfig
from nar.model import Dropout, ModelConfig
from nar.sampling import Sampling
from nar.storage.fields import Length, NotNegative, OneOf, Share
from nar.text import TextEncoderConfig
from nar.tokenizer import TokenizerConfig
from nar.tokenizer.causal import CausalTokenizerConfig
from nar.tokenizer.image import ImageTokenizerConfig
from nar.tokenizer.larp import VideoTokenizerConfig
from nar.tokenizer.multiscale import MultiScaleTokenizerConfig
from nar.training.adversary import AdversaryConfig
from nar.training.codebook import CodebookConfig
from nar.training.edits import EditConfig
from nar.training.plan import Plan
from nar.training.prior import PriorConfig

# Groups with the sizes of a tokenizer to train, the first where no other is given; and all that speak of tokenizers.
_TOKENIZERS = ("tokenizer", "causal_tokenizer", "video_tokenizer", "multiscale_tokenizer")
OF_TOKENIZERS = frozenset((*_TOKENIZERS, "tokenizer_loss", "adversary", "prior", "train_encoder"))
# What only the training of a model reads, groups and keys.
_OF_MODELS = {
    *("model", "text_encoder", "prompts", "equal", "dropout", "condition_dropout", "mixed_context", "classes"),
    *("given_frames", "frame_dropout", "edit", "sampling", "tokenizer_path", "tokenizer_recipe", "tokenizer_overrides"),
    *("data.views", "data.wording", "data.heldout_pairs", "data.heldout_styles", "data.text_features"),
    *("data.composed", "data.num_composed", "data.codes", "data.heldout_codes"),
}


@dataclass(frozen=True)
class TokenizerLossConfig(CodebookConfig):
    """Weights of the parts of a tokenizer's loss; the rest is about its codebook.

    Attributes:
        l1, l2: of the difference of pixels on the -1..1 scale.
        perceptual: of the distance of features, those of EfficientNet-Lite0 or, with `lpips`, LPIPS.
        lpips: a folder with VGG16's weights and LPIPS's, see `nar.metrics.networks.perceptual.load_lpips`.
        codebook, commitment: of the distance between latents and their codes, as it moves one or the other.
        entropy, entropy_diversity, entropy_sharpness: for lfq and bsq, of the entropy of single latents minus
            `entropy_diversity` times that of the mean code, in nats; a bit whose latent is at its entry has log-odds of
            `entropy_sharpness`.
    """

    l1: NotNegative = 0.0
    l2: NotNegative = 1.0
    perceptual: NotNegative = 0.0
    lpips: str = ""
    codebook: NotNegative = 1.0
    commitment: NotNegative = 0.25
    entropy: NotNegative = 0.02
    entropy_diversity: float = 1.0
    entropy_sharpness: float = 4.0


@dataclass(frozen=True)
class Recipe(Plan):
    """A whole training run. `about` says what it makes, on which hardware, in which time, to which number.

    The tokenizer to train is of pictures, unless the sizes of another kind are given: `causal_tokenizer` or
    `video_tokenizer` for clips, `multiscale_tokenizer` for pictures as codes of growing scales.

    A model needs a tokenizer: that in `tokenizer_path`, or the one that comes with `data.codes`, or one that is first
    trained with `tokenizer_recipe` on the same data, in the folder `tokenizer` of the run; `tokenizer_overrides` are
    overrides of that recipe.

    `by_count` has settings for small sets: those of the smallest number that is not below the number of pictures and
    clips come after the rest of the recipe, and before overrides.

    `cuda_recipe` names the recipe that is taken in place of this one where there is a GPU, with the same overrides; it
    is no part of what `base` hands on, as `by_count` is not.

    `init` is a model folder to start from, with its architecture and tokenizer; the grid and the classes may be others.
    `to_diagonal` gives a raster one the order of NAR, see `nar.convert.to_diagonal`; else it keeps its own.
    `lora_rank` above 0 trains low-rank additions to it, which the exported model has merged.

    `equal` makes a model of another order as deep as NAR's of these sizes, or of as many parameters too; see
    `nar.training.models.equal_to_nar`.

    With a `text_encoder` the model learns from captions instead of classes; `prompts` are what its previews show, by
    default captions that are held out. `given_frames` trains frame prediction: how many of its first frames a clip's
    condition may hold, one of these numbers for each sample, and none for a further share of `frame_dropout`.
    `classes` says whether classes are learned; None: where there are neither captions nor given frames.
    `condition_dropout` is the share of samples that learn without class and words, and never drops frames.
    `edit` makes the model fill holes: its condition is the codes of a whole picture or clip with holes in it, all hole
    for what begins from nothing; `init` may then be a model without.
    `mixed_context` shows samples codes of others in place of up to this share of their own, drawn for each sample.

    Attributes:
        task: what is trained.
        train_encoder: of tokenizers; false keeps all codes as they are, and trains what makes pictures of them.
    """

    about: str = ""
    task: Annotated[str, OneOf("tokenizer", "model")] = "model"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    causal_tokenizer: CausalTokenizerConfig | None = None
    video_tokenizer: VideoTokenizerConfig | None = None
    multiscale_tokenizer: MultiScaleTokenizerConfig | None = None
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    init: str = ""
    to_diagonal: bool = False
    train_encoder: bool = True
    tokenizer_path: str = ""
    tokenizer_recipe: str = ""
    tokenizer_overrides: tuple[str, ...] = ()
    by_count: dict[str, Any] = field(default_factory=dict)
    cuda_recipe: str = ""
    lora_rank: Length = 0
    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_classes=1000))
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    prompts: tuple[str, ...] = ()
    equal: Annotated[str, OneOf("", "depth", "parameters")] = ""
    dropout: Dropout = field(default_factory=Dropout)
    condition_dropout: Share = 0.1
    mixed_context: Share = 0.0
    classes: bool | None = None
    given_frames: tuple[Length, ...] = ()
    frame_dropout: Share = 0.0
    edit: EditConfig | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "given_frames", tuple(sorted(self.given_frames)))
        if wrong := [count for count in self.by_count if not count.isdecimal()]:
            raise ValueError(f"by_count has settings for numbers of pictures, such as 1000, not {wrong[0]!r}")
        if self.frame_dropout and 0 not in self.given_frames:
            raise ValueError(f"frame_dropout {self.frame_dropout} needs 0 among given_frames, such as [0, 1, 6]")
        if self.edit and (self.given_frames or self.data.composed or self.data.codes):
            raise ValueError(
                "edit needs pictures to make holes in (data.source, not data.codes), without data.composed; and takes "
                "the place of given_frames: a hole may be what follows some frames"
            )
        if len(named := [name for name in _TOKENIZERS[1:] if getattr(self, name)]) > 1:
            raise ValueError(f"one tokenizer is trained: give {' or '.join(named)}, not both")
        for name in ("lora_rank", "to_diagonal"):
            if getattr(self, name) and not (self.init and self.task == "model"):
                raise ValueError(f"{name} needs init=FOLDER, a model to adapt")
        if self.task == "tokenizer":
            self._check_tokenizer()
        else:
            self._check_model()

    def record(self) -> dict[str, Any]:
        """What a run and its model keep of a recipe, with every size of the model written out."""
        return dataclasses.asdict(self) | {"model": dataclasses.asdict(self.model.complete())}

    @property
    def tokenizer_group(self) -> str:
        """Which of the groups has the sizes of the tokenizer to train."""
        return next((name for name in _TOKENIZERS[1:] if getattr(self, name)), "tokenizer")

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        """The sizes of the tokenizer to train, of whichever kind."""
        return cast(TokenizerConfig, getattr(self, self.tokenizer_group))

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained before the model."""
        given = self.tokenizer_path or self.data.codes or self.init
        return self.task == "model" and bool(self.tokenizer_recipe) and not given

    @property
    def learns_classes(self) -> bool:
        """Whether the model is conditioned on classes."""
        return not (self.text_encoder.source or self.given_frames) if self.classes is None else self.classes

    def refuse_of_models(self, given: Iterable[str]) -> None:
        """Refuse `given` keys that training a tokenizer passes over; a base or a model's data may have them."""
        wrong = next((key for key in given if not _OF_MODELS.isdisjoint((key, key.partition(".")[0]))), "")
        if wrong and self.task == "tokenizer":
            why = ", which sees pictures as data.augment says" if wrong == "data.views" else ""
            fix = "leave it out, or set it for a recipe with task=model"
            raise ValueError(f"{wrong} has no effect on a tokenizer{why}; {fix}")

    def check_null_class(self, config: ModelConfig) -> None:
        """Refuse to drop classes where a model of this config has no embedding for none."""
        words = bool(self.text_encoder.source)  # then some samples learn without their class, whatever the rate
        if self.learns_classes and not config.null_class and (self.condition_dropout or words):
            fix = "classes=false" if words else "condition_dropout=0"
            raise ValueError(
                f"model.null_class is false, so classes can't be dropped (condition_dropout {self.condition_dropout}); "
                f"set it to true, or {fix}"
            )

    def _check_model(self) -> None:
        """Refuse settings that the training of a model would pass over."""
        for known in dataclasses.fields(Recipe):
            default = known.default if known.default_factory is dataclasses.MISSING else known.default_factory()
            if known.name in OF_TOKENIZERS and getattr(self, known.name) != default:
                raise ValueError(
                    f"{known.name} has no effect on a model; set it for a recipe with task=tokenizer, and give what "
                    "that trains as tokenizer_path"
                )
        if not self.init:
            self.check_null_class(self.model)
        data = self.data
        for name in ("augment", "shift"):
            if getattr(data, name) != getattr(DataConfig, name):
                raise ValueError(f"data.{name} is for tokenizers: models learn the codes of data.views")
        if data.windows == "random":
            raise ValueError("data.windows=random is for tokenizers: codes are made once; take all, or centre")

    def _check_tokenizer(self) -> None:
        """Refuse settings that the training of a tokenizer would pass over."""
        if self.engine.parallel == "fsdp":
            raise ValueError("tokenizers are small: they train with engine.parallel=ddp or none, not fsdp")
        for name in ("compile", "activation_checkpointing"):
            if getattr(self.engine, name):
                raise ValueError(f"engine.{name} has no effect on tokenizers, which have no blocks; set it to false")
        group, unset = self.tokenizer_group, dataclasses.asdict(ImageTokenizerConfig())
        own = dataclasses.asdict(self.tokenizer)
        changed = [f"tokenizer.{name}" for name, value in own.items() if value != unset[name]]
        if changed and group != "tokenizer":
            raise ValueError(
                f"{', '.join(changed)} would have no effect: this recipe trains the {group}; set its sizes as "
                f"{group}.vocab_size and so on"
            )
        if self.multiscale_tokenizer and self.prior.weight:
            raise ValueError("prior.weight has no effect on multiscale_tokenizer, whose codes add up; set it to 0")
        kind = getattr(self.tokenizer_config, "quantizer", "multiscale" if self.multiscale_tokenizer else "vq")
        for name in ("kmeans_steps", "codebook_decay"):
            if kind != "vq" and (value := getattr(self.tokenizer_loss, name)):
                of_vq = f"tokenizer_loss.{name} {value} is of quantizer vq"
                reason = "adds codes up" if kind == "multiscale" else "is fixed"
                raise ValueError(f"{of_vq}: the codebook of {kind} {reason}; set it to 0")
