"""CKA sees what it should and is blind to what it should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bildung.look.comparing.similarity import centred_without_diagonal, cka, gram
from bildung.look.comparing.weight_change import decompose, matrix_change, overlap
from bildung.model.linear import dense_linear
from bildung.model.low_rank import LowRank


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("debiased", [True, False])
def test_rotations_scales_and_shifts_are_the_same(debiased: bool):
    x, y = drawn(30, 12), drawn(30, 12) + drawn(30, 12, seed=1)
    rotation = torch.linalg.qr(drawn(12, 12, seed=2))[0]
    there = cka([x], [y], debiased)
    assert torch.allclose(cka([3 * x @ rotation + 5], [y], debiased), there)
    assert torch.allclose(cka([x], [3 * x @ rotation - 1], debiased), torch.ones(1, 1).double())
    stretched = x * torch.tensor([10.0] + [1.0] * 11)
    assert cka([x], [stretched], debiased).item() < 0.95 and 0.2 < there.item() < 0.95


def test_only_the_debiased_one_is_0_for_two_that_have_nothing_in_common():
    pairs = [(drawn(20, 200, seed=n), drawn(20, 200, seed=100 + n)) for n in range(20)]
    mean = {on: sum(cka([x], [y], on).item() for x, y in pairs) / len(pairs) for on in (True, False)}
    assert mean[False] > 0.85 and abs(mean[True]) < 0.05


def test_the_debiased_product_is_song_and_others_estimate():
    x, y, n = drawn(9, 4), drawn(9, 5, seed=1), 9
    K, L = (k - torch.diag(k.diagonal()) for k in (x @ x.mT, y @ y.mT))
    hsic = ((K @ L).trace() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * (K @ L).sum() / (n - 2)) / (n * (n - 3))
    mine = (centred_without_diagonal(gram(x)) * centred_without_diagonal(gram(y))).sum() / (n * (n - 3))
    assert mine.item() == pytest.approx(hsic.item(), rel=1e-9)


def test_ranks_and_overlaps_of_a_known_change():
    a, b = dense_linear(12, 20), dense_linear(12, 20)
    u, v = torch.linalg.qr(drawn(20, 12))[0], torch.linalg.qr(drawn(12, 12, seed=1))[0]
    weight = (u * torch.arange(12, 0, -1)) @ v.mT
    for linear in (a, b):
        linear.base.weight.data = weight.clone()
    change = 3 * u[:, :1] @ v[:, 5:6].mT + u[:, 1:2] @ v[:, 6:7].mT  # writes to W's first two directions, reads others
    b.base.weight.data = weight + change
    found = matrix_change("model.layers.3.mlp.up_proj", a, b)
    assert (found.layer, found.kind, found.rank, found.directions) == (3, "mlp.up_proj", 2, 2)
    assert found.norm == pytest.approx(10**0.5, rel=1e-5) and found.stable_rank == pytest.approx(10 / 9, rel=1e-5)
    assert found.effective_rank == pytest.approx(4 / (3**0.75 * 1), rel=1e-4)  # exp of the entropy of 3/4, 1/4
    assert found.overlap_out == pytest.approx(1, abs=1e-5) and found.overlap_in == pytest.approx(0, abs=1e-5)
    sigma, left, right = decompose(change.mT)
    assert torch.allclose(sigma[:2], torch.tensor([3.0, 1.0]).double()) and left.shape == (12, 12)
    assert overlap(right[:, :2], u[:, :2]) == pytest.approx(1)


def test_the_rank_of_a_lora_is_its_rank():
    a, b = dense_linear(12, 20), dense_linear(12, 20)
    weight = torch.nn.Parameter(drawn(20, 12).float() * 100)
    for linear in (a, b):
        linear.base.weight = weight
    delta = LowRank(12, 20, 3, 0.5)
    torch.nn.init.normal_(delta.lora_B, 0, 1e-3)
    b.deltas["one"] = delta
    assert matrix_change("w", a, b).rank == 3
    b.base.weight = torch.nn.Parameter(weight.detach().clone())  # numbers of its own: the rounding of W + dW counts
    assert matrix_change("w", a, b).norm == pytest.approx(matrix_change("w", b, a).norm)
