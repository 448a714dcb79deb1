"""At the start of a run: the memory it will take, said before it is taken, and kept beside what was measured.

It costs one step on paper (plan.py), no step of the run. What came before the training (loading, cards, encoding the
data) is over by then, so its peak is known; a prediction is the higher of the two. What comes after it (figures on
held-out data, baselines) is made to take less: batches no larger than those of training, counts instead of tables
(evaluate/ngram.py). So the prediction is that of the whole operation, to be compared with the record's peak_bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from bildung.core import ranks
from bildung.core.foretold import say
from bildung.core.hardware import give_back_memory, peak_so_far
from bildung.core.operation import Job
from bildung.train.loss import Objective
from bildung.train.memory import room_of
from bildung.train.plan import KERNELS, Plan, plan

LOOKED_AT = 8  # batches, evenly spread over the run: the largest is the one that is planned
_processes_that_trained: set[int] = set()  # this one, once its kernels have run: then they are part of the runtime


def predict(
    job: Job,
    model: Any,
    given: Any,
    batch_at: Callable[[int], Any],
    objective: Objective,
    steps: int,
    carried: dict[str, Tensor] | None = None,
) -> None:
    """Put `predicted_peak_bytes` and `predicted_parts` into the job's numbers, and say them; warn if it is too much.

    model: as it will be trained, before it is shared among ranks.
    """
    with _restored(carried):
        batch, varied = largest(batch_at, steps * given.micro_steps)
        try:
            made = planned(model, given, objective, batch, steps, varied)
            if made.checkpoint:  # which takes what is carried along (and is there already: part of the runtime) with it
                carried_bytes = sum(tensor.nbytes for tensor in (carried or {}).values())
                made = dataclasses.replace(made, checkpoint=made.checkpoint + carried_bytes)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            job.notes.append(f"memory was not predicted: this loss looks at numbers that are not there yet ({error})")
            return
    world, kind = shared_by(given)
    parts = made.parts_on(world, kind)
    before = peak_so_far() if model.device.type == "cpu" else torch.cuda.max_memory_allocated()
    peak = max(before, sum(parts.values()))
    job.measured |= {"predicted_peak_bytes": peak, "predicted_parts": parts}
    if ranks.rank() > 0:
        return
    say(peak, parts, room_of(model.device))


def planned(model: Any, given: Any, objective: Objective, batch: Any, steps: int, varied: bool = False) -> Plan:
    """The plan of a training with these settings, in this process as it is now. varied: other batches have other
    shapes."""
    runtime = 0
    if model.device.type == "cpu":
        give_back_memory()
        held = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in model.parameters()}.values())
        runtime = max(0, psutil.Process().memory_info().rss - held)
        runtime += 0 if os.getpid() in _processes_that_trained else KERNELS
        _processes_that_trained.add(os.getpid())
    return plan(
        model,
        objective,
        batch,
        optimizer=given.optimizer,
        kept_as=given.weights,
        page_budget=given.page_budget * 1e6,
        micro_steps=given.micro_steps,
        steps=steps,
        checkpoint=copies(given, steps),
        recompute=given.recompute,
        runtime=runtime,
        varied=varied,
    )


def copies(given: Any, steps: int) -> bool:
    """Whether a thread writes a checkpoint's copy while more steps are made."""
    earliest = min(given.checkpoint_every, given.evaluate_every or given.checkpoint_every)  # the best is kept too
    return bool(given.async_checkpoints and given.optimizer != "paged_adamw" and 0 < earliest < steps)


def shared_by(given: Any) -> tuple[int, str]:
    """(ranks, kind) that the memory is shared by, in the words of Plan.on."""
    world = ranks.world_size()
    return {
        "none": (1, "ddp"),
        "hybrid": (ranks.local_world_size(), "zero3"),
        "tensor": (getattr(given, "tensor_ranks", None) or world, "tensor"),
    }.get(given.parallel, (world, given.parallel))


def largest(batch_at: Callable[[int], Any], batches: int) -> tuple[Any, bool]:
    """The one with the most numbers, of some; and whether they differ in how many they have."""
    numbers = sorted({round(n * (batches - 1) / max(1, LOOKED_AT - 1)) for n in range(min(LOOKED_AT, batches))})
    looked_at = [batch_at(number) for number in numbers]
    return max(looked_at, key=_numbers), len({*map(_numbers, looked_at)}) > 1


def _numbers(batch: Any) -> int:
    leaves = tree_leaves(vars(batch) if hasattr(batch, "__dict__") else batch)
    return sum(
        leaf.numel() if isinstance(leaf, Tensor) else _numbers(leaf) if hasattr(leaf, "__dict__") else 0
        for leaf in leaves
    )


@contextlib.contextmanager
def _restored(carried: dict[str, Tensor] | None) -> Iterator[None]:
    """An objective with a memory must not remember tensors without numbers."""
    kept = dict(carried or {})
    try:
        yield
    finally:
        if carried is not None:
            carried.clear()
            carried.update(kept)
