"""Int8 and NF4: exact formats, known errors, gradients through, and peers that read the same numbers."""

from __future__ import annotations

import importlib
import json
import logging

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from bildung.core.errors import ConfigError, ModelFileError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.int8 import Int8
from bildung.model.linear import Dense, Linear, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.nf4 import NF4_CODE, Nf4, dynamic_map
from bildung.model.quantized import METHODS, describe, method_of
from bildung.model.safetensors_file import read_tensors, write_tensors
from bildung.model.store import assemble, state_tensors
from bildung.model.transformer import Decoder

CONFIG = dict(
    model_type="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
both = pytest.mark.parametrize("kind", [Int8, Nf4])


def normal(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)


def relative_error(weight: Tensor, kind: type) -> float:
    return float((kind.quantize(weight).dense() - weight).norm() / weight.norm())


def quantized_model(method: str, dtype: torch.dtype = torch.float32) -> Decoder:
    random = build(from_dict({**CONFIG, "dtype": str(dtype)[6:]}))
    tensors = {name: tensor.to(dtype) for name, tensor in state_tensors(random).items()}
    model = assemble(random.config, tensors)
    replace_stores(model, "all", lambda linear: METHODS[method].quantize(linear.base.dense()))
    return model


def write(model: Decoder, method: str, directory) -> dict:
    raw = {**model.config.raw, "architectures": ["LlamaForCausalLM"]}
    raw["quantization_config"] = describe(method, ["lm_head"], model.dtype)
    (directory / "config.json").write_text(json.dumps(raw))
    write_tensors(state_tensors(model), directory)
    return raw


# ── the numbers ──────────────────────────────────────────────────────────────


def test_int8_errs_by_at_most_half_a_step():
    weight = normal(30, 70)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((Int8.quantize(weight).dense() - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    signal_to_noise = -20 * torch.log10(torch.tensor(relative_error(normal(256, 1024), Int8)))
    assert signal_to_noise > 38  # torchao's gate for int8, in decibels


def test_nf4_has_the_known_error_on_a_normal_matrix():
    # 0.0919 with float32 block maxima (measured with bitsandbytes); double quantization adds little.
    assert relative_error(normal(512, 1024), Nf4) == pytest.approx(0.0919, abs=0.001)


@both
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 31, 64, 65, 255, 1023])
def test_error_on_llama_cpp_synthetic_rows(kind, size):
    """llama.cpp's test-quantize-fns: x = 0.1 + 2 cos(i + o), total error sqrt(sum d²)/n below 0.002 per 32 values."""
    i = torch.arange(size * 4, dtype=torch.float32).view(4, size)
    weight = 0.1 + 2 * torch.cos(i)
    error = (kind.quantize(weight).dense() - weight).pow(2).mean().sqrt() / weight.pow(2).mean().sqrt()
    assert error < {Int8: 0.004, Nf4: 0.12}[kind]


@both
def test_the_error_does_not_depend_on_the_scale_of_the_weights(kind):
    weight = normal(64, 128)
    assert relative_error(weight * 1e-4, kind) == pytest.approx(relative_error(weight, kind), rel=1e-2)


@both
def test_a_zero_row_and_a_zero_matrix_stay_zero(kind):
    weight = normal(64, 64)
    weight[3] = 0
    assert (kind.quantize(weight).dense()[3] == 0).all()
    assert (kind.quantize(torch.zeros(64, 64)).dense() == 0).all()


@both
def test_quantizing_what_was_dequantized_changes_no_code(kind):
    once = kind.quantize(normal(64, 128))
    twice = kind.quantize(once.dense())
    names = {Int8: ["values"], Nf4: ["codes"]}[kind]
    assert all(torch.equal(getattr(once, name), getattr(twice, name)) for name in names)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    out_features=st.integers(1, 9),
    in_features=st.integers(1, 150),
    method=st.sampled_from(sorted(METHODS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_tensors_and_back_is_the_same_store(out_features, in_features, method, dtype):
    store = METHODS[method].quantize(normal(out_features, in_features, dtype))
    again = METHODS[method].from_tensors(store.tensors(), (out_features, in_features), dtype)
    assert torch.equal(store.dense(), again.dense())
    assert store.dense().dtype == dtype and store.dense().shape == (out_features, in_features)
    assert store.stored_bytes == again.stored_bytes


# ── used in a model ──────────────────────────────────────────────────────────


@both
def test_forward_and_gradient_are_those_of_the_dequantized_matrix(kind):
    store = kind.quantize(normal(24, 40))
    x = torch.randn(3, 5, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    expected_x = x.detach().clone().requires_grad_()
    torch.testing.assert_close(store(x, bias), expected_x @ store.dense().T + bias)
    store(x, bias).square().sum().backward()
    (expected_x @ store.dense().T + bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad)
    assert bias.grad is not None


@both
def test_nothing_is_kept_for_the_backward_pass(kind):
    saved = []
    store = kind.quantize(normal(64, 64))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        store(torch.randn(32, 64, requires_grad=True), None)
    assert not saved


def test_the_int8_kernel_for_few_rows_agrees_with_dequantizing():
    store = Int8.quantize(normal(128, 192, torch.bfloat16))
    x = torch.randn(4, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert store._has_kernel(x) and not store._has_kernel(x.float()) and not store._has_kernel(x.repeat(5, 1))
    exact = x.double() @ (store.values.double() * store.scale.double()).T
    by_kernel = (store(x, None) - exact).norm() / exact.norm()
    by_dequantizing = (x @ store.dense().T - exact).norm() / exact.norm()
    assert by_kernel < 0.004 and by_kernel <= by_dequantizing * 1.1
    assert store(x[None], torch.ones(128)).shape == (1, 4, 128)
    # The kernel reads beyond the end of sizes that are not multiples of its blocks: those must not reach it.
    odd = Int8.quantize(normal(7, 33, torch.bfloat16))
    assert not odd._has_kernel(x[:, :33])


@both
def test_a_delta_trains_over_a_quantized_base(kind):
    linear = Linear(kind.quantize(normal(24, 40)))
    linear.deltas["lora"] = LowRank(40, 24, 2, 1.0)
    assert [name for name, _ in linear.named_parameters()] == ["deltas.lora.lora_A", "deltas.lora.lora_B"]
    linear(torch.randn(3, 40)).sum().backward()
    assert linear.deltas["lora"].lora_B.grad.abs().sum() > 0
    torch.testing.assert_close(linear.weight(), linear.base.dense())  # B = 0 at the start


@both
def test_moving_a_model_to_another_type_rounds_no_stored_constant(kind):
    store = kind.quantize(normal(64, 128))
    before = {name: tensor.clone() for name, tensor in store.named_buffers()}
    dense = store.dense()
    Linear(store).to(torch.bfloat16)
    assert all(torch.equal(before[name], tensor) for name, tensor in store.named_buffers())
    assert store.dense().dtype == torch.bfloat16
    store.to(torch.float32)
    assert torch.equal(store.dense(), dense)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_directory_loads_bit_equal(method, dtype, tmp_path):
    model = quantized_model(method, dtype)
    raw = write(model, method, tmp_path)
    assert method_of(raw) == method
    again = assemble(from_dict(raw), dict(read_tensors(tmp_path)))
    tokens_BL = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens_BL), again(tokens_BL))
    assert isinstance(again.linears()["lm_head"].base, Dense)


# ── peers ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bitsandbytes():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a failed download of a kernel on import
    return importlib.import_module("bitsandbytes")


@pytest.mark.filterwarnings("ignore")
def test_nf4_equals_bitsandbytes(bitsandbytes):
    weight = normal(192, 256)
    assert tuple(bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist()) == NF4_CODE
    torch.testing.assert_close(bitsandbytes.functional.create_dynamic_map().float(), dynamic_map(), rtol=0, atol=0)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = Nf4.quantize(weight)
    assert torch.equal(packed, ours.codes)
    differing = int((state.absmax != ours.absmax).sum())
    assert differing <= 4, f"{differing} of {ours.absmax.numel()} block constants differ"
    torch.testing.assert_close(state.offset, ours.nested_offset)
    torch.testing.assert_close(state.state2.absmax, ours.nested_absmax)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_directory(method, dtype, tmp_path, bitsandbytes):
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = quantized_model(method, dtype)
    write(model, method, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BL = torch.arange(40).view(2, 20)
    if method == "nf4":
        peer.train()  # in evaluation bitsandbytes repacks the weights to bfloat16 on some processors
        for name, linear in model.linears().items():
            if name != "lm_head":
                theirs = peer.get_submodule(name).weight
                dense = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
                assert torch.equal(dense, linear.base.dense()), name
    with torch.no_grad():
        difference = (peer(tokens_BL).logits - model(tokens_BL)).abs().max()
    assert difference <= {torch.float32: 1e-4, torch.bfloat16: 0.0 if method == "int8" else 0.1}[dtype]


# ── bad files ────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("harm", ["shape", "missing", "besides", "nan"])
def test_tensors_that_do_not_fit_are_refused(kind, harm):
    tensors = kind.quantize(normal(64, 128)).tensors()
    shape = (64, 128)
    constant = {Int8: "weight_scale", Nf4: "weight.nested_absmax"}[kind]
    if harm == "shape":
        shape = (64, 127)
    elif harm == "missing":
        del tensors[constant]
    elif harm == "besides":
        tensors["weight_zero_point"] = torch.zeros(64, 1)
    else:
        tensors[constant] = tensors[constant] * float("nan")
    with pytest.raises(ModelFileError):
        kind.from_tensors(tensors, shape, torch.float32)


def test_a_quant_state_that_is_not_json_is_refused():
    tensors = Nf4.quantize(normal(64, 64)).tensors()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor([123, 10, 255], dtype=torch.uint8)
    with pytest.raises(ModelFileError, match="quant_state"):
        Nf4.from_tensors(tensors, (64, 64), torch.float32)


@pytest.mark.parametrize(
    "given",
    [
        "nf4",
        {"quant_method": "gptq", "bits": 4},
        {**describe("nf4", [], torch.float32), "bnb_4bit_use_double_quant": False},
        {**describe("int8", [], torch.float32), "config_groups": {}},
        {**describe("int8", [], torch.float32), "config_groups": {"group_0": "weights"}},
        {**describe("int8", [], torch.float32), "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    ],
)
def test_another_quantization_is_refused_with_what_is_readable(given):
    with pytest.raises(ConfigError, match="NF4 with double quantization"):
        method_of({"quantization_config": given})
    assert method_of({}) is None
