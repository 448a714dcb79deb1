"""The state of a run on disk: what training goes on from after a kill, bit for bit.

    .checkpoint-00000040/
        part-N.safetensors   what rank N holds of the trained parameters, of the optimizer's moments and of the best
                             parameters so far; and what the objective carries on
        state.json           counters, the optimizer's values that are no tensors, the sha256 of each part and of itself

Written under another name, forced to the disk, then renamed: a checkpoint is there whole or not at all, and older ones
go only afterwards. Numbers can rot on a disk all the same, so they are hashed when they are read; of a damaged
checkpoint it is said what is wrong, and the one before is used. No pickle: reading one runs whatever code it holds.
Parameters that are not trained are not in it; they come from the model's own directory.

Weights that are infinite or no number are never written: a run would go on from them, and those before be gone. It is
seen in the copy that is written, so that no step waits for it; the run ends a step later, and says so (finite.py).

Neither is the order of the data nor a random state: both are functions of (seed, step), see data/batches.py and fit.py.

By default a thread writes a copy while training goes on (as torch.distributed.checkpoint's async_save does). A kill
then costs, beside the steps since the last checkpoint, those that were made while it was being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bildung.core import ranks
from bildung.core.errors import TrainingError
from bildung.core.progress import size
from bildung.core.record import hash_file
from bildung.core.staging import to_disk
from bildung.train import optimizer_state
from bildung.train.finite import not_finite, spoiled
from bildung.train.parts import Parts, held, is_mine_to_write, write
from bildung.train.shards import local

NAME, NUMBERS, DAMAGED = ".checkpoint-", "state.json", ".damaged-"
USUAL = 10.0  # seconds in which a checkpoint is written, for messages
BEING_WRITTEN, BEING_REMOVED = ".checkpoint-being-written", ".checkpoint-being-removed"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is being trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the trained parameters, each by a tensor that is spread over the ranks as it is."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(tensors[name])


def alone() -> None:
    """This thread computes by itself. With a team of OpenMP's of its own there would be more threads than cores, and
    the training thread's team would sleep where it waits: a small model's steps then take twice as long."""
    torch.get_num_threads()  # which sets what is set below, the first time
    with contextlib.suppress(OSError, AttributeError):  # another OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)


class Checkpoints:
    """Those of one run, in `out`: the newest `keep_last`, and the one with the lowest held-out loss.

    `with Checkpoints(...) as checkpoints`; on leaving, what is being written is finished. Every rank makes one, and
    calls its methods at the same steps. Errors of the writing thread are raised by the next call.
    """

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        carried: dict[str, Tensor] | None = None,
        *,
        keep_last: int = 1,
        in_background: bool = True,
        rank_timeout: float = 1800.0,
    ) -> None:
        self.out, self.model, self.optimizer, self.carried = out, model, optimizer, carried
        self.keep_last, self.in_background = keep_last, in_background
        self._group = ranks.side_group(rank_timeout)  # what the thread tells the others must not meet with gradients
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=alone)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as later:
            if error is None:
                raise
            error.add_note(f"and a checkpoint could not be written: {later}")
        finally:
            self._worker.shutdown()

    def wait(self) -> None:
        """Until nothing is being written any more."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> int | None:
        """After how many steps the newest was made; one that is being written is waited for, as long as is usual."""
        if self._writing is not None:
            wait([self._writing], timeout=USUAL)
        there = all_in(self.out)
        return step_of(there[-1]) if there else None

    def save(self, step: int, counters: Mapping[str, Any], best: Mapping[str, Tensor], *, goes_on: bool = True) -> None:
        """Write the state after `step` steps, then remove older ones.

        goes_on: more steps follow, which change what is written; without them nothing is copied.
        counters: JSON values of the caller; `best_step` among them names the checkpoint that is never removed.
        best: the trained parameters with the lowest held-out loss, if the caller keeps them.
        """
        self.wait()
        numbers: dict[str, dict[str, Any]] = {}
        alone = optimizer_state.is_shared_out(self.optimizer)
        mine = {
            name: tensor
            for name, tensor in self._tensors(best, numbers)
            if is_mine_to_write(tensor) or (alone and name.startswith("optimizer."))
        }
        boxes = {name: held(tensor) for name, tensor in mine.items()}
        mine = {name: local(tensor).detach() for name, tensor in mine.items()}
        needed = sum(tensor.nbytes for tensor in mine.values())
        copy = self.in_background and goes_on and (needed < psutil.virtual_memory().available / 2)
        # Best parameters, and what comes from a GPU, nobody changes; what is on the CPU the next step will change.
        copied = {
            name: (tensor.clone() if copy and tensor.device.type == "cpu" and not name.startswith("best.") else tensor)
            .cpu()
            .contiguous()
            for name, tensor in mine.items()
        }
        work = (step, copied, boxes, numbers, dict(counters))
        if copy:
            self._writing = self._worker.submit(self._write, *work)
        else:
            self._write(*work)

    def _tensors(self, best: Mapping[str, Tensor], numbers: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """Name in the file -> tensor; the optimizer's values that are none go into `numbers`."""
        yield from ((f"model.{name}", parameter.detach()) for name, parameter in trained(self.model).items())
        yield from ((f"best.{name}", tensor) for name, tensor in best.items())
        yield from ((f"carried.{name}", tensor) for name, tensor in (self.carried or {}).items())
        for name, state in optimizer_state.of(self.optimizer, trained(self.model)).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{key}.{name}", value
                else:
                    numbers.setdefault(name, {})[key] = value

    def _write(self, step: int, tensors: Any, boxes: Any, numbers: Any, counters: dict[str, Any]) -> None:
        """This rank's part; then rank 0 writes what holds the parts together, and makes it the checkpoint."""
        # (A name for each step: other ranks may begin the next one before rank 0 has renamed this one.)
        place, being_written = self.out / f"{NAME}{step:08d}", self.out / f"{BEING_WRITTEN}-{step:08d}"
        part = being_written / f"part-{ranks.rank()}.safetensors"
        told: dict[str, Any] = {"name": part.name, "numbers": numbers}
        error: Exception | None = None
        try:
            if wrong := not_finite({name: tensor for name, tensor in tensors.items() if name.startswith("model.")}):
                there = all_in(self.out)
                raise TrainingError(spoiled(step, wrong, step_of(there[-1]) if there else None))
            being_written.mkdir(parents=True, exist_ok=True)
            write(part, tensors, boxes)
            to_disk(part)
            told["sha256"] = hash_file(part)
        except Exception as found:
            error, told["error"] = found, f"{type(found).__name__}: {found}"
        all_told = ranks.gathered(told, self._group)
        if error is not None:
            raise error
        for rank, one in enumerate(all_told):
            if "error" in one:
                raise TrainingError(f"rank {rank} could not write its part of the checkpoint: {one['error']}")
        if ranks.rank() == 0:
            merged = {name: state for one in all_told for name, state in one["numbers"].items()}
            files = {one["name"]: one["sha256"] for one in all_told}
            _write_state(being_written / NUMBERS, {"counters": counters, "optimizer": merged, "files": files})
            to_disk(being_written)
            if place.exists():
                self._remove(place)
            being_written.rename(place)
            to_disk(self.out)
            for older in all_in(self.out)[: -self.keep_last]:
                if step_of(older) != counters.get("best_step"):
                    self._remove(older)

    def _remove(self, place: Path) -> None:
        """Rename first: a kill must not leave half a checkpoint under the name of a whole one."""
        shutil.rmtree(self.out / BEING_REMOVED, ignore_errors=True)
        place.rename(self.out / BEING_REMOVED)
        shutil.rmtree(self.out / BEING_REMOVED)

    def load(self) -> tuple[dict[str, Any] | None, dict[str, Tensor], list[str]]:
        """Put the newest whole state into model, optimizer and `carried`: (counters, best, what was wrong with newer
        ones); the counters are None if there is no whole state.

        Raises TrainingError when the state belongs to another model or optimizer.
        """
        name, notes = ranks.told(self._choose() if ranks.rank() == 0 else None)
        if ranks.rank() == 0:
            print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
        if name is None:
            return None, {}, notes
        place = self.out / name
        state = _read_state(place / NUMBERS)
        parts = Parts(place / file for file in state["files"])
        parameters, stored = trained(self.model), parts.under("model.")
        if {n: parts.shapes[file] for n, file in stored.items()} != {n: tuple(p.shape) for n, p in parameters.items()}:
            raise TrainingError(
                f"{place} holds {len(stored)} trained tensors of other names or shapes than the {len(parameters)} of "
                f"this model; it is from another run. Remove it or choose another place."
            )
        put(self.model, {name: parts.read(file, parameters[name]) for name, file in stored.items()})
        optimizer_state.load(self.optimizer, parameters, parts, state["optimizer"], place)
        best = {name: parts.read(file, parameters[name]) for name, file in parts.under("best.").items()}
        device = next(iter(parameters.values())).device
        best = {name: tensor.to(device) for name, tensor in best.items()}
        if self.carried is not None:
            self.carried.update({name: parts.read(file).to(device) for name, file in parts.under("carried.").items()})
        return state["counters"], best, notes

    def _choose(self) -> tuple[str | None, list[str]]:
        """The name of the newest whole checkpoint, and what is wrong with newer ones, which are set aside."""
        for unfinished in self.out.glob(f"{BEING_WRITTEN}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        notes: list[str] = []
        for place in reversed(all_in(self.out)):
            wrong = damage(place)
            if not wrong:
                return place.name, notes
            aside = place.with_name(f"{DAMAGED}{place.name.removeprefix(NAME)}")
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
            notes.append(f"the checkpoint of step {step_of(aside)} was damaged ({wrong}) and is not used")
        if notes:
            notes.append("no checkpoint is whole: training begins anew")
        return None, notes


def all_in(out: Path) -> list[Path]:
    """Complete checkpoints in `out`, oldest first."""
    return sorted(path for path in out.glob(f"{NAME}*") if path.name.removeprefix(NAME).isdigit())


def step_of(place: Path) -> int:
    """After how many steps a checkpoint was made."""
    return int(place.name.rpartition("-")[2])


def damage(place: Path) -> str:
    """What is wrong with a checkpoint, with its hash; "" when every byte is as it was written."""
    try:
        files = _read_state(place / NUMBERS)["files"]
        for name, sha256 in files.items():
            if (found := hash_file(place / name)) != sha256:
                length = (place / name).stat().st_size
                return f"{name}, {size(length)}, has sha256 {found}; it was written with {sha256}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ""


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    text = json.dumps(state)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "state": text}), encoding="utf-8")
    to_disk(path)


def _read_state(path: Path) -> Any:
    """Raises ValueError when the text is not what was written."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, {size(path.stat().st_size)}, is cut off or changed: {error}") from None
    found = hashlib.sha256(read["state"].encode()).hexdigest()
    if found != read["sha256"]:
        raise ValueError(f"{path.name} has sha256 {found}; it was written with {read['sha256']}")
    return json.loads(read["state"])
