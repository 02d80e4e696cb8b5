"""Sampling: the fast path equals the reference loop, seeds, guidance, filters, known codes."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_condition, make_model
from nar import ClassCondition, Sampling, Transformer, generate, generate_fronts
from nar.condition import PrefixCondition
from nar.sampling import draw, probabilities, uniforms
from reference import reference_generate

SETTINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0),
    "guided": Sampling(guidance_scale=2.5, top_k=7),
    "guided-greedy": Sampling(guidance_scale=2.5, temperature=0.0),
    "interval": Sampling(guidance_scale=3.0, guidance_interval=4),
    "interval-0": Sampling(guidance_scale=3.0, guidance_interval=0, top_p=0.8),
    "curve": Sampling(guidance_scale=3.0, guidance_curve="cosine", temperature=0.8),
}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_reference_loop(model: Transformer, settings: str, batch: int) -> None:
    sampling = SETTINGS[settings]
    if sampling.guidance_scale != 1.0 and not (model.config.num_classes or model.config.text_dim):
        with pytest.raises(ValueError, match="given frames"):
            generate(model, make_condition(model, batch), sampling)
        return
    condition = make_condition(model, batch)
    expected = reference_generate(model, condition, sampling, seed=11)
    assert torch.equal(generate(model, condition, sampling, seed=11), expected)
    assert expected.unique().numel() > 1


def test_a_picture_depends_on_its_own_stream_only() -> None:
    model = make_model("text-published")
    condition = make_condition(model, 8)
    sampling = Sampling(guidance_scale=2.0)
    together = generate(model, condition, sampling, seed=5)
    for size in (1, 3):
        for start in range(0, 8, size):
            rows = range(start, min(start + size, 8))
            part = condition.rows(slice(rows.start, rows.stop))
            assert torch.equal(generate(model, part, sampling, seed=5, indices=rows), together[rows.start : rows.stop])
    assert not torch.equal(generate(model, condition, sampling, seed=6), together)


def test_guidance_of_one_equals_none(model: Transformer) -> None:
    condition = make_condition(model, 2)
    assert torch.equal(generate(model, condition, Sampling(guidance_scale=1.0)), generate(model, condition))


def test_negative_condition_replaces_the_null() -> None:
    model = make_model("nar")
    condition, other = ClassCondition(torch.tensor([1, 2])), ClassCondition(torch.tensor([5, 5]))
    sampling = Sampling(guidance_scale=4.0)
    null = generate(model, condition, sampling, negative=ClassCondition(torch.tensor([-1, -1])))
    assert torch.equal(generate(model, condition, sampling), null)
    assert not torch.equal(generate(model, condition, sampling, negative=other), null)


def test_every_row_has_its_own_of_everything() -> None:
    model, condition = make_model("nar"), ClassCondition(torch.tensor([1, 2, 3]))
    known = torch.full((1, *model.config.grid), -1)
    led = ClassCondition(torch.tensor([5]))
    for given in ({"indices": [5]}, {"known": known}, {"negative": led, "sampling": Sampling(guidance_scale=2.0)}):
        with pytest.raises(ValueError, match=r"(indices|known|negative) has 1 rows for a batch of 3"):
            generate(model, condition, **given)  # type: ignore[arg-type]


def test_a_negative_without_a_mask_leaves_the_mask_of_the_other_side() -> None:
    model = make_model("frames")
    codes = torch.randint(model.config.vocab_size, (2, *model.config.prefix_grid))
    mask = torch.zeros_like(codes, dtype=torch.bool)
    hidden = (codes + 1) % model.config.vocab_size
    classes = ClassCondition(torch.tensor([1, 2])), ClassCondition(torch.tensor([3, 3]))
    sampling = Sampling(guidance_scale=3.0, temperature=0.0)
    led = classes[1], PrefixCondition(codes)
    first, second = (
        generate(model, (classes[0], PrefixCondition(given, mask)), sampling, negative=led) for given in (codes, hidden)
    )
    assert torch.equal(first, second), "codes that are masked are not seen"


def test_fronts_appear_one_after_another(model: Transformer) -> None:
    schedule = model.layout.schedule
    condition = make_condition(model, 2)
    seen = 0
    for number, codes in generate_fronts(model, condition, seed=1):
        seen += schedule.fronts[number]
        assert (codes >= 0).flatten(1).sum(1).tolist() == [seen, seen]
        assert (codes.flatten(1)[:, schedule.order[:seen]] >= 0).all()
    assert seen == schedule.num_positions
    assert torch.equal(codes, generate(model, condition, seed=1))


def test_known_codes_are_kept(model: Transformer) -> None:
    condition = make_condition(model, 3)
    known = torch.randint(-1, model.config.vocab_size, (3, *model.config.grid))
    known[torch.rand(known.shape) < 0.5] = -1
    made = generate(model, condition, Sampling(), seed=2, known=known)
    assert torch.equal(made[known >= 0], known[known >= 0])
    assert torch.equal(made, reference_generate(model, condition, Sampling(), seed=2, known=known))
    complete = generate(model, condition, seed=2)
    assert torch.equal(generate(model, condition, seed=9, known=complete), complete)


def test_what_is_drawn_has_the_distribution_that_forward_states() -> None:
    """Chi-square of the second front's first token, given the first token, over 20,000 drawings."""
    model = make_model("nar", vocab_size=4, grid=(1, 2))
    count = 20_000
    codes = generate(model, ClassCondition(torch.full((count,), 3)), seed=0).flatten(1)
    first = model(codes[:1].view(1, 1, 2), ClassCondition(torch.tensor([3])))[0, 0, 0].softmax(-1)
    observed = torch.bincount(codes[:, 0], minlength=4)
    chi = ((observed - count * first) ** 2 / (count * first)).sum()
    for token in range(4):
        given = codes[codes[:, 0] == token]
        second = model(given[:1].view(1, 1, 2), ClassCondition(torch.tensor([3])))[0, 0, 1].softmax(-1)
        expected = len(given) * second
        chi = chi + ((torch.bincount(given[:, 1], minlength=4) - expected) ** 2 / expected).sum()
    assert chi.item() < 37.7  # 99.9 % of chi-square with 15 degrees of freedom


def test_draw_never_takes_an_impossible_token() -> None:
    logits = torch.full((1, 3, 5), -math.inf)
    logits[..., 1], logits[..., 3] = 0.0, 1.0
    for value in (0.0, 0.2, 0.999999, 1 - 2**-24, 1.0):
        tokens = draw(logits, torch.full((1, 3), value))
        assert set(tokens.flatten().tolist()) <= {1, 3}


def test_filters() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 2.0, 1.0])
    assert (probabilities(logits, top_k=2) > 0).tolist() == [False, True, True, True, False]  # ties stay
    assert (probabilities(logits, top_k=99) > 0).all()
    assert (probabilities(logits, top_p=1e-6) > 0).tolist() == [False, True, False, False, False]
    assert probabilities(logits, temperature=0.0).argmax() == 1
    torch.testing.assert_close(probabilities(logits, temperature=2.0), (logits / 2).softmax(-1))


def test_uniforms_are_streams() -> None:
    whole = uniforms(3, range(5), 10)
    assert torch.equal(uniforms(3, [4, 1], 10), whole[[4, 1]])
    assert torch.equal(uniforms(3, range(5), 4), whole[:, :4])
    assert whole.unique().numel() == 50
    assert 0 <= whole.min() <= whole.max() < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": math.nan}, "top_p"),
        ({"guidance_interval": -2}, "guidance_interval"),
        ({"guidance_curve": "square"}, "guidance_curve must be one of constant, linear, cosine, power"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_guidance_needs_something_to_lead_away_from() -> None:
    with pytest.raises(ValueError, match="no null class"):
        generate(make_model("nar", null_class=False), ClassCondition(torch.tensor([1])), Sampling(guidance_scale=2.0))
    model = make_model("frames-full")
    with pytest.raises(ValueError, match="given frames"):
        generate(model, make_condition(model, 1), Sampling(guidance_scale=2.0))
