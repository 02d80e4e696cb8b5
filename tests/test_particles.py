"""Particles: with many of them the model's own distribution given all that is known, with one today's sample."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import nar
from conftest import make_condition, make_model
from nar import Pipeline
from nar.likelihood import bits_per_token
from nar.model import Transformer
from nar.pipeline import particles as particles_module
from nar.pipeline.particles import weighted_fronts
from nar.sampling import Sampling


def last(model: Transformer, condition: nar.condition.Condition, known: Tensor, particles: int, **options: object):
    *_, found = weighted_fronts(model, condition, known=known, particles=particles, **options)
    return found


@pytest.fixture(scope="module")
def small() -> Transformer:
    return make_model("nar", grid=(2, 2), vocab_size=3, num_classes=3)


@pytest.fixture(scope="module")
def exact(small: Transformer) -> Tensor:
    """The probabilities (3, 3, 3, 3) of all codes of class 1."""
    codes = torch.tensor([*itertools.product(range(3), repeat=4)]).view(-1, 2, 2)
    with torch.no_grad():
        logits = small(codes, nar.ClassCondition(torch.ones(len(codes), dtype=torch.long)))
    shares = logits.log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2, 3))
    assert math.isclose(float(shares.exp().sum()), 1, abs_tol=1e-5)
    return shares.exp().view(3, 3, 3, 3).double()


def test_many_particles_have_the_distribution_given_all_that_is_known(small: Transformer, exact: Tensor) -> None:
    known = torch.tensor([[-1, -1], [0, 0]])
    true = exact[:, :, 0, 0] / exact[:, :, 0, 0].sum()
    count, distances, low = 800, {}, {}
    condition = nar.ClassCondition(torch.ones(count, dtype=torch.long))
    for particles in (1, 8):
        made = last(small, condition, known.expand(count, 2, 2), particles, seed=5)
        codes = made.codes
        assert (codes[:, 1] == 0).all()
        found = torch.bincount(codes[:, 0, 0] * 3 + codes[:, 0, 1], minlength=9).view(3, 3) / count
        distances[particles] = float((found - true).abs().sum() / 2)
        # The estimate of the probability is unbiased, its logarithm low.
        wanted, estimated = float(exact[:, :, 0, 0].sum()), made.log_known.exp()
        assert abs(float(estimated.mean()) - wanted) < 4 * float(estimated.std()) / math.sqrt(count)
        low[particles] = math.log(wanted) - float(made.log_known.mean())
    assert distances[1] > 0.1
    assert distances[8] < 0.06  # 800 samples of 9 outcomes: 0.03 on average if exact
    assert low[1] > 2 * low[8] > 0


@pytest.mark.parametrize("layout", ["nar", "raster", "text", "video", "modulated", "edits"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_particle_is_the_sample_as_it_was(layout: str, scale: float) -> None:
    model = make_model(layout)
    condition, sampling = make_condition(model, 3), Sampling(guidance_scale=scale, temperature=0.9, guidance_interval=4)
    known = torch.randint(model.config.vocab_size, (3, *model.config.grid), generator=torch.Generator().manual_seed(1))
    known = known.masked_fill(known % 3 > 0, -1)
    plain = nar.generate(model, condition, sampling, seed=3, indices=[4, 0, 7], known=known)
    found = last(model, condition, known, 1, sampling=sampling, seed=3, indices=[4, 0, 7])
    assert torch.equal(found.codes, plain)
    # Whatever is beside it, and however often particles gave way to copies of others.
    several = last(model, condition, known, 6, sampling=sampling, seed=3, indices=[4, 0, 7])
    alone = last(model, condition.rows(slice(1, 2)), known[1:2], 6, sampling=sampling, seed=3, indices=[0])
    assert torch.equal(several.codes[1], alone.codes[0])
    assert ((known < 0) | (several.codes == known)).all()


def test_estimates_where_all_is_known_are_exact() -> None:
    model = make_model("nar", num_classes=3)
    known = torch.randint(24, (2, *model.config.grid), generator=torch.Generator().manual_seed(0))
    condition = nar.ClassCondition(torch.tensor([0, 2]))
    found = last(model, condition, known, 5)  # all known: every particle has the same weight
    bits = bits_per_token(model, known, condition)
    nats = bits * math.log(2) * known[0].numel()
    assert torch.allclose(found.log_known, nats.neg(), rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_copies_go_on_from_what_was_copied(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Each front's factor of the estimate is the mean of what `forward` gives its known codes after each particle."""
    monkeypatch.setattr(particles_module, "LEAST_EFFECTIVE", 2.0)  # all give way after every front
    model, count = make_model("nar", num_classes=3), 5
    known = torch.randint(24, (2, *model.config.grid), generator=torch.Generator().manual_seed(0))
    known[:, ::2] = -1
    labels, before = torch.tensor([0, 2]), torch.zeros(2)
    sampling = Sampling(guidance_scale=scale, guidance_interval=5)
    for found in weighted_fronts(model, nar.ClassCondition(labels), sampling, known=known, particles=count):
        codes, there = found.particles.flatten(0, 1), known.repeat_interleave(count, 0)
        with torch.no_grad():
            shares = model(codes.clamp_min(0), nar.ClassCondition(labels.repeat_interleave(count))).log_softmax(-1)
        own = shares.gather(-1, there.clamp_min(0)[..., None])[..., 0].masked_fill(there < 0, 0.0)
        front = model.layout.schedule.front(found.number)
        factor = model.in_order(own)[:, front].sum(-1).view(2, count).logsumexp(-1) - math.log(count)
        assert torch.allclose((found.log_known - before).float(), factor, atol=1e-4)
        before = found.log_known


def test_particles_in_calls(toy_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, device="cpu")
    known = np.full((2, 4, 4), -1)
    known[:, 2:] = 3
    plain = pipe([1, 2], known=known, seed=0)
    assert torch.equal(pipe([1, 2], known=known, seed=0, particles=1).codes, plain.codes)
    seen = []
    made = pipe([1, 2], known=known, seed=0, particles=8, callback_on_front_end=lambda _, front, __: seen.append(front))
    assert seen == [*range(pipe.num_steps)]
    assert (made.codes[:, 2:] == 3).all()
    given = np.zeros((8, 8, 3), np.uint8)
    edited = [pipe.edit(given, box=(0, 0, 4, 4), class_labels=1, seed=0, particles=number) for number in (1, 8)]
    assert (np.asarray(edited[1].images[0])[4:] == 0).all()
    with pytest.raises(ValueError, match="particles must be a whole number from 1 to 1024, not 0"):
        pipe([1, 2], known=known, particles=0)
    with pytest.raises(ValueError, match="particles choose among samples by what is known"):
        pipe([1, 2], particles=2)
