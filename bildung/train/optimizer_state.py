"""An optimizer's state as named tensors, for checkpoints: all of it, or the share that this rank keeps (zero1).

PyTorch numbers parameters in the order of their groups, which is not the same on every number of ranks; names are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bildung.core.errors import TrainingError
from bildung.train.parts import Parts

Parameters = Mapping[str, nn.Parameter]


def is_shared_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each rank keeps the state of other parameters: then nobody else has what this one has."""
    return hasattr(optimizer, "optim")  # ZeroRedundancyOptimizer's inner one


def of(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, dict[str, Any]]:
    """Name of a parameter -> its state, where this rank keeps it."""
    names = _names(optimizer, parameters)
    if not is_shared_out(optimizer):
        return {names[number]: state for number, state in optimizer.state_dict()["state"].items()}
    by_id = {id(parameters[name]): name for name in names}
    inner: Any = optimizer.optim  # type: ignore[attr-defined]
    return {by_id[id(parameter)]: dict(state) for parameter, state in inner.state.items()}


def load(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    parts: Parts,
    numbers: Mapping[str, Mapping[str, Any]],
    place: Path,
) -> None:
    """Take the state from a checkpoint's tensors "optimizer.KEY.NAME" and from its `numbers`, which are no tensors.

    A parameter that never had a gradient has none. Raises TrainingError when there is state of other parameters.
    """
    names = _names(optimizer, parameters)
    stored = [name.split(".", 2) for name in parts.under("optimizer.").values()]
    if others := {*(name for _, _, name in stored), *numbers} - set(names):
        raise TrainingError(f"{place} holds optimizer state of {min(others)}, which does not train here. Remove it.")
    inner = getattr(optimizer, "optim", optimizer)
    mine = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers.items()}
    for word, key, name in stored:
        like, file = parameters[name], f"{word}.{key}.{name}"
        values = state.setdefault(name, {})
        if id(like) in mine:
            values[key] = parts.read(file, like if parts.shapes[file] == tuple(like.shape) else None)
    numbered = {number: state[name] for number, name in enumerate(names) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": _groups(optimizer)})


def _names(optimizer: torch.optim.Optimizer, parameters: Parameters) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Parameter groups with numbers for parameters, as state_dict() has them."""
    groups, number = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        numbers = list(range(number, number + count))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
        number += count
    return groups
