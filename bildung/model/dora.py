"""DoRA: the length of each row of a matrix and its direction are learned apart (Liu et al. 2024, arXiv 2402.09353).

    W' = m · V / |V|,   V = W + scaling · B A          |V|: the norm of each row of V, m a number per row

At the start m = |W| and B = 0: W' is W, bit for bit. The gradient takes |V| for a constant (section 4.3), which spares
memory and hardly changes what is learned. The paper speaks of columns, as it writes x W where PyTorch has x Wᵀ.

    y' = y + (m / |V| - 1) · (y - bias),     y = W x + bias + scaling · B A x

|V| takes the whole matrix, in every forward pass, so a DoRA costs a few tens of percent in training and several times
as much in decoding; merge it for use. Dropout falls on the input of B A alone; peft's falls on (m / |V| - 1) W x too.
"""

# B L: any leading dimensions, I input features, O output features

from __future__ import annotations

import torch
from torch import Tensor, nn

from bildung.model.linear import Delta, Linear
from bildung.model.low_rank import LowRank


class DoRA(Delta):
    """A low-rank update of the matrix `linear`, and a magnitude per output feature. Made before it is added."""

    linear: Linear

    def __init__(self, linear: Linear, update: LowRank):
        super().__init__()
        object.__setattr__(self, "linear", linear)  # a reference, not a part
        self.update = update
        weight_OI = linear.effective(torch.float32)[0]
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight_OI.detach(), dim=1))

    @property
    def rank(self) -> int:
        """Of the update."""
        return self.update.rank

    @property
    def dropout(self) -> float:
        """Of the update's input."""
        return self.update.dropout

    def _stretch(self, weight_OI: Tensor) -> Tensor:
        """m / |V| (O,), given W."""
        with torch.no_grad():
            norm_O = torch.linalg.vector_norm(weight_OI.float() + self.update.weight().float(), dim=1)
        return self.magnitude / norm_O

    def forward(self, x_BLI: Tensor, y_BLO: Tensor) -> Tensor:
        with torch.no_grad():
            weight_OI, bias_O = self.linear.effective(torch.float32, below=self)
        stretch_O = self._stretch(weight_OI)
        y_BLO = self.update(x_BLI, y_BLO)
        unbiased_BLO = y_BLO if bias_O is None else y_BLO - bias_O.to(y_BLO.dtype)
        return y_BLO + (stretch_O - 1).to(y_BLO.dtype) * unbiased_BLO

    def applied(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        stretch_O1 = self._stretch(weight_OI)[:, None].to(weight_OI.dtype)
        return stretch_O1 * (weight_OI + self.update.weight().to(weight_OI.dtype)), bias_O
