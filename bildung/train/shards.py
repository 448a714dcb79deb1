"""Tensors of which each rank holds a part: DTensors, which know the part and the whole.

    Shard(0) on 2 ranks      rank 0: rows 0..9      rank 1: rows 10..19      of a (20, D) matrix

ZeRO 2 and 3 cut parameters in this way (parallel.py), and so does tensor parallelism (tensor_parallel.py): whatever
saves, gathers, clips or counts parameters need not know which of them it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.tensor
from torch import Tensor, nn

from bildung.model.linear import WeightStore


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over the ranks."""
    return isinstance(tensor, torch.distributed.tensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The numbers that this rank holds; gradients flow through."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor, gathered on every rank; others as they are. Every rank must call this."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if `like` is spread."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def number_of_part(tensor: Tensor) -> int:
    """Which part of a tensor this rank holds, from 0; ranks that hold the same part have the same number."""
    if not is_shard(tensor):
        return 0
    spread: Any = tensor
    number = 0
    for place, at, size in zip(
        spread.placements, spread.device_mesh.get_coordinate(), spread.device_mesh.shape, strict=True
    ):
        number = number * size + at if place.is_shard() else number
    return number


def apart(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those that are spread and those that are not: PyTorch's kernels over lists take one kind at a time."""
    both = [[p for p in parameters if is_shard(p)], [p for p in parameters if not is_shard(p)]]
    return [some for some in both if some]


def norm_of(gradients: Sequence[Tensor]) -> float:
    """The norm of the whole gradient: parts count on every rank, what all ranks have counts once."""
    norms = [float(whole(torch.nn.utils.get_total_norm(some))) for some in apart(gradients)]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes this rank holds: weights (quantized ones too), gradients, optimizer state."""
    inner = getattr(optimizer, "optim", optimizer)  # what ZeroRedundancyOptimizer keeps of it
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    parameters = list(model.parameters())
    stores = [module for module in model.modules() if isinstance(module, WeightStore)]
    numbers = [buffer for store in stores for buffer in store.buffers(recurse=False)]
    return {
        "weights": sum(local(tensor).nbytes for tensor in [*parameters, *numbers]),
        "gradients": sum(local(p.grad).nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(local(state).nbytes for state in states),
    }
