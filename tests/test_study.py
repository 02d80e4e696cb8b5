"""Studies: what a file says, which runs it means, what is kept, and the tables that are made of the logs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from nar import bench
from nar.model import ModelConfig
from nar.sampling import Sampling
from nar.storage.config import load
from nar.storage.files import write_json
from nar.storage.folder import find_model
from nar.study import run as study_run
from nar.study.figures import write_figures
from nar.study.judge import Half, Judged, _speed, check_halves, golden_section, judge
from nar.study.plan import STUDY, Judging, Prediction, Study, model_config, read_study, training_flops
from nar.study.run import compare_models, run_study, write_log
from nar.study.tables import FAILED, HELD, OPEN, Result, as_csv, markdown, read_result, result, write_tables
from nar.tokenizer import Tokenizer, load_tokenizer, new_tokenizer
from nar.training.recipe import Recipe
from nar.training.tasks import run_recipe
from training_runs import recipe, start

STUDIES = Path(__file__).parents[1] / "studies"
ARMS = {"raster": {"settings": ["model.schedule=raster"]}, "nar": {"settings": ["model.schedule=manhattan"]}}
JUDGING = {"number": 64, "num_sampled": 0, "independence": False, "batch_sizes": []}


def tiny(folder: Path, **values: object) -> Path:
    """A study of two arms and two seeds of four steps, as a YAML file."""
    path = folder / "study.yaml"
    plain = {"recipe": str(recipe(folder)), "arms": ARMS, "seeds": [0, 1], "judging": JUDGING, **values}
    path.write_text(yaml.safe_dump(plain))
    return path


def study_of(folder: Path, **values: object) -> Study:
    return read_study(str(tiny(folder, **values)), [f"run={folder / 'out'}"])


def times(folder: Path) -> dict[str, int]:
    """When the models and logs of a study were written."""
    paths = [*folder.glob("runs/*/model/config.json"), *folder.glob("logs/*.json")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def test_a_study_trains_judges_and_keeps(tmp_path: Path) -> None:
    out = run_study(study_of(tmp_path, seeds=[1]))
    assert out is not None
    first = times(out)
    assert sorted(path.name for path in (out / "logs").glob("*.json")) == ["nar-1.json", "raster-1.json"]
    found = read_result(out)
    assert found.arms["raster"]["steps"].mean == 16
    assert found.arms["nar"]["steps"].mean == 7
    assert np.load(out / "logs" / "nar-1.npz")["bits_per_token"].shape == (32,)
    weights = load_file(next(out.glob("runs/nar-1-*")) / "model" / "model.safetensors")
    assert found.arms["nar"]["num_parameters"].mean == sum(tensor.numel() for tensor in weights.values())
    assert (out / "runs").resolve() in (run := next((out / "runs").iterdir())).resolve().parents
    assert (run / "codes").resolve() == (out / "codes").resolve()

    assert run_study(study_of(tmp_path, seeds=[1])) == out  # nothing is left to do
    assert times(out) == first

    arms = ARMS | {"nar": {"settings": ["model.schedule=manhattan", "model.dim=48"]}}
    run_study(study_of(tmp_path, arms=arms, seeds=[1]))  # one arm anew, others are not
    again = times(out)
    kept = [name for name in first if "raster" in name]
    assert [first[name] for name in kept] == [again[name] for name in kept]
    assert len([name for name in again if "runs/nar-" in name]) == 2
    assert read_result(out).arms["nar"]["num_parameters"] != found.arms["nar"]["num_parameters"]


@pytest.mark.slow
def test_learning_rates_are_chosen_by_arm_and_arms_share_models(tmp_path: Path) -> None:
    arms = ARMS | {"horizontal": {"of": "nar", "heads": "horizontal"}}
    sweep = {"optim.learning_rate": ["1e-9", "3e-3"]}
    out = run_study(study_of(tmp_path, arms=arms, sweep=sweep, seeds=[3]))
    assert out is not None
    logs = {path.stem: json.loads(path.read_text()) for path in (out / "logs").glob("*.json")}
    assert {log["chosen"][0] for log in logs.values()} == {"optim.learning_rate=3e-3"}
    assert logs["horizontal-3"]["run"] == logs["nar-3"]["run"]
    assert logs["horizontal-3"]["metrics"]["bits_per_token"] != logs["nar-3"]["metrics"]["bits_per_token"]
    assert len(list((out / "runs").iterdir())) == 4


def test_budgets_in_flops(tmp_path: Path) -> None:
    arms = ARMS | {"longer": {"settings": ["model.schedule=raster"], "flops_of": "nar"}}
    study = study_of(tmp_path, arms=arms, num_images=3200)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    costs = {arm: training_flops(model_config(study.recipe_of(arm), tokenizer)) for arm in ARMS}
    longer = study.recipe_of("longer", tokenizer=tokenizer)
    assert longer.num_images == pytest.approx(3200 * costs["nar"] / costs["raster"], abs=longer.batch_size)
    assert longer.num_images % longer.batch_size == 0
    fixed = study_of(tmp_path, training_flops=1e9)
    assert fixed.recipe_of("nar", tokenizer=tokenizer).num_images == pytest.approx(1e9 / costs["nar"], abs=32)


def test_training_flops_are_counted_as_stated() -> None:
    """By hand: blocks, output, attention. NAR takes 1.25 times the multiplications of raster order at width 128."""
    sizes = {"grid": (8, 8), "vocab_size": 1024, "dim": 128, "num_layers": 6, "num_heads": 4, "hidden_dim": 352}
    raster = ModelConfig(**sizes, num_classes=10, schedule="raster")
    block = 4 * 128 * 128 + 3 * 128 * 352
    attention = 2 * 128 * sum(range(1, 65))
    forward = 6 * (64 * block + attention) + 64 * 128 * 1024
    assert training_flops(raster) == 6 * forward
    ours = dataclasses.replace(raster, schedule="manhattan")
    assert training_flops(ours) / training_flops(raster) == pytest.approx(1.25, abs=0.02)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"arms": {}}, "a study needs a recipe, arms and seeds"),
        ({"seeds": [1, 1]}, "two trainings with one seed are the same"),
        ({"arms": {"a b": {}}}, "the name of an arm must be letters"),
        ({"arms": {"a": {"setings": []}}}, "unknown key 'setings' in arm a .did you mean 'settings'"),
        ({"arms": {"a": {"of": "b"}}}, "of must name another arm"),
        ({"arms": {"a": {"settings": ["model.dimm=3"]}}}, "unknown key 'model.dimm'"),
        ({"baseline": "rster"}, "did you mean 'raster'"),
        ({"expect": ["nar is better"]}, "must be `METRIC of ARM < ARM`"),
        ({"expect": ["FD of nar < rastr"]}, "did you mean 'raster'"),
        ({"expect": ["FDD of nar < raster"]}, "names no metric 'FDD' .did you mean 'FD'.*; there are bits_per_token"),
        ({"expect": ["steps_given_5 of nar < raster"]}, "names no metric 'steps_given_5'"),
        ({"sweep": {"batch_size": "7"}}, "sweep: batch_size must have a list of values"),
        ({"num_images": 5, "training_flops": 1e9}, "a budget is num_images or training_flops"),
        ({"judging": {"guidance": [3, 1]}}, "must be two rising scales"),
        ({"judging": {"tuning_number": 2**63}}, "judging.tuning_number must be at least 8 and at most 1048576"),
        ({"judging": {"tuning_steps": 2**63}}, "judging.tuning_steps must be at least 3 and at most 1000"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(tmp_path: Path, values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study_of(tmp_path, **values)


def logged(folder: Path, means: dict[str, list[float]], expect: list[str]) -> Path:
    """The folder of a study with logs of arms whose seeds have these bits."""
    study = Study(recipe="toy", arms={name: {} for name in means}, seeds=(0, 1, 2), expect=tuple(expect))
    write_json(folder / STUDY, dataclasses.asdict(study))
    noise = np.random.default_rng(0).normal(0, 1, 400)
    noise -= noise.mean()
    for arm, values in means.items():
        for seed, mean in enumerate(values):
            facts = {"arm": arm, "seed": seed, "metrics": {"bits_per_token": mean, "latency_seconds": 0.1 * len(arm)}}
            facts |= {"interval": {}, "sampling": {"guidance_scale": 1.5}, "num_images": 640}
            facts |= {"curve": [[320, mean + 1], [640, mean]]}
            write_log(folder / "logs" / f"{arm}-{seed}.json", Judged(facts, {"bits_per_token": mean + noise}))
    return folder


def test_tables_say_what_held_with_intervals(tmp_path: Path) -> None:
    expect = ["bits_per_token of nar < raster", "bits_per_token of nar > raster", "bits_per_token of par < raster"]
    expect += ["bits_per_token of nar < 5.0", "bits_per_token of nar < raster - 0.5", "FD of nar < raster"]
    means = {"raster": [5.0, 5.01, 5.02], "par": [5.0, 5.03, 4.99], "nar": [4.8, 4.81, 4.83]}
    found = read_result(logged(tmp_path, means, expect))
    answers = [found.held(prediction)[0] for prediction in found.study.predictions]
    assert answers == [HELD, FAILED, OPEN, HELD, FAILED, OPEN]
    each, corrected = found.differences["nar"]["bits_per_token"]
    assert each.mean == pytest.approx(-0.1967, abs=1e-4)
    assert each.seeds == pytest.approx((-0.2111, -0.1823), abs=1e-3)
    assert each.pictures == pytest.approx((-0.1967, -0.1967), abs=2e-3)  # paired by picture: their spread cancels
    assert corrected == pytest.approx(2 * (each.p or 0))
    text = markdown(found)
    assert "| bits per token | 5.01 [4.985, 5.035] | 5.007 [4.955, 5.058] | 4.813 [4.775, 4.851] |" in text
    assert "| bits_per_token of nar < raster | **held** |" in text
    written = write_tables(tmp_path, found)
    assert [path.suffix for path in written] == [".md", ".tex", ".csv", ".json"]
    assert json.loads((tmp_path / "table.json").read_text())["expect"][1]["answer"] == FAILED
    assert "nar,bits_per_token,raster,-0.196" in (tmp_path / "table.csv").read_text()
    assert (tmp_path / "table.tex").read_text().count(r"\\") == 5
    pytest.importorskip("matplotlib")
    assert {path.name for path in write_figures(tmp_path, found)} == {"curves.png", "quality.png"}


def test_a_published_table_is_made_again_of_its_logs() -> None:
    folder = STUDIES / "results" / "orders-short"
    assert markdown(read_result(folder)) == (folder / "table.md").read_text(encoding="utf-8")


def test_predictions_are_read() -> None:
    assert Prediction.of("FD of nar > raster - 0.5", ["nar", "raster"]) == Prediction(
        "FD of nar > raster - 0.5", "FD", "nar", False, "raster", -0.5
    )


def test_golden_section_closes_in_on_the_least() -> None:
    best, tried = golden_section(lambda value: (value - 2.2) ** 2, 1.0, 4.0, 10)
    assert best == pytest.approx(2.2, abs=0.05)
    assert len(tried) == 10
    assert best == min(tried, key=lambda pair: pair[1])[0]


@pytest.mark.slow
def test_finished_models_are_compared(tmp_path: Path) -> None:
    out = run_study(study_of(tmp_path, seeds=[0]))
    assert out is not None
    models = [str(path / "model") for path in sorted((out / "runs").iterdir())]
    study, logs = compare_models(models, "toy", dataclasses.replace(study_of(tmp_path).judging), tmp_path / "models")
    assert [*logs] == sorted(path.name for path in (out / "runs").iterdir())
    found = read_result(tmp_path / "models")
    assert [each.seeds for each in (found.arms[arm]["bits_per_token"] for arm in study.arms)] == [None, None]
    assert "which says nothing of seeds" in markdown(found)
    difference = next(iter(found.differences.values()))["bits_per_token"][0]
    assert difference.pictures is not None


def of_arms(expect: list[str], **arms: list[dict[str, float]]) -> Result:
    """The result of arms with these metrics, by seed."""
    facts = {"interval": {"FD": [9.0, 11.0]}, "sampling": {"guidance_scale": 1.0}}
    logs = {
        arm: [Judged(facts | {"metrics": metrics, "seed": seed}, {}) for seed, metrics in enumerate(found)]
        for arm, found in arms.items()
    }
    return result(Study(recipe="toy", arms={arm: {} for arm in arms}, expect=tuple(expect)), logs)


def test_exact_metrics_fail_on_the_boundary_and_ties_show_nothing() -> None:
    expect = ["steps of a < 8", "steps of a < b", "steps of a < 8.5", "steps of a > 8", "precision of a < b"]
    expect += ["precision of a < 0.6", "coverage of a < b"]
    a = [{"steps": 8.0, "precision": 0.5 - 1 / 128, "coverage": coverage} for coverage in (0.3, 0.31)]
    b = [{"steps": 8.0, "precision": 0.5, "coverage": coverage} for coverage in (0.4, 0.42)]
    found = of_arms(expect, a=a, b=b)
    answers = [found.held(prediction)[0] for prediction in found.study.predictions]
    assert answers == [FAILED, FAILED, HELD, FAILED, OPEN, OPEN, HELD]
    assert found.differences["b"]["precision"][1] is None


def test_uneven_seeds_are_stated() -> None:
    several = [{"FD": 10.0}, {"FD": 20.0}, {"FD": 30.0}]
    found = of_arms(["FD of b < a"], a=several, b=several[:1])
    text = markdown(found)
    assert "Means of 1 to 3 seeds; in brackets the 95 % interval over seeds (Student's t), of one seed over" in text
    assert "| seeds | 3 | 1 |\n| FD | 20 [-4.841, 44.84] | 10 [9, 11] |" in text
    assert "| b | FD | +0 (1 seed) |" in text
    assert "| FD of b < a | **not shown** | difference 0 (1 seed)  |" in text
    assert found.arms["a"]["FD"].pictures is None  # what is known is of the first seed alone
    assert as_csv(found).splitlines()[1].endswith(",,,3")
    assert "| seeds |" not in markdown(of_arms([], a=several, b=several))


def test_bits_after_context_frames_have_a_name_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a judgement, its log and the tables: models that begin after other numbers of frames aren't compared."""
    for count in (0, 1):
        samples = SimpleNamespace(bits=lambda _: np.array([6.0, 7.0]), cost=lambda *_: np.zeros(2), text_bytes=0)
        half = SimpleNamespace(samples=samples, count=count, heldout=[1, 2])
        pipe = SimpleNamespace(sampling=Sampling(), num_steps=7, config=ModelConfig((4, 4), 32, num_classes=3))
        monkeypatch.setattr("nar.study.judge.Pipeline.from_pretrained", lambda _, pipe=pipe: pipe)
        monkeypatch.setattr("nar.study.judge.halves", lambda *_, half=half: (half, half))
        write_json(tmp_path / "config.json", {})
        monkeypatch.setattr("nar.study.judge.made_by", lambda _: {})
        log = judge(tmp_path, "toy", Judging(num_sampled=0, batch_sizes=()))
        log.facts["seed"] = 0
        write_log(tmp_path / f"logs/arm{count}-0.json", log)
    write_json(tmp_path / STUDY, dataclasses.asdict(Study(recipe="toy", arms={"arm0": {}, "arm1": {}}, seeds=(0,))))
    found = read_result(tmp_path)
    assert {name for name in found.arms["arm0"] if "_" in name} >= {"bits_per_token", "independence_cost"}
    assert found.arms["arm1"]["bits_per_token_given_1"].pictures is not None
    assert "bits_per_token" not in found.arms["arm1"]
    assert not found.differences["arm1"]
    assert "| bits per token, after 1 frames |  | 6.5 [" in markdown(found)


@pytest.mark.parametrize(("independence", "least"), [(True, 8), (False, 4)])
def test_too_few_held_out_samples_are_refused_before_the_training(independence: bool, least: int) -> None:
    how = Judging(independence=independence)
    check_halves(least, how)
    with pytest.raises(ValueError, match=f"samples: {least - 1}, and {least} are needed"):
        check_halves(least - 1, how)


def test_speed_is_of_the_settings_and_the_device_that_are_judged(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[Sampling] = []
    real = bench.generate
    monkeypatch.setattr(
        bench, "generate", lambda model, what, how, **more: sampled.append(how) or real(model, what, how, **more)
    )
    monkeypatch.setattr(bench, "_machine", lambda *_: (1.0, 1.0))
    chosen = Sampling(2.5, 8, "linear", temperature=0.7, top_k=5)
    setups: list[bench.Setup] = []
    monkeypatch.setattr(
        "nar.study.judge.bench_folder",
        lambda folder, setup, **more: setups.append(setup) or bench.bench_folder(folder, setup, **more),
    )
    found, device = _speed(toy_folder, "cpu:0", chosen, Judging(batch_sizes=(1,), repetitions=1))
    assert set(sampled) == {chosen}
    assert [setup.device for setup in setups] == ["cpu:0"]
    assert device.startswith("cpu")
    assert found["latency_seconds"] > 0


def test_one_seed_shows_no_difference_in_what_varies(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=[0], expect=["FD of nar < raster", "steps of nar < raster"])
    facts = {"interval": {}, "sampling": {"guidance_scale": 1.0}, "seed": 0}
    logs = {
        arm: [Judged(facts | {"metrics": {"FD": distance, "steps": steps}}, {})]
        for arm, distance, steps in (("raster", 40.0, 16), ("nar", 30.0, 7))
    }
    found = result(study, logs)
    assert [found.held(prediction)[0] for prediction in study.predictions] == [OPEN, HELD]


@pytest.mark.parametrize("wrong", ['"steps": "word"', '"steps": null', '"steps": [1]', '"steps": true'])
def test_a_damaged_log_is_named(tmp_path: Path, wrong: str) -> None:
    study = study_of(tmp_path)
    write_json(tmp_path / "out" / "study.json", dataclasses.asdict(study))
    facts = {"metrics": {"steps": 7}, "interval": {}, "sampling": {"guidance_scale": 1.0}, "seed": 0}
    log = tmp_path / "out" / "logs" / f"{next(iter(study.all_arms))}-{study.seeds[0]}.json"
    write_json(log, facts)
    assert read_result(tmp_path / "out").arms
    log.write_text(log.read_text().replace('"steps": 7', wrong))
    with pytest.raises(ValueError, match=f"{log.name} is damaged .* is no number.*; delete it"):
        read_result(tmp_path / "out")


@pytest.mark.parametrize(
    "wrong", [np.array(["2020-01-01"], "M8[D]"), np.ones((2, 2)), np.array([np.nan]), np.ones(0), 1]
)
def test_damaged_numbers_of_pictures_are_named(tmp_path: Path, wrong: object) -> None:
    study = study_of(tmp_path)
    write_json(tmp_path / "out" / "study.json", dataclasses.asdict(study))
    for arm in study.all_arms:
        facts = {"metrics": {"bits_per_token": 7.0}, "interval": {}, "sampling": {"guidance_scale": 1.0}, "seed": 0}
        write_log(tmp_path / f"out/logs/{arm}-0.json", Judged(facts, {"bits_per_token": np.full(4, 7.0)}))
    assert read_result(tmp_path / "out").arms
    np.savez(tmp_path / "out/logs/nar-0.npz", bits_per_token=wrong)
    with pytest.raises(ValueError, match=r"nar-0.npz is damaged .*finite number for each picture.*; delete it"):
        read_result(tmp_path / "out")


def test_a_refused_study_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        run_study(study_of(tmp_path, data=str(tmp_path / "pictures")))
    for number in range(30):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"pictures/{number}.png")
    with pytest.raises(ValueError, match=r"^held-out samples: 1, and 4 are needed: .*heldout_share"):
        run_study(study_of(tmp_path, data=str(tmp_path / "pictures")))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float | None]]:
    """Trainings and judgements that take no time: which runs are judged, with which guidance scale."""
    judged: list[tuple[str, float | None]] = []

    def train(_: str, overrides: tuple[str, ...]) -> Path:
        run = Path(overrides[-1].removeprefix("run="))
        write_json(run / "model" / "config.json", {"training": {"heldout": {"loss": 1.0}}})
        (run / "metrics.jsonl").touch()
        return run / "model"

    def judge(folder: Path, *_: object, guidance_scale: float | None, **__: object) -> Judged:
        judged.append((folder.parent.name.rpartition("-")[0], guidance_scale))
        facts = {"metrics": {"steps": 7.0}, "interval": {}}
        return Judged(facts | {"sampling": {"guidance_scale": guidance_scale or float(len(judged))}}, {})

    monkeypatch.setattr("nar.study.run.run_recipe", train)
    monkeypatch.setattr("nar.study.run.judge", judge)
    monkeypatch.setattr("nar.study.run.code_sets", lambda *_: None)
    return judged


@pytest.mark.usefixtures("asked")
def test_tables_leave_out_logs_of_the_study_before_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path, seeds=[0])
    out = run_study(study)
    assert out is not None
    assert len(read_result(out).arms) == 2
    changed = study_of(tmp_path, seeds=[0], judging=JUDGING | {"number": 32})
    with monkeypatch.context() as stopped:
        stopped.setattr("nar.study.run.write_log", lambda path, log: write_log(path, log) or sys.exit())
        with pytest.raises(SystemExit):
            run_study(changed)
    with pytest.warns(UserWarning, match=f"^raster-0 in .* before it was changed, .* nar compare STUDY.yaml run={out}"):
        assert [*read_result(out).arms] == ["nar"]
    run_study(changed)
    assert len(read_result(out).arms) == 2
    with monkeypatch.context() as stopped:
        stopped.setattr("nar.study.run.run_recipe", lambda *_: None)
        assert run_study(study_of(tmp_path, seeds=[0], num_images=64)) is None
    with pytest.warns(UserWarning, match="nar-0, raster-0"), pytest.raises(ValueError, match="has no logs yet"):
        read_result(out)
    write_json(out / STUDY, dataclasses.asdict(study))  # of a version that kept no digests
    assert len(read_result(out).arms) == 2


def test_all_seeds_of_an_arm_have_the_guidance_of_its_first(
    tmp_path: Path, asked: list[tuple[str, float | None]]
) -> None:
    arms = ARMS | {"fixed": {"of": "nar", "sampling": ["guidance_scale=3"]}}
    for seeds in ([0, 1], [5, 0, 1]):
        out = run_study(study_of(tmp_path, arms=arms, seeds=seeds, judging=JUDGING | {"guidance": [1, 3]}))
        assert out is not None
        for arm in ARMS:
            logs = [json.loads((out / f"logs/{arm}-{seed}.json").read_text()) for seed in seeds]
            assert len({log["sampling"]["guidance_scale"] for log in logs}) == 1
    assert len(asked) == 2 * 2 + 2 + 2 * 3 + 1  # what does not depend on the first seed is kept


@pytest.mark.usefixtures("asked")
def test_what_has_its_log_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study goes on on another machine from its logs alone."""
    trained = list[str]()
    train = study_run.run_recipe

    def noted(path: str, overrides: tuple[str, ...]) -> Path | None:
        trained.append(overrides[-1].rpartition("/")[2].rpartition("-")[0])
        return train(path, overrides)

    monkeypatch.setattr(study_run, "run_recipe", noted)
    arms = ARMS | {"horizontal": {"of": "nar", "heads": "horizontal"}}
    values = {"arms": arms, "judging": JUDGING | {"guidance": [1, 3]}, "sweep": {"optim.learning_rate": [1e-3, 3e-3]}}
    out = run_study(study_of(tmp_path, **values))
    assert out is not None
    assert sorted(trained) == ["nar-0", "nar-0", "nar-1", "raster-0", "raster-0", "raster-1"]
    logs = {path: path.read_bytes() for path in sorted(out.glob("logs/*"))}
    for folder in ("runs", "codes"):
        shutil.rmtree(out / folder, ignore_errors=True)
    trained.clear()
    assert run_study(study_of(tmp_path, **values)) == out
    assert not trained
    assert {path: path.read_bytes() for path in sorted(out.glob("logs/*"))} == logs

    (out / "logs" / "horizontal-1.json").unlink()  # another arm's model, which has its own log
    run_study(study_of(tmp_path, **values))
    assert trained == ["nar-1"]

    shutil.rmtree(out / "runs")
    trained.clear()
    run_study(study_of(tmp_path, **values | {"sweep": {"optim.learning_rate": [1e-3, 3e-3, 1e-2]}}))  # chosen anew
    assert len(trained) == 2 * 3 + 2


@pytest.mark.usefixtures("asked")
def test_runs_are_named_by_their_data_wherever_they_lie(tmp_path: Path) -> None:
    pictures, moved = tmp_path / "pictures", tmp_path / "elsewhere" / "moved"
    for index in range(120):
        file = pictures / f"{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (2 * index, 90, 9)).save(file)
    shutil.copytree(pictures, moved)
    for data in (pictures, moved):
        out = run_study(study_of(tmp_path, data=str(data), seeds=[0]))
    assert out is not None
    assert len(list((out / "runs").iterdir())) == 2
    (moved / "0" / "0.png").unlink()
    run_study(study_of(tmp_path, data=str(moved), seeds=[0]))
    assert len(list((out / "runs").iterdir())) == 4


def test_an_arm_that_begins_with_other_weights_is_trained_anew(tmp_path: Path) -> None:
    first = run_recipe(str(recipe(tmp_path)), [f"run={tmp_path / 'first'}", "num_images=16"])
    assert first is not None
    arms = {"begun": {"settings": [f"init={first}"]}, "moved": {"settings": [f"init={first}"]}}
    out = run_study(study_of(tmp_path, arms=arms, seeds=[0]))
    assert out is not None
    (first / "model.safetensors").replace(tmp_path / "kept")
    state = {name: tensor + 0.1 for name, tensor in load_file(tmp_path / "kept").items()}
    save_file(state, first / "model.safetensors")
    run_study(study_of(tmp_path, arms=arms, seeds=[0]))
    assert len(list(out.glob("runs/begun-0-*"))) == 2
    (tmp_path / "kept").replace(first / "model.safetensors")
    before = times(out)
    shutil.copytree(first, tmp_path / "elsewhere")
    arms["moved"] = {"settings": [f"init={tmp_path / 'elsewhere'}"]}
    run_study(study_of(tmp_path, arms=arms, seeds=[0]))
    assert {name for name in times(out) if "runs" in name} == {name for name in before if "runs" in name}


@pytest.mark.parametrize("where", ["arm", "sweep"])
def test_arms_hold_out_the_same_samples(tmp_path: Path, where: str) -> None:
    further = {"smaller": {"settings": ["data.heldout_share=0.2"]}}
    values = {"arms": ARMS | further} if where == "arm" else {"sweep": {"data.heldout_share": [0.05, 0.2]}}
    with pytest.raises(ValueError, match=r"data.heldout_share is 0.2, and must be 0.05 as in the other arms"):
        run_study(study_of(tmp_path, **values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(16, 64, 64), (64, 64)])
def test_real_samples_get_the_size_of_the_model(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SimpleNamespace(makes_clips=len(shape) == 3, pixel_shape=shape, device="cpu")
    half = Half.__new__(Half)
    half.pipe, half.how, half.cache, half.count = pipe, Judging(), None, 0  # type: ignore[assignment]
    half.samples = SimpleNamespace(requests=lambda *_: ["one"])  # type: ignore[assignment]
    half.heldout = SimpleNamespace(source=None)  # type: ignore[assignment]
    monkeypatch.setattr("nar.metrics.detectors.TransNetDetector", lambda _: None)
    given: dict[str, object] = {}
    monkeypatch.setattr("nar.study.judge.evaluate", lambda *_, **options: given.update(options) or {"interval": {}})
    half.scores(Sampling(), 8)
    assert given["size"] == 64


def test_one_model_is_no_comparison(tmp_path: Path) -> None:
    for models in (["fashion", "fashion"], ["runs/a/model", "runs/a/"]):
        with pytest.raises(ValueError, match="must be different models"):
            compare_models(models, "toy", dataclasses.replace(study_of(tmp_path).judging))


def stand_in(study: Study) -> Tokenizer:
    """A tokenizer of the sizes that a study's is of: the bundled one, or that of the recipe before its own."""
    base = study.recipe_of(next(iter(study.all_arms)))
    if (base.tokenizer_path or "runs/").startswith("runs/"):
        name = base.tokenizer_recipe or f"{study.recipe}-tokenizer"
        return new_tokenizer(load(Recipe, name).tokenizer_config).eval()
    return load_tokenizer(find_model(base.tokenizer_path))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in ("toy", "heads") else pytest.mark.slow)
        for path in sorted(STUDIES.glob("*.yaml"))
    ],
)
def test_shipped_studies_parse_and_every_arm_builds(path: Path) -> None:
    study = read_study(str(path))
    assert study.question
    assert study.cost
    assert study.predictions
    tokenizer = stand_in(study)
    costs = {}
    for name, arm in study.all_arms.items():
        if not arm.of:
            recipe = study.recipe_of(name, tokenizer=tokenizer)
            costs[name] = recipe.num_images * training_flops(model_config(recipe, tokenizer))
    for name in costs:
        if other := study.all_arms[name].flops_of:
            assert costs[name] == pytest.approx(costs[other], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform == "win32", reason="no times of other processes")
def test_the_toy_study_takes_six_minutes_of_two_cores(tmp_path: Path) -> None:
    """In processor time, which does not depend on what else the machine does."""
    import resource

    def used() -> float:
        times = resource.getrusage(resource.RUSAGE_CHILDREN)
        return times.ru_utime + times.ru_stime

    before = used()
    command = (
        "from nar.cli import main; main()",
        "compare",
        STUDIES / "toy.yaml",
        f"run={tmp_path / 'out'}",
        "--jobs",
        2,
    )
    done = subprocess.run([sys.executable, "-c", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert used() - before < 2 * 6 * 60
    found = read_result(tmp_path / "out")
    assert [len(found.logs[arm]) for arm in ("raster", "par", "manhattan")] == [2, 2, 2]
    answers = {prediction.text: found.held(prediction)[0] for prediction in found.study.predictions}
    assert answers["steps of manhattan < 8"] == HELD
    assert all(prediction.metric in found.arms[prediction.arm] for prediction in found.study.predictions)
    assert f"wrote {tmp_path / 'out/table.md'}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_study_goes_on(tmp_path: Path, jobs: int) -> None:
    path, out = tiny(tmp_path), tmp_path / "out"
    process = start("compare", path, f"run={out}", "--jobs", jobs, "settings=[num_images=1280]")
    while not list(out.glob("runs/*/model")):
        process.join(0.1)
        assert process.is_alive()
    process.kill()
    process.join()
    finished = times(out)
    assert 0 < len(finished) < 8
    process = start("compare", path, f"run={out}", "--jobs", jobs, "settings=[num_images=1280]")
    process.join()
    assert process.exitcode == 0
    assert finished.items() <= times(out).items()
    assert (out / "table.md").is_file()
