"""Held-out bits per token, and what drawing the tokens of a front independently costs, on models with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_condition, make_model
from nar import ClassCondition, generate
from nar.evaluation.independence import independence_cost
from nar.likelihood import bits_per_token
from nar.model import Transformer


def test_bits_are_those_that_forward_states_under_any_condition(model: Transformer) -> None:
    codes = torch.randint(24, (7, *model.config.grid), generator=torch.Generator().manual_seed(0))
    condition = make_condition(model, 7)
    with torch.no_grad():
        logits = model(codes, condition).log_softmax(-1)
    expected = -logits.gather(-1, codes[..., None])[..., 0] / math.log(2)
    found = bits_per_token(model, codes, condition, batch_size=3)
    torch.testing.assert_close(found.float(), expected.flatten(1).mean(1), atol=1e-4, rtol=1e-4)
    known = codes.clone()
    known[:, 1:] = -1  # the first row of the grid is given
    free = bits_per_token(model, codes, condition, known=known, batch_size=3)
    torch.testing.assert_close(free.float(), expected[:, 1:].flatten(1).mean(1), atol=1e-4, rtol=1e-4)


def test_tokens_that_are_equal_in_a_front_cost_what_they_should() -> None:
    model = make_model("nar")
    with torch.no_grad():
        model.output.weight.zero_()  # every token is equally likely: log2(24) bits
    schedule = model.layout.schedule
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(24, (300, schedule.num_steps), generator=generator)
    codes = model.in_raster(values.repeat_interleave(torch.tensor(schedule.fronts), 1))
    labels = ClassCondition(torch.zeros(300, dtype=torch.long))
    cost = independence_cost(model, codes, labels)
    assert len(cost) == 150
    most = math.log2(24) * (schedule.num_positions - schedule.num_steps) / schedule.num_positions
    assert 0.8 * most < float(cost.mean()) <= most + 0.05
    assert float(bits_per_token(model, codes, labels).mean()) == pytest.approx(math.log2(24), rel=1e-5)


def test_another_picture_is_never_the_picture_itself() -> None:
    """Alone in its batch a picture was its own stranger, and all dependence was subtracted."""
    model = make_model("nar")
    with torch.no_grad():
        model.output.weight.zero_()
    schedule = model.layout.schedule
    values = torch.randint(24, (80, schedule.num_steps), generator=torch.Generator().manual_seed(0))
    codes = model.in_raster(values.repeat_interleave(torch.tensor(schedule.fronts), 1))
    cost = independence_cost(model, codes, ClassCondition(torch.zeros(80, dtype=torch.long)), batch_size=1)
    assert float(cost.mean()) > 0.3


def test_a_models_own_pictures_and_raster_models_cost_nothing() -> None:
    model = make_model("nar")
    labels = ClassCondition(torch.arange(600) % 10)
    drawn = generate(model, labels, seed=1)
    cost = independence_cost(model, drawn, labels)
    assert abs(float(cost.mean())) < 0.06
    codes = torch.zeros(8, 3, 4, dtype=torch.long)
    assert independence_cost(make_model("raster"), codes, labels.rows(slice(8))).tolist() == [0] * 4
    with pytest.raises(ValueError, match="at least 4"):
        independence_cost(model, drawn[:3], labels.rows(slice(3)))
