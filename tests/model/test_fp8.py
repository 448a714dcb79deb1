"""8-bit products: the arithmetic against numbers written out, on the CPU; the kernels of a GPU are not run here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bildung.core.errors import SettingsError
from bildung.model import fp8
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.fp8 import E4M3, E5M2, Fp8Dense, check_device, leave_fp8, quantize, use_fp8
from bildung.model.linear import Dense

KEYS = dict(model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
KEYS |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5)
KEYS |= dict(tie_word_embeddings=True, initializer_range=0.2)


def test_the_formats() -> None:
    """e4m3 has 3 bits of fraction up to 448, e5m2 2 bits up to 57344; the largest number becomes the largest."""
    x = torch.tensor([448.0, 1.0, 1.0625, 1.1875, -0.0625 * 3])
    x8, scale = quantize(x, E4M3)
    assert scale == 1 and x8.float().tolist() == [448.0, 1.0, 1.0, 1.25, -0.1875]  # half-way goes to the even one
    x8, scale = quantize(2 * x, E4M3)
    assert scale == 2 and x8.float().tolist() == [448.0, 1.0, 1.0, 1.25, -0.1875]
    x8, scale = quantize(torch.tensor([57344.0, 1.1, 1.2, -3.3]), E5M2)
    assert scale == 1 and x8.float().tolist() == [57344.0, 1.0, 1.25, -3.5]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_and_large_numbers_stay_finite(dtype: torch.dtype) -> None:
    for x in (torch.zeros(4), torch.tensor([3e38, -3e38, 1.0]), torch.full((3,), 1e-40)):
        x8, scale = quantize(x, dtype)
        assert x8.float().isfinite().all() and scale > 0


@pytest.mark.parametrize("rows", [32, 21])
def test_products_are_those_of_the_rounded_numbers(rows: int) -> None:
    x, weight = torch.randn(rows, 32).requires_grad_(), torch.nn.Parameter(torch.randn(48, 32))
    dense, dy = Fp8Dense(weight).train(), torch.randn(rows, 48)
    y = dense(x, None)
    y.backward(dy)

    def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = t.abs().max() / torch.finfo(dtype).max
        return (t / scale).to(dtype).float() * scale

    x8, w8, dy8 = rounded(x.detach(), E4M3), rounded(weight.detach(), E4M3), rounded(dy, E5M2)
    assert weight.grad is not None and x.grad is not None
    torch.testing.assert_close(y, x8 @ w8.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, dy8 @ w8, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight.grad, dy8.t() @ x8, rtol=1e-5, atol=1e-4)
    y, exact = y.detach(), F.linear(x, weight).detach()
    assert 0.01 < float((y - exact).norm() / exact.norm()) < 0.06


def test_what_is_kept_of_an_input_has_eight_bits() -> None:
    dense, x = Fp8Dense(torch.nn.Parameter(torch.randn(48, 32))).train(), torch.randn(64, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dense(x, None)
    assert sorted(t.nbytes for t in kept) == [4, 4, 48 * 32, 64 * 32]


def test_a_model_trains_in_it_and_reads_without() -> None:
    model = build(from_dict(KEYS))
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(0, 61, (2, 20))
    before = model.eval()(tokens)
    names = use_fp8(model)
    assert len(names) == 14 and "lm_head" not in names
    assert torch.equal(model(tokens), before)
    trained = model.train()(tokens)
    error = float((trained - before).detach().norm() / before.detach().norm())
    assert 0.005 < error < 0.2
    trained.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    leave_fp8(model)
    assert all(type(linear.base) is Dense for linear in model.linears().values())
    assert torch.equal(model.eval()(tokens), before)


def test_a_model_without_a_matrix_that_fits_is_refused() -> None:
    model = build(from_dict({**KEYS, "hidden_size": 24, "intermediate_size": 40, "head_dim": 12}))
    with pytest.raises(SettingsError, match="multiples of 16"):
        use_fp8(model)


def test_a_device_without_such_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8.torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(fp8.torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(SettingsError, match=r"compute capability 8.9 .*A100 has 8.0"):
        check_device(torch.device("cuda:0"))
    monkeypatch.setattr(fp8.torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda:0"))
    with pytest.raises(SettingsError, match="NVIDIA GPU"):
        check_device(torch.device("mps"))
