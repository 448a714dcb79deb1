"""How fast a training will be: some forward and backward passes on random weights, timed."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from bildung.train.loss import Objective


def speed(model: Any, objective: Objective, batch: Any, seconds: float) -> float:
    """Micro-batches per second, after one that warms up. model: on the meta device, or with numbers."""
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    real = copy.deepcopy(model).to_empty(device="cpu") if on_meta else model
    if on_meta:
        with torch.no_grad():
            for parameter in real.parameters():
                parameter.normal_(0.0, 0.02)
    real.train()
    passes, start = 0, time.monotonic()
    while passes < 2 or time.monotonic() - start < seconds:
        objective(real, batch).total.backward()
        passes += 1
        if passes == 1:
            start = time.monotonic()
    return (passes - 1) / (time.monotonic() - start)
