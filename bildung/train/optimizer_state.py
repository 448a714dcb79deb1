"""An optimizer's state as numbered tensors, for checkpoints: all of it, or the share that this rank keeps (zero1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bildung.core.errors import TrainingError
from bildung.train.parts import Parts


def is_shared_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each rank keeps the state of other parameters: then nobody else has what this one has."""
    return hasattr(optimizer, "optim")  # ZeroRedundancyOptimizer's inner one


def of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Number of a parameter -> its state, where this rank keeps it."""
    if not is_shared_out(optimizer):
        return dict(optimizer.state_dict()["state"])
    index = {id(parameter): number for number, parameter in enumerate(_parameters(optimizer))}
    inner: Any = optimizer.optim  # type: ignore[attr-defined]
    return {index[id(parameter)]: dict(state) for parameter, state in inner.state.items()}


def load(optimizer: torch.optim.Optimizer, parts: Parts, numbers: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Take the state from a checkpoint's tensors "optimizer.NUMBER.KEY" and from its `numbers`, which are no tensors.

    A parameter that never had a gradient has none. Raises TrainingError when there are more than parameters.
    """
    parameters = _parameters(optimizer)
    names = [name.split(".", 2) for name in parts.under("optimizer.").values()]
    if any(int(index) >= len(parameters) for index in [*(index for _, index, _ in names), *numbers]):
        raise TrainingError(f"{place} holds optimizer state of other parameters; it is from another run. Remove it.")
    inner = getattr(optimizer, "optim", optimizer)
    mine = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers.items()}
    for word, number, key in names:
        like, name = parameters[int(number)], f"{word}.{number}.{key}"
        values = state.setdefault(int(number), {})
        if id(like) in mine:
            values[key] = parts.read(name, like if parts.shapes[name] == tuple(like.shape) else None)
    optimizer.load_state_dict({"state": state, "param_groups": _groups(optimizer)})


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Parameter groups with numbers for parameters, as state_dict() has them."""
    groups, number = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        numbers = list(range(number, number + count))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
        number += count
    return groups
