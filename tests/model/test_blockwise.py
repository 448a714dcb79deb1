"""Eight bits by blocks, beside bitsandbytes."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

from bildung.model.blockwise import dequantize, dynamic_map, quantize


@pytest.fixture(scope="module")
def functional():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a failed download of a kernel on import
    return importlib.import_module("bitsandbytes.functional")


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_equals_bitsandbytes(functional, signed):
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed, differing", [(True, 0.002), (False, 0.04)])
def test_codes_are_bitsandbytes_or_nearer(functional, signed, differing):
    """Its CPU kernel looks values up in a coarse table; here it is the nearest code. Maxima and decoding are equal."""
    values = torch.randn(100 * 256, generator=torch.Generator().manual_seed(0))
    values, code = (values, dynamic_map(True)) if signed else (values.square(), dynamic_map(False))
    theirs, state = functional.quantize_blockwise(values, code=code, blocksize=256)
    ours, absmax = quantize(values, code, 256)
    assert torch.equal(absmax, state.absmax)
    assert (ours != theirs).float().mean() < differing
    decoded = functional.dequantize_blockwise(theirs, state)
    assert torch.equal(dequantize(theirs, absmax, code, 256), decoded)
    assert ((dequantize(ours, absmax, code, 256) - values).abs() <= (decoded - values).abs() + 1e-7).all()


@pytest.mark.parametrize(
    "signed, codes_per_sign", [(True, [1, 2, 4, 8, 16, 32, 64]), (False, [2**n for n in range(1, 8)])]
)
def test_every_decade_has_twice_the_codes_of_the_one_below(signed, codes_per_sign):
    code = dynamic_map(signed)
    inside = [int(((code > 10.0**e / 10) & (code < 10.0**e)).sum()) for e in range(-6, 1)]
    assert inside == codes_per_sign
    assert 0.0 in code.tolist() and code.max() == 1


@pytest.mark.parametrize("shape", [(1,), (256,), (3, 100), (17, 31)])
def test_any_shape_and_zeros(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantize(values, dynamic_map(), 256)
    back = dequantize(codes, absmax, dynamic_map(), 256)
    assert codes.shape == back.shape == shape and codes.dtype == torch.uint8
    assert ((back - values).abs() <= 0.01 * values.abs().max()).all()
    codes, absmax = quantize(torch.zeros(shape), dynamic_map(), 256)
    assert not dequantize(codes, absmax, dynamic_map(), 256).any()
