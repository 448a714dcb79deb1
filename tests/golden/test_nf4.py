"""NF4 and double quantization from their definitions (exam row 28: the constants cost 0.5 bit, then 0.127)."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from bildung.model.nf4 import NF4_CODE, Nf4, dynamic_map


def test_code_table_is_the_quantiles_of_a_normal_distribution():
    """Dettmers et al. 2023, section 3: 8 quantiles on the positive side, 7 on the negative, and 0."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    code = sorted([*negative, 0.0, *positive])
    assert [value / max(code) for value in code] == pytest.approx(NF4_CODE, abs=1e-6)
    assert len(set(NF4_CODE)) == 16 and NF4_CODE[7] == 0.0


def test_bits_per_parameter_measured():
    store = Nf4.quantize(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    bits = 8 * store.stored_bytes / 2**20
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20, abs=1e-12)
    assert round(bits, 3) == 4.127
    of_constants = bits - 8 * store.codes.nbytes / 2**20
    assert round(of_constants, 3) == 0.127  # exam row 28
    assert 8 * 4 * store.absmax.numel() / 2**20 == 0.5  # what float32 constants would take


def test_the_definition_in_a_few_lines():
    """Blocks of 64, nearest code, absmax minus its mean in blocks of 256 by the dynamic map: written out as loops."""
    weight = torch.randn(48, 100, generator=torch.Generator().manual_seed(1))
    flat, code, nested_code = weight.flatten().tolist(), NF4_CODE, dynamic_map().tolist()
    blocks = [flat[start : start + 64] for start in range(0, len(flat), 64)]
    absmax = [max(abs(w) for w in block) for block in blocks]
    mean = sum(absmax) / len(absmax)
    constants = []
    for start in range(0, len(absmax), 256):
        centred = [a - mean for a in absmax[start : start + 256]]
        scale = max(abs(c) for c in centred)
        constants += [min(nested_code, key=lambda x: abs(x - c / scale)) * scale + mean for c in centred]
    expected = [
        min(code, key=lambda x: abs(x - w / largest)) * constant
        for block, largest, constant in zip(blocks, absmax, constants, strict=True)
        for w in block
    ]
    torch.testing.assert_close(Nf4.quantize(weight).dense().flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_dynamic_map_has_256_codes_finer_towards_zero():
    code = dynamic_map()
    assert code.numel() == 256 and code[-1] == 1.0 and (code == 0).sum() == 1
    assert code[0] == pytest.approx(-0.99296875)
    gaps = (code[1:] - code[:-1])[127:]
    assert gaps.argmin() < gaps.argmax() and math.isclose(float(gaps[-1]), 0.00703125, rel_tol=1e-3)


def test_first_of_two_weights_lies_in_the_high_nibble():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1] = 1.0, -1.0  # codes 15 and 0
    assert int(Nf4.quantize(weight).codes[0, 0]) == 0xF0
