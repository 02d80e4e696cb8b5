"""The fast paths give what the plain ones give: packed weights, cached decoding, sessions, steps for CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import LAYOUTS, make_condition, make_model
from nar import Pipeline, Sampling, Transformer, generate, generate_fronts
from nar.attention import flex_takes
from nar.condition import Condition
from nar.precision import PRECISIONS, PackedLinear, convert
from nar.sampling import Session, last_guided, step

# How far logits may move when nothing but the order of sums differs, and against float32 weights.
ROUNDING = {"float32": 2e-5, "float16": 3e-3, "int8": 0.25, "bfloat16": 0.3}  # float16: that of cached keys and values
WEIGHTS = {"float32": 2e-5, "float16": 2e-2, "int8": 0.6, "bfloat16": 0.4}
SAMPLING = Sampling(guidance_scale=2.0, temperature=0.9, top_k=20, top_p=0.95)


def packed(layout: str, precision: str) -> Transformer:
    if precision in ("float16", "int8") and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no FBGEMM here")
    return convert(make_model(layout), precision, "cpu")


@torch.inference_mode()
def cached_logits(model: Transformer, codes: Tensor, condition: Condition, together: int = 1) -> Tensor:
    """Logits (B, N, V) in generation order as decoding computes them, `together` fronts at a time."""
    embedded, key_mask = model.embed(condition)
    cache, tokens, schedule = model.new_cache(len(embedded)), model.in_order(codes), model.layout.schedule
    hidden = [model.prefill(embedded, key_mask, cache)]
    for first in range(0, schedule.num_steps - 1, together):
        fronts = range(first, min(first + together, schedule.num_steps - 1))
        hidden.append(model.decode(tokens[:, : schedule.front(fronts[-1]).stop], fronts, cache))
    return model.logits(torch.cat(hidden, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cached_logits_equal_forward(layout: str, precision: str) -> None:
    model, plain = packed(layout, precision), make_model(layout)
    condition = make_condition(model, 3)
    codes = torch.randint(model.config.vocab_size, (3, *model.config.grid))
    with torch.inference_mode():
        whole = model(codes, condition).flatten(1, -2)[:, model.layout.order]
        exact = plain(codes, condition).flatten(1, -2)[:, model.layout.order]
    scale = float(exact.abs().max())
    for together in (1, 3):
        cached = cached_logits(model, codes, condition, together)
        assert float((cached - whole).abs().max()) <= ROUNDING[precision] * scale
    assert float((whole - exact).abs().max()) <= WEIGHTS[precision] * scale


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_flex_attention_equals_the_dense_mask(layout: str) -> None:
    model = make_model(layout)
    condition = make_condition(model, 3)
    codes = torch.randint(model.config.vocab_size, (3, *model.config.grid))
    dense, flex = (model.hidden(codes, condition, flex=choice) for choice in (False, True))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)


class NoNumbersBesideTensors(TorchFunctionMode):
    """Refuses to index with a number and a tensor, as PyTorch 2.6 and 2.7 do in the mask of FlexAttention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            kinds = {isinstance(index, Tensor) for index in args[1] if isinstance(index, Tensor | int)}
            assert len(kinds) < 2, f"indexed with {args[1]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["nar", "text-published", "frames"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_the_mask_of_flex_attention_is_indexed_by_tensors_alone(
    layout: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = make_model(layout), []

    def checked(sees, *sizes):
        with NoNumbersBesideTensors():
            asked.append(bool(sees(*torch.zeros(4, dtype=torch.long))))
        return create_block_mask(sees, *sizes)

    monkeypatch.setattr("nar.model.create_block_mask", checked)
    codes = torch.randint(model.config.vocab_size, (batch, *model.config.grid))
    model.hidden(codes, make_condition(model, batch), flex=True)
    assert asked == [True], "the first position sees itself"


def test_flex_attention_takes_heads_of_its_kernels_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, sizes in (
        ("2.7.1+cpu", [16, 64, 128]),
        ("2.8.0", [16, 48, 64, 96, 128]),
        ("2.13.0", [16, 48, 64, 96, 128]),
    ):
        monkeypatch.setattr(torch, "__version__", version)
        assert [size for size in (2, 8, 16, 48, 64, 96, 128) if flex_takes(size)] == sizes


def test_flex_attention_skips_blocks() -> None:
    """As many as without a condition (field notes): 21 of 64 for 32x32 tokens and for 4x16x16."""
    for grid in ((32, 32), (4, 16, 16)):
        model = make_model("nar", grid=grid)
        mask = model.block_mask(model.config.num_condition + len(model.layout.slots) - 1, None)
        assert mask.to_dense().eq(0).sum() == 21


@pytest.mark.parametrize("layout", ["nar", "text-published"])
@torch.inference_mode()
def test_flex_attention_is_compiled_three_times_whatever_the_sizes_of_batches(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # what is compiled anew is decided alike on a GPU
    monkeypatch.setattr("nar.attention.flex_attention", torch.compile(flex_attention, backend=counter))
    model, counts = make_model(layout), []
    for batch in (8, 8, 5, 3, 7, 2, 6, 1, 4, 1):
        codes = torch.zeros(batch, *model.config.grid, dtype=torch.long)
        model.hidden(codes, make_condition(model, batch), flex=True)
        counts.append(counter.frame_count)
    assert counts == [1, 1, *[2] * 5, *[3] * 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: FlexAttention has no gradients on a CPU")
def test_flex_attention_gradients_equal_the_dense_mask() -> None:
    model = make_model("nar", grid=(18, 18)).to("cuda")
    condition, codes = make_condition(model, 2), torch.randint(24, (2, 18, 18), device="cuda")
    gradients = []
    for choice in (False, True):
        model.zero_grad()
        model.hidden(codes, condition, flex=choice).square().sum().backward()
        gradients.append(model.blocks[0].attention.qkv.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", ["nar", "raster", "par", "text-published", "video"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_same_tokens_at_any_batch_size(layout: str, precision: str) -> None:
    model = packed(layout, precision)
    condition = make_condition(model, 8)
    together = generate(model, condition, SAMPLING, seed=5)
    for count in (1, 3):
        assert torch.equal(generate(model, condition.rows(slice(count)), SAMPLING, seed=5), together[:count])


def test_packed_float32_draws_what_plain_weights_draw() -> None:
    plain = make_model("nar")
    condition = make_condition(plain, 4)
    drawn = generate(packed("nar", "float32"), condition, SAMPLING, seed=2)
    assert torch.equal(drawn, generate(plain, condition, SAMPLING, seed=2))


@pytest.mark.parametrize(
    ("sampling", "fed"),
    [
        (Sampling(guidance_scale=2.0), [4] * 7),
        (Sampling(guidance_scale=2.0, guidance_interval=3), [4, 4, 4, 2, 2, 2, 2]),  # 0, 1, 3, 6... are generated
        (Sampling(guidance_scale=2.0, guidance_interval=0), [4, 2, 2, 2, 2, 2, 2]),
        (Sampling(guidance_scale=2.0, guidance_interval=0, guidance_curve="linear"), [2] * 7),  # 1.0 at the first front
        (Sampling(guidance_scale=2.0, guidance_interval=1, guidance_curve="linear"), [4, 4, 2, 2, 2, 2, 2]),
        (Sampling(guidance_scale=1.0, guidance_curve="cosine"), [2] * 7),
    ],
)
def test_the_unconditional_half_is_fed_while_it_is_needed(sampling: Sampling, fed: list[int]) -> None:
    model = make_model("nar")
    session, rows_fed = Session(model), []
    for _ in generate_fronts(model, make_condition(model, 2), sampling, session=session):
        rows_fed.append(session.buffers(2, fed[0], False).cache.batch_size)
    assert rows_fed == fed


@pytest.mark.parametrize("layout", ["nar", "text", "frames"])
def test_a_session_changes_nothing(layout: str) -> None:
    model = make_model(layout)
    session = Session(model)
    for batch, sampling in [(2, Sampling()), (3, Sampling(temperature=0)), (2, Sampling(top_k=3)), (1, Sampling())]:
        condition = make_condition(model, batch)
        for seed in (0, 1):
            alone = generate(model, condition, sampling, seed=seed)
            assert torch.equal(generate(model, condition, sampling, seed=seed, session=session), alone)


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(temperature=0)])
def test_drawing_in_parts_changes_nothing(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("nar")
    condition = make_condition(model, 3)
    whole = generate(model, condition, sampling, seed=5)
    monkeypatch.setattr("nar.sampling.MOST_LOGITS_CPU", 2 * model.config.vocab_size)  # two rows at once
    assert torch.equal(generate(model, condition, sampling, seed=5), whole)


def test_a_session_keeps_its_memory_and_forgets_what_was_drawn() -> None:
    model = make_model("nar")
    condition, session = make_condition(model, 2), Session(model)
    interval = Sampling(guidance_scale=3.0, guidance_interval=4)
    first = generate(model, condition, interval, session=session)
    address = session.buffers(2, 4, False).cache.keys.data_ptr()
    known = torch.full_like(first, -1)
    known[:, 1] = 7
    generate(model, condition, interval, session=session, known=known)
    assert torch.equal(generate(model, condition, interval, session=session), first)
    assert session.buffers(2, 4, False).cache.keys.data_ptr() == address


def test_a_session_runs_one_generation_at_a_time() -> None:
    model = make_model("nar")
    condition, session = make_condition(model, 2), Session(model)
    running = generate_fronts(model, condition, session=session)
    next(running)
    generate(model, condition, session=session)
    with pytest.raises(RuntimeError, match="one session for each"):
        next(running)
    with pytest.raises(ValueError, match="another model"):
        generate(make_model("nar"), condition, session=session)


def test_graphs_and_compilation_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="compiled is for GPUs"):
        Session(packed("nar", "int8"), compiled=True)
    with pytest.raises(ValueError, match="cuda"):
        Session(make_model("nar"), graphs=True)


class Operators(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_can_be_recorded(layout: str) -> None:
    """It is what eager decoding runs, and holds nothing that waits for a GPU: no look at values, no data from here."""
    model = make_model(layout)
    condition = make_condition(model, 2)
    guided = Sampling(guidance_scale=2.0, guidance_interval=3, top_k=5, top_p=0.9)
    sampling = guided if model.config.num_classes or model.config.text_dim else Sampling(top_k=5, top_p=0.9)
    expected = generate(model, condition, sampling)
    session = Session(model)
    generate(model, condition, sampling, session=session)
    rows = 4 if last_guided(sampling, model.layout.schedule) >= 0 else 2
    buffers = session.buffers(2, rows, model.embed(condition)[1] is not None)
    with torch.inference_mode(), Operators() as ran:
        buffers.tokens.fill_(-1)
        for front in range(model.layout.schedule.num_steps):
            step(model, buffers, sampling, front)
    assert torch.equal(model.in_raster(buffers.tokens), expected)
    waiting = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "is_nonzero", "unique", "masked_select")
    assert [name for name in sorted(ran.names) if name.removeprefix("aten::").split(".")[0] in waiting] == []
    assert "aten::searchsorted.Tensor" in ran.names  # the net holds water


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_equal_eager_byte_for_byte(layout: str) -> None:
    model = make_model(layout).to("cuda")
    condition = make_condition(model, 2)
    eager, graphs = Session(model, graphs=False), Session(model, graphs=True)
    for seed in (0, 1):
        drawn = generate(model, condition, seed=seed, session=graphs)
        assert graphs.graphs, "recording failed"
        assert torch.equal(drawn, generate(model, condition, seed=seed, session=eager))


def test_packed_models_neither_save_nor_train(tmp_path: Path) -> None:
    model = packed("nar", "float32")
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        pytest.skip("nothing to pack here")
    with pytest.raises(ValueError, match="packed"):
        model.save_pretrained(tmp_path / "model")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    other = model.at_grid((2, 6))
    assert generate(other, make_condition(other, 1)).shape == (1, 2, 6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_converted_as_they_are_read_are_the_same(precision: str, toy_folder: Path) -> None:
    if precision in ("float16", "int8") and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no FBGEMM here")
    whole = convert(Transformer.from_pretrained(toy_folder), precision, "cpu")
    one_by_one = Transformer.from_pretrained(toy_folder, precision)
    condition, codes = make_condition(whole, 2), torch.randint(24, (2, 4, 4))
    with torch.inference_mode():
        assert torch.equal(one_by_one(codes, condition), whole(codes, condition))
    assert one_by_one.cache_dtype == whole.cache_dtype
    assert not any(parameter.requires_grad for parameter in one_by_one.parameters())


def test_models_are_made_without_drawing_numbers() -> None:
    """On the meta device PyTorch imports its whole compiler to initialise weights: a second and 75 MB."""
    code = (
        "import sys; from nar.storage.folder import without_weights; from nar import ModelConfig, Transformer\n"
        "with without_weights(): model = Transformer(ModelConfig(dim=32, num_heads=2, text_dim=8))\n"
        "print('sympy' in sys.modules, {p.device.type for p in [*model.parameters(), *model.buffers()]})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False {'meta'}"


def test_precisions_by_name(toy_folder: Path) -> None:
    for dtype in (*PRECISIONS, torch.float32, torch.bfloat16):
        codes = Pipeline.from_pretrained(toy_folder, device="cpu", dtype=dtype)("pear", seed=1, output_type="codes")
        assert codes.images.shape == (1, 4, 4)
    with pytest.raises(ValueError, match="float32, float16, int8, bfloat16, not 'float64'"):
        Pipeline.from_pretrained(toy_folder, dtype="float64")


def test_int8_rounds_every_row_with_a_scale_of_its_own() -> None:
    model = packed("nar", "int8")
    layer, weight = model.output, make_model("nar").output.weight
    x = torch.randn(4, weight.shape[1])
    x[3] *= 50
    x[2] = 0
    together = layer(x)
    assert torch.equal(layer(x[:3]), together[:3])
    assert torch.equal(layer(x[None, :1]), together[None, :1])
    exact = x @ weight.T
    assert not together[2].any()
    assert float(((together - exact).detach().norm(dim=1) / exact.norm(dim=1).clamp_min(1e-9)).max()) < 0.02


def test_weights_beyond_float16_take_its_largest_number() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no FBGEMM here")
    layers = nn.Sequential(nn.Linear(8, 2, bias=False))
    layers[0].weight.data = torch.tensor([[1e6], [-1e6]]).expand(2, 8)
    assert convert(layers, "float16", "cpu")(torch.ones(1, 8)).tolist() == [[8 * 65504, -8 * 65504]]


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_formats_for_cpus_are_refused_elsewhere(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nar.precision.usable_device", lambda name: name)  # "meta" stands for another device
    with pytest.raises(ValueError, match=f"dtype {precision} is for CPUs only; on meta use bfloat16 or float32"):
        convert(make_model("nar"), precision, "meta")
