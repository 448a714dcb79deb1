"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354).

    learning rate of B = ratio · learning rate of A          ratio 1: LoRA;  16 (the paper's 2⁴) for hard tasks

B starts at 0 and A does not, and in a wide model one rate cannot serve both: at the rate that A can bear, B hardly
moves. Only the rates differ; both follow the schedule. The vectors of a delta (DoRA's magnitudes) go with B, as in the
authors' code and in peft. With a large ratio A wants about half of its usual rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def faster_b(
    groups: Sequence[dict[str, Any]], model: nn.Module, learning_rate: float, ratio: float
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, each cut in two: what learns at `learning_rate`, and B, at `ratio` times it."""
    fast = {
        parameter
        for name, parameter in model.named_parameters()
        if ".deltas." in name and (name.endswith("lora_B") or parameter.ndim < 2)
    }
    return [
        {**group, "params": params, "lr": learning_rate * (ratio if is_fast else 1.0)}
        for is_fast in (False, True)
        for group in groups
        if (params := [parameter for parameter in group["params"] if (parameter in fast) == is_fast])
    ]
