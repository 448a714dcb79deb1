"""Low-rank deltas: LoRA, the form in which every edit is kept too.

    dW = scaling · (B A - B₀ A₀)          A (rank x in), B (out x rank); B₀ A₀: where they started, mostly 0

Hu et al. 2021 (arXiv 2106.09685, section 4.1) start with A random and B = 0, so the model is bit-equal at step 0. PiSSA
(Meng et al. 2024, arXiv 2404.02948) starts with the largest singular directions of W itself, where a gradient step goes
furthest, and trains those while the rest of W is frozen:

    W = U S Vᵀ      A₀ = √S_r V_rᵀ, B₀ = U_r √S_r      W + dW = (W - B₀ A₀) + B A

W itself is left as it is: B₀ A₀ is subtracted, so the result is an ordinary LoRA of twice the rank on the model that
everybody has, [B, -B₀] [A; A₀], the form into which peft converts a PiSSA.
"""

# B L N: any leading dimensions, I input features, O output features, R rank

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.model.linear import Delta

POWER_STEPS = 16  # of the subspace iteration of Halko et al. 2011; peft's pissa_niter_16


class LowRank(Delta):
    """A of uniform numbers up to 1/sqrt(I), peft's `kaiming_uniform_(a=sqrt(5))`, and B = 0.

    scaling: alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732).
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        bound = 1 / math.sqrt(in_features)
        lora_A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    @property
    def rank(self) -> int:
        """Inner dimension of the two factors that train."""
        return self.lora_A.shape[0]

    def start_at(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Train from these factors; what they make at first is subtracted, so that dW is 0."""
        with torch.no_grad():
            self.lora_A.copy_(lora_A)
            self.lora_B.copy_(lora_B)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, B with dW = scaling · B A: of a delta that started elsewhere than at 0, of twice the rank."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def forward(self, x_BLI: Tensor, y_BLO: Tensor) -> Tensor:
        x_NI = F.dropout(x_BLI, self.dropout, self.training).flatten(0, -2)
        lora_A, lora_B = self.factors()
        h_NR = x_NI @ lora_A.to(x_NI.dtype).t()
        y_NO = torch.addmm(y_BLO.flatten(0, -2), h_NR, lora_B.to(x_NI.dtype).t(), alpha=self.scaling)
        return y_NO.view(y_BLO.shape)

    def weight(self) -> Tensor:
        lora_A, lora_B = self.factors()
        return self.scaling * (lora_B @ lora_A)


def principal(weight_OI: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A₀, B₀ of PiSSA: B₀ A₀ is, nearly, the matrix of this rank that is closest to W. A function of (W, rank, seed).

    By subspace iteration on twice the rank, which takes a thousandth of a full decomposition's time and needs not be
    exact: what it leaves out stays in W. Raises SettingsError for a rank above that of the matrix.
    """
    if rank > min(weight_OI.shape):
        raise SettingsError(
            f"rank = {rank} was given for a matrix of shape {tuple(weight_OI.shape)}, which has {min(weight_OI.shape)} "
            f"singular directions to start from."
        )
    if weight_OI.is_meta:  # a model on paper
        return weight_OI.new_empty(rank, weight_OI.shape[1]), weight_OI.new_empty(weight_OI.shape[0], rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u_OR, s_R, v_IR = torch.svd_lowrank(
            weight_OI.detach().float(), q=min(2 * rank, *weight_OI.shape), niter=POWER_STEPS
        )
    root_R = s_R[:rank].sqrt()
    return root_R[:, None] * v_IR[:, :rank].t(), u_OR[:, :rank] * root_R
