"""A batch that does not fit: which part of memory it is, as train/plan.py counts it, and what would fit."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import psutil
import torch

from bildung.core.progress import size
from bildung.model.base import CausalLM
from bildung.train.parallel import is_shard

if TYPE_CHECKING:
    from bildung.train.plan import Plan

NAMES = {"AdamW8bit": "adamw_8bit", "Muon": "muon", "Adafactor": "adafactor", "PagedAdamW": "paged_adamw"}


def is_too_large(error: BaseException) -> bool:
    """Whether an error says that memory is used up. (The CPU's allocator has no class of its own for it.)"""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(error: BaseException, model: Any, batch: Any, optimizer: torch.optim.Optimizer, micro_steps: int) -> str:
    """What did not fit and which settings would, in words."""
    from bildung.train.plan import plan  # here: fake tensors take a second to import

    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    tokens_BL = getattr(batch, "tokens_BL", None)
    if tokens_BL is None or not isinstance(model, CausalLM) or any(map(is_shard, model.parameters())):
        return f"a batch does not fit into memory. Set batch_size to half and micro_steps to twice as much. ({said})"
    rows, length = tokens_BL.shape
    made = plan(
        model,
        rows=rows,
        length=length,
        dtype=model.dtype,
        optimizer=NAMES.get(type(optimizer).__name__, "adamw"),
        micro_steps=micro_steps,
    )
    room = memory_of(model.device)
    parts = {name: getattr(made, name) for name in ("weights", "gradients", "optimizer", "activations", "logits")}
    largest = max(parts, key=lambda name: parts[name])
    shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return (
        f"a batch of {rows} rows of {length} tokens does not fit into {size(room)} of memory. Planned are {shown}: the "
        f"largest part is {largest}. {_what_fits(made, rows, micro_steps, room)} ({said})"
    )


def _what_fits(made: Plan, rows: int, micro_steps: int, room: int) -> str:
    """Activations grow with the rows of a micro-batch, everything else stays."""
    fixed = made.peak_bytes - made.activations
    each = made.activations / rows
    parts = next((n for n in range(2, rows + 1) if rows % n == 0 and fixed + each * rows / n <= room), None)
    if parts is not None:
        return (
            f"batch_size {rows // parts} with micro_steps {micro_steps * parts} is the same training in about "
            f"{size(fixed + each * rows / parts)}."
        )
    if fixed + each <= 2 * room:
        return "Not even one row fits: set recompute to blocks, or max_length to half."
    return (
        "Not even one row fits: train fewer parameters (tune lora), keep less of each (optimizer adamw_8bit, "
        "adafactor or paged_adamw), or share them among several devices (parallel zero3)."
    )


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory, or what this process may use of them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    total = int(psutil.virtual_memory().total)
    return total if limit == resource.RLIM_INFINITY else min(limit, total)
