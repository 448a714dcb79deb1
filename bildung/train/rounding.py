"""Weights kept in bfloat16 alone: how they take updates smaller than their own rounding.

A bfloat16 has 8 bits: the neighbours of 1 are 1.0078 and 0.9961. An update of 0.001 rounds away, and so does the next:
the weight stands still for ever. Two cures:

    stochastic   round up or down by chance, with the chances that make the mean right: 1 + 0.001 becomes 1.0078 once in
                 eight times and 1 otherwise. Right on average, 0 bytes more (Gupta et al. 2015, arXiv 1502.02551)
    kahan        remember what rounding lost and add it to the next update: 2 bytes more, error of about 16 bits
                 instead of 8 (Kahan 1965; for weights Zamirai et al. 2020, arXiv 2010.06192)

Per parameter 2 bytes of weight and 2 of gradient instead of 4 and 4. The moments stay float32: v changes by 1/1000 per
step at β₂ = 0.999, which bfloat16 would lose in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bildung.core.errors import SettingsError
from bildung.train.optimizer import Optimizer, adam_direction

Rounding = Literal["stochastic", "kahan"]


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 -> bfloat16, up or down by chance so that the expected value is the given one.

    A bfloat16 is the upper half of a float32. Adding a random number below 2^16 to the whole carries into the upper
    half with chance (lower half)/2^16, exactly the share of the way to the next bfloat16. Not a number stays that.
    """
    noise = torch.randint(0, 2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    upper = values.view(torch.int32).add(noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), upper, values).bfloat16()


def add_kahan(weight: Tensor, update: Tensor, lost: Tensor) -> None:
    """weight += update (float32), in place; `lost` (bfloat16) is what rounding has kept back so far, and is renewed."""
    wanted = weight.float() + (update + lost)
    weight.copy_(wanted)
    lost.copy_(wanted - weight.float())


class RoundedAdamW(Optimizer):
    """AdamW for bfloat16 weights. Chance is a function of (seed, step, parameter): a resumed run is the same run.

    State: 8 bytes per parameter (stochastic) or 10 (kahan). Raises SettingsError for weights of another type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        rounding: Rounding,
        seed: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        given = dict(lr=lr, rounding=rounding, seed=seed, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__(params, given)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._number = {parameter: number for number, parameter in enumerate(parameters)}
        if others := {parameter.dtype for parameter in parameters} - {torch.bfloat16}:
            raise SettingsError(f"{rounding} rounding is for bfloat16 weights; these are {others}.")

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, computed in float32; only its result is rounded."""
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter, dtype=torch.float32))
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            if group["rounding"] == "kahan":
                state["lost"] = torch.zeros_like(parameter)
        state["step"] += 1
        direction, _, _ = adam_direction(
            grad.float(), state["exp_avg"], state["exp_avg_sq"], state["step"], group["betas"], group["eps"]
        )
        change = direction.add_(parameter.float(), alpha=group["weight_decay"]).mul_(-group["lr"])
        if group["rounding"] == "kahan":
            add_kahan(parameter, change, state["lost"])
        else:
            words = (group["seed"] * 1_000_003 + state["step"]) * 1_000_003 + self._number[parameter]
            generator = torch.Generator(parameter.device).manual_seed(words % 2**63)
            parameter.copy_(round_stochastically(parameter.float() + change, generator))
