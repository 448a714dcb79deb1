"""ZeRO 1: every parameter has an owner, the rank that keeps its optimizer state.

    after the last backward pass     gradient of p ── sum ──▸ owner of p          P numbers
    after the owner's step           new p ──▸ everybody                          P numbers

DDP alone would sum every gradient for everybody, 2 P, of which a rank needs its own only. The second half is
ZeroRedundancyOptimizer's. On the other ranks a gradient that was sent holds no sum, and nobody looks at it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bildung.core import ranks


class Owners:
    """Who owns which parameter of a ZeroRedundancyOptimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer: torch.optim.Optimizer = optimizer.optim  # over this rank's own parameters
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        claimed = ranks.gathered([number for number, p in enumerate(everything) if id(p) in own])
        self._owner = {id(everything[number]): rank for rank, numbers in enumerate(claimed) for number in numbers}
        self._under_way: list[Any] = []

    def collect(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: send the gradients of a bucket to their owners. `wait` tells when they are there:
        they lie in the bucket itself (gradient_as_bucket_view), so DDP has nothing to wait for."""
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self._under_way.append(dist.reduce(gradient, dst=self._owner[id(parameter)], async_op=True))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def wait(self) -> None:
        """Until this rank's gradients are the sums of all ranks'."""
        for one in self._under_way:
            one.wait()
        self._under_way = []
