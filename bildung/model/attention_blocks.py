"""Attention on a CPU by blocks of queries: what a mask forbids as a whole is never computed.

    keys ->                               keys ->
    q  ■ . . .                            q  ■ . . . . .     three packed documents: a block of queries
    u  ■ ■ . .    causal: a block of      u  ■ ■ . . . .     begins its keys where the document of its
    e  ■ ■ ■ .    queries ends its        e  . . ■ . . .     first query begins
    r  ■ ■ ■ ■    keys with itself        r  . . ■ ■ . .

PyTorch's CPU kernel computes every block under an explicit mask, and takes matrix products too small to be fast. Here
the query heads that share keys are one product, and only the scores of one block exist at a time, in float32. In
bfloat16 the factors of the products are bfloat16 and their sums float32, as in the kernel. Only q, k and v are kept for
the backward pass, which computes the scores again.
"""

# B batch, L query length, S key length, N heads, K key-value heads, G heads per key-value head, H head dim,
# Q queries of a block, W keys of a block, R = G Q rows of a product

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128  # of a block; below so many the kernel is as fast


@dataclass(frozen=True)
class Block:
    """Queries of one row of the batch, and the keys that one of them at least may look at."""

    row: int
    queries: slice
    keys: slice
    bias_QW: Tensor | None  # 0 or -inf, of the last columns; those before are allowed to all


def blocks_of(allowed_B1LS: Tensor | None, causal: bool, rows: int, length: int, total: int) -> list[Block]:
    """The blocks of a mask: `allowed_B1LS` (B or 1 rows), or causality, or all pairs."""
    blocks: list[Block] = []
    for row in range(rows):
        if row and (allowed_B1LS is None or len(allowed_B1LS) == 1):
            blocks += [Block(row, b.queries, b.keys, b.bias_QW) for b in blocks[: -(-length // QUERIES)]]
            continue
        for start in range(0, length, QUERIES):
            end = min(start + QUERIES, length)
            if allowed_B1LS is not None:
                keys, bias_QW = _of_mask(allowed_B1LS[row, 0, start:end])
            elif causal:
                keys = slice(0, end)
                bias_QW = _bias(torch.ones(end - start, end - start, dtype=torch.bool).tril())
            else:
                keys, bias_QW = slice(0, total), None
            blocks.append(Block(row, slice(start, end), keys, bias_QW))
    return blocks


def _of_mask(allowed_QS: Tensor) -> tuple[slice, Tensor | None]:
    """The keys that any query sees, and the bias from the first that not all of them see."""
    seen = allowed_QS.any(0).nonzero()
    keys = slice(int(seen[0]), int(seen[-1]) + 1)
    by_all = allowed_QS[:, keys].all(0)
    if by_all.all():
        return keys, None
    return keys, _bias(allowed_QS[:, keys][:, int((~by_all).nonzero()[0]) :])


def _bias(allowed_QW: Tensor) -> Tensor:
    return torch.zeros(allowed_QW.shape).masked_fill_(~allowed_QW, float("-inf"))


def attend(q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, blocks: list[Block]) -> Tensor:
    """softmax(q k^T · scale, masked) v of shape BNLH; every query is in one of the blocks and sees a key."""
    z_BNLH: Tensor = _Blocks.apply(q_BNLH, k_BKSH, v_BKSH, scale, blocks)
    return z_BNLH


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, blocks: list[Block]) -> Tensor:
        ctx.scale, ctx.blocks = scale, blocks
        ctx.save_for_backward(q_BNLH, k_BKSH, v_BKSH)
        # Laid out as B L N H, which is what reads it next.
        z_BNLH = torch.empty_like(q_BNLH.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        k, v = _wide(k_BKSH), _wide(v_BKSH)
        with products_in(q_BNLH.dtype):
            for block in blocks:
                q_KRH = _rows(q_BNLH[block.row, :, block.queries], k.shape[1])
                p_KRW = _probs(q_KRH, k[block.row, :, block.keys], scale, block.bias_QW)
                z_KRH = torch.bmm(p_KRW, v[block.row, :, block.keys])
                z_BNLH[block.row, :, block.queries] = z_KRH.view(q_BNLH.shape[1], -1, q_BNLH.shape[3])
        return z_BNLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_BNLH: Tensor) -> tuple[Tensor | None, ...]:
        """With p the probabilities, s the scores: dv = pᵀ dz, dp = dz vᵀ, ds = p (dp - Σ p dp), dq = ds k · scale."""
        q_BNLH, k_BKSH, v_BKSH = ctx.saved_tensors
        k, v = _wide(k_BKSH), _wide(v_BKSH)
        dq_BNLH, dk, dv = torch.empty_like(q_BNLH), torch.zeros_like(k), torch.zeros_like(v)
        with products_in(q_BNLH.dtype):
            for block in ctx.blocks:
                at_keys, at_queries = (block.row, slice(None), block.keys), (block.row, slice(None), block.queries)
                q_KRH, dz_KRH = _rows(q_BNLH[at_queries], k.shape[1]), _rows(dz_BNLH[at_queries], k.shape[1])
                p_KRW = _probs(q_KRH, k[at_keys], ctx.scale, block.bias_QW)
                dv[at_keys].baddbmm_(p_KRW.transpose(1, 2), dz_KRH)
                dp_KRW = torch.bmm(dz_KRH, v[at_keys].transpose(1, 2))
                ds_KRW = torch._softmax_backward_data(dp_KRW, p_KRW, -1, dp_KRW.dtype).mul_(ctx.scale)
                dk[at_keys].baddbmm_(ds_KRW.transpose(1, 2), q_KRH)
                dq_BNLH[at_queries] = torch.bmm(ds_KRW, k[at_keys]).view(q_BNLH.shape[1], -1, q_BNLH.shape[3])
        return dq_BNLH, dk.to(k_BKSH.dtype), dv.to(v_BKSH.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 where that is given, without gaps."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide, memory_format=torch.contiguous_format).contiguous()  # `to` leaves float32 with its gaps


def _rows(x_NQH: Tensor, key_heads: int) -> Tensor:
    """The query heads that share a key-value head, one below the other: K R H."""
    return _wide(x_NQH).view(key_heads, -1, x_NQH.shape[2])


def _probs(q_KRH: Tensor, k_KWH: Tensor, scale: float, bias_QW: Tensor | None) -> Tensor:
    s_KRW = torch.baddbmm(q_KRH.new_empty(()), q_KRH, k_KWH.transpose(1, 2), beta=0, alpha=scale)
    if bias_QW is not None:
        s_KRW.unflatten(1, (-1, len(bias_QW)))[..., -bias_QW.shape[1] :].add_(bias_QW)
    return torch.softmax(s_KRW, -1)


@contextlib.contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """If `dtype` is bfloat16, products of float32 matrices round their factors to it; their sums stay float32.

    Where the factors are bfloat16 numbers anyway nothing is lost, and oneDNN is 2.5 times as fast.
    """
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
