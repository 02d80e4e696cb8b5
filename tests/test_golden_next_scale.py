"""VAR's transformer and tokenizer, converted, give the numbers that the published code gives with the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_fixtures import Fixture, fixtures
from nar.condition import ClassCondition
from nar.convert import Checkpoint
from nar.convert.next_scale import multiscale_tokenizer_state, next_scale_state
from nar.model import Transformer
from nar.sampling import Sampling, generate
from nar.scales import ScaleSums, smoother
from nar.tokenizer.multiscale import MultiScaleTokenizer
from test_golden_models import decoded_logits

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-4, "rtol": 0.0}
INPUTS = {"atol": 1e-5, "rtol": 0.0}
GRADIENTS = {  # published names, and what is ours
    "word_embed.weight": "tokens.weight",
    "class_emb.weight": "classes.weight",
    "lvl_embed.weight": "levels",
    "head.bias": "output_bias",
    "head_nm.ada_lin.1.bias": "modulation.last.bias",
    "blocks.0.attn.q_bias": "blocks.0.attention.query_bias",
    "blocks.0.attn.v_bias": "blocks.0.attention.value_bias",
    "blocks.1.ffn.fc2.bias": "blocks.1.feed_forward.down.bias",
    "blocks.0.attn.scale_mul_1H11": "blocks.0.attention.log_scale",
    "blocks.0.ada_lin.1.bias": "modulation.blocks.0.bias",
    "shared_ada_lin.1.bias": "modulation.blocks.0.bias",
}


def sums_of(fixture: Fixture, prefix: str = "vae.", source: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Codebook, kernels and biases of the quantiser under its published names."""
    tensors = fixture.io if source is None else source
    phi = f"{prefix}quantize.quant_resi.qresi_ls"
    kernels, biases = (
        torch.stack([tensors[f"{phi}.{index}.{part}"] for index in range(4)]) for part in ("weight", "bias")
    )
    found = {"codebook": tensors[f"{prefix}quantize.embedding.weight"], "kernels": kernels, "biases": biases}
    return {name: tensor.float() for name, tensor in found.items()}


def transformer(fixture: Fixture, change: float = 1.0) -> Transformer:
    weights = {name: w * change if w.is_floating_point() else w for name, w in (fixture.weights or {}).items()}
    config, state = next_scale_state(
        Checkpoint(weights, {}, fixture.name), sums_of(fixture), num_heads=fixture.meta["config"]["num_heads"]
    )
    assert config.scales == tuple(fixture.meta["config"]["patch_nums"])
    model = Transformer(config)
    model.load_state_dict({name: parts.tensor() for name, parts in state.items()})
    return model.eval()


def tokenizer(fixture: Fixture, change: float = 1.0) -> MultiScaleTokenizer:
    weights = {name: (w * change).to(w.dtype) for name, w in (fixture.weights or {}).items()}
    config, state = multiscale_tokenizer_state(
        Checkpoint(weights, {}, fixture.name), scales=fixture.meta["config"]["patch_nums"]
    )
    made = MultiScaleTokenizer(config)
    made.load_state_dict({name: parts.tensor().float() for name, parts in state.items()})
    return made.eval()


def conditions(fixture: Fixture) -> tuple[ClassCondition, ClassCondition]:
    labels = fixture.io["labels"]
    return ClassCondition(labels), ClassCondition(torch.full_like(labels, -1))


def check_training(fixture: Fixture, model: Transformer) -> None:
    io, (condition, null) = fixture.io, conditions(fixture)
    codes = io["train.tokens"]
    torch.testing.assert_close(
        model.sums(codes, range(model.layout.schedule.num_steps - 1)), io["train.var_input"], **INPUTS
    )
    logits = model(codes, condition)
    torch.testing.assert_close(logits, io["train.logits"], **CLOSE)
    torch.testing.assert_close(model.hidden(codes, condition), io["train.head_input"], **CLOSE)
    losses = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    torch.testing.assert_close(losses.mean().reshape(1), io["train.loss"], **CLOSE)
    each = [part.mean() for part in losses.split(model.layout.schedule.fronts, 1)]
    torch.testing.assert_close(torch.stack(each), io["train.loss_per_scale"], **CLOSE)
    torch.testing.assert_close(model(codes, null), io["train.null_logits"], **CLOSE)


def check_tokenizer(fixture: Fixture, made: MultiScaleTokenizer) -> None:
    io, sums = fixture.io, made.quantizer.sums
    with torch.no_grad():
        torch.testing.assert_close(made.latents(io["image"]), io["f"], **CLOSE)
        codes = made.encode(io["image"])
        own = codes.split([side * side for side in sums.sides], 1)
        for scale, (part, total) in enumerate(zip(own, sums.totals(codes), strict=True)):
            assert torch.equal(part, io[f"idx.{scale}"])
            torch.testing.assert_close(total, io[f"f_hat.{scale}"], **INPUTS)
        torch.testing.assert_close(made.inputs(codes), io["var_input"], **INPUTS)
        torch.testing.assert_close(made.decode(codes), io["recon_unclamped"], **CLOSE)
        coarse = torch.where(
            torch.arange(codes.shape[1]) < sums.starts(3), codes, -1
        )  # a picture that is not whole yet
        torch.testing.assert_close(made.decode(coarse).clamp(-1, 1), io["recon_scale.2"], **CLOSE)
        random = torch.cat([io[f"idx_random.{scale}"] for scale in range(len(sums.sides))], 1)
        torch.testing.assert_close(made.decode(random), io["decoded_random"], **CLOSE)
        torch.testing.assert_close(made.inputs(random), io["var_input_random"], **INPUTS)
    trained = made(io["image"])
    torch.testing.assert_close(trained.pixels, io["train.recon"], **CLOSE)
    loss = trained.codebook_loss + fixture.meta["config"]["beta"] * trained.commitment_loss
    torch.testing.assert_close(loss.reshape(1), io["train.vq_loss"], **INPUTS)
    made.zero_grad()
    (trained.pixels.square().mean() + loss).backward()
    for published, ours in (
        ("encoder.conv_in.weight", made.encoder.conv_in.weight.grad),
        ("quantize.embedding.weight", sums.codebook.grad),
        ("quantize.quant_resi.qresi_ls.0.weight", sums.kernels.grad[0]),
        ("quant_conv.weight", made.to_code.weight.grad),
        ("post_quant_conv.weight", made.from_code.weight.grad),
    ):
        torch.testing.assert_close(ours, io[f"train.grad.{published}"], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("fixture", fixtures("var"), ids=str)
def test_training_logits_losses_and_gradients(fixture: Fixture) -> None:
    model, io = transformer(fixture), fixture.io
    with torch.no_grad():
        check_training(fixture, model)
    logits = model(io["train.tokens"], conditions(fixture)[0])
    F.cross_entropy(logits.flatten(0, 1), io["train.tokens"].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for published, ours in GRADIENTS.items():
        if f"train.grad.{published}" in io:
            torch.testing.assert_close(gradients[ours], io[f"train.grad.{published}"].view_as(gradients[ours]), **CLOSE)
            compared += 1
    assert compared == len([name for name in io if name.startswith("train.grad.")]) - 1 - (
        model.config.modulation == "shared"
    )
    torch.testing.assert_close(gradients["positions"][:1], io["train.grad.pos_start"][0], **CLOSE)
    if model.config.modulation == "shared":
        torch.testing.assert_close(
            gradients["modulation.constants"][0], io["train.grad.blocks.0.ada_gss"][0, 0], **CLOSE
        )


@torch.no_grad()
@pytest.mark.parametrize("fixture", fixtures("var"), ids=str)
def test_every_block(fixture: Fixture) -> None:
    model, seen = transformer(fixture), []
    hooks = [block.register_forward_hook(lambda *call: seen.append((call[1][0], call[2]))) for block in model.blocks]
    model(fixture.io["train.tokens"], conditions(fixture)[0])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen[0][0], fixture.io["train.embedded"], **CLOSE)
    for index, (_, output) in enumerate(seen):
        torch.testing.assert_close(output, fixture.io[f"train.block.{index}"], **CLOSE)


@pytest.mark.parametrize("fixture", fixtures("var"), ids=str)
def test_the_norm_has_the_published_epsilon(fixture: Fixture) -> None:
    """One of 1e-5 changes logits by 1.4e-5 only, so rows of the size of the epsilon tell: layer norms of x are
    x / sqrt(1 + eps / var)."""
    model = transformer(fixture)
    assert model.config.norm_eps == fixture.meta["config"]["norm_eps"] == 1e-6
    x = torch.randn(1, 1, model.config.dim) * 1e-3
    block, seen = model.blocks[0], []
    hook = block.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(x, None, None, None, 0, (0.0, 0.0), torch.zeros(1, 6, model.config.dim))
    hook.remove()
    centred = (x - x.mean()).double()
    expected = centred / (centred.square().mean() + 1e-6).sqrt()
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=0)
    wrong = transformer(fixture)
    wrong.config = dataclasses.replace(wrong.config, norm_eps=1e-5)
    states = [x.expand(1, 1, -1)]
    modulations = [torch.zeros(1, 2, model.config.dim)]
    rows = model.layout.source[:, :1], model.layout.weight[:, :1]
    last, changed = (made.readout(states, *rows, modulations) for made in (model, wrong))
    torch.testing.assert_close(last.double(), expected, atol=1e-5, rtol=0)
    assert float((last - changed).abs().max()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("fixture", fixtures("var"), ids=str)
def test_greedy_codes_and_logits_of_both_halves(fixture: Fixture) -> None:
    model, io, (condition, null) = transformer(fixture), fixture.io, conditions(fixture)
    codes = generate(model, condition, Sampling(temperature=0))
    assert torch.equal(codes, io["greedy.tokens"])
    torch.testing.assert_close(decoded_logits(model, codes, condition), io["greedy.logits"], **CLOSE)
    order = model.layout.schedule
    sampling = Sampling(temperature=0, guidance_scale=1 + fixture.meta["cfg"], guidance_curve="linear")
    assert [sampling.guidance_at(front, order) for front in range(order.num_steps)] == pytest.approx(
        fixture.meta["guidance_scale_per_scale"]
    )
    guided = generate(model, condition, sampling)
    assert torch.equal(guided, io["greedy_cfg.tokens"])
    halves = [decoded_logits(model, guided, each) for each in (condition, null)]
    torch.testing.assert_close(halves[0], io["greedy_cfg.logits_cond"], **CLOSE)
    torch.testing.assert_close(halves[1], io["greedy_cfg.logits_uncond"], **CLOSE)
    for run, made in (("greedy", codes), ("greedy_cfg", guided)):
        *_, total = model.sums.totals(made)
        torch.testing.assert_close(total, io[f"{run}.f_hat"], **INPUTS)
        torch.testing.assert_close(model.sums(made, range(order.num_steps - 1)), io[f"{run}.var_input"], **INPUTS)


@torch.no_grad()
@pytest.mark.parametrize("fixture", fixtures("var"), ids=str)
def test_pictures_of_greedy_codes(fixture: Fixture) -> None:
    if not fixture.meta["vae"]:
        pytest.skip("its decoder was not recorded")
    (other,) = [found for found in fixtures("var-vq") if found.name == fixture.meta["vae"]]
    for run in ("greedy", "greedy_cfg"):
        pixels = tokenizer(other).decode(fixture.io[f"{run}.tokens"]).clamp(-1, 1)
        torch.testing.assert_close((pixels + 1) / 2, fixture.io[f"{run}.image"], **CLOSE)


@pytest.mark.parametrize("fixture", fixtures("var-vq"), ids=str)
def test_tokenizer(fixture: Fixture) -> None:
    check_tokenizer(fixture, tokenizer(fixture))


@torch.no_grad()
@pytest.mark.parametrize("fixture", fixtures("var-vq"), ids=str)
def test_published_scales_and_their_convolutions(fixture: Fixture) -> None:
    io, sides = fixture.io, fixture.meta["published_patch_nums"]
    assert [smoother(scale, len(sides)) for scale in range(len(sides))] == fixture.meta["published_phi_index"]
    quantizer = tokenizer(fixture).quantizer
    quantizer.sums.sides = tuple(sides)
    codes = quantizer.encode(io["published.f"])
    assert torch.equal(codes, torch.cat([io[f"published.idx.{scale}"] for scale in range(len(sides))], 1))
    torch.testing.assert_close(quantizer.decode(codes), io["published.f_hat"], **INPUTS)
    torch.testing.assert_close(quantizer.sums(codes, range(len(sides) - 1)), io["published.var_input"], **INPUTS)


def test_convolutions_of_all_recorded_numbers_of_scales() -> None:
    for text in ("0 2 3", "0 1 2 3", "0 1 2 2 3", "0 0 1 2 3 3", "0 0 1 1 2 2 3 3"):
        table = [int(number) for number in text.split()]
        assert [smoother(scale, len(table)) for scale in range(len(table))] == table
    for text in ("0011122333", "001122233", "0001112222333", "00011112222333"):
        assert "".join(str(smoother(scale, len(text))) for scale in range(len(text))) == text


@pytest.mark.parametrize("fixture", fixtures("var", "var-vq"), ids=str)
def test_weights_changed_by_one_percent_are_noticed(fixture: Fixture) -> None:
    check, made = (check_training, transformer) if fixture.meta["kind"] == "var" else (check_tokenizer, tokenizer)
    with pytest.raises(AssertionError):
        check(fixture, made(fixture, change=1.01))


@torch.no_grad()
def test_sums_at_published_width_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    sums = ScaleSums((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 4096, 32, learned=False)
    sums.codebook.normal_()
    codes = torch.randint(4096, (8, 680))
    together = sums(codes, range(9))
    for size in (1, 3):
        assert torch.equal(sums(codes[:size], range(9)), together[:size])
