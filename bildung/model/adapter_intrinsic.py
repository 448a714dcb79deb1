"""Deltas of intrinsic dimension on disk: a few numbers, and seeds. peft has no such type.

    adapter_config.json           seeds: matrix -> seed of its projection; drawn: matrix -> a number drawn from it
    adapter_model.safetensors     theta (d - m numbers), scales (m numbers, one per matrix; absent without them)

The projections are drawn again from the seeds when the directory is loaded. A generator that draws other numbers (torch
does not promise its own from version to version) would silently make another model; so one number of each projection is
kept, and compared.
"""

# d numbers in all, m matrices

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import AdapterError, nearest
from bildung.model.intrinsic import Intrinsic
from bildung.model.linear import linears
from bildung.model.safetensors_file import read_file

WHAT, DELTAS = "deltas of intrinsic dimension", (Intrinsic,)
REQUIRED: dict[str, tuple[Any, ...]] = {}
INERT = {"seeds", "drawn"}


def check(given: dict[str, Any], path: Path) -> None:
    """Raises AdapterError unless every matrix has its seed and the number drawn from it."""
    seeds, drawn = given.get("seeds"), given.get("drawn")
    if not isinstance(seeds, dict) or not isinstance(drawn, dict) or not seeds or set(seeds) != set(drawn):
        raise AdapterError(f"{path}: seeds and drawn must be tables of the same matrices.")
    if not all(type(seed) is int for seed in seeds.values()) or not all(type(n) is float for n in drawn.values()):
        raise AdapterError(f"{path}: a seed is a whole number, and what is drawn from it a number with a point.")


def add_to(model: Any, path: Path, settings: dict[str, Any], name: str) -> None:
    """Add the deltas to `model` under `name`. Raises AdapterError when they do not fit it."""
    tensors, seeds = dict(read_file(path)), settings["seeds"]
    theta_d, scales_m = tensors.pop("theta", None), tensors.pop("scales", None)
    if theta_d is None or tensors or (scales_m is not None and len(scales_m) != len(seeds)):
        raise AdapterError(f"{path} must hold `theta`, and `scales` with one number per matrix or none at all.")
    there, shared = linears(model), nn.Parameter(theta_d.float().to(model.device))
    for number, (target, seed) in enumerate(seeds.items()):
        linear = there.get(target)
        if linear is None:
            raise AdapterError(
                f"{path} was made for a matrix {target!r} that this model does not have. {nearest(target, there)}"
            )
        delta = Intrinsic(shared, (linear.out_features, linear.in_features), seed, scales_m is not None)
        if not math.isclose(drawn_number(delta), settings["drawn"][target], rel_tol=1e-4):
            raise AdapterError(
                f"{path.parent}: the projection of {target!r} is not the one that was trained: the matrix has another "
                f"shape, or this version of torch draws other random numbers. Merge the adapter where it was trained."
            )
        if delta.scale is not None and scales_m is not None:
            delta.scale.data = scales_m[number].float()
        linear.deltas[name] = delta.to(model.device).eval()


def drawn_number(delta: Intrinsic) -> float:
    """A number that depends on the signs, the order and the Gaussian numbers of a projection: |k · (P e_0)_k|."""
    first_d = torch.zeros_like(delta.theta_d)
    first_d[0] = 1.0
    with torch.no_grad():
        column_D = delta.project(first_d)
        return float((column_D * torch.arange(1, len(column_D) + 1, device=column_D.device) / len(column_D)).norm())


def _deltas(model: Any) -> dict[str, Intrinsic]:
    found: dict[str, Intrinsic] = {}
    for name, linear in linears(model).items():
        for delta in linear.deltas.values():
            if isinstance(delta, Intrinsic):
                found[name] = delta
    return found


def holds(model: Any) -> bool:
    """Whether the model carries deltas of this type."""
    return bool(_deltas(model))


def parts(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the config's keys, the tensors)."""
    deltas = _deltas(model)
    scales = [delta.scale.detach() for delta in deltas.values() if delta.scale is not None]
    tensors = {"theta": next(iter(deltas.values())).theta_d.detach()}
    if scales:
        tensors["scales"] = torch.stack(scales)
    seeds = {name: delta.seed for name, delta in deltas.items()}
    return {"seeds": seeds, "drawn": {name: drawn_number(delta) for name, delta in deltas.items()}}, tensors
