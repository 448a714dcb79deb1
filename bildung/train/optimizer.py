"""What our own optimizers share: AdamW's formula, and a state that is restored exactly as it was saved.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), t = 1, 2, ...:

    m ← β₁m + (1 - β₁)g        v ← β₂v + (1 - β₂)g²        two running means: of the gradient and of its square
    w ← w - ηλw - η · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

Bytes of state per parameter:

    adamw          8       m and v in float32
    adamw_8bit     2.03    m and v in one byte each, a float32 per block of 256
    muon           4       of the matrices inside the layers: their momentum; 8 of the rest
    adafactor      ~0      a float32 per row and per column of a matrix
    paged_adamw    8       on disk or in host memory; at most `budget` bytes where the weights are
    kahan          10      m, v and, in bfloat16, what rounding the weight has lost (stochastic rounding: 8)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Optimizer(torch.optim.Optimizer):
    """PyTorch's, except for two things.

    A step is written once per parameter (`update`), and a loaded state keeps each tensor's own type: PyTorch turns
    every floating tensor of it into the parameter's type, codes of 8 bits and float32 moments of bfloat16 weights too.
    """

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change a parameter, given its gradient and its own state (empty at first)."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient; `closure` recomputes the loss, as in PyTorch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, group in self.with_gradient():
            assert parameter.grad is not None
            self.update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def with_gradient(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """(parameter, its group) of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, group

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, with every tensor in the type it was saved in."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, saved in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }


def adam_direction(
    grad: Tensor, m: Tensor, v: Tensor, step: int, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(direction, m, v): Adam's step before the learning rate, and the new moments (m and v are changed in place)."""
    beta1, beta2 = betas
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return (m / (1 - beta1**step)).div_(denominator), m, v
