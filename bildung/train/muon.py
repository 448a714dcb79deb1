"""Muon: every direction of a matrix's update is made equally long (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

    B ← μB + (1 - μ)G                momentum of the gradient, one number per weight
    U = (1 - μ)G + μB                Nesterov: the momentum as it will be after one more such gradient
    O = NS(U) ≈ U (UᵀU)^(-1/2)       U = PSQᵀ becomes about PQᵀ: all singular values near 1
    W ← W - ηλW - η · scale · O

A gradient of a matrix is nearly of low rank: a few directions are large, and Adam, which looks at one number at a time,
follows them. NS takes five Newton-Schulz steps of an odd polynomial, matrix products alone:

    X ← aX + bXXᵀX + cXXᵀXXᵀX,   (a, b, c) = (3.4445, -4.7750, 2.0315),   X = U / |U|

The coefficients do not converge to 1: they lift small singular values fast and leave all in about 0.7 to 1.2.

scale: "spectral" is Jordan's √max(1, rows/columns), for η near 0.02. "rms" is Moonlight's 0.2·√max(rows, columns) (Liu
et al. 2025, arXiv 2502.16982, eq. 4): updates as large as AdamW's usually are, so its η and λ carry over.

For matrices inside the layers. Embeddings, unembedding, heads and vectors are AdamW's: a row of an embedding is a thing
of its own, not a direction of a map. torch.optim.Muon (torch 2.9) is the first half of this and equal to it.
"""

# U, X: (R, C) rows and columns of a weight

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.train.optimizer import Optimizer, adam_direction
from bildung.train.shards import spread_like, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Scale = Literal["rms", "spectral"]


def orthogonalized(u_RC: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns, of a tall one), in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = u_RC.shape[0] > u_RC.shape[1]
    x_RC = u_RC.bfloat16().T if tall else u_RC.bfloat16()  # the smaller side's products
    x_RC = x_RC / x_RC.norm().clamp(min=eps)  # no singular value above 1
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.T
        x_RC = torch.addmm(x_RC, torch.addmm(gram_RR, gram_RR, gram_RR, beta=b, alpha=c), x_RC, beta=a)
    return x_RC.T if tall else x_RC


class Muon(Optimizer):
    """Muon for the parameters of groups with `muon: True` (the default), AdamW for the groups with `muon: False`.

    One learning rate for all groups unless they set their own (scale "spectral" wants that). Raises SettingsError for a
    Muon parameter that is no matrix. State: 4 bytes per parameter of the matrices, 8 of the others.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        muon: bool = True,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        scale: Scale = "rms",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = dict(lr=lr, muon=muon, weight_decay=weight_decay, momentum=momentum, scale=scale)
        super().__init__(params, {**defaults, "betas": betas, "eps": eps})
        shapes = [tuple(p.shape) for group in self.param_groups if group["muon"] for p in group["params"]]
        if wrong := [shape for shape in shapes if len(shape) != 2]:
            raise SettingsError(f"Muon is for matrices; {wrong[0]} was given. Put it into a group with muon: False.")

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of a matrix (Muon) or of another parameter (AdamW)."""
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if not group["muon"]:
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["step"] += 1
            direction, _, _ = adam_direction(
                grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group["betas"], group["eps"]
            )
            parameter.add_(direction, alpha=-group["lr"])
            return
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        ahead_RC = grad.lerp(state["momentum"], group["momentum"])
        update_RC = orthogonalized(whole(ahead_RC))  # of the whole matrix, also where ranks hold parts of it
        scale = scale_of(group["scale"], *parameter.shape)
        parameter.add_(spread_like(update_RC, parameter), alpha=-group["lr"] * scale)


def scale_of(scale: Scale, rows: int, columns: int) -> float:
    """What an orthogonal update is multiplied by; see the top of this file."""
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "rms" else math.sqrt(max(1, rows / columns))


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices inside the model's stacks of layers: not embeddings, unembedding or heads."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {parameter for stack in stacks for parameter in stack.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and p in inside]
