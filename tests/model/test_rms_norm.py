"""RMSNorm in training: the plain formula's output bit for bit, its gradient, and much less kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bildung.model.layers import RMSNorm


def make(dtype: torch.dtype = torch.float32, offset: float = 0.0, weight_dtype: torch.dtype | None = None) -> RMSNorm:
    norm = RMSNorm(12, 1e-5, offset)
    torch.nn.init.normal_(norm.weight, mean=1 - offset, std=0.3)
    return norm.to(weight_dtype or dtype)


def plain(norm: RMSNorm, x_BLD: Tensor) -> Tensor:
    """As autograd sees it (Llama's and Gemma's code in Hugging Face)."""
    x = x_BLD.double() if x_BLD.dtype == torch.float64 else x_BLD.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (x * (norm.offset + norm.weight.to(x.dtype))).to(x_BLD.dtype)
    return x.to(x_BLD.dtype) * norm.weight.to(x_BLD.dtype)


def gradients(f, norm: RMSNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    norm.weight.grad, x = None, x.detach().requires_grad_()
    f(x).backward(dy)
    assert x.grad is not None and norm.weight.grad is not None
    return x.grad, norm.weight.grad


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_the_output_is_that_of_the_formula(types: tuple[torch.dtype, torch.dtype], offset: float) -> None:
    norm, x = make(types[0], offset, types[1]), (3 * torch.randn(4, 5, 12)).to(types[0])
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(norm(x), plain(norm, x))
    assert torch.equal(norm(x), plain(norm, x)) and torch.equal(x, before)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_gradient_is_that_of_autograd(offset: float) -> None:
    norm, x, dy = make(torch.float64, offset), torch.randn(4, 5, 12).double(), torch.randn(4, 5, 12).double()
    for ours, theirs in zip(
        gradients(norm, norm, x, dy), gradients(lambda x: plain(norm, x), norm, x, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(norm, x.requires_grad_())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_in_bfloat16_it_is_nearer_to_the_truth_than_autograds(offset: float) -> None:
    """Autograd rounds dy · weight to bfloat16 on the way."""
    x, dy = torch.randn(64, 12).bfloat16(), torch.randn(64, 12).bfloat16()
    norm, exact = make(torch.float32, offset), make(torch.float64, offset)
    exact.weight.data = norm.weight.data.double()
    truth = gradients(lambda x: plain(exact, x), exact, x.double(), dy.double())
    ours, theirs = gradients(norm, norm, x, dy), gradients(lambda x: plain(norm, x), norm, x, dy)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype and (a - t).abs().mean() <= (b - t).abs().mean() + 1e-9
        torch.testing.assert_close(a.double(), t, rtol=0.02, atol=0.02)


def kept(f, x: Tensor) -> int:  # type: ignore[no-untyped-def]
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f(x)
    del y
    return sum(found.values())


def test_it_keeps_x_and_a_number_per_token() -> None:
    norm, x = make(torch.bfloat16, 0.0, torch.float32), torch.randn(100, 12).bfloat16().requires_grad_()
    assert kept(norm, x) == x.nbytes + 100 * 4 + norm.weight.nbytes
    assert kept(lambda x: plain(norm, x), x) > 3 * x.nbytes


def test_a_weight_that_does_not_train_costs_no_gradient() -> None:
    norm, x = make().requires_grad_(False), torch.randn(3, 12, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None
    norm.requires_grad_(True)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


def test_compiled() -> None:
    norm, x = make(), torch.randn(3, 7, 12)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        gradients(compiled, norm, x, torch.ones_like(x)), gradients(norm, norm, x, torch.ones_like(x)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
