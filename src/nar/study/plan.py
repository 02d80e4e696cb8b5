"""What a study file says: question, arms, seeds, budget, predictions, and how models are judged.

Knows study files, recipes and what training costs; does not train, sample or judge. A prediction is one line, such as
`bits_per_token of nar < raster + 0.02` or `steps of nar < 20`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch

from nar.bench import work
from nar.model import ModelConfig, Transformer
from nar.pipeline.continuation import prefix_grid
from nar.pipeline.requests import HEADS
from nar.sampling import Sampling
from nar.storage.config import load
from nar.storage.fields import Length, NotNegative, OneOf, Range, Seed, Size, check, from_dict, suggestion
from nar.storage.folder import without_weights
from nar.tokenizer import Tokenizer
from nar.training.models import equal_to_nar
from nar.training.recipe import Recipe
from nar.training.tasks import read_recipe

STUDY = "study.json"  # a copy of the study in its folder
METRICS = {  # what is measured, and what tables call it
    "bits_per_token": "bits per token",
    "independence_cost": "of which independence costs",
    **{score: score for score in ("FD", "KID", "precision", "recall", "coverage")},
    "steps": "steps",
    "latency_seconds": "seconds, smallest batch",
    "images_per_second": "pictures a second, largest batch",
    "num_images": "pictures learned from",
    "training_flops": "training FLOPs",
    "num_parameters": "parameters",
    "guidance_scale": "guidance",
}
_GIVEN = re.compile(r"(bits_per_token|independence_cost)_given_(\d+)")  # of clips, after so many context frames
_PREDICTION = re.compile(r"(.+?) of (\S+) ([<>]) (\S+)(?: ([+-]) (\S+))?")
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Arm:
    """One of what is compared.

    Attributes:
        settings: of its training, key=value, over those of the study.
        flops_of: another arm: as many pictures are learned as cost what training that one costs.
        of: another arm: its models are judged with other `heads` or `sampling`, and none is trained.
        heads: which head decides where several predict.
        sampling: settings of sampling, key=value; with a `guidance_scale` none is searched.
    """

    settings: tuple[str, ...] = ()
    flops_of: str = ""
    of: str = ""
    heads: Annotated[str, OneOf(*HEADS)] = "mean"
    sampling: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if self.of and (self.settings or self.flops_of):
            raise ValueError(f"of {self.of} judges that arm's models: leave settings and flops_of out")


@dataclass(frozen=True)
class Judging:
    """How models are judged, on held-out pictures or clips in two halves: guidance is chosen on the first alone.

    Attributes:
        number: held-out samples at most, in both halves.
        num_sampled: of each model, compared with the second half; 0 leaves scores of pictures out.
        guidance: the least and the largest scale of a golden-section search, once an arm; empty keeps the recipe's.
        tuning_steps, tuning_number: settings that the search tries, and samples of each.
        independence: whether to measure what sampling a front independently costs, a minute or two a model.
        batch_sizes: of latency (the first) and throughput (the last); empty leaves both out.
        repetitions: of each timing.
        seed: of the halves and of sampling: all arms and seeds are sampled with the same random numbers.
    """

    number: Annotated[int, Range(8, 2**20)] = 10_000
    num_sampled: Length = 5_000
    guidance: tuple[NotNegative, ...] = ()
    tuning_steps: Annotated[int, Range(3, 1000)] = 6
    tuning_number: Annotated[int, Range(8, 2**20)] = 1_000
    independence: bool = True
    batch_sizes: tuple[Size, ...] = (1, 32)
    repetitions: Size = 3
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self, "judging.")
        if self.guidance and (len(self.guidance) != 2 or self.guidance[0] >= self.guidance[1]):
            raise ValueError(f"judging.guidance must be two rising scales, such as [1, 4], not {list(self.guidance)}")
        if self.num_sampled == 1:
            raise ValueError("judging.num_sampled 1 is too few to compare; 0 leaves scores of pictures out")


@dataclass(frozen=True)
class Study:
    """A comparison: its arms are trained with the same recipe, seeds and budget, and judged alike.

    Attributes:
        question, cost: for readers: what is asked, and what it takes to answer.
        recipe: of all arms.
        run: the folder of the study.
        data: of the recipe, in place of its own `data.source`.
        settings: overrides of the recipe, key=value.
        tokenizer: overrides of the recipe of the tokenizer, where one is trained first, once for all arms.
        arms: settings of each arm by its name, see `Arm`.
        baseline: the arm that the others are compared with; the first one.
        seeds: of every arm.
        num_images, training_flops: the budget of an arm, one of them; 0 takes the recipe's length. See
            `training_flops`.
        sweep: values of settings by key, tried with the first seed of each arm; the least held-out loss chooses.
        expect: predictions.
        judging: how models are judged.
    """

    question: str = ""
    cost: str = ""
    recipe: str = ""
    run: str = ""
    data: str = ""
    settings: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()
    arms: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    num_images: Annotated[int, Range(0, 10**12)] = 0
    training_flops: NotNegative = 0.0
    sweep: dict[str, Any] = field(default_factory=dict)
    expect: tuple[str, ...] = ()
    judging: Judging = field(default_factory=Judging)

    def __post_init__(self) -> None:
        check(self)
        if not self.recipe or not self.arms or not self.seeds:
            raise ValueError("a study needs a recipe, arms and seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must differ: two trainings with one seed are the same")
        if self.num_images and self.training_flops:
            raise ValueError("a budget is num_images or training_flops, not both")
        if wrong := [name for name in self.arms if not _NAME.fullmatch(name)]:
            raise ValueError(f"the name of an arm must be letters, digits, _, ., + and -, not {wrong[0]!r}")
        if wrong := [key for key, values in self.sweep.items() if not isinstance(values, list) or not values]:
            raise ValueError(f"sweep: {wrong[0]} must have a list of values")
        arms = self.all_arms
        for name, arm in arms.items():
            for role, other in (("of", arm.of), ("flops_of", arm.flops_of)):
                if other and (other == name or other not in arms or arms[other].of or arms[other].flops_of):
                    raise ValueError(f"arm {name}: {role} must name another arm that is trained for its own budget")
        if self.baseline and self.baseline not in arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm{suggestion(self.baseline, arms)}")
        _ = self.predictions

    @cached_property
    def all_arms(self) -> dict[str, Arm]:
        """The arms by name, the baseline first."""
        arms = {name: from_dict(Arm, values or {}, f"arm {name}", text=True) for name, values in self.arms.items()}
        return {self.baseline: arms[self.baseline], **arms} if self.baseline in arms else arms

    @cached_property
    def predictions(self) -> list[Prediction]:
        """What is expected."""
        return [Prediction.of(text, self.all_arms) for text in self.expect]

    def recipe_of(self, arm: str, further: Sequence[str] = (), tokenizer: Tokenizer | None = None) -> Recipe:
        """The recipe of an arm with further overrides; with the tokenizer, for as long as the budget is."""
        return read_recipe(self.recipe, [*self.overrides(arm, tokenizer), *further])

    def overrides(self, arm: str, tokenizer: Tokenizer | None = None) -> list[str]:
        """What an arm changes of the recipe; with the tokenizer its length too, where the budget is in FLOPs."""
        chosen, data = self.all_arms[arm], [f"data.source={self.data}"] if self.data else []
        length = [f"num_images={self.num_images}"] if self.num_images else []
        overrides = [*data, *self.settings, *length, *chosen.settings]
        if tokenizer is None or not (chosen.flops_of or self.training_flops):
            return overrides
        recipe, flops = read_recipe(self.recipe, overrides), self.training_flops
        if chosen.flops_of:
            other = self.recipe_of(chosen.flops_of, tokenizer=tokenizer)
            if not other.num_images:
                raise ValueError(f"flops_of {chosen.flops_of}: its length must be known in pictures; set num_images")
            flops = other.num_images * training_flops(model_config(other, tokenizer))
        steps = round(flops / training_flops(model_config(recipe, tokenizer)) / recipe.batch_size)
        return [*overrides, f"num_images={max(1, steps) * recipe.batch_size}"]


@dataclass(frozen=True)
class Kept(Study):
    """A study as its folder keeps it, with the digests of the logs that belong to it; any do where there are none."""

    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """That a metric of an arm is below (or above) that of another arm, or a number, plus a margin."""

    text: str
    metric: str
    arm: str
    below: bool
    other: str | float
    margin: float = 0.0

    @classmethod
    def of(cls, text: str, arms: Sequence[str] | dict[str, Arm]) -> Prediction:
        """Read a line; raises ValueError for what is none, or names no arm or metric."""
        found = _PREDICTION.fullmatch(" ".join(text.split()))
        if found is None:
            raise ValueError(
                f"expect: {text!r} must be `METRIC of ARM < ARM`, or > or a number on the right, and maybe + NUMBER"
            )
        metric, arm, sign, right, plus, by = found.groups()
        other: str | float = right if right in arms else _number(right, text, arms)
        if kind_of(metric) not in METRICS:
            raise ValueError(
                f"expect: {text!r} names no metric {metric!r}{suggestion(metric, METRICS)}; there are "
                f"{', '.join(METRICS)}, and of clips bits_per_token_given_N after N frames"
            )
        if arm not in arms:
            raise ValueError(f"expect: {text!r} names no arm {arm!r}{suggestion(arm, arms)}")
        margin = _number(by, text, ()) * (-1 if plus == "-" else 1) if by else 0.0
        return cls(text, metric, arm, sign == "<", other, margin)


def kind_of(metric: str) -> str:
    """The metric without the number of context frames that it is measured after."""
    return _GIVEN.sub(r"\1", metric)


def title(metric: str) -> str:
    """What tables call a metric."""
    after = _GIVEN.fullmatch(metric)
    return METRICS.get(kind_of(metric), metric) + (f", after {after[2]} frames" if after else "")


def read_study(path: str, overrides: Sequence[str] = ()) -> Study:
    """Read a study file with `key=value` overrides; raises ValueError where an arm's recipe is none."""
    study = load(Study, path, overrides)
    for name, arm in study.all_arms.items():
        if not arm.of:
            study.recipe_of(name)
    return study


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The sizes of the model that a recipe trains on codes of a tokenizer, without its data: how many classes there are
    and how wide the features of words, which the cost of training does not depend on, are stand-ins."""
    grid, text = recipe.model.grid, bool(recipe.text_encoder.source)
    if len(tokenizer.pixel_axes) == 2:
        with torch.inference_mode():
            grid = tuple(tokenizer.encode(torch.zeros(1, 3, recipe.data.size, recipe.data.size)).shape[1:])
    sizes: dict[str, Any] = {"grid": grid, "vocab_size": tokenizer.config.vocab_size}
    sizes |= {"num_classes": int(recipe.learns_classes), "text_dim": int(text)}
    if text and recipe.text_encoder.max_length:
        sizes["text_length"] = recipe.text_encoder.max_length
    if recipe.given_frames:
        sizes["prefix_grid"] = prefix_grid(tokenizer, grid, recipe.given_frames)
    if recipe.edit:
        sizes |= {"prefix_grid": grid, "prefix_holes": "token", "prefix_attention": "full"}
    return equal_to_nar(dataclasses.replace(recipe.model, **sizes), recipe.equal)


def training_flops(config: ModelConfig) -> int:
    """Operations that learning from one picture takes: three times the forward pass, two for each multiplication.

    Counted are the products with weights, and attention over what each token sees; a backward pass is two forward ones.
    Not counted are embeddings, norms, and what is computed again to save memory.
    """
    with without_weights():
        return 3 * 2 * work(Transformer(config), Sampling()).products


def _number(text: str, line: str, arms: Sequence[str] | dict[str, Arm]) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expect: {line!r} has {text!r}, no arm{suggestion(text, arms)} or number") from None
