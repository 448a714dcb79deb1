"""The delta of DyLoRA: one pair of factors whose first b rows and columns are an update of rank b, for every b.

    rank b:   dW = alpha / b · B[:, :b] A[:b]        b = 1 ... rank     (Valipour et al. 2023, arXiv 2210.07558, eq. 7)

`use` says which b counts; afterwards, and in files, all do: an ordinary LoRA of full rank. frozen: only row and column
b get a gradient, what smaller ranks use stands still (the paper's FROZEN, section 3).
"""

# R rank, I input features, O output features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.model.low_rank import LowRank


class Nested(LowRank):
    """A LowRank of which only a part may be in use."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, *, frozen: bool = False, **options: Any
    ):
        super().__init__(in_features, out_features, rank, alpha / rank, **options)
        self.alpha, self.frozen, self.active = alpha, frozen, self.rank

    def use(self, rank: int) -> None:
        """Count the first `rank` rows of A and columns of B only."""
        if not 1 <= rank <= self.rank:
            raise SettingsError(f"rank {rank} was asked for; this delta has 1 to {self.rank}.")
        self.active, self.scaling = rank, self.alpha / rank

    def factors(self) -> tuple[Tensor, Tensor]:
        b = self.active
        lora_A, lora_B = self.lora_A[:b], self.lora_B[:, :b]
        if self.frozen and self.training:
            lora_A = torch.cat([lora_A[: b - 1].detach(), lora_A[b - 1 :]])
            lora_B = torch.cat([lora_B[:, : b - 1].detach(), lora_B[:, b - 1 :]], dim=1)
        return lora_A, lora_B


def use_rank(model: nn.Module, rank: int | None) -> None:
    """Let every Nested delta of the model count `rank` of its ranks; None: all."""
    for module in model.modules():
        if isinstance(module, Nested):
            module.use(module.rank if rank is None else rank)
