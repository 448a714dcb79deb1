"""Fastfood and the deltas of intrinsic dimension: linear, length-preserving, with the true gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bildung.model.intrinsic import Fastfood, Intrinsic, seed_of, walsh_hadamard


@pytest.mark.parametrize("length", [1, 2, 8, 32])
def test_the_walsh_hadamard_transform_is_its_definition(length: int) -> None:
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(length)] for i in range(length)])
    x = torch.randn(length)
    torch.testing.assert_close(walsh_hadamard(x), h @ x)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), length * x)


@pytest.mark.parametrize(("dimension", "size"), [(5, 24), (40, 24)])
def test_the_projection_is_linear_and_its_gradient_true(dimension: int, size: int) -> None:
    project = Fastfood(dimension, size, 3)
    a, b = torch.randn(dimension), torch.randn(dimension)
    torch.testing.assert_close(project(2 * a - b), 2 * project(a) - project(b), atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradcheck(project.double(), torch.randn(dimension, dtype=torch.double, requires_grad=True))


def test_lengths_are_kept_on_average() -> None:
    theta = torch.randn(100)
    ratios = torch.stack([Fastfood(100, 3000, seed)(theta).norm() / theta.norm() for seed in range(40)])
    assert ratios.mean().item() == pytest.approx(1, abs=0.02) and ratios.std() < 0.1


def test_the_projection_mixes_like_a_gaussian() -> None:
    """Columns of P are nearly orthogonal and their entries about normal: kurtosis 3, not that of a permutation."""
    project = Fastfood(16, 2048, 0)
    P = torch.stack([project(row) for row in torch.eye(16)])
    gram = P @ P.T
    assert (gram - torch.eye(16)).abs().max() < 0.15
    entries = P.flatten() * math.sqrt(2048)
    assert entries.mean().abs() < 0.05 and entries.pow(4).mean().item() == pytest.approx(3, abs=0.4)


def test_the_same_seed_is_the_same_projection_and_another_matrix_has_another() -> None:
    theta = torch.randn(7)
    assert torch.equal(Fastfood(7, 50, 1)(theta), Fastfood(7, 50, 1)(theta))
    assert seed_of(0, "a") != seed_of(0, "b") != seed_of(1, "b")


def test_a_delta_starts_at_nothing_and_each_scale_moves_its_own_matrix() -> None:
    theta = nn.Parameter(torch.zeros(6))
    one, other = (Intrinsic(theta, (4, 5), seed, scaled=True) for seed in (1, 2))
    x, y = torch.randn(3, 5), torch.randn(3, 4)
    assert torch.equal(one(x, y), y)
    torch.nn.init.normal_(theta)
    before = one.weight().detach(), other.weight().detach()
    assert one.scale is not None
    one.scale.data *= 3
    torch.testing.assert_close(one.weight(), 3 * before[0])
    torch.testing.assert_close(other.weight(), before[1])
    torch.testing.assert_close(one(x, y), y + x @ one.weight().T)
    (one(x, y).sum() + other(x, y).sum()).backward()
    assert theta.grad is not None and theta.grad.any() and one.scale.grad is not None
    assert Intrinsic(theta, (4, 5), 1, scaled=False).scale is None
