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

QUERIES = 128  # of a block; below so many the kernel is as fast


@dataclass(frozen=True)
class Blocks:
    """A mask cut into blocks, as tensors, so that compiled graphs can take it. Each line of `table` (one per block):
    row of the batch; first query and the one after the last; first key and the one after the last that any of these
    queries may look at; where its bias begins, and how many columns it has. The bias, 0 or -inf, is that of the last
    columns; those before are allowed to all queries."""

    table: Tensor
    bias: Tensor


def blocks_of(allowed_B1LS: Tensor | None, causal: bool, rows: int, length: int, total: int) -> Blocks:
    """The blocks of a mask: `allowed_B1LS` (B or 1 rows), or causality, or all pairs."""
    table: list[list[int]] = []
    parts: list[Tensor] = [torch.zeros(0)]
    filled, per_row = 0, -(-length // QUERIES)
    for row in range(rows):
        if row and (allowed_B1LS is None or len(allowed_B1LS) == 1):
            table += [[row, *line[1:]] for line in table[:per_row]]
            continue
        for start in range(0, length, QUERIES):
            end = min(start + QUERIES, length)
            if allowed_B1LS is not None:
                first, last, bias_QW = _of_mask(allowed_B1LS[row, 0, start:end])
            else:
                first, last, bias_QW = 0, total, torch.zeros(end - start, 0)
                if causal:
                    last, bias_QW = end, _bias(torch.ones(end - start, end - start, dtype=torch.bool).tril())
            table.append([row, start, end, first, last, filled, bias_QW.shape[1]])
            parts.append(bias_QW.flatten())
            filled += bias_QW.numel()
    return Blocks(torch.tensor(table), torch.cat(parts))


def _of_mask(allowed_QS: Tensor) -> tuple[int, int, Tensor]:
    """The first key that any query sees, the one after the last, and the bias from the first that not all see."""
    seen = allowed_QS.any(0).nonzero()
    first, last = int(seen[0]), int(seen[-1]) + 1
    by_all = allowed_QS[:, first:last].all(0)
    partly = last - first if by_all.all() else int((~by_all).nonzero()[0])
    return first, last, _bias(allowed_QS[:, first + partly : last])


def _bias(allowed_QW: Tensor) -> Tensor:
    return torch.zeros(allowed_QW.shape).masked_fill_(~allowed_QW, float("-inf"))


def attend(
    q_BNLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, blocks: Blocks, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T · scale, masked) v of shape BNLH; every query is in one of the blocks and sees a key. dropout: the
    share of the probabilities that is set to 0, the others being scaled up."""
    seed = torch.randint(2**62, (1,)) if dropout else torch.zeros(1, dtype=torch.int64)
    z_BLNH: Tensor = torch.ops.bildung.attend(q_BNLH, k_BKSH, v_BKSH, scale, blocks.table, blocks.bias, dropout, seed)
    return z_BLNH.transpose(1, 2)


# Operators of their own: to a compiler, and to a plan on paper, each is one call with a known result.
GIVEN = "Tensor q, Tensor k, Tensor v, float scale, Tensor table, Tensor bias, float dropout, Tensor seed"


# Defined one by one: torch.library.custom_op would import torch._dynamo at the first call, 80 MB.
_LIBRARY = torch.library.Library("bildung", "DEF")
_LIBRARY.define(f"attend({GIVEN}) -> Tensor", tags=())
_LIBRARY.define(f"attend_backward(Tensor dz, {GIVEN}) -> (Tensor, Tensor, Tensor)", tags=())


@torch.library.impl(_LIBRARY, "attend", "CompositeExplicitAutograd")
def _attend_kernel(
    q_BNLH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    scale: float,
    table: Tensor,
    bias: Tensor,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    B, N, L, H = q_BNLH.shape
    z_BLNH = q_BNLH.new_empty(B, L, N, H)  # laid out as what reads it next wants it
    z_BNLH, k, v = z_BLNH.transpose(1, 2), _wide(k_BKSH), _wide(v_BKSH)
    drop = _Drop(dropout, seed)
    with products_in(q_BNLH.dtype):
        for at_queries, at_keys, bias_QW in _each(table, bias):
            q_KRH = _rows(q_BNLH[at_queries], k.shape[1])
            p_KRW = _probs(q_KRH, k[at_keys], scale, bias_QW)
            z_BNLH[at_queries] = torch.bmm(drop(p_KRW), v[at_keys]).view(N, -1, H)
    return z_BLNH


@torch.library.impl(_LIBRARY, "attend_backward", "CompositeExplicitAutograd")
def _attend_backward_kernel(
    dz_BLNH: Tensor,
    q_BNLH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    scale: float,
    table: Tensor,
    bias: Tensor,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p the probabilities, m what dropout multiplies them by, s the scores:
    dv = (p m)ᵀ dz, dp = m dz vᵀ, ds = p (dp - Σ p dp), dq = ds k · scale."""
    N, H = q_BNLH.shape[1], q_BNLH.shape[3]
    dz_BNLH, k, v = dz_BLNH.transpose(1, 2), _wide(k_BKSH), _wide(v_BKSH)
    dq_BNLH, dk, dv = q_BNLH.new_empty(q_BNLH.shape), torch.zeros_like(k), torch.zeros_like(v)
    drop = _Drop(dropout, seed)
    with products_in(q_BNLH.dtype):
        for at_queries, at_keys, bias_QW in _each(table, bias):
            q_KRH, dz_KRH = _rows(q_BNLH[at_queries], k.shape[1]), _rows(dz_BNLH[at_queries], k.shape[1])
            p_KRW = _probs(q_KRH, k[at_keys], scale, bias_QW)
            dv[at_keys].baddbmm_(drop(p_KRW).transpose(1, 2), dz_KRH)
            dp_KRW = drop.again(torch.bmm(dz_KRH, v[at_keys].transpose(1, 2)))
            ds_KRW = torch._softmax_backward_data(dp_KRW, p_KRW, -1, dp_KRW.dtype).mul_(scale)
            dk[at_keys].baddbmm_(ds_KRW.transpose(1, 2), q_KRH)
            dq_BNLH[at_queries] = torch.bmm(ds_KRW, k[at_keys]).view(N, -1, H)
    return dq_BNLH, _as(dk, k_BKSH), _as(dv, v_BKSH)


class _Drop:
    """Dropout on one block after the other; the same `seed` gives the same masks."""

    def __init__(self, dropout: float, seed: Tensor):
        self.dropout = dropout
        self.generator = torch.Generator().manual_seed(int(seed)) if dropout else None
        self.factors: Tensor | None = None

    def __call__(self, p_KRW: Tensor) -> Tensor:
        """The probabilities of the next block, some of them 0 (a new tensor)."""
        if not self.dropout:
            return p_KRW
        # 16 random bits decide on each number: the share is rounded to 1/65536. bernoulli_ takes 64, and 3.4 times as
        # long: half of a fine-tuning step.
        dropped = round(self.dropout * 2**16)
        bits = torch.empty(-(-p_KRW.numel() // 4), dtype=torch.int64)
        bits = bits.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: p_KRW.numel()]
        kept = bits.view(p_KRW.shape) >= dropped - 2**15
        self.factors = kept.to(p_KRW.dtype).mul_(2**16 / (2**16 - dropped))
        return p_KRW * self.factors

    def again(self, dp_KRW: Tensor) -> Tensor:
        """The gradient of the same block's probabilities (in place)."""
        return dp_KRW if self.factors is None else dp_KRW.mul_(self.factors)


@torch.library.register_fake("bildung::attend", lib=_LIBRARY)
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: Tensor, bias: Tensor, dropout: float, seed: Tensor
) -> Tensor:
    B, N, L, H = q.shape
    return q.new_empty(B, L, N, H)


@torch.library.register_fake("bildung::attend_backward", lib=_LIBRARY)
def _(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    table: Tensor,
    bias: Tensor,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, table, bias, ctx.dropout, seed = inputs
    ctx.save_for_backward(q, k, v, table, bias, seed)


def _slopes(ctx: Any, dz_BLNH: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, table, bias, seed = ctx.saved_tensors
    slopes = torch.ops.bildung.attend_backward(dz_BLNH, q, k, v, ctx.scale, table, bias, ctx.dropout, seed)
    return *slopes, None, None, None, None, None


torch.library.register_autograd("bildung::attend", _slopes, setup_context=_keep, lib=_LIBRARY)


def _each(table: Tensor, bias: Tensor) -> Iterator[tuple[Any, Any, Tensor]]:
    """(where its queries are, where its keys are, its bias) of every block."""
    every = slice(None)
    for row, start, end, first, last, filled, width in table.tolist():
        bias_QW = bias[filled : filled + (end - start) * width].view(end - start, width)
        yield (row, every, slice(start, end)), (row, every, slice(first, last)), bias_QW


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 where that is given, without gaps."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide, memory_format=torch.contiguous_format).contiguous()  # `to` leaves float32 with its gaps


def _rows(x_NQH: Tensor, key_heads: int) -> Tensor:
    """The query heads that share a key-value head, one below the other: K R H."""
    return _wide(x_NQH).view(key_heads, -1, x_NQH.shape[2])


def _as(x: Tensor, like: Tensor) -> Tensor:
    """In the type of `like`, in memory of its own."""
    return x.to(like.dtype).contiguous()


def _probs(q_KRH: Tensor, k_KWH: Tensor, scale: float, bias_QW: Tensor) -> Tensor:
    s_KRW = torch.baddbmm(q_KRH.new_empty(()), q_KRH, k_KWH.transpose(1, 2), beta=0, alpha=scale)
    if bias_QW.numel():
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
