"""The optimizer's parameter groups, and learning-rate schedules as plain functions of the step.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): weight decay is applied to the weights directly, not through the
gradient. Norm weights, biases and other vectors are not decayed: shrinking a scale towards 0 regularises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from bildung.core.errors import SettingsError, TrainingError

Schedule = Callable[[int], float]  # step, counted from 0 -> factor of the learning rate
ScheduleName = Literal["constant", "linear", "cosine"]


def adamw(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients: matrices decayed, vectors not.

    The fused kernel goes through weights, gradients and moments once instead of about ten times. Raises TrainingError
    when nothing is trainable, SettingsError for a learning rate that is not positive.
    """
    if not learning_rate > 0:
        raise SettingsError(f"learning_rate {learning_rate} was given; it must be above 0 (LoRA: about 2e-4).")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingError("no parameter requires a gradient: nothing would be trained. Add a delta or unfreeze some.")
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps, fused=True
    )


def constant(warmup: int = 0) -> Schedule:
    """1, after a linear rise over `warmup` steps. The first step already learns (transformers' first factor is 0)."""
    return lambda step: min(1.0, (step + 1) / warmup) if warmup else 1.0


def linear(steps: int, warmup: int = 0) -> Schedule:
    """From 1 down towards 0, which would be reached after `steps`."""
    rise = constant(warmup)
    return lambda step: rise(step) * _left(step, steps, warmup)


def cosine(steps: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Half a cosine from 1 down to `floor` (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts)."""
    rise = constant(warmup)

    def factor(step: int) -> float:
        return rise(step) * (floor + (1 - floor) * 0.5 * (1 - math.cos(math.pi * _left(step, steps, warmup))))

    return factor


def _left(step: int, steps: int, warmup: int) -> float:
    """1 until the warmup is over, then the share of the remaining steps that is left."""
    return max(0.0, min(1.0, (steps - step) / max(1, steps - warmup)))


def schedule(name: ScheduleName, steps: int, warmup: int) -> Schedule:
    """One of the above by its name in the settings. Raises SettingsError when the warmup does not fit the steps."""
    if not 0 <= warmup <= steps:
        raise SettingsError(f"warmup {warmup} was given for {steps} steps; allowed: 0 to {steps}.")
    return {"constant": constant(warmup), "linear": linear(steps, warmup), "cosine": cosine(steps, warmup)}[name]
