"""The pieces of a block against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nar.attention import Attention, Block, Cache, RMSNorm, rotate, rotations


def test_pairs_are_split_evenly_with_the_remainder_to_the_last_axes() -> None:
    """Eight pairs over three axes: 2, 3, 3; an axis with p pairs has frequencies base ** (-j / p)."""
    phases = rotations(torch.tensor([[5, 7, 11]]), 16, 10000.0)[0]
    angles = [5 * 10000 ** (-j / 2) for j in range(2)]
    angles += [7 * 10000 ** (-j / 3) for j in range(3)] + [11 * 10000 ** (-j / 3) for j in range(3)]
    expected = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
    torch.testing.assert_close(phases, expected, atol=1e-5, rtol=0)


def test_rotation_turns_adjacent_pairs() -> None:
    x = torch.randn(1, 3, 2, 4)
    phases = rotations(torch.tensor([[0], [1], [2]]), 4, 100.0)
    turned = torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.view_as_complex(phases)[:, None]
    torch.testing.assert_close(rotate(x, phases), torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_scores_depend_on_the_offset_only(axes: int) -> None:
    query, key = torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 24)

    def score(at: list[int], other: list[int]) -> float:
        turned = [rotate(x, rotations(torch.tensor([p]), 24, 100.0)) for x, p in ((query, at), (key, other))]
        return float((turned[0] * turned[1]).sum())

    here, there = [3] * axes, [1, 4, 2][:axes]
    moved = [[value + 5 for value in place] for place in (here, there)]
    assert score(here, there) == pytest.approx(score(*moved), abs=1e-4)
    assert score(here, there) != pytest.approx(score(here, here), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_casts_before_the_weight(dtype: torch.dtype) -> None:
    norm = RMSNorm(8, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8).to(dtype)
    scaled = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype)
    torch.testing.assert_close(norm(x), scaled * norm.weight)


def test_cache_is_an_append_only_prefix() -> None:
    cache = Cache(2, 4, 1, 6, 3)
    first, second = torch.randn(4, 1, 2, 3), torch.randn(4, 1, 3, 3)
    for layer in range(2):
        keys, values = cache.extend(layer, first, -first)
        assert torch.equal(keys, first)
        assert torch.equal(values, -first)
    cache.commit(2)
    keys, _ = cache.extend(1, second, second)
    assert torch.equal(keys, torch.cat([first, second], 2))
    cache.keep(2)
    assert cache.batch_size == 2
    keys, _ = cache.extend(0, second[:2], second[:2])
    assert torch.equal(keys, torch.cat([first[:2], second[:2]], 2))


def test_a_compiler_sees_the_same_rotation() -> None:
    """Compilers get real products, because they have no code for complex ones."""
    x, phases = torch.randn(2, 5, 2, 3, 8), rotations(torch.arange(5)[:, None], 8, 100.0)
    torch.testing.assert_close(torch.compile(rotate, backend="eager", fullgraph=True)(x, phases), rotate(x, phases))


def by_hand(attention: Attention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by PyTorch's own kernel."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
def test_learning_attention_has_the_values_and_gradients_of_the_fused_kernel(masked: bool) -> None:
    """On a CPU a training step computes attention as matrix products; inference takes the kernel itself."""
    generator = torch.Generator().manual_seed(0)
    attention = Attention(24, 3).double()
    x = torch.randn(2, 7, 24, generator=generator, dtype=torch.float64).requires_grad_()
    mask = None
    if masked:  # broadcast over heads, and different for the samples of the batch
        mask = (torch.rand(2, 1, 7, 7, generator=generator) < 0.5) | torch.eye(7, dtype=torch.bool)
    weights = torch.randn(2, 7, 24, generator=generator, dtype=torch.float64)
    found = []
    for values in (attention(x, None, mask), by_hand(attention, x, mask)):
        found.append((values, *torch.autograd.grad((values * weights).sum(), (x, attention.qkv.weight))))
    for ours, fused in zip(*found, strict=True):
        torch.testing.assert_close(ours, fused, atol=1e-10, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, None, mask), found[1][0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_dropped_branches_are_made_up_for_by_the_others() -> None:
    """Of whole branches per sample, and of elements of each: what is left is larger, so that the mean stays."""
    torch.manual_seed(0)
    block, x = Block(16, 2, 32, 1e-5), torch.randn(1, 3, 16).expand(4000, -1, -1)
    torch.nn.init.zeros_(block.attention.proj.weight)  # only the second branch adds something
    whole = (block(x, None, None) - x)[0]
    found = block(x, None, None, dropout=(0.0, 0.2)) - x
    kept = found.abs().flatten(1).amax(1) > 0
    assert 0.17 < 1 - float(kept.float().mean()) < 0.23
    torch.testing.assert_close(found[kept], (whole / 0.8).expand(int(kept.sum()), -1, -1), atol=1e-5, rtol=1e-5)
    found = block(x, None, None, dropout=(0.2, 0.0)) - x
    assert 0.19 < float((found == 0).float().mean()) < 0.21
    torch.testing.assert_close(found[found != 0], (whole / 0.8).expand_as(found)[found != 0], atol=1e-5, rtol=1e-5)
