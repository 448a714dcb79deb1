"""Model FLOPs utilisation: the operations by hand, the ceiling, and what a run logs of it."""

from __future__ import annotations

import pytest
import torch

from bildung.model.linear import match_linears
from bildung.train.utilisation import ceiling, flops_per_token, full_speed


def by_hand(length: int) -> int:
    """Multiply-adds per token of conftest's decoder: q, k, v, o, gate, up, down of two layers, attention, lm_head."""
    layer = 24 * (24 + 12 + 12 + 24) + 3 * 24 * 40
    return 2 * (layer + 2 * length * 24) + 24 * 61


def test_operations_by_hand(make_model) -> None:
    assert flops_per_token(make_model(), 16) == 6 * by_hand(16)


def test_frozen_matrices_have_no_gradient_of_their_own(make_lora, make_model) -> None:
    lora = make_lora()
    linears = match_linears(lora, "all").values()
    deltas = sum(2 * (linear.in_features + linear.out_features) for linear in linears)  # rank 2
    frozen = sum(linear.in_features * linear.out_features for linear in lora.linears().values())
    assert flops_per_token(lora, 16) == pytest.approx(6 * (by_hand(16) + deltas) - 2 * frozen)


def test_the_ceiling_is_measured_once_and_divided_by_a_tokens_operations(make_model) -> None:
    threads = torch.get_num_threads()
    assert 1e8 < ceiling("cpu", threads) < 1e14
    assert ceiling("cpu", threads) == ceiling("cpu", threads), "measured once per process"
    model = make_model()
    assert full_speed(model, 16) == pytest.approx(ceiling("cpu", threads) / flops_per_token(model, 16))
    assert full_speed(model, 16, ranks=4) == pytest.approx(4 * full_speed(model, 16))


def test_no_utilisation_where_the_tokens_say_nothing(make_model) -> None:
    assert full_speed(make_model(), None) is None
    assert full_speed(torch.nn.Linear(2, 2), 16) is None
