"""Adafactor: the second moment of a matrix as one number per row and one per column (Shazeer & Stern 2018, arXiv
1804.04235).

    R_i ← β R_i + (1-β) mean_j G²_ij          V_ij ≈ R_i C_j / mean(R)        the best rank-1 guess of all G²
    C_j ← β C_j + (1-β) mean_i G²_ij          β = 1 - t^-0.8                  (no bias correction: β is 0 at t = 1)
    U = G / √V                                U ← U / max(1, RMS(U))          update clipping, d = 1
    W ← W - ηλW - α U                         no first moment

Two float32 vectors instead of two matrices: a 4096 x 4096 weight has 32 kB of state instead of 134 MB.

relative: α = max(10^-3, RMS(W)) · min(η, 1/√t), steps as a share of the weights' own size (the paper's; η = 0.01).
Otherwise α = η, and a learning rate means what it means for AdamW (T5's common use with a schedule).

Equal to torch.optim.Adafactor (relative) and transformers' Adafactor(relative_step=False, scale_parameter=False).
"""

# G, U, V: gradient, update and second moment of a parameter, its last two dimensions rows and columns

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bildung.train.optimizer import Optimizer

TINY = 1e-30  # ε₁: under a square root, where a row of the gradient has been 0 so far
SMALLEST_SCALE = 1e-3  # ε₂: a weight that starts at 0 must be able to leave it


class Adafactor(Optimizer):
    """params: as for any PyTorch optimizer. State: about 0 bytes per parameter of a matrix, 4 of a vector."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        relative: bool = False,
        decay: float = 0.8,
        clip: float = 1.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, relative=relative, decay=decay, clip=clip))

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step."""
        if not state:
            state["step"] = 0
            if grad.ndim >= 2:
                state["rows"], state["columns"] = torch.zeros_like(grad[..., :1]), torch.zeros_like(grad[..., :1, :])
            else:
                state["square"] = torch.zeros_like(grad)
        state["step"] += 1
        new = state["step"] ** -group["decay"]  # 1 - β
        if grad.ndim >= 2:
            rows, columns = state["rows"], state["columns"]
            rows.lerp_(grad.square().mean(-1, keepdim=True).add_(TINY), new)
            columns.lerp_(grad.square().mean(-2, keepdim=True).add_(TINY), new)
            direction = grad * (rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt()
        else:
            state["square"].lerp_(grad.square().add_(TINY), new)
            direction = grad * state["square"].rsqrt()
        size = group["lr"]
        if group["relative"]:
            size = max(SMALLEST_SCALE, _rms(parameter)) * min(size, state["step"] ** -0.5)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-size / max(1.0, _rms(direction) / group["clip"]))


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm()) / tensor.numel() ** 0.5
