"""Adafactor: equal to PyTorch's (relative) and to transformers' (plain)."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from bildung.train.adafactor import Adafactor


def run(make, steps=6):
    """Weights after some steps with fixed gradients, a convolution's among them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(6, 9), (7,), (3, 4, 2, 5)]]
    optimizer = make(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("rate", [0.5, 0.01])
def test_relative_steps_equal_pytorchs(rate):
    ours, _ = run(lambda p: Adafactor(p, lr=rate, relative=True, weight_decay=0.1))
    theirs, _ = run(lambda p: torch.optim.Adafactor(p, lr=rate, weight_decay=0.1))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_plain_steps_equal_transformers():
    peer = importlib.import_module("transformers").Adafactor
    ours, _ = run(lambda p: Adafactor(p, lr=0.01, weight_decay=0.1))
    theirs, _ = run(lambda p: peer(p, lr=0.01, weight_decay=0.1, relative_step=False, scale_parameter=False))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_matrix_keeps_its_rows_and_columns_only():
    parameters, optimizer = run(lambda p: Adafactor(p, lr=0.01))
    kept = {key: tuple(value.shape) for key, value in optimizer.state[parameters[0]].items() if key != "step"}
    assert kept == {"rows": (6, 1), "columns": (1, 9)}


def test_a_gradient_of_rank_one_is_estimated_exactly():
    """Then V = R Cᵀ / mean(R) is G² and the first update ±1 everywhere."""
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.tensor([1.0, -2, 3])[:, None] * torch.tensor([4.0, 5, -6, 7])
    Adafactor([weight], lr=0.01).step()
    torch.testing.assert_close(weight.detach(), -0.01 * weight.grad.sign())


def test_a_row_without_gradient_stands_still():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    weight.grad[1] = 0
    Adafactor([weight], lr=0.01).step()
    assert weight[1].tolist() == [1] * 4 and weight.isfinite().all()
