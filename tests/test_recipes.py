"""Recipes: that all of them load, say what they make, and are the published models; and the small ones, run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import shutil
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nar.data.config import SKIN_TONES, DataConfig
from nar.data.open import load_pictures
from nar.data.split import families, held_out
from nar.model import ModelConfig, Transformer
from nar.storage.config import load, recipe_names
from nar.storage.described import described
from nar.storage.folder import find_model, without_weights
from nar.storage.presets import PRESETS
from nar.training import tasks
from nar.training.distributed import joined
from nar.training.models import equal_to_nar
from nar.training.optim import OptimConfig, learning_rate_factor
from nar.training.recipe import Recipe
from nar.training.tasks import read_recipe, run_recipe
from nar.training.tokenizers import TokenizerTask, check_start
from training_runs import equal, nar, recipe, tokenizer_recipe, weights

MINI = Path(__file__).parent / "data" / "emoji-mini.parquet"

PUBLISHED = {
    **{f"c2i-{size}": f"NAR-{size}" for size in ("B", "M", "L", "XL", "XXL")},
    **{f"c2i-{size}-raster": f"LlamaGen-{size}" for size in ("B", "L", "XL", "XXL")},
    "t2i-XL-stage1": "NAR-XL-t2i",
    **{f"c2v-{size}-{kind}": f"NAR-video-{size}" for size in ("L", "LP") for kind in ("paper", "script")},
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_what_it_makes(name: str) -> None:
    recipe = load(Recipe, name)
    assert len(recipe.about) > 60
    assert recipe.run.startswith("runs/")


@pytest.mark.parametrize("name", [name for name in recipe_names() if load(Recipe, name).task == "tokenizer"])
def test_tokenizers_have_the_codes_they_state_and_may_begin_where_they_do(name: str) -> None:
    recipe = load(Recipe, name)
    if stated := re.search(r"(\d+)x(\d+) codes", recipe.about):
        assert recipe.data.size // recipe.tokenizer_config.patch_size == int(stated[1]) == int(stated[2])
    if recipe.init and not recipe.init.startswith("runs/"):  # what others make there
        check_start(recipe, find_model(recipe.init))


@pytest.mark.parametrize(("recipe", "preset"), PUBLISHED.items())
def test_published_models_have_their_sizes(recipe: str, preset: str) -> None:
    model, known = load(Recipe, recipe).model, PRESETS[preset]
    assert model == ModelConfig(**known.config)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(model).parameters()) == known.num_parameters


def test_frame_prediction_and_clips_have_the_sizes_they_state() -> None:
    for name, parameters in (("f2v-LP", 694_769_920), ("clips", None)):
        recipe = load(Recipe, name)
        sizes = {} if parameters else {"vocab_size": 4096, "num_classes": 8, "text_dim": 384, "text_length": 24}
        sizes |= {} if parameters else {"prefix_grid": (2, 8, 8)}
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(recipe.model, **sizes))
        found = sum(parameter.numel() for parameter in model.parameters())
        assert found == parameters if parameters else found < 4.0e6
    assert model.layout.schedule.num_steps == 18


@pytest.mark.parametrize("size", ["B", "M", "L", "XL", "XXL"])
def test_raster_and_par_versions_differ_in_nothing_else(size: str) -> None:
    base = load(Recipe, f"c2i-{size}")
    for version, steps in (("raster", 256), ("par", 67)):
        other = load(Recipe, f"c2i-{size}-{version}")
        with torch.device("meta"):
            assert Transformer(other.model).layout.schedule.num_steps == steps
        for field in ("optim", "dropout", "condition_dropout", "batch_size", "epochs", "ema_decay", "data"):
            assert getattr(other, field) == getattr(base, field)


def test_learning_rates_follow_the_published_curves() -> None:
    image = load(Recipe, "c2i-B").optim
    assert [learning_rate_factor(image, epoch, 300) for epoch in (1, 149, 151, 201, 251)] == pytest.approx(
        [1, 1, 0.2, 0.04, 0.008]
    )
    video = load(Recipe, "c2v-L-script")
    per_epoch = 9537 // video.batch_size
    for step in (1, 4 * per_epoch, 4 * per_epoch + 1, 500 * per_epoch, 1000 * per_epoch):
        warm, end = 4 * per_epoch, 1000 * per_epoch
        expected = (
            0.01 + 0.99 * step / warm
            if step <= warm
            else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (end - warm)))
        )
        made = learning_rate_factor(video.optim, step * video.batch_size, end * video.batch_size)
        assert made == pytest.approx(expected, abs=2e-3)  # the recipe's warm-up is 4 x 9,537 clips, not 4 x 298 x 32


def test_multistep_rates_fall_with_the_published_scheduler() -> None:
    """MultiStepLR, stepped after each of 12 epochs of 10 steps, and of 300 of 7."""
    config = OptimConfig(curve="multistep")
    for epochs, per_epoch in ((12, 10), (300, 7)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        places = [int(epochs * 0.5), int(epochs * 2 / 3), int(epochs * 5 / 6)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, places, gamma=0.2)
        expected = []
        for _ in range(epochs):
            expected += [optimizer.param_groups[0]["lr"]] * per_epoch
            optimizer.step()
            scheduler.step()
        number = len(expected)
        made = [learning_rate_factor(config, (step + 1) * 32, number * 32) for step in range(number)]
        assert made == pytest.approx(expected)


def test_classes_are_not_dropped_without_an_embedding_for_none(tmp_path: Path) -> None:
    """It was accepted, and failed in the first step that dropped a class."""
    with pytest.raises(ValueError, match=r"null_class is false, .* \(condition_dropout 0\.1\); .* condition_dropout=0"):
        load(Recipe, "toy", ["model.null_class=false"])
    with pytest.raises(ValueError, match=r"null_class is false.*or classes=false"):
        load(Recipe, "emoji", ["model.null_class=false", "classes=true", "condition_dropout=0"])
    load(Recipe, "emoji", ["model.null_class=false"])
    own = ["condition_dropout=0", "model.null_class=false", "num_images=32"]
    path = recipe(tmp_path)
    made = run_recipe(str(path), [f"run={tmp_path / 'run'}", *own])
    with pytest.raises(ValueError, match="null_class is false"):
        run_recipe(str(path), [f"run={tmp_path / 'next'}", f"init={made}", "num_images=32"])


def test_unknown_keys_are_answered_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown key 'engine.paralel' in recipe toy \(did you mean 'engine.parallel'"
    ):
        load(Recipe, "toy", ["engine.paralel=ddp"])
    with pytest.raises(ValueError, match=r"engine\.parallel must be one of none, ddp, fsdp, not 'dpp'"):
        load(Recipe, "toy", ["engine.parallel=dpp"])
    (tmp_path / "mine.yaml").write_text("base: toyy\n")
    with pytest.raises(FileNotFoundError, match=r"no recipe 'toyy' \(did you mean 'toy'"):
        load(Recipe, str(tmp_path / "mine.yaml"))
    with pytest.raises(ValueError, match=r"this recipe needs pictures: data\.source=FOLDER"):
        run_recipe("my-pictures", [f"run={tmp_path / 'run'}"])


BSQ = "causal_tokenizer.quantizer=bsq causal_tokenizer.code_dim=12"


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (
            "clips-tokenizer",
            "tokenizer.vocab_size=8192",
            r"tokenizer\.vocab_size would have no effect: .* trains the causal_tokenizer; .*causal_tokenizer\.vocab",
        ),
        ("c2v-larp-tokenizer", "tokenizer.l2_norm=false", r"tokenizer\.l2_norm .* trains the video_tokenizer"),
        ("toy-tokenizer", "engine.compile=true", r"engine\.compile has no effect on tokenizers"),
        ("toy-tokenizer", "engine.activation_checkpointing=true", r"engine\.activation_checkpointing has no effect"),
        ("clips-tokenizer", f"{BSQ} tokenizer_loss.kmeans_steps=3", "kmeans_steps 3 is of quantizer vq: .* of bsq"),
        ("clips-tokenizer", f"{BSQ} tokenizer_loss.codebook_decay=0.9", r"codebook_decay 0\.9 is of quantizer vq"),
        ("toy", "tokenizer.vocab_size=64", r"tokenizer has no effect on a model; .*task=tokenizer.*tokenizer_path"),
        ("fashion", "adversary.weight=0.5", "adversary has no effect on a model"),
        ("fashion", "train_encoder=false", "train_encoder has no effect"),
        ("toy", "data.augment=flip", r"data\.augment is for tokenizers: models learn the codes of data\.views"),
        ("clips", "data.windows=random", r"data\.windows=random is for tokenizers"),
    ],
)
def test_what_would_be_passed_over_is_refused(recipe: str, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Recipe, recipe, given.split())


@pytest.mark.parametrize(
    "given",
    [
        *(
            "data.heldout_styles=[x]",
            "data.heldout_pairs=2",
            "data.composed=0.3",
            "data.wording=varied",
            "data.codes=x",
        ),
        *("condition_dropout=0.5", "mixed_context=0.5", "edit.plain=0.1", "given_frames=[1]", "sampling.top_k=5"),
        *("dropout.token=0.1", "equal=depth", "prompts=[x]", "classes=true", "model.num_layers=4"),
        *("tokenizer_path=fashion/tokenizer", "tokenizer_recipe=fashion-tokenizer", "tokenizer_recipe.epochs=3"),
    ],
)
def test_settings_of_models_are_refused_for_a_tokenizer(given: str) -> None:
    key = re.escape(given.partition("=")[0])
    with pytest.raises(ValueError, match=f"^{key} has no effect on a tokenizer; leave it out"):
        read_recipe("toy-tokenizer", [given])


def test_only_what_is_said_of_a_tokenizer_itself_is_refused(tmp_path: Path) -> None:
    refused = r"data\.views has no effect on a tokenizer, which sees pictures as data\.augment says; leave it out"
    (tmp_path / "flipped.yaml").write_text("base: toy-tokenizer\ndata: {views: flip}\n")
    (tmp_path / "derived.yaml").write_text("base: flipped.yaml\nbatch_size: 32\n")
    for name, given in (
        ("toy-tokenizer", "data.views=flip"),
        (str(tmp_path / "flipped.yaml"), "seed=1"),
        ("toy", "tokenizer_recipe.data.views=flip"),
    ):
        with pytest.raises(ValueError, match=refused):
            read_recipe(name, [given])
    assert read_recipe(str(tmp_path / "derived.yaml")).batch_size == 32
    recipe = read_recipe("toy", ["data.views=flip", "data.wording=varied", "tokenizer_recipe.data.augment=flip"])
    first = tasks._first(recipe, recipe.data.open())
    assert (first.task, first.data.views, first.data.augment) == ("tokenizer", "flip", "flip")


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"my-data"}))
def test_every_recipe_can_be_trained_as_it_is(name: str) -> None:
    assert read_recipe(name).about


def own_folder(folder: Path) -> Path:
    """Pictures of two sizes in two class folders, as people have them."""
    pictures = load_pictures("toy", size=40)
    for index in range(24):
        path = folder / ("cats" if index % 2 else "dogs") / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures.images[index]).resize((90, 70 + index)).save(path)
    return folder


def test_own_pictures_in_one_command(tmp_path: Path) -> None:
    data, run = own_folder(tmp_path / "data"), tmp_path / "run"
    own = "base: my-pictures-tokenizer\nepochs: 0\nnum_images: 64\ndata: {augment: flip, shift: 2}\n"
    (tmp_path / "tokenizer.yaml").write_text(own)
    short = [f"tokenizer_recipe={tmp_path / 'tokenizer.yaml'}", "epochs=0", "num_images=64", "data.size=32"]
    command = ("train", "my-pictures", f"data={data}", f"run={run}", *short)
    assert f"wrote {run / 'model'}" in nar(*command)
    made_with = json.loads((run / "tokenizer" / "model" / "config.json").read_text())["training"]["config"]
    assert (made_with["data"]["augment"], made_with["data"]["shift"]) == ("flip", 2)
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["class_names"] == ["cats", "dogs"]
    assert config["training"]["heldout"]["bits_per_token"] > 0
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert "is finished: nothing was left to do" in nar(*command)
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    nar("sample", run / "model", "--class-label", "cats", "-n", "2", "-o", tmp_path / "out.npz")
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (2, 32, 32, 3)


def short_recipes(folder: Path) -> list[str]:
    """Recipes of a tokenizer and a model that take a second, as overrides; with settings for up to 100 pictures."""
    (folder / "tokenizer.yaml").write_text(
        "base: my-pictures-tokenizer\ndata: {size: 32}\nsteps: 2\ninit: ''\n"
        "tokenizer: {vocab_size: 256, channels: 8, channel_multipliers: [1, 2, 2, 2], pixel_shuffle: 1}\n"
        "optim: {warmup_images: 0}\n"
        "by_count: {100: {tokenizer: {vocab_size: 128}}}\n"
    )
    (folder / "model.yaml").write_text(
        f"base: my-pictures\ntokenizer_recipe: {folder / 'tokenizer.yaml'}\ndata: {{size: 32}}\nepochs: 3\n"
        "model: {dim: 32, num_layers: 1, num_heads: 2, hidden_dim: 64}\noptim: {warmup_images: 0}\n"
        "by_count: {100: {data: {heldout_share: 0.2}, epochs: 1}, 10: {epochs: 2}}\n"
    )
    return [str(folder / "model.yaml"), f"data={own_folder(folder / 'data')}", f"run={folder / 'run'}"]


def test_small_sets_have_settings_of_their_own(tmp_path: Path) -> None:
    name, *given = short_recipes(tmp_path)
    recipe = read_recipe(name, given)
    assert (recipe.epochs, recipe.data.heldout_share) == (1.0, 0.2)
    assert recipe.by_count == {"24": {"data.heldout_share": "0.2", "epochs": "1"}}
    other = read_recipe(name, [*given, "steps=4", "data.heldout_share=0.5"])
    assert (other.steps, other.data.heldout_share, other.by_count) == (4, 0.5, {"24": {}}), "given, so not by count"
    (tmp_path / "more.yaml").write_text("base: model.yaml\nbatch_size: 8\n")
    assert read_recipe(str(tmp_path / "more.yaml"), given).epochs == 3, "what base hands on has no by_count"


@pytest.mark.parametrize(
    ("size", "advice"), [(32, "data.size=64, or tokenizer.pixel_shuffle=2"), (16, "data.size=64"), (64, "")]
)
def test_advice_on_few_codes_suits_the_tokenizer_that_training_begins_with(
    tmp_path: Path, size: int, advice: str
) -> None:
    given = [f"data={own_folder(tmp_path / 'data')}", "steps=1", f"run={tmp_path / 'run'}", f"data.size={size}"]
    with joined("cpu") as workers, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TokenizerTask(read_recipe("my-pictures-tokenizer", given), workers)
        followed = read_recipe("my-pictures-tokenizer", [*given, *filter(None, [advice.partition(", or ")[2]])])
        TokenizerTask(followed, workers)
    said = [str(warning.message) for warning in caught if "codes, one for" in str(warning.message)]
    assert [text.partition("take ")[2] for text in said] == [advice] * (2 if size == 16 else bool(advice))


def test_the_tokenizer_is_set_in_the_same_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, *given = short_recipes(tmp_path)
    advice = ["tokenizer_loss.kmeans_steps=1", "tokenizer_recipe.batch_size=8", "steps=2"]
    with pytest.warns(UserWarning, match=r"only 4x4 codes, .* or tokenizer.channel_multipliers=\[1,2,2\]"):
        assert run_recipe(name, [*given, *advice]) is not None
    config = json.loads((tmp_path / "run/tokenizer/model/config.json").read_text())
    made_with = config["training"]["config"]
    assert (made_with["tokenizer_loss"]["kmeans_steps"], made_with["batch_size"]) == (1, 8)
    assert config["tokenizer"]["vocab_size"] == 128
    said = capfd.readouterr().err
    assert "2 steps of 8; " in said
    assert "(for so many: tokenizer.vocab_size=128)" in said
    with pytest.raises(ValueError, match="no tokenizer is trained, as one is given"):
        read_recipe(name, [*given, *advice, "tokenizer_path=emoji/tokenizer"])
    with pytest.raises(ValueError, match=r"epochs=2 has no effect: no tokenizer is trained, as one is given"):
        read_recipe(name, [*given, "tokenizer_recipe.epochs=2", "init=emoji"])
    with pytest.raises(ValueError, match=r"unknown key 'tokenizer_loss.kmeans_step' in recipe tokenizer"):
        read_recipe(name, [*given, "tokenizer_loss.kmeans_step=1"])


def test_minutes_become_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nar.training.loop.TRIAL_SECONDS", 0.1)
    path, run = tokenizer_recipe(tmp_path, checkpoint_every=1000), tmp_path / "run"
    given = [f"run={run}", "minutes=0.02"]
    folder = run_recipe(str(path), given)
    assert folder is not None
    record = json.loads((folder / "config.json").read_text())["training"]
    steps = record["config"]["steps"]
    assert (record["config"]["num_images"], record["config"]["minutes"]) == (0, 0.02)
    assert record["images_seen"] == steps * record["config"]["batch_size"] > 0
    monkeypatch.setattr("nar.training.tasks.steps_within", lambda *_: 10**6)
    assert run_recipe(str(path), given) == folder, "it is finished, whatever a new trial would find"


def test_steps_and_minutes_exclude_each_other(tmp_path: Path) -> None:
    refused = "of steps=5 and minutes=10 each takes the place of the others; give one of them"
    (tmp_path / "both.yaml").write_text("steps: 5\nminutes: 10\n")
    (tmp_path / "few.yaml").write_text("base: toy\nby_count: {9999: {steps: 5, minutes: 10}}\n")
    for name, given in (("toy", ["steps=5", "minutes=10"]), *((str(path), []) for path in tmp_path.glob("*.yaml"))):
        with pytest.raises(ValueError, match=refused):
            read_recipe(name, given)
    assert read_recipe("toy", ["steps=5", "minutes=0.0"]).steps == 5
    assert read_recipe(str(tmp_path / "few.yaml"), ["minutes=3"]).steps == 0


@pytest.mark.parametrize("given", ["run=", "run= "])
def test_a_run_needs_a_folder(given: str) -> None:
    with pytest.raises(ValueError, match=r"run='.*' is no folder; give one, such as run=runs/mine"):
        read_recipe("toy", [given])


@pytest.mark.parametrize(
    ("given", "minutes"),
    [
        ("tokenizer_path=fashion/tokenizer", [3]),
        ("init=fashion", [3]),
        ("tokenizer_recipe.batch_size=8", [1, 2]),
        ("tokenizer_recipe.epochs=0.1", [3]),
        ("tokenizer_recipe.minutes=0.5", [0.5, 3]),
    ],
)
def test_only_a_tokenizer_without_a_length_shares_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, minutes: list[float]
) -> None:
    measured: list[float] = []
    monkeypatch.setattr(tasks, "steps_within", lambda seconds, *_: measured.append(seconds / 60) or 1)
    name, *overrides = short_recipes(tmp_path)
    assert run_recipe(name, [*overrides, "minutes=3", given]) is not None
    assert measured == pytest.approx(minutes)


def test_a_part_of_a_group_may_count_for_nothing() -> None:
    assert families(["1F44B-1F3FB", "1F44B", "1f44b-1f3ff-200D"], SKIN_TONES) == ["1F44B", "1F44B", "1f44b-200D"]
    assert families(None, SKIN_TONES) is None


def toned(folder: Path) -> tuple[Path, list[str | None]]:
    """The drawings of MINI twice, the second time in skin tones; and their code points."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pq.read_table(MINI)
    codes = table.column("hexcode").to_pylist()
    codes += [code and f"{code}-1F3F{'BCDEF'[row % 5]}" for row, code in enumerate(codes)]
    table = pa.concat_tables([table, table])
    pq.write_table(table.set_column(table.column_names.index("hexcode"), "hexcode", [codes]), folder / "toned.parquet")
    return folder / "toned.parquet", codes


@pytest.mark.parametrize(("recipe", "share"), [("emoji", 0.03), ("emoji-tokenizer", 0.05)])
def test_recipes_hold_out_the_drawings_that_they_always_did(tmp_path: Path, recipe: str, share: float) -> None:
    path, codes = toned(tmp_path)
    # As it was decided by the column's name.
    keys = [
        f"row {row}" if code is None else re.sub(r"-1F3F[B-F]\b", "", code, flags=re.IGNORECASE)
        for row, code in enumerate(codes)
    ]
    loaded = load(Recipe, recipe, [f"data.source={path}"])
    train, out = loaded.data.open()
    expected = held_out(keys, share)
    assert len(set(keys)) < len(set(codes))
    assert train.groups == [key for key, held in zip(keys, expected, strict=True) if not held]
    assert out.groups == [key for key, held in zip(keys, expected, strict=True) if held]


def test_group_without_must_be_an_expression() -> None:
    with pytest.raises(ValueError, match=r"data\.group_without '\(' is no regular expression: missing \)"):
        DataConfig(source="toy", group="kind", group_without="(")


def test_a_run_begun_before_group_without_keeps_its_split(tmp_path: Path) -> None:
    data = {"source": str(toned(tmp_path)[0]), "size": 16, "group": "hexcode"}
    path, run = tokenizer_recipe(tmp_path, data=data), tmp_path / "run"
    run_recipe(str(path), [f"run={run}", "num_images=64", f"data.group_without={SKIN_TONES}"])
    whole = run_recipe(str(path), [f"run={tmp_path / 'whole'}", f"data.group_without={SKIN_TONES}"])
    for record in [*(run / "checkpoints").glob("*/run.json")]:
        kept = json.loads(record.read_text())
        del kept["config"]["data"]["group_without"], kept["digest"]
        record.write_text(json.dumps(kept))
    assert run_recipe(str(path), [f"run={run}", "num_images=128"], override=True)
    assert whole is not None
    assert equal(weights(run), weights(whole.parent))


def test_a_recipe_names_another_for_machines_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tasks, "joined", lambda _: nullcontext())
    monkeypatch.setattr(tasks, "_run", lambda recipe, *_, **__: taken.append(recipe.tokenizer_recipe))
    (tmp_path / "mine.yaml").write_text("base: my-pictures\ntokenizer_recipe: mine\n")
    for name, overrides in (
        ("my-pictures", ()),
        ("my-pictures", ["engine.device=cpu"]),
        (str(tmp_path / "mine.yaml"), ()),
    ):
        run_recipe(name, overrides)
    assert taken == ["my-pictures-cuda-tokenizer", "my-pictures-tokenizer", "mine"]


@pytest.mark.slow
def test_toy_trains_in_a_minute(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    began = time.perf_counter()
    run_recipe("toy", [f"run={tmp_path / 'run'}"])
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s")
    assert seconds < 60


@pytest.mark.parametrize("group", ["", "data", "model", "optim", "engine", "sampling", "tokenizer_loss"])
def test_settings_that_came_after_a_run_began_are_no_change(tmp_path: Path, group: str) -> None:
    """A record without a key, of whichever group, is one of the key's default."""
    path = recipe(tmp_path, num_images=64, checkpoint_every=1)
    run = tmp_path / "run"
    assert run_recipe(str(path), [f"run={run}"]) is not None
    for record in [*run.rglob("run.json"), run / "model" / "config.json"]:
        written = json.loads(record.read_text(encoding="utf-8"))
        config = written["training"]["config"] if "training" in written else written["config"]
        settings = config[group] if group else config
        plain = Recipe(num_images=1)
        defaults = dataclasses.asdict(getattr(plain, group) if group else plain)
        written.pop("digest", None)  # checkpoints of then had none
        dropped = [key for key, value in settings.items() if json.loads(json.dumps(defaults.get(key))) == value]
        assert dropped
        for key in dropped:
            del settings[key]
        record.write_text(json.dumps(written), encoding="utf-8")
    assert run_recipe(str(path), [f"run={run}"]) == run / "model"  # finished
    shutil.rmtree(run / "model")
    assert run_recipe(str(path), [f"run={run}"]) == run / "model"  # goes on from the last checkpoint


@pytest.mark.parametrize("name", ["c2i-B-raster", "c2i-B-par", "c2v-L-raster"])
def test_orders_are_compared_at_equal_depth_or_size(name: str) -> None:
    config = load(Recipe, name, ["equal=parameters"]).model
    ours = dataclasses.replace(config, schedule="manhattan", regions=()).complete()

    def size(config: ModelConfig) -> int:
        with without_weights():
            return sum(parameter.numel() for parameter in Transformer(config).parameters())

    assert equal_to_nar(config, "") is config
    assert config.num_blocks < ours.num_blocks
    deep, equal = equal_to_nar(config, "depth"), equal_to_nar(config, "parameters")
    assert deep.num_blocks == equal.num_blocks == ours.num_blocks
    assert size(deep) < size(ours)
    assert abs(size(equal) / size(ours) - 1) < 5e-4


def test_the_page_of_keys_is_current() -> None:
    path = Path(__file__).parents[1] / "scripts/write_recipe_keys.py"
    spec = importlib.util.spec_from_file_location("write_recipe_keys", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run scripts/write_recipe_keys.py"
    assert [key.name for key in described(Recipe) if not key.meaning] == [], "their docstrings say nothing of these"


def test_info_of_recipes_and_data(tmp_path: Path) -> None:
    own = nar("info", "my-pictures-tokenizer")
    assert "model." not in own
    assert re.search(r"up to 1,000 samples +tokenizer.vocab_size=512\n", own)
    said = nar("info", "my-pictures")
    assert re.search(r"^data +needs your own: data=FOLDER$", said, re.MULTILINE)
    assert re.search(r"^batch_size +32$", said, re.MULTILINE)
    assert re.search(r"^learns from +classes, pictures or clips$", said, re.MULTILINE)
    assert "num_classes" not in said, "the data say how many"
    assert re.search(r"^model.hidden_dim +512$", said, re.MULTILINE)
    both = nar("info", "fashion")  # a bundled model and its recipe
    assert "steps                    15 for 64 tokens" in both
    assert "optim.curve              cosine" in both
    listed = nar("info")
    assert re.search(r"^  my-clips +Your own clips", listed, re.MULTILINE)
    assert re.search(r"^  fashion ", listed, re.MULTILINE)
    folder = own_folder(tmp_path / "data")
    found = nar("info", folder)
    assert re.search(r"^pictures +24$", found, re.MULTILINE)
    assert re.search(r"^classes +cats, dogs$", found, re.MULTILINE)
    assert f"nar train my-pictures data={folder} run=runs/mine" in found
