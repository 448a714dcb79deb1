"""What an objective returns: a SUM and a COUNT, never a mean (see fit.py for why)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class LossSum:
    """total: the loss, with its graph, summed over `count` things (target tokens, in nats; pairs ...). metrics: other
    sums over the same things, logged as means."""

    total: Tensor
    count: int
    metrics: Mapping[str, Tensor | float] = dataclasses.field(default_factory=dict)


Objective = Callable[[Any, Any], LossSum]  # (model, batch); a batch has .to, .num_tokens and .num_targets
