"""AdamW with both moments in one byte per number (Dettmers et al. 2022, arXiv 2110.02861).

    codes → m, v in float32 → one AdamW step → codes                   parameter by parameter

Codes and blocks of 256: model/blockwise.py. m is quantized with the signed map, v, which is never negative, with the
unsigned one. Tensors under 4096 numbers (norms, biases) stay in float32: they cost nothing and are the sensitive ones.

A trap of the method: where a gradient is less than about 1/2500 of its block's largest, v rounds to 0 while m does not,
and its next step divides by the fresh gradient's share of v alone, up to 1/√(1 - β₂) = 30 times too long. A second
moment that is not 0 therefore never takes the code of 0 here. (bitsandbytes lets it.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bildung.model.blockwise import dequantize, dynamic_map, quantize
from bildung.train.optimizer import Optimizer, adam_direction

BLOCK = 256
SMALLEST = 4096  # tensors of fewer numbers stay in float32


class AdamW8bit(Optimizer):
    """params: as for any PyTorch optimizer. State: 2 + 8/256 bytes per parameter (float32 AdamW: 8)."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step."""
        state.setdefault("step", 0)
        state["step"] += 1
        m, v = self._moments(parameter, state)
        direction, m, v = adam_direction(grad, m, v, state["step"], group["betas"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        if parameter.numel() < SMALLEST:
            state["m"], state["v"] = m, v
            return
        state["m"], state["m_largest"] = quantize(m, dynamic_map(signed=True), BLOCK)
        codes, state["v_largest"] = quantize(v, dynamic_map(signed=False), BLOCK)
        state["v"] = torch.where(v > 0, codes.clamp(min=1), codes)

    def _moments(self, parameter: nn.Parameter, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """m and v in float32."""
        if "m" not in state:
            return torch.zeros_like(parameter), torch.zeros_like(parameter)
        if parameter.numel() < SMALLEST:
            return state["m"], state["v"]
        return (
            dequantize(state["m"], state["m_largest"], dynamic_map(signed=True), BLOCK),
            dequantize(state["v"], state["v_largest"], dynamic_map(signed=False), BLOCK),
        )
