"""bfloat16 weights: rounding by chance is right on average, Kahan's sum is right to 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bildung.core.errors import SettingsError
from bildung.train.rounding import RoundedAdamW, add_kahan, round_stochastically


@settings(max_examples=30, deadline=None)
@given(st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32, allow_subnormal=False), st.integers(0, 2**31))
def test_rounding_by_chance_is_unbiased_and_goes_to_a_neighbour(value, seed):
    values = torch.full((4096,), value, dtype=torch.float32)
    rounded = round_stochastically(values, torch.Generator().manual_seed(seed)).float()
    below, above = rounded.min(), rounded.max()
    gap = max(abs(value) * 2**-7, 1e-38)
    assert below <= value + gap * 1e-6 and above - below <= gap * 1.01
    # the mean of n draws has a standard error of at most gap / (2√n); six of them
    assert abs(rounded.double().mean() - float(values[0])) <= 6 * gap / (2 * 4096**0.5) + 1e-38


def test_a_bfloat16_is_left_as_it_is_and_so_are_infinity_and_nan():
    values = torch.tensor([1.0, -0.5, 3.0, 0.0, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(values.repeat(100, 1)).float(), values.repeat(100, 1))
    assert round_stochastically(torch.full((100,), float("nan"))).isnan().all()


def test_kahans_sum_is_float32s_to_16_bits_and_plain_bfloat16_stands_still():
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(1000, generator=generator) + 1
    exact = exact.bfloat16().float()
    kahan, lost, plain = exact.bfloat16(), torch.zeros(1000).bfloat16(), exact.bfloat16()
    start = exact.clone()
    steps = 400
    for _ in range(steps):
        update = 1e-3 * torch.rand(1000, generator=generator)
        exact += update
        plain += update.bfloat16()
        add_kahan(kahan, update, lost)
    kept = kahan.float() + lost.float()
    assert ((kept - exact).abs() <= steps * 2**-17 * exact).all()
    assert ((kahan.float() - exact).abs() <= (2**-9 + steps * 2**-17) * exact).all()
    assert (plain.float() - start).abs().max() < 0.5 * (exact - start).min()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_small_steps_arrive(rounding):
    """500 steps of 1e-4 move float32 weights from 1 to about 0.95; each is an eightieth of bfloat16's spacing."""
    weight = nn.Parameter(torch.ones(4096).bfloat16())
    optimizer = RoundedAdamW([weight], lr=1e-4, rounding=rounding)
    for _ in range(500):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.95, abs=0.003)


def test_chance_is_a_function_of_seed_step_and_parameter():
    def run(seed):
        weights = [nn.Parameter(torch.ones(64).bfloat16()) for _ in range(2)]
        optimizer = RoundedAdamW(weights, lr=1e-3, rounding="stochastic", seed=seed)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return torch.stack([weight.detach() for weight in weights])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2)) and not torch.equal(run(1)[0], run(1)[1])


def test_float32_weights_are_refused():
    with pytest.raises(SettingsError, match="bfloat16"):
        RoundedAdamW([nn.Parameter(torch.ones(3))], lr=1e-3, rounding="kahan")
