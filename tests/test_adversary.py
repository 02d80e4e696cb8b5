"""The adversary of tokenizer training: its two ways of weighing, and when it learns and acts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nar.training.adversary import Adversary, AdversaryConfig, generator_hinge_loss
from nar.training.distributed import Workers

ALONE = Workers(0, 1, torch.device("cpu"))


def adversary(**changes: object) -> Adversary:
    torch.manual_seed(0)
    return Adversary(AdversaryConfig(**{"weight": 0.5, "channels": 8, "num_layers": 1, **changes}), ALONE)


def test_a_fixed_weight_is_a_factor_and_an_adaptive_one_a_share_of_the_gradient() -> None:
    real, layer = torch.rand(2, 3, 16, 16), nn.Conv2d(3, 3, 1)
    fake = layer(real)
    reconstruction = 100 * (fake - real).square().mean()
    fixed, adaptive = adversary(adaptive=False), adversary()
    expected = 0.5 * generator_hinge_loss(fixed.network(fake))
    torch.testing.assert_close(fixed.loss(real, fake, reconstruction, layer.weight, 0), expected)
    loss = adaptive.loss(real, fake, reconstruction, layer.weight, 0)
    (wanted,) = torch.autograd.grad(reconstruction, layer.weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss, layer.weight)
    torch.testing.assert_close(found.norm(), 0.5 * wanted.norm(), rtol=1e-3, atol=0)


def test_it_learns_and_acts_from_its_steps_on() -> None:
    judge = adversary(start=3, learn_from=2, adaptive=False, clip_norm=1.0, learning_rate=1e-2)
    real, fake = torch.ones(4, 3, 16, 16), -torch.ones(4, 3, 16, 16, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in judge.network.state_dict().items()}
    for step in range(3):
        assert float(judge.loss(real, fake, fake.sum(), fake, step)) == 0
        learned = judge.update(torch.Generator())
        assert (learned is None) == (step < 2)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in judge.network.state_dict().items())
    losses = []
    for step in range(3, 12):
        assert float(judge.loss(real, fake, fake.sum(), fake, step).detach()) != 0
        learned = judge.update(torch.Generator())
        assert learned is not None
        losses.append(float(learned))
    assert losses[-1] < 0.5 * losses[0]


def test_its_losses_are_told_and_looking_changes_nothing() -> None:
    judge = adversary(adaptive=False)
    before = {name: tensor.clone() for name, tensor in judge.network.state_dict().items()}
    judge.check(torch.zeros(1, 3, 2, 16, 16))  # a clip, frame by frame
    assert all(torch.equal(tensor, before[name]) for name, tensor in judge.network.state_dict().items())
    assert judge.network.training
    assert judge.losses == {}
    real, fake = torch.ones(4, 3, 16, 16), -torch.ones(4, 3, 16, 16, requires_grad=True)
    loss = judge.loss(real, fake, fake.sum(), fake, 0)
    learned = judge.update(torch.Generator())
    assert float(judge.losses["adversarial"]) == pytest.approx(float(loss.detach()) / 0.5)  # before its weight
    assert judge.losses["discriminator"] == learned


@pytest.mark.parametrize("half", [False, True])
def test_it_learns_in_the_precision_of_the_engine(half: bool) -> None:
    judge = Adversary(AdversaryConfig(weight=0.5, channels=8, num_layers=1), ALONE, half=half)
    seen = []
    judge.network[0].register_forward_hook(lambda *made: seen.append(made[-1].dtype))
    fake = torch.zeros(2, 3, 16, 16, requires_grad=True)
    judge.loss(torch.ones(2, 3, 16, 16), fake, fake.sum(), fake, 0)
    seen.clear()
    learned = judge.update(torch.Generator())
    assert seen == [torch.bfloat16 if half else torch.float32] * 2
    assert learned is not None
    assert learned.dtype == torch.float32


def test_frames_seen_at_once_show_motion() -> None:
    clip = torch.rand(1, 3, 4, 16, 16)
    swapped = clip[:, :, [1, 0, 3, 2]]  # other motion within the pairs, the same pictures
    for frames, blind in ((1, True), (2, False)):
        judge = adversary(frames=frames)
        judge.network.eval()
        logits = [judge.judge(pixels).flatten(1) for pixels in (clip, swapped)]
        assert len(logits[0]) == 4 // frames
        same = torch.allclose(*(found.sort(0).values for found in logits), atol=1e-6)
        assert same == blind
    with pytest.raises(ValueError, match=r"num_layers 1 and frames 3 can't judge samples of 4x16x16"):
        adversary(frames=3).check(clip)
    with pytest.raises(ValueError, match=r"frames 2 can't judge samples of 16x16 "):
        adversary(frames=2).check(clip[:, :, 0])


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"adversary\.frames must be at least 1 .*, not 0$"):
        AdversaryConfig(frames=0)
    with pytest.raises(ValueError, match=r"frames 4 is of the network patch; a transformer sees whole clips"):
        AdversaryConfig(frames=4, network="transformer")
    with pytest.raises(ValueError, match=r"adversary\.every must be at least 1 .*, not 0$"):
        AdversaryConfig(every=0)
    with pytest.raises(ValueError, match=r"lecam 0\.1 is of the network transformer; with patch it must be 0"):
        AdversaryConfig(lecam=0.1)
    with pytest.raises(ValueError, match=r"adversary\.weight must be at least 0, not -1"):
        AdversaryConfig(weight=-1)
    with pytest.raises(ValueError, match=r"learn_from 5 is after adversary\.start 2: an untrained discriminator"):
        AdversaryConfig(start=2, learn_from=5)
