"""A few numbers that move all weights: the intrinsic dimension of a task.

    dW = λ · P θ        θ: d numbers, shared by all matrices;  P: a fixed random projection;  λ: one number per matrix

Without λ this is DID (Li et al. 2018, arXiv 1804.08838); with it, structure-aware, SAID (Aghajanyan, Zettlemoyer, Gupta
2021, arXiv 2012.13255, section 3.2). The smallest d that reaches 90 % of what full tuning gains is the task's intrinsic
dimension, d90.

P of a dense Gaussian would hold d times as many numbers as the model. The Fastfood transform (Le, Sarlos & Smola 2013,
arXiv 1408.3060) holds three vectors of one matrix's size and multiplies in n log n:

    P θ = H G Π H B θ / sqrt(D Σ G²)        θ padded to n = 2^k ≥ D numbers, the result cut to D

    B random signs   H Walsh-Hadamard matrix, not normalised   Π a permutation   G Gaussian

The factor makes P keep lengths: each of the D numbers has on average the square |θ|² / D. What is random follows from a
seed, so a file holds θ and λ alone.

The authors' own backward pass of H divides by sqrt(n) where the forward pass does not; two of them make the gradient n
times too small. Adam hides that, SGD does not. Here the gradient is the true one.
"""

# O output features, I input features, D = O · I, n = D rounded up to a power of two

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from bildung.model.linear import Delta


def walsh_hadamard(x_n: Tensor) -> Tensor:
    """H x, H_ij = (-1)^popcount(i & j), not normalised; the length of x is a power of two.

    A row of 2^(a+b) numbers is a matrix of 2^a rows: H of the whole is H of its rows and H of its columns, so two
    matrix products do, which are faster than log n passes over memory.
    """
    bits = x_n.numel().bit_length() - 1
    rows, columns = 2 ** (bits // 2), 2 ** (bits - bits // 2)
    left, right = _hadamard(rows, x_n.dtype, x_n.device), _hadamard(columns, x_n.dtype, x_n.device)
    return (left @ x_n.view(rows, columns) @ right).flatten()


def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


class _Hadamard(torch.autograd.Function):
    """H is symmetric: its backward pass is itself."""

    @staticmethod
    def forward(ctx: Any, x_n: Tensor) -> Tensor:
        return walsh_hadamard(x_n)

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor) -> Tensor:
        y_n: Tensor = _Hadamard.apply(grad_n.contiguous())
        return y_n


class Fastfood(nn.Module):
    """P: `dimension` numbers -> `size` numbers, random but for the seed. Linear, and keeps lengths on average."""

    sign_n: Tensor
    order_n: Tensor
    gauss_n: Tensor

    def __init__(self, dimension: int, size: int, seed: int):
        super().__init__()
        self.dimension, self.size = dimension, size
        length = 2 ** math.ceil(math.log2(max(size, dimension, 2)))
        generator = torch.Generator().manual_seed(seed)
        sign_n = torch.randint(0, 2, (length,), generator=generator, dtype=torch.int8) * 2 - 1
        order_n = torch.randperm(length, generator=generator).int()
        gauss_n = torch.randn(length, generator=generator)
        self.scale = 1 / math.sqrt(size * float(gauss_n.double().square().sum()))
        for name, value in (("sign_n", sign_n), ("order_n", order_n), ("gauss_n", gauss_n)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, theta_d: Tensor) -> Tensor:
        x_n = theta_d * self.sign_n[: self.dimension]
        x_n = torch.nn.functional.pad(x_n, (0, len(self.sign_n) - self.dimension))
        x_n = _Hadamard.apply(x_n)[self.order_n] * self.gauss_n.to(x_n.dtype)
        return _Hadamard.apply(x_n)[: self.size] * self.scale


class Intrinsic(Delta):
    """dW = λ P θ for one matrix. `theta_d` is one Parameter, the same in all matrices; λ None: DID."""

    def __init__(self, theta_d: nn.Parameter, shape: tuple[int, int], seed: int, scaled: bool):
        super().__init__()
        self.theta_d, self.shape, self.seed = theta_d, shape, seed
        self.project = Fastfood(theta_d.numel(), shape[0] * shape[1], seed).to(theta_d.device)
        self.scale = nn.Parameter(torch.ones((), device=theta_d.device)) if scaled else None

    def forward(self, x_BLI: Tensor, y_BLO: Tensor) -> Tensor:
        return y_BLO + x_BLI @ self.weight().to(x_BLI.dtype).t()

    def weight(self) -> Tensor:
        dW_OI = self.project(self.theta_d).view(self.shape)
        return dW_OI if self.scale is None else self.scale * dW_OI


def seed_of(seed: int, name: str) -> int:
    """The seed of one matrix's projection: another matrix, another P."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
