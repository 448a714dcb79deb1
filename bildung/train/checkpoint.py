"""The state of a run on disk: what training goes on from after a kill, bit for bit.

    .checkpoint-00000040/   state.safetensors   trained parameters, optimizer moments, best parameters so far, and
                                                what the objective carries on (a recurrent model's state)
                            state.json          counters, the optimizer's numbers that are not tensors

Written under another name, forced to the disk, then renamed: a checkpoint is there whole or not at all, and the older
one goes only afterwards. No pickle: reading one runs whatever code it holds. Parameters that are not trained are not in
it; they come from the model's own directory.

Neither is the order of the data nor a random state: both are functions of (seed, step), see data/batches.py and fit.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bildung.core import ranks
from bildung.core.errors import TrainingError
from bildung.core.staging import to_disk
from bildung.model.safetensors_file import read_file
from bildung.train.parallel import spread_like, whole

NAME, TENSORS, NUMBERS = ".checkpoint-", "state.safetensors", "state.json"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is being trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the trained parameters."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(spread_like(tensors[name], parameter))


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    best: dict[str, Tensor],
    carried: dict[str, Tensor] | None = None,
) -> None:
    """Write the state after `step` steps into `out`, then remove older ones. `counters`: JSON values of the caller.

    What is spread over several ranks is gathered, so every rank calls this, and rank 0 writes.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": whole(p.detach()).cpu() for name, p in trained(model).items()}
    tensors |= {f"best.{name}": whole(tensor).cpu() for name, tensor in best.items()}
    tensors |= {f"carried.{name}": tensor.cpu() for name, tensor in (carried or {}).items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in _state_of(optimizer).items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = whole(value).cpu()
            else:
                numbers.setdefault(str(index), {})[key] = value
    if ranks.rank() > 0:
        return
    place = out / f"{NAME}{step:08d}"
    being_written = out / f"{NAME}being-written"
    shutil.rmtree(being_written, ignore_errors=True)
    being_written.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, being_written / TENSORS)
    text = json.dumps({"counters": counters, "optimizer": numbers})
    (being_written / NUMBERS).write_text(text, encoding="utf-8")
    for path in (being_written / TENSORS, being_written / NUMBERS, being_written):
        to_disk(path)
    shutil.rmtree(place, ignore_errors=True)
    being_written.rename(place)
    to_disk(out)
    for older in _all(out)[:-1]:
        shutil.rmtree(older)


def load(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, carried: dict[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Put the newest state in `out` into model, optimizer and `carried`; (counters, best), or None if there is none.

    Raises TrainingError when the state belongs to another model or optimizer.
    """
    places = _all(out)
    if not places:
        return None
    place = places[-1]
    numbers = json.loads((place / NUMBERS).read_text(encoding="utf-8"))
    tensors = dict(read_file(place / TENSORS))
    parameters = trained(model)
    stored = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if {name: t.shape for name, t in stored.items()} != {name: p.shape for name, p in parameters.items()}:
        raise TrainingError(
            f"{place} holds {len(stored)} trained tensors of other names or shapes than the {len(parameters)} of this "
            f"model; it is from another run. Remove it or choose another place."
        )
    put(model, stored)
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers["optimizer"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            like = in_order[int(index)] if int(index) < len(in_order) else tensor
            value = spread_like(tensor, like) if tensor.shape == like.shape else tensor
            state.setdefault(int(index), {})[key] = value
    if sorted(state) != list(range(len(parameters))):
        raise TrainingError(f"{place} holds optimizer state of other parameters; it is from another run. Remove it.")
    optimizer.load_state_dict({"state": state, "param_groups": _groups_of(optimizer)})
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
    if carried is not None:
        device = next(iter(parameters.values())).device
        # Cloned, because a tensor inside a file's bytes is not aligned, and a kernel may then round in another way.
        kept = {name: tensor.clone().to(device) for name, tensor in tensors.items() if name.startswith("carried.")}
        carried.update({name.removeprefix("carried."): tensor for name, tensor in kept.items()})
    return numbers["counters"], best


def _state_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Parameter number -> optimizer state, on rank 0 of all ranks where each keeps a part (zero1)."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
        if ranks.rank() > 0:
            return {}
    return dict(optimizer.state_dict()["state"])


def _groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Parameter groups with numbers for parameters, as state_dict() has them."""
    groups, number = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        numbers = list(range(number, number + count))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
        number += count
    return groups


def _all(out: Path) -> list[Path]:
    """Complete checkpoints in `out`, oldest first."""
    return sorted(path for path in out.glob(f"{NAME}*") if path.name.removeprefix(NAME).isdigit())
