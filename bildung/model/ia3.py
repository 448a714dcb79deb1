"""(IA)³: activations are rescaled by learned vectors (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    keys       l_k · (W_k x)                      the output of k_proj, its bias included
    values     l_v · (W_v x)                      the output of v_proj
    inside     W_down (l_ff · act(W_up x))        the input of down_proj

All start at 1. A number per feature is all that trains, a ten-thousandth of the model, and it can be multiplied into
the matrix: l · W scales rows (and the bias), W · l columns.
"""

# B L: any leading dimensions, I input features, O output features, F features that are scaled: O or I

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bildung.model.linear import Delta

Side = Literal["output", "input"]


class Rescale(Delta):
    """A factor per feature of a matrix's output or input."""

    def __init__(self, features: int, side: Side, *, device: torch.device | None = None):
        super().__init__()
        self.side = side
        self.factor = nn.Parameter(torch.ones(features, device=device))

    def reads(self, x_BLI: Tensor) -> Tensor:
        return self._scaled(x_BLI) if self.side == "input" else x_BLI

    def forward(self, x_BLI: Tensor, y_BLO: Tensor) -> Tensor:
        return self._scaled(y_BLO) if self.side == "output" else y_BLO

    def _scaled(self, x_BLF: Tensor) -> Tensor:
        # What differs from 1 is rounded to bfloat16, not the factor, whose steps above 1 would be 2^-7.
        return torch.addcmul(x_BLF, x_BLF, (self.factor - 1).to(x_BLF.dtype))

    def applied(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor_F = self.factor.to(weight_OI.dtype)
        if self.side == "input":
            return weight_OI * factor_F, bias_O
        return weight_OI * factor_F[:, None], None if bias_O is None else bias_O * self.factor.to(bias_O.dtype)
