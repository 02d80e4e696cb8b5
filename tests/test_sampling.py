"""Sampling: the fast path equals the reference loop, seeds, guidance, filters, known codes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from conftest import make_condition, make_model
from nar import ClassCondition, Sampling, Transformer, generate, generate_fronts
from nar.condition import PrefixCondition
from nar.order import manhattan
from nar.sampling import probabilities, sample, uniforms
from reference import reference_generate

SETTINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0),
    "guided": Sampling(guidance_scale=2.5, top_k=7),
    "guided-greedy": Sampling(guidance_scale=2.5, temperature=0.0),
    "interval": Sampling(guidance_scale=3.0, guidance_interval=4),
    "interval-0": Sampling(guidance_scale=3.0, guidance_interval=0, top_p=0.8),
    "curve": Sampling(guidance_scale=3.0, guidance_curve="cosine", temperature=0.8),
    "tokens": Sampling(guidance_scale=4.0, guidance_curve="cosine-tokens", guidance_power=1.5),
    "filters": Sampling(guidance_scale=2.0, guidance_curve="linear", temperature=1.5, top_k=15, top_p=0.9),
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
    assert expected.unique().numel() > 1 or "greedy" in settings


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_known_codes_are_whole_numbers(model: Transformer, dtype: torch.dtype) -> None:
    known = torch.zeros(1, *model.config.grid, dtype=dtype)
    with pytest.raises(ValueError, match="known must be whole numbers, not torch"):
        generate(model, make_condition(model, 1), known=known)


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
        tokens = sample(logits, torch.full((1, 3), value))
        assert set(tokens.flatten().tolist()) <= {1, 3}


def test_filters() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 2.0, 1.0])
    assert (probabilities(logits, top_k=2) > 0).tolist() == [False, True, True, True, False]  # ties stay
    assert (probabilities(logits, top_k=99) > 0).all()
    assert (probabilities(logits, top_p=1e-6) > 0).tolist() == [False, True, False, False, False]
    assert probabilities(logits, temperature=0.0).argmax() == 1
    torch.testing.assert_close(probabilities(logits, temperature=2.0), (logits / 2).softmax(-1))


def test_a_filter_takes_its_share_of_the_tempered_distribution() -> None:
    """Four tokens of 0.4, 0.3, 0.2, 0.1: tempered by 0.5 they have 16, 9, 4 and 1 thirtieths."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    expected = torch.tensor([16, 9, 0, 0]) / 25
    torch.testing.assert_close(probabilities(logits, temperature=0.5, top_p=0.8), expected)
    torch.testing.assert_close(probabilities(logits, temperature=0.5, top_k=2), expected)


@pytest.mark.parametrize("curve", ["constant", "linear", "cosine", "power"])
def test_curves_end_at_the_scale_and_all_but_one_begin_without_guidance(curve: str) -> None:
    sampling = Sampling(guidance_scale=5.0, guidance_curve=curve)
    scales = [sampling.guidance_at(front, manhattan((4, 4))) for front in range(7)]
    assert scales[-1] == 5.0
    assert scales[0] == (5.0 if curve == "constant" else 1.0)
    assert scales == sorted(scales)


def test_curves_by_tokens_are_those_of_other_models() -> None:
    """A 4x4 diagonal has 0, 1, 3, 6, 10, 13 and 15 tokens before its fronts; RAR: 1 + (s - 1) (1 - cos(pi t^p)) / 2."""
    order, shares = manhattan((4, 4)), [before / 16 for before in (0, 1, 3, 6, 10, 13, 15)]
    linear = Sampling(guidance_scale=5.0, guidance_curve="linear-tokens")
    assert [linear.guidance_at(front, order) for front in range(7)] == [1 + 4 * share for share in shares]
    rar = Sampling(guidance_scale=5.0, guidance_curve="cosine-tokens", guidance_power=2.75)
    expected = [1 + 2 * (1 - math.cos(math.pi * share**2.75)) for share in shares]
    assert [rar.guidance_at(front, order) for front in range(7)] == pytest.approx(expected)


def test_a_sum_in_parts_does_not_bring_back_what_a_filter_took_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs a cumsum is computed in parts, and its rounding rises and falls over tokens of no probability."""
    logits = torch.linspace(4.0, 3.0, 8)[torch.arange(64) // 8]
    uniform = torch.arange(4096) / 4096
    plain = torch.Tensor.cumsum

    def in_parts(self: torch.Tensor, dim: int) -> torch.Tensor:
        noise = torch.rand(self.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        return plain(self, dim) + noise * (torch.arange(64) < 63)

    monkeypatch.setattr(torch.Tensor, "cumsum", in_parts)
    monkeypatch.setattr("nar.sampling.SEQUENTIAL_SUMS", ())
    tokens = sample(logits.expand(4096, -1).roll(3, -1), uniform, top_k=16)
    assert set(tokens.tolist()) == set(range(3, 19))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    """Also when the likeliest token is taken, and with no token that an embedding does not have."""
    for value in (math.nan, math.inf):
        logits = torch.zeros(2, 5)
        logits[1, 3] = value
        for settings in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}):
            tokens = sample(logits, torch.tensor([0.5, 0.5]), **settings).tolist()
            assert 0 <= tokens[0] < 5
            assert tokens[1] == -1, (value, settings)
    model = make_model("nar")
    model.output.weight.data[3, 3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(
            ValueError, match="logits are NaN or infinite: its weights are damaged, or overflow in float32"
        ):
            generate(model, make_condition(model, 2), Sampling(temperature=temperature))
        known = torch.zeros(2, *model.config.grid, dtype=torch.long)
        assert not generate(model, make_condition(model, 2), Sampling(temperature=temperature), known=known).any()


def test_uniforms_are_streams() -> None:
    whole = uniforms(3, range(5), 10)
    assert torch.equal(uniforms(3, [4, 1], 10), whole[[4, 1]])
    assert torch.equal(uniforms(3, range(5), 4), whole[:, :4])
    assert whole.unique().numel() == 50
    assert 0 <= whole.min() <= whole.max() < 1
    recorded = torch.tensor([0.0089, 0.8984, 0.5843])  # of numpy's default_rng((3, 4)); pictures depend on them
    torch.testing.assert_close(uniforms(3, [4], 3)[0], recorded, atol=1e-4, rtol=0)


def test_no_two_seeds_share_a_stream() -> None:
    """Small and large ones, also those that agree in some of their bits, or in their sum with the index."""
    seeds = [0, 1, 2, 5, 2**32 - 1, 2**32, 2**32 + 5, 2 * 2**32, 5 * 2**32, 2**33 + 5, 2**63, 2**64 - 1]
    indices = [0, 1, 2, 3, 5, 2**32, 2**32 + 1, 5 * 2**32, 2**33]  # passes of a clip are 2**32 apart
    rows = torch.cat([uniforms(seed, indices, 4) for seed in seeds])
    assert len(rows.unique(dim=0)) == len(seeds) * len(indices)
    for seed in (-1, 2**64, 1.0, "1", torch.tensor(1)):
        with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*64 - 1"):
            uniforms(seed, [0], 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_p": Fraction(1, 2)}, "top_p must be a finite number"),
        ({"guidance_interval": -2}, "guidance_interval"),
        ({"guidance_scale": 1e308}, "guidance_scale must be at least 0 and at most 1000"),
        ({"guidance_scale": torch.tensor([1.0, 2.0])}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2"}, "guidance_scale must be a finite number"),
        ({"guidance_interval": math.nan}, "guidance_interval must be a whole number, at least 0, or null"),
        ({"temperature": None}, "temperature must be a finite number"),
        ({"top_k": math.nan}, "top_k must be a whole number, at least 0"),
        ({"top_k": 2.5}, "top_k must be a whole number, at least 0"),
        ({"top_k": True}, "top_k must be a whole number, at least 0"),
        ({"top_p": torch.ones(2)}, "top_p"),
        ({"guidance_curve": "square"}, "guidance_curve must be one of constant, linear, cosine, power, linear-tokens"),
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


@pytest.mark.parametrize("row", [0, 1])
def test_one_head_alone_samples_what_the_reference_does(row: int) -> None:
    model = make_model("nar")
    alone, condition = model.decided_by(row), make_condition(model, 3)
    codes = generate(alone, condition, Sampling(guidance_scale=1.5), seed=3)
    assert torch.equal(codes, reference_generate(alone, condition, Sampling(guidance_scale=1.5), 3))
    assert not torch.equal(codes, generate(model, condition, Sampling(guidance_scale=1.5), seed=3))
