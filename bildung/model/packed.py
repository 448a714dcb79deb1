"""Matrices laid out as the CPU's kernels want them, while a model only computes and does not learn.

    with packed(model):
        decode(model, prompts, new_tokens=128)

A matrix-vector product is bound by how fast the matrix comes from memory. An ordinary row-major W_OI arrives at a third
of the memory's speed, because the kernel needs many rows at a time; oneDNN's blocked layout puts the numbers in the
order in which they are used. One token through SmolLM2's unembedding, one thread: bfloat16 3.4 -> 1.5 ms (37 GB/s),
float32 7.1 -> 4.2 ms; long prompts gain too in float32 (2.1 times). The results are the same to rounding.

Matrices that multiply the same input (q, k and v; gate and up) are put below each other in one packed matrix: a kernel
call costs 10 µs before it does anything, as much as reading a small matrix.

It costs a second copy of the matrices and as much time as about 15 decoded tokens save.
"""

# I input features, O output features, J outputs of several matrices

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import psutil
import torch
from torch import Tensor

from bildung.model.base import Model
from bildung.model.linear import Dense, Joint, Linear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@contextmanager
def packed(model: Model) -> Iterator[None]:
    """Lend the dense matrices on the CPU a packed copy in the model's dtype while the block runs.

    Weights must not change inside. Passes that record gradients use the ordinary matrices. Does nothing where it cannot
    help: on other devices, without oneDNN, or when the copies would take more than half of the free memory.
    """
    linears = [linear for linear in model.linears().values() if _is_free(linear)]
    numbers = sum(linear.in_features * linear.out_features for linear in linears)
    too_large = numbers * model.dtype.itemsize > psutil.virtual_memory().available / 2
    if model.device.type != "cpu" or not _supported(model.dtype) or too_large:
        linears = []
    try:
        with torch.no_grad():
            _lend(model, linears)
        yield
    finally:
        for linear in linears:
            cast(Dense, linear.base).packed = linear.joint = None


def _lend(model: Model, linears: Sequence[Linear]) -> None:
    """Joint copies to groups of plain matrices, single ones to the others."""
    left = dict.fromkeys(linears)
    for module in model.modules():
        for names in TOGETHER:
            group = [linear for name in names if (linear := getattr(module, name, None)) in left and linear.is_plain()]
            if len(group) == len(names):
                joint = _join(group, model.dtype)
                for linear in group:
                    linear.joint = joint
                    del left[linear]
    for linear in left:
        cast(Dense, linear.base).packed = _pack(linear.base.dense(), model.dtype)


def _is_free(linear: Linear) -> bool:
    """A dense matrix to which nothing is lent yet."""
    return isinstance(linear.base, Dense) and linear.base.packed is None and linear.joint is None


def _join(linears: Sequence[Linear], dtype: torch.dtype) -> Joint:
    weight_JI = torch.cat([linear.base.dense().to(dtype) for linear in linears])
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    bias_J = torch.cat(biases).to(dtype) if biases else None  # a family gives all of a group a bias, or none
    return Joint(_pack(weight_JI, dtype), bias_J, tuple(linear.out_features for linear in linears))


def _pack(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    packed_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.to(dtype).contiguous(), 1)
    return packed_OI


def _supported(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN computes in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
