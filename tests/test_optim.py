"""Learning rates, groups and averages of parameters, stated by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nar.training.ema import update_average
from nar.training.optim import OptimConfig, build_optimizers, learning_rate_factor, parameter_groups


class Small(nn.Module):
    """A table, a norm, a hidden and an output layer, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 3, bias=False)
        self.register_buffer("count", torch.zeros(()))


def names(module: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, own in module.named_parameters() if any(own is one for one in parameters)}


def test_a_cosine_rises_to_one_and_falls_to_the_last_factor() -> None:
    config = OptimConfig(curve="linear", warmup_images=100, final_factor=0.1)  # VAR's lin0
    rates = [learning_rate_factor(config, images, 1100) for images in (50, 100, 150, 151, 625, 1100)]
    assert rates == pytest.approx([0.55, 1, 1, 1 - 0.9 / 950, 0.55, 0.1])
    config = OptimConfig(curve="cosine", warmup_images=100, final_factor=0.2)
    seen = {0: 0.2, 50: 0.6, 100: 1.0, 550: 0.6, 1000: 0.2, 2000: 0.2, 325: 0.2 + 0.4 * (1 + math.cos(math.pi / 4))}
    for images, factor in seen.items():
        assert learning_rate_factor(config, images, 1000) == pytest.approx(factor)
    assert learning_rate_factor(OptimConfig(warmup_images=10), 400, 1000) == 1.0


def test_only_matrices_or_only_linear_layers_decay() -> None:
    module = Small()
    for decay, decayed in (
        ("matrices", {"table.weight", "hidden.weight", "output.weight"}),
        ("linear", {"hidden.weight", "output.weight"}),
    ):
        first, second = parameter_groups(module, 0.1, decay)
        assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
        assert names(module, first["params"]) == decayed
        assert names(module, second["params"]) == set(dict(module.named_parameters())) - decayed


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 has Muon")
def test_muon_takes_the_hidden_matrices_and_no_other() -> None:
    module = nn.ModuleDict({"body": Small()})
    adamw, muon = build_optimizers(module, OptimConfig(muon_learning_rate=0.02, learning_rate=1e-3))
    assert names(module, muon.param_groups[0]["params"]) == {"body.hidden.weight"}
    others = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert names(module, others) == set(dict(module.named_parameters())) - {"body.hidden.weight"}
    assert (adamw.param_groups[0]["initial_lr"], muon.param_groups[0]["initial_lr"]) == (1e-3, 0.02)


def test_the_average_begins_as_a_copy_and_warms_up() -> None:
    """After step s its decay is the smaller of the one given and (1 + s) / (10 + s)."""
    module, average = Small(), Small()
    expected = None
    for step in range(300):
        with torch.no_grad():
            module.hidden.weight.fill_(float(step % 7))
        module.count.fill_(step)
        update_average(average, module, step, 0.95)
        decay = min(0.95, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * (expected or 0.0) + (1 - decay) * (step % 7)
        torch.testing.assert_close(average.hidden.weight, torch.full((4, 4), expected), atol=1e-4, rtol=0)
        assert torch.equal(average.count, module.count), "buffers are copied"
    torch.testing.assert_close(average.table.weight, module.table.weight)
