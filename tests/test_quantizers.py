"""Quantisers: that codes are what their papers say, that each trains without collapse, and that a collapse is told."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nar import load_tokenizer
from nar.data.open import load_pictures
from nar.metrics.reconstruction import psnr
from nar.tokenizer.image import ImageTokenizer, ImageTokenizerConfig
from nar.tokenizer.quantize import BinaryQuantizer, ScalarQuantizer, VectorQuantizer, build_quantizer
from nar.training.codebook import Codebook, CodebookConfig
from nar.training.distributed import Workers
from nar.training.tasks import run_recipe
from training_runs import equal, losses, tokenizer_recipe, weights

EMOJI = Path(__file__).parent / "data" / "emoji-mini.parquet"
SIZES = {
    "vq": {"vocab_size": 256, "code_dim": 8},
    "fsq": {"vocab_size": 240, "code_dim": 3, "levels": (8, 6, 5)},
    "lfq": {"vocab_size": 256, "code_dim": 8},
    "bsq": {"vocab_size": 256, "code_dim": 8},
}
BODY = {
    "channels": 16,
    "channel_multipliers": [1],
    "pixel_shuffle": 4,
    "num_blocks": 1,
    "latent_channels": 32,
    "norm_groups": 4,
}
ALONE = Workers(0, 1, torch.device("cpu"))


def quantizer(kind: str) -> VectorQuantizer | ScalarQuantizer | BinaryQuantizer:
    torch.manual_seed(0)
    made = build_quantizer(kind, **SIZES[kind])
    if isinstance(made, VectorQuantizer):
        torch.nn.init.normal_(made.embedding.weight)
    assert isinstance(made, VectorQuantizer | ScalarQuantizer | BinaryQuantizer)
    return made


def short_recipe(folder: Path, kind: str, tokenizer: dict[str, object], loss: dict[str, object], steps: int) -> Path:
    """A recipe of a tiny tokenizer on the small emoji, 32x32 pixels to 8x8 codes."""
    return tokenizer_recipe(
        folder,
        tokenizer={**BODY, **SIZES[kind], "quantizer": kind, **tokenizer},
        tokenizer_loss=loss,
        data={"source": str(EMOJI), "size": 32, "group": "hexcode"},
        batch_size=16,
        num_images=16 * steps,
        log_every=50,
        preview_every=1000,
        checkpoint_every=1000,
        ema_decay=0.9,
        optim={"learning_rate": 4e-3, "warmup_images": 160, "weight_decay": 0.0, "curve": "cosine"},
    )


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("vq", {"kmeans_steps": 5, "restart_every": 20}),
        pytest.param(
            "vq", {"kmeans_steps": 5, "restart_every": 20, "codebook_decay": 0.9}, marks=pytest.mark.slow, id="vq-decay"
        ),
        ("fsq", {}),
        ("lfq", {"entropy": 0.1}),
        ("bsq", {}),
    ],
)
def test_each_learns_real_pictures_without_collapse(tmp_path: Path, kind: str, loss: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no word of a collapse
        folder = run_recipe(str(short_recipe(tmp_path, kind, {}, loss, 100)), [f"run={tmp_path / 'run'}"])
    assert folder is not None
    run = folder.parent
    pictures = load_pictures(EMOJI, size=32).images.astype(np.float32)
    constant = psnr(float(np.square(pictures - pictures.mean(0)).mean()))  # what one code could at best
    assert losses(run, "heldout_psnr")[-1] > constant + 1.5
    assert losses(run, "heldout_usage")[-1] > 0.35
    assert losses(run, "heldout_perplexity")[-1] > 32
    tokenizer = load_tokenizer(folder)  # strictly, with the quantiser that its config names
    assert isinstance(tokenizer, ImageTokenizer)
    assert tokenizer.config.quantizer == kind
    assert losses(run, "heldout_dead_codes")[-1] < 0.65 * tokenizer.config.vocab_size


def test_a_collapse_is_told_once_with_what_to_change(tmp_path: Path) -> None:
    path = short_recipe(tmp_path, "vq", {"vocab_size": 2048, "l2_norm": False}, {}, 150)
    advice = r"set tokenizer\.l2_norm=true, tokenizer_loss\.kmeans_steps=10, tokenizer_loss\.restart_every=100"
    with pytest.warns(
        UserWarning, match=f"the codebook collapses: usage is only .* of 2048 codes .*{advice}"
    ) as caught:
        run_recipe(str(path), [f"run={tmp_path / 'run'}"])
    told = [str(warning.message) for warning in caught if "collapses" in str(warning.message)]
    assert len(told) == 1
    assert losses(tmp_path / "run", "warning") == told


def test_falling_usage_is_told() -> None:
    book = Codebook(VectorQuantizer(64, 4), CodebookConfig(), ALONE)
    said = []
    for step in range(300):
        codes = torch.arange(64) if step < 140 else torch.arange(64) % 20
        book.observe(torch.randn(1, 4, 64), codes[None])
        said.append(book.update(step, 300, torch.Generator()))
    assert [step for step, text in enumerate(said) if text] == [199]
    assert "usage has fallen from 100.0% to 31.2% after 200 steps, 20 of 64 codes in the last 50" in str(said[199])
    assert "set tokenizer_loss.kmeans_steps=10" in str(said[199])
    scalars = book.scalars()
    assert (float(scalars["dead_codes"]), float(scalars["usage"])) == (44, 20 / 64)


def test_a_trained_codebook_is_gone_on_from(tmp_path: Path) -> None:
    made = quantizer("vq")
    before = made.embedding.weight.detach().clone()
    book = Codebook(made, CodebookConfig(restart_every=4, kmeans_steps=2), ALONE, fresh=False)
    latents = made.decode(torch.arange(128)[None])  # half of the codes
    for step in range(9):
        assert torch.equal(made.embedding.weight, before)
        book.observe(latents, made.encode(latents))
        book.update(step, 100, torch.Generator())
        if step == 4:  # the others were idle for as long as it takes
            assert torch.equal(made.embedding.weight[:128], before[:128])
            assert not (made.embedding.weight[128:] == before[128:]).all(1).any()
            break
    first = run_recipe(
        str(short_recipe(tmp_path, "vq", {}, {"kmeans_steps": 1, "restart_every": 1}, 3)), [f"run={tmp_path / 'first'}"]
    )
    still = [f"init={first}", "optim.learning_rate=1e-12", "num_images=16", "tokenizer_loss.restart_every=9"]
    run_recipe(str(tmp_path / "tiny-tokenizer.yaml"), [f"run={tmp_path / 'second'}", *still])
    for name, tensor in weights(tmp_path / "second").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "first")[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("l2_norm", "config", "advice"),
    [
        (False, CodebookConfig(), "set causal_tokenizer.l2_norm=true, tokenizer_loss.kmeans_steps=10"),
        (
            True,
            CodebookConfig(restart_every=1000, kmeans_steps=1),
            "set a smaller causal_tokenizer.vocab_size, or lower",
        ),
    ],
)
def test_advice_names_the_group_of_the_tokenizer(l2_norm: bool, config: CodebookConfig, advice: str) -> None:
    book = Codebook(VectorQuantizer(64, 4, l2_norm=l2_norm), config, ALONE, group="causal_tokenizer")
    said = []
    for step in range(100):
        book.observe(torch.ones(1, 4, 8), torch.zeros(1, 8, dtype=torch.long))
        said.append(book.update(step, 1000, torch.Generator()) or "")
    assert advice in said[-1]
    assert not any(said[:-1])


@pytest.mark.parametrize("kind", SIZES)
def test_codes_in_training_are_those_of_encode_under_autocast(kind: str) -> None:
    made, latents = quantizer(kind), torch.randn(2, SIZES[kind]["code_dim"], 9, 7)
    plain = made.encode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        trained = made(latents)
        assert torch.equal(trained.codes, made.encode(latents))
    assert torch.equal(trained.codes, plain)
    torch.testing.assert_close(trained.latents, made.decode(plain), atol=1e-6, rtol=1e-5)
    half = latents.bfloat16()
    assert torch.equal(made(half).codes, made.encode(half))


def test_codes_do_not_depend_on_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on CUDA allows it; here its products are emulated: 10 bits of the mantissa of each factor."""
    made, latents = VectorQuantizer(4096, 4), torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(made.embedding.weight, generator=torch.Generator().manual_seed(1))
    expected = made.encode(latents)
    plain = torch.addmm

    def cut(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(torch, "addmm", lambda base, x, y, **more: plain(base, cut(x), cut(y), **more))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rows = F.normalize(latents, dim=1).movedim(1, -1).flatten(0, 2)
        shortened = torch.addmm(torch.zeros(4096), rows, made.codebook().T, alpha=-2.0).argmin(-1)
        assert (shortened != expected.flatten()).sum() > 50, "the emulation does nothing"
        assert torch.equal(made.encode(latents), expected)
        assert torch.equal(made(latents).codes, expected)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", SIZES)
def test_entries_are_their_own_codes_and_gradients_pass(kind: str) -> None:
    made = quantizer(kind)
    codes = torch.arange(SIZES[kind]["vocab_size"])
    entries = made.entries(codes)
    assert len(entries.unique(dim=0)) == len(codes)
    assert torch.equal(made.nearest(entries.detach()), codes)
    latents = torch.randn(2, SIZES[kind]["code_dim"], 3, 3, requires_grad=True)
    made(latents).latents.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.any()


def test_fsq_rounds_to_the_nearest_of_all_lattice_points() -> None:
    made, latents = quantizer("fsq"), torch.randn(4, 3, 50) * 2
    assert isinstance(made, ScalarQuantizer)
    grid = torch.cartesian_prod(*(torch.arange(level) - level // 2 for level in made.levels)) / torch.tensor([4, 3, 2])
    scale = torch.tensor([4, 3, 2])  # levels are one apart on the lattice, whatever an entry's scale
    points = made.points(latents)
    expected = grid[torch.cdist((points * scale).flatten(0, 1), grid * scale).argmin(1)]
    torch.testing.assert_close(made.entries(made.encode(latents)).flatten(0, 1), expected)
    ends = made.encode(torch.tensor([[-99.0], [99.0]]).expand(2, 3).T[None])
    assert ends.tolist() == [[0, made.vocab_size - 1]]


def test_fsq_bounds_latents_as_the_paper_does() -> None:
    """(L - 1) (1 + 0.001) / 2 tanh(z + shift) - offset, where even L are off by a half and 0 stays at 0."""
    made = ScalarQuantizer((8, 5))
    for value in (-99.0, -0.7, 0.0, 0.4, 99.0):
        even = 3.5035 * math.tanh(value + math.atanh(0.5 / 3.5035)) - 0.5
        odd = 2.002 * math.tanh(value)
        found = made.points(torch.full((1, 2, 1), value))[0, 0]
        torch.testing.assert_close(found, torch.tensor([even / 4, odd / 2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spherical", [False, True])
def test_binary_codes_are_signs_and_their_entropies_are_those_of_the_softmax(spherical: bool) -> None:
    made, latents = BinaryQuantizer(4, spherical=spherical), torch.randn(3, 4, 5)
    points = F.normalize(latents, dim=1) if spherical else latents
    bits = (points > 0).long()
    assert torch.equal(made.encode(latents), (bits * torch.tensor([1, 2, 4, 8])[:, None]).sum(1))
    entries = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4))) * made.scale
    if spherical:
        torch.testing.assert_close(entries.norm(dim=1), torch.ones(16))
    squares = torch.cdist(points.movedim(1, -1).flatten(0, 1), entries).square()
    shares = torch.softmax(-squares * 3.0 / (4 * made.scale**2), 1)

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1)

    single, joint = made.entropies(latents, sharpness=3.0)
    torch.testing.assert_close(single, entropy(shares).mean())
    torch.testing.assert_close(joint, entropy(shares.mean(0)))


def test_entropy_of_halves_that_share_their_mean_is_that_of_the_whole() -> None:
    """Two processes with gradients averaged, as DDP does, against one process with both halves."""
    made, latents = BinaryQuantizer(11, spherical=True), torch.randn(8, 11, 6, requires_grad=True)
    _, whole = made.entropies(latents)
    (wanted,) = torch.autograd.grad(whole, latents)
    halves = [half.detach().requires_grad_() for half in latents.chunk(2)]
    means: list[list[Tensor]] = [[], []]
    for side, half in enumerate(halves):  # what each would contribute
        made.entropies(half, mean=lambda share, kept=means[side]: kept.append(share) or share)
    both = [(first + second) / 2 for first, second in zip(*means, strict=True)]
    for side, half in enumerate(halves):
        shares = iter(both)
        _, joint = made.entropies(half, mean=lambda share, shares=shares: next(shares))  # noqa: ARG005
        torch.testing.assert_close(joint, whole)
        (found,) = torch.autograd.grad(joint, half)
        torch.testing.assert_close(found / 2, wanted.chunk(2)[side])


@torch.no_grad()
def test_a_large_vocabulary_costs_no_table() -> None:
    for kind, sizes in (("bsq", {"code_dim": 18}), ("fsq", {"code_dim": 6, "levels": (8,) * 6})):
        made = build_quantizer(kind, 2**18, **sizes)
        codes = made.encode(torch.randn(2, sizes["code_dim"], 40, 40) * 2)
        assert codes.max() > 2**17
        assert not list(made.parameters())
        assert torch.equal(made.nearest(made.entries(codes)), codes)


def test_kmeans_finds_separated_clusters_and_sums_over_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(8, 4, generator=generator), dim=1)
    latents = (centres.repeat(50, 1) + 0.01 * torch.randn(400, 4, generator=generator)).T[None]
    made = VectorQuantizer(8, 4)
    config = CodebookConfig(kmeans_steps=3)
    book = Codebook(made, config, ALONE)
    for step in range(3):
        book.observe(latents, made.encode(latents))
        book.update(step, 10, generator)
    points = made.points(latents).flatten(0, 1)
    apart = torch.cdist(points, made.codebook()).amin(1).mean()
    drawn = torch.stack([torch.cdist(points, points[torch.randperm(400)[:8]]).amin(1).mean() for _ in range(20)])
    assert apart < drawn.mean()  # better than entries drawn from the latents
    assert torch.bincount(made.encode(latents).flatten(), minlength=8).min() > 0
    again, other = VectorQuantizer(8, 4), VectorQuantizer(8, 4)
    again.load_state_dict(made.state_dict())
    other.load_state_dict(made.state_dict())
    again.cluster(latents)
    second = other.members(latents[..., 200:], other.encode(latents[..., 200:]))
    parts = iter(second)
    other.cluster(latents[..., :200], lambda share: share + next(parts))
    torch.testing.assert_close(again.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("loss", [{"kmeans_steps": 3, "codebook_decay": 0.9, "restart_every": 3, "perceptual": 0.1}])
def test_a_run_goes_on_bit_for_bit_with_the_state_of_its_codebook(tmp_path: Path, loss: dict[str, object]) -> None:
    path = short_recipe(tmp_path, "vq", {}, loss, 6)
    every = ["checkpoint_every=2", "log_every=1", "preview_every=5"]
    run_recipe(str(path), [f"run={tmp_path / 'straight'}", *every])

    def crash(*_: object) -> dict[str, float]:
        raise RuntimeError("power cut")

    broken = [f"run={tmp_path / 'broken'}", *every]
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(str(path), broken, metrics=crash)
    run_recipe(str(path), broken)
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "broken"))
    for name in ("loss", "usage", "perplexity", "perceptual"):
        assert losses(tmp_path / "straight", name) == losses(tmp_path / "broken", name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "fvq"}, "quantizer must be one of vq, fsq, lfq, bsq, not 'fvq'"),
        ({"quantizer": "fsq"}, r"needs levels of at least 2 each, such as \[8, 8, 8, 5, 5\]"),
        ({"quantizer": "fsq", "levels": (8, 8)}, "make vocab_size 64 and code_dim 2, not 16384 and 8"),
        ({"quantizer": "bsq"}, "code_dim 8 makes vocab_size 256, not 16384"),
        ({"levels": (8, 8)}, "are of quantizer fsq, not of vq"),
    ],
)
def test_sizes_that_do_not_agree_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTokenizerConfig(**changes)


def test_a_moving_average_follows_its_latents() -> None:
    made = VectorQuantizer(2, 2, l2_norm=False)
    made.embedding.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    book = Codebook(made, CodebookConfig(codebook_decay=0.8), ALONE)
    latents = torch.tensor([[2.0, 4.0, -3.0], [1.0, 1.0, 1.0]])[None]
    book.observe(latents, made.encode(latents))
    book.update(0, 10, torch.Generator())
    # A fifth of the way from one latent at each entry to the two at (2, 1) and (4, 1) and the one at (-3, 1).
    torch.testing.assert_close(made.embedding.weight.data, torch.tensor([[2 / 1.2, 0.4 / 1.2], [-1.4, 0.2]]))
    assert not made.embedding.weight.requires_grad
    assert float(book.scalars()["usage"]) == 1.0


def test_each_loss_moves_its_own_side() -> None:
    """The codebook loss pulls entries to latents, the commitment loss latents to entries."""
    made, latents = quantizer("vq"), torch.randn(2, 8, 5, requires_grad=True)
    found = made(latents)
    sides = (made.embedding.weight, latents)
    for loss, moved in ((found.codebook_loss, (True, False)), (found.commitment_loss, (False, True))):
        gradients = torch.autograd.grad(loss, sides, retain_graph=True, allow_unused=True)
        assert tuple(gradient is not None and bool(gradient.any()) for gradient in gradients) == moved
    torch.testing.assert_close(found.codebook_loss, found.commitment_loss)


def used(book: Codebook, codes: list[int], steps: range, num_steps: int = 100) -> None:
    """Let the codes be used, each by a latent at its entry."""
    made = book.quantizer
    for step in steps:
        book.observe(made.decode(torch.tensor([codes])), torch.tensor([codes]))
        book.update(step, num_steps, torch.Generator().manual_seed(step))


def test_what_is_used_stays_and_nothing_moves_after_the_restarts() -> None:
    made = quantizer("vq")
    before = made.embedding.weight.detach().clone()
    book = Codebook(made, CodebookConfig(restart_every=1, restart_until=0.5), ALONE, fresh=False)
    used(book, [1, 2], range(4), 10)
    assert torch.equal(made.embedding.weight[1:3], before[1:3]), "used in this very step"
    assert not (made.embedding.weight[3:] == before[3:]).all(1).any()
    moved = made.embedding.weight.detach().clone()
    used(book, [1, 2], range(6, 9), 10)
    assert torch.equal(made.embedding.weight, moved), "after half of the training"


def test_perplexity_forgets() -> None:
    book = Codebook(VectorQuantizer(8, 2), CodebookConfig(warn_usage=0), ALONE)
    used(book, [0, 0, 0, 0], range(400))
    used(book, [0, 1, 2, 3], range(400, 800))
    assert float(book.scalars()["perplexity"]) == pytest.approx(4, rel=0.01)


def test_averages_of_entries_that_are_not_used_stay_and_begin_anew_where_they_are_put() -> None:
    made = VectorQuantizer(3, 2, l2_norm=False)
    made.embedding.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]]))
    before = made.embedding.weight.detach().clone()
    book = Codebook(made, CodebookConfig(codebook_decay=0.5), ALONE, fresh=False)
    used(book, [0, 1], range(20))  # the last one's average is of a millionth of a latent
    torch.testing.assert_close(made.embedding.weight.detach(), before)
    book = Codebook(made, CodebookConfig(codebook_decay=0.5, restart_every=5), ALONE, fresh=False)
    used(book, [0, 1], range(6))
    put = made.embedding.weight.detach().clone()
    assert put[2].tolist() in put[:2].tolist(), "on a latent of the batch"
    used(book, [0, 1], range(6, 9))
    torch.testing.assert_close(made.embedding.weight.detach(), put)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_codes_are_those_of_the_nearest_entries(l2_norm: bool) -> None:
    """Entries of very different lengths: without `l2_norm` the longest is not the nearest for being long."""
    generator = torch.Generator().manual_seed(0)
    made, latents = VectorQuantizer(64, 4, l2_norm=l2_norm), torch.randn(2, 4, 50, generator=generator)
    made.embedding.weight.data = torch.randn(64, 4, generator=generator) * torch.arange(64)[:, None] / 16
    points, entries = latents.movedim(1, -1), made.embedding.weight.detach()
    if l2_norm:
        points, entries = F.normalize(points, dim=-1), F.normalize(entries, dim=-1)
    expected = torch.linalg.vector_norm(points[:, :, None] - entries, dim=-1).argmin(-1)
    assert torch.equal(made.encode(latents), expected)
    torch.testing.assert_close(made.decode(expected), entries[expected].movedim(-1, 1))


def test_a_step_of_kmeans_moves_entries_to_the_means_of_their_latents() -> None:
    """Of one latent too; an entry without any stays."""
    made = VectorQuantizer(3, 2, l2_norm=False)
    made.embedding.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 9.0]]))
    latents = torch.tensor([[2.0, 4.0, -3.0], [1.0, -1.0, 1.0]])[None]
    assert made.cluster(latents).tolist() == [2, 1, 0]
    assert made.embedding.weight.tolist() == [[3.0, 0.0], [-3.0, 1.0], [0.0, 9.0]]
