"""The state of a run on disk: what training goes on from after a kill, bit for bit.

    .checkpoint-00000040/   state.safetensors   trained parameters, optimizer moments, best parameters so far
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

from bildung.core.errors import TrainingError
from bildung.core.staging import to_disk
from bildung.model.safetensors_file import read_file

NAME, TENSORS, NUMBERS = ".checkpoint-", "state.safetensors", "state.json"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is being trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the trained parameters."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(tensors[name])


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    best: dict[str, Tensor],
) -> None:
    """Write the state after `step` steps into `out`, then remove older ones. `counters`: JSON values of the caller."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in trained(model).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
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
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Put the newest state in `out` into model and optimizer; (counters, best), or None when there is none.

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
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers["optimizer"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    if sorted(state) != list(range(len(parameters))):
        raise TrainingError(f"{place} holds optimizer state of other parameters; it is from another run. Remove it.")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
    return numbers["counters"], best


def _all(out: Path) -> list[Path]:
    """Complete checkpoints in `out`, oldest first."""
    return sorted(path for path in out.glob(f"{NAME}*") if path.name.removeprefix(NAME).isdigit())
