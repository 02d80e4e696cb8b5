"""The transformer: decoding equals forward, nothing flows from later fronts, folders load strictly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from conftest import make_condition, make_model
from nar import ClassCondition, ModelConfig, Transformer
from nar.attention import Block
from nar.condition import Condition, TextCondition
from nar.model import Dropout
from nar.storage.folder import BUNDLED


def decode_all(model: Transformer, codes: torch.Tensor, condition: object, step: int) -> torch.Tensor:
    """Logits (B, N, V) in generation order from the cached path, feeding `step` fronts at a time."""
    schedule = model.layout.schedule
    tokens = model.in_order(codes)
    embedded, key_mask = model.embed(condition)
    cache = model.new_cache(len(codes))
    hidden = [model.prefill(embedded, key_mask, cache)]
    for first in range(0, schedule.num_steps - 1, step):
        fronts = range(first, min(first + step, schedule.num_steps - 1))
        hidden.append(model.decode(tokens[:, : schedule.front(fronts[-1]).stop], fronts, cache))
    return model.logits(torch.cat(hidden, 1))


@pytest.mark.parametrize("step", [1, 2, 100])
@torch.no_grad()
def test_decoding_equals_forward(model: Transformer, step: int) -> None:
    codes = torch.randint(model.config.vocab_size, (3, *model.config.grid))
    condition = make_condition(model, 3)
    whole = model(codes, condition).flatten(1, -2)[:, model.layout.order]
    assert whole.std() > 0.3, "the test would pass on a model that says nothing"
    torch.testing.assert_close(decode_all(model, codes, condition, step), whole, atol=2e-5, rtol=0)


@torch.no_grad()
def test_decoding_equals_forward_for_null_conditions(model: Transformer) -> None:
    codes = torch.randint(model.config.vocab_size, (3, *model.config.grid))
    condition = make_condition(model, 3).drop(torch.tensor([True, False, True]))
    whole = model(codes, condition).flatten(1, -2)[:, model.layout.order]
    torch.testing.assert_close(decode_all(model, codes, condition, 1), whole, atol=2e-5, rtol=0)


def test_causality_by_gradient(model: Transformer) -> None:
    """The logits of a front have no gradient from its own tokens or later ones, and some from the front before."""
    schedule = model.layout.schedule
    codes = torch.randint(model.config.vocab_size, (1, *model.config.grid))
    condition = make_condition(model, 1)
    if model.config.scales:  # each position has a code of its own, so that the codebook's rows are the positions
        codes, lookup = torch.arange(schedule.num_positions)[None], model.sums.codebook.requires_grad_()
        logits = model(codes, condition)[0]
    else:
        fed: list[torch.Tensor] = []
        hook = model.tokens.register_forward_hook(lambda *call: fed.append(call[2].requires_grad_()))
        logits = model(codes, condition).flatten(1, -2)[0, schedule.order]
        hook.remove()
        lookup = fed[-1]  # (1, positions of all fronts but the last, d)
    for front in range(schedule.num_steps):
        positions = schedule.front(front)
        (gradient,) = torch.autograd.grad(
            logits[positions].square().sum(), lookup, retain_graph=True, allow_unused=True
        )
        seen = torch.zeros(1) > 0 if gradient is None else gradient.flatten(0, -2).abs().amax(-1) > 0
        assert not seen[positions.start :].any()
        if front:
            assert seen[schedule.front(front - 1)].all()


def test_every_parameter_learns(model: Transformer) -> None:
    codes = torch.randint(model.config.vocab_size, (12, *model.config.grid))
    condition = make_condition(model, 12)
    model(codes, condition.drop(torch.arange(12) % 3 == 0)).square().mean().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    """What stands in the padding of a caption, and which captions share the batch, has no effect."""
    for layout in ("text", "text-published"):
        model = make_model(layout)
        condition = make_condition(model, 4)
        text = condition.text
        assert text is not None
        codes = torch.randint(model.config.vocab_size, (4, *model.config.grid))
        together = model(codes, condition)
        noisy = TextCondition(torch.where(text.mask[..., None], text.features, 9.0), text.mask)
        torch.testing.assert_close(model(codes, noisy), together, atol=1e-5, rtol=0)
        alone = model(codes[2:3], condition.rows(slice(2, 3)))
        torch.testing.assert_close(alone, together[2:3], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_dropped_caption_is_seen_whole_or_with_the_padding_of_the_caption() -> None:
    """`null_mask` "own" makes every dropped caption the same; "caption" (published) leaves the padding of each."""
    for layout, settings in (("text", {}), ("text-published", {}), ("text", {"null_mask": "caption"})):
        model = make_model(layout, **settings)
        condition = make_condition(model, 4)  # captions of one to four words
        assert condition.text is not None
        assert len(condition.text.mask.unique(dim=0)) == 4
        codes = torch.randint(model.config.vocab_size, (1, *model.config.grid)).expand(4, -1, -1)
        logits = model(codes, condition.drop(torch.ones(4, dtype=torch.bool)))
        alike = float((logits - logits[:1]).abs().max()) < 1e-5
        assert alike == (model.config.null_mask == "own")


def test_first_loss_is_uniform() -> None:
    model = Transformer(ModelConfig(grid=(4, 4), vocab_size=50, dim=32, num_layers=1, num_heads=2, num_classes=3))
    logits = model(torch.zeros(1, 4, 4, dtype=torch.long), ClassCondition(torch.tensor([1])))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.zeros(16, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(50), abs=1e-6)


def test_dropout_is_an_argument() -> None:
    model = make_model("nar").train()
    codes, condition = torch.zeros(2, 4, 4, dtype=torch.long), make_condition(model, 2)
    assert torch.equal(model(codes, condition), model.eval()(codes, condition))
    for rates in (Dropout(token=0.5), Dropout(residual=0.5), Dropout(path=0.9)):
        assert not torch.equal(model(codes, condition, dropout=rates), model(codes, condition))


def test_path_dropout_rises_from_the_first_block_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rates, plain = make_model("nar-deep-heads"), [], Block.forward

    def noted(block: Block, *given: object) -> torch.Tensor:
        rates.append(given[-1])
        return plain(block, *given)

    monkeypatch.setattr(Block, "forward", noted)
    model(torch.zeros(1, 4, 3, dtype=torch.long), make_condition(model, 1), dropout=Dropout(residual=0.1, path=0.4))
    assert rates == pytest.approx(np.array([(0.1, 0.0), (0.1, 0.1), (0.1, 0.2), (0.1, 0.3), (0.1, 0.4)]))


def test_fixed_positions_are_sines_and_cosines_of_falling_frequencies() -> None:
    table = make_model("video").layout.table
    assert table is not None
    for position in (0, 3, 17):
        angles = [position * 10000 ** (-place / 16) for place in range(16)]
        row = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(table[position], torch.tensor(row), atol=1e-6, rtol=0)


def test_null_words_have_the_length_of_features() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(grid=(2, 2), dim=32, num_layers=1, num_heads=2, text_dim=256, text_length=64))
    assert float(model.null_text.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)
    assert float(model.tokens.weight.std()) == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
def test_another_grid_shares_the_weights() -> None:
    model = make_model("nar")
    larger = model.at_grid((6, 3))
    assert larger.output.weight.data_ptr() == model.output.weight.data_ptr()
    assert larger(torch.zeros(1, 6, 3, dtype=torch.long), make_condition(model, 1)).shape == (1, 6, 3, 24)
    with pytest.raises(ValueError, match="learned positions"):
        make_model("nar-shared-head").at_grid((6, 6))


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    model = make_model("nar")
    codes, condition = torch.randint(24, (2, 4, 4)), make_condition(model, 2)
    exact = model(codes, condition)
    rough = model.to(torch.bfloat16)(codes, condition)
    assert model.layout.phases is not None
    assert model.layout.phases.dtype == model.layout.weight.dtype == rough.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.1 * exact.std()


def test_folder_round_trip(tmp_path: Path, model: Transformer) -> None:
    model.save_pretrained(tmp_path / "model")
    again = Transformer.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    codes, condition = torch.zeros(2, *model.config.grid, dtype=torch.long), make_condition(model, 2)
    assert torch.equal(again(codes, condition), model(codes, condition))


def test_only_a_model_folder_is_replaced(tmp_path: Path) -> None:
    model = make_model("nar")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a model folder; choose another"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").is_file()
    bundled = BUNDLED / "fashion" / "tokenizer"
    model.save_pretrained(tmp_path / "model", tokenizer=bundled)
    with pytest.raises(ValueError, match="holds a tokenizer, which would be lost"):
        model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model", tokenizer=tmp_path / "model" / "tokenizer")
    assert (tmp_path / "model" / "tokenizer" / "config.json").is_file()
    assert Transformer.from_pretrained("fashion").config.grid == (8, 8)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = make_model("nar")
    folder = tmp_path / "model"

    def refuses(message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Transformer.from_pretrained(folder)

    refuses("is not a model folder")
    model.save_pretrained(folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refuses("truncated")
    weights.write_bytes(b"PK\x03\x04 something else")
    refuses("truncated or not a safetensors file")
    weights.unlink()
    refuses("is missing")
    weights.write_bytes(whole)
    tensors = load(whole)  # not mapped: the file is written anew
    save_file({name: tensor for name, tensor in tensors.items() if name != "output.weight"}, weights)
    refuses("missing: output.weight")
    save_file(tensors | {"medusa.weight": torch.zeros(1)}, weights)
    refuses(r"not part of this model: medusa\.weight")
    save_file(tensors | {"output.weight": torch.zeros(3, 3)}, weights)
    refuses(r"output.weight is \(3, 3\), the model needs \(24, 64\)")
    (folder / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"depth": 3}}))
    refuses("unknown key 'depth'")
    (folder / "config.json").write_text(json.dumps(config | {"kind": "image-tokenizer"}))
    refuses("holds 'image-tokenizer', not a transformer")
    (folder / "config.json").write_text("{")
    refuses("not valid JSON")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 30, "num_heads": 4}, "dim 30 must be num_heads 4 times"),
        ({"num_classes": 0}, "needs a condition"),
        ({"positions": "alibi"}, "positions must be one of rope, learned, sincos, levels, not 'alibi'"),
        ({"axis_heads": (0, 2)}, "axis_heads"),
        ({"scales": (1, 2)}, "schedule scales needs both, others neither"),
        ({"schedule": "scales", "grid": (5,), "scales": (1, 2)}, "schedule scales needs both"),
        ({"schedule": "scales", "grid": (5,), "scales": (1, 2), "code_dim": 4}, "needs positions learned"),
        ({"unit_keys": True}, "unit_keys is of modulated blocks"),
        ({"modulation": "own", "text_dim": 4}, "modulation is by the class"),
        ({"schedule": "spiral"}, "'spiral'"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"grid": (3, 1000000)}, r"grid \(3, 1000000\) has 3,000,000 positions; at most 65,536"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**({"num_classes": 10} | values))


def test_sizes_left_open_follow_the_rest() -> None:
    config = ModelConfig(dim=96, num_heads=3, num_classes=10)
    assert (config.hidden_dim, config.head_depths, config.axis_heads) == (0, (), ()), "what was written is kept"
    clips = replace(config, grid=(4, 8, 8))
    made = Transformer(clips).config
    assert (made.hidden_dim, made.head_depths, made.axis_heads) == (256, (0, 1, 1), (0, 1, 2))
    assert clips.num_blocks == made.num_blocks == made.num_layers + 2
    assert made.complete() == made
    shared = ModelConfig(dim=96, num_heads=3, num_classes=10, axis_heads=(0, 0))
    assert shared.complete().head_depths == (0,)
    with pytest.raises(ValueError, match="for each of the 3 rows of manhattan"):
        replace(shared, grid=(4, 8, 8))


def test_wrong_inputs_are_named() -> None:
    model = make_model("nar")
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"class label 10 is not one of 0\.\.9"):
        model(codes, ClassCondition(torch.tensor([10])))
    with pytest.raises(ValueError, match=r"grid \(4, 4\) has 16 tokens but the codes are \(4, 5\)"):
        model(torch.zeros(1, 4, 5, dtype=torch.long), ClassCondition(torch.tensor([1])))
    with pytest.raises(ValueError, match="this model's condition is labels, not text"):
        model(codes, make_condition(make_model("text"), 1))
    with pytest.raises(ValueError, match="no null class"):
        make_model("nar", null_class=False)(codes, ClassCondition(torch.tensor([-1])))
    with pytest.raises(ValueError, match="must be fed after"):
        model.decode(codes.flatten(1)[:, :2], range(1, 2), model.new_cache(1))


def test_conditions_combine() -> None:
    labels, words = ClassCondition(torch.tensor([1, 2])), TextCondition(torch.ones(2, 3, 4), torch.ones(2, 3).bool())
    both = labels | words
    assert both.kinds == ("labels", "text")
    assert Condition.of((words, labels)).kinds == both.kinds, "parts come in any order"
    assert len(both.rows(slice(1))) == 1
    with pytest.raises(ValueError, match=r"must have one batch size, not \[1, 2\]"):
        labels | words.rows(slice(1))
    with pytest.raises(ValueError, match="both have labels"):
        both | labels
    with pytest.raises(ValueError, match="needs labels, text or a prefix"):
        Condition()
    model = make_model("nar")
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    assert torch.equal(model(codes, (labels,)), model(codes, labels)), "a tuple of parts still does"
    for wrong in (torch.tensor([1, 2]), ()):
        with pytest.raises(ValueError, match="a condition is nar"):
            model(codes, wrong)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("text_encoder", None, "text_encoder must be keys and values, not None"),
        ("training", -1, "training must be keys and values, not -1"),
        ("class_names", [1], "class_names must be text, not 1"),
        ("class_names", "cat", "class_names must be a list, not 'cat'"),
        ("given_frames", -1, "given_frames must be a list, not -1"),
        ("given_frames", [-1], "given_frames must be at least 0 and at most 1048576, not -1"),
        ("frame_rate", "x", "frame_rate must be a finite number, above 0, or null, not 'x'"),
        ("sampling", [], r"sampling must be keys and values, not \[\]"),
        ("model.norm_eps", "x", "norm_eps must be a finite number, above 0, not 'x'"),
        ("model.num_classes", math.nan, "num_classes must be a whole number, .*, not nan"),
        ("model.dim", True, "dim must be a whole number, .*, not True"),
        ("model.dim", 32.0, "dim must be a whole number, .*, not 32.0"),
        ("model.vocab_size", 10**18, "vocab_size must be at least 1 and at most 2147483648"),
        ("model.prefix_grid", [2**20, 2**20], "prefix_grid .* must have at most 65,536 codes"),
        ("model", [1], r"model must be keys and values, not \[1\]"),
    ],
)
def test_damaged_configs_are_named(tmp_path: Path, section: str, value: object, message: str) -> None:
    make_model("nar").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    inside, _, key = section.rpartition(".")
    (config[inside] if inside else config)[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as refused:
        Transformer.from_pretrained(tmp_path / "m")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
