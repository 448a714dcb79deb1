"""A batch that does not fit: which part of memory it is, as train/plan.py counts it, and what would fit."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch

from bildung.core.progress import size
from bildung.model.base import CausalLM
from bildung.train.memory import room_of
from bildung.train.parallel import is_shard

if TYPE_CHECKING:
    from bildung.train.plan import Plan

NAMES = {"AdamW8bit": "adamw_8bit", "Muon": "muon", "Adafactor": "adafactor", "PagedAdamW": "paged_adamw"}
HALF = "Set batch_size to half and micro_steps to twice as much: that is the same training."
RUNTIME = 400_000_000  # bytes that Python, PyTorch and the data take, at most; the rest of the process is the training


def is_too_large(error: BaseException) -> bool:
    """Whether an error says that memory is used up. (The CPU's allocator has no class of its own for it.)"""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(error: BaseException, model: Any, batch: Any, optimizer: torch.optim.Optimizer, micro_steps: int) -> str:
    """What did not fit and which settings would, in words."""
    from bildung.train.plan import any_objective, plan  # here: tensors without numbers take a second to import

    traceback.clear_frames(error.__traceback__)  # they hold what there was of the step, and memory is short
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    tokens_BL = getattr(getattr(batch, "batch", batch), "tokens_BL", None)
    if tokens_BL is None or not isinstance(model, CausalLM) or any(map(is_shard, model.parameters())):
        return f"a batch does not fit into memory. {HALF} ({said})"
    rows, length = tokens_BL.shape
    runtime = min(RUNTIME, psutil.Process().memory_info().rss) if model.device.type == "cpu" else 0

    def planned(rows: int, length: int) -> Plan:
        return plan(
            model,
            any_objective,
            (rows, length),
            optimizer=NAMES.get(type(optimizer).__name__, "adamw"),
            micro_steps=micro_steps,
            length=length,
            runtime=runtime,
        )

    room = room_of(model.device)
    try:
        made = planned(rows, length)
        fits = _what_fits(planned, rows, length, micro_steps, room)
    except (RuntimeError, MemoryError) as again:  # nothing is left even to think about it
        if not is_too_large(again):
            raise
        return f"a batch of {rows} rows of {length} tokens does not fit into {size(room)} of memory. {HALF} ({said})"
    parts = {name: value for name, value in made.parts.items() if value}
    largest = max(parts, key=lambda name: parts[name])
    shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return (
        f"a batch of {rows} rows of {length} tokens does not fit into {size(room)} of memory. Planned are {shown}: the "
        f"largest part is {largest}. {fits} ({said})"
    )


def _what_fits(planned: Callable[[int, int], Plan], rows: int, length: int, micro_steps: int, room: int) -> str:
    """The smallest change that does: fewer rows at a time, the same training; then shorter rows; then others."""
    for parts in (n for n in range(2, rows + 1) if rows % n == 0):
        if (needed := planned(rows // parts, length).peak_bytes) <= room:
            return (
                f"batch_size {rows // parts} with micro_steps {micro_steps * parts} is the same training in about "
                f"{size(needed)}."
            )
    shorter = length // 2
    while shorter >= 16:
        if (needed := planned(1, shorter).peak_bytes) <= room:
            return (
                f"Not even one row fits. With max_length {shorter}, batch_size 1 and micro_steps {micro_steps * rows} "
                f"it takes about {size(needed)}."
            )
        shorter //= 2
    return (
        "Not even one short row fits: set recompute to blocks, train fewer parameters (tune lora), keep less of each "
        "(optimizer adamw_8bit, adafactor or paged_adamw), or share them among several devices (parallel zero3)."
    )
