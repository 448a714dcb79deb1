"""Eight bits per number, by blocks: x ≈ code[c] · (largest |x| of its block). Dettmers et al. 2022, arXiv 2110.02861.

The 256 codes are a *dynamic tree*. Of a byte's bits the first is the sign, then zeros count the exponent, a one ends
them, and what is left over is a linear fraction:

    s 1 ffffff     10^0   · 64 fractions    the larger the number, the more bits its fraction has
    s 01 fffff     10^-1  · 32
    ...
    s 0000001      10^-6  ·  1

so numbers over seven decades fit one byte, fine where a block has its largest. Each code is the middle of its interval
of [0.1, 1]; 0 and 1 are codes too. Without the sign (second moments) every exponent has twice the fractions.
"""

# G blocks, K numbers per block

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENTS = 7


@cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 codes, sorted (256,), float32; equal to bitsandbytes' `create_dynamic_map`."""
    codes: list[float] = []
    for exponent in range(EXPONENTS):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        codes += ((10 ** (exponent - EXPONENTS + 1)) * means).tolist()
        if signed:
            codes += (-(10 ** (exponent - EXPONENTS + 1)) * means).tolist()
    return torch.tensor(sorted([*codes, 0.0, 1.0]), dtype=torch.float32)


def nearest_code(values: Tensor, code: Tensor) -> Tensor:
    """Index (uint8) of the closest code of each value; `code` is sorted. Half-way goes down."""
    code = code.to(values.device)
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2).to(torch.uint8)


def by_blocks(values: Tensor, block: int) -> Tensor:
    """(N,) -> (G, K), the last block filled with zeros."""
    return F.pad(values, (0, -values.numel() % block)).view(-1, block)


def scaled(x_GK: Tensor, absmax_G: Tensor) -> Tensor:
    """Blocks divided by their largest; by its reciprocal, as in bitsandbytes: x / absmax rounds differently."""
    return x_GK * (1.0 / absmax_G.clamp(min=torch.finfo(torch.float32).tiny))[:, None]


def quantize(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes, uint8, shaped like `values`; the largest |x| of each block (G,), float32)."""
    x_GK = by_blocks(values.flatten(), block)
    absmax_G = x_GK.abs().amax(dim=1)
    return nearest_code(scaled(x_GK, absmax_G), code).flatten()[: values.numel()].view_as(values), absmax_G


def dequantize(codes: Tensor, absmax_G: Tensor, code: Tensor, block: int) -> Tensor:
    """The numbers again, float32, shaped like `codes`."""
    x_GK = by_blocks(code.to(codes.device)[codes.flatten().int()], block) * absmax_G[:, None]
    return x_GK.flatten()[: codes.numel()].view_as(codes)
