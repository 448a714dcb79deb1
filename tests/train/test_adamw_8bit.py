"""8-bit AdamW: one step by hand, near to AdamW, small tensors untouched."""

from __future__ import annotations

import torch
from torch import nn

from bildung.model.blockwise import dequantize, dynamic_map, quantize
from bildung.train.adamw_8bit import BLOCK, AdamW8bit


def test_two_steps_by_hand():
    """Decode, one AdamW step, encode."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 100, generator=generator))
    expected = weight.detach().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    optimizer = AdamW8bit([weight], lr=0.01, weight_decay=0.1)
    for step in (1, 2):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        m = 0.9 * m + 0.1 * weight.grad
        v = 0.999 * v + 0.001 * weight.grad**2
        expected = expected - 0.01 * 0.1 * expected
        expected -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        m = dequantize(*quantize(m, dynamic_map(True), BLOCK), dynamic_map(True), BLOCK)
        codes, largest = quantize(v, dynamic_map(False), BLOCK)
        v = dequantize(codes.clamp(min=1), largest, dynamic_map(False), BLOCK)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.state[weight]["m"].dtype == torch.uint8


def test_small_tensors_stay_in_float32_and_are_adamw():
    weights = [nn.Parameter(torch.ones(40, 100)) for _ in range(2)]
    ours, theirs = AdamW8bit(weights[:1], lr=0.01), torch.optim.AdamW(weights[1:], lr=0.01, weight_decay=0.0)
    for seed in range(4):
        for weight in weights:
            weight.grad = torch.randn(40, 100, generator=torch.Generator().manual_seed(seed))
        ours.step()
        theirs.step()
    assert ours.state[weights[0]]["m"].dtype == torch.float32
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_a_small_gradient_in_a_block_of_large_ones_takes_no_giant_steps():
    """Its second moment would round to 0; AdamW's step for a steady gradient is the learning rate."""
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = AdamW8bit([weight], lr=1.0)
    grad = torch.ones(64, 256)
    grad[:, 0] = 1e-4
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = grad.clone()
        optimizer.step()
        assert (weight - before).abs().max() < 1.5
