"""Two models of one base, with the weights in memory once.

    a, b = load_both("lives/base", "lives/tuned-lora")
    a.model(tokens), b.model(tokens)                      # each with its own deltas, attached modules and taps

A twin is a second set of modules over the same numbers: what an adapter adds is its own, what both share is there once.
So two models that differ by adapters are compared, patched into each other or set side by side for little more than
the memory of one. Switching an adapter off and on (deltas_off, named_adapters.py) does with even less, but then only
one of the two can run at a time, and only what works by deltas can be switched.

Two whole directories are read one after the other, and what is equal in them (an edit changes one matrix of hundreds)
is then held once; while the second is read, both are in memory.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bildung.model import adapter_file
from bildung.model.store import LanguageModel, adapted, load


def load_both(
    a: str | Path, b: str | Path, dtype: str | None = None, device: str | torch.device | None = None
) -> tuple[LanguageModel, LanguageModel]:
    """Two models, of any form that `load` takes, that share what is equal in them. Raises as `load` does."""
    base_a, base_b = base_of(a), base_of(b)
    if base_a != base_b:
        first, second = load(a, dtype, device), load(b, dtype, device)
        share_equal(first.model, second.model)
        return first, second
    first = load(base_a, dtype, device)
    second = twin(first)
    return tuple(  # type: ignore[return-value]
        lm if Path(path).expanduser().resolve() == base_a else adapted(lm, Path(path).expanduser())
        for lm, path in ((first, a), (second, b))
    )


def base_of(path: str | Path) -> Path:
    """The directory with the full weights: of an adapter its base, of anything else itself."""
    path = Path(path).expanduser()
    if (path / adapter_file.CONFIG).exists():
        return adapter_file.find_base(path, adapter_file.read_config(path)).resolve()
    return path.resolve()


def twin(lm: LanguageModel) -> LanguageModel:
    """The model once more, on the same numbers: deltas, attachments and taps added to one are not seen by the other.

    A parameter of the twin that is given other numbers (`parameter.data = ...`) leaves the first model as it is; one
    whose numbers are changed in their place changes both.
    """
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in lm.model.buffers()}
    for parameter in lm.model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    model = copy.deepcopy(lm.model, memo)
    return replace(lm, model=model, config=model.config)


@torch.no_grad()
def share_equal(a: nn.Module, b: nn.Module) -> int:
    """Let B's parameters and buffers that equal A's of the same name be A's; returns how many bytes that freed."""
    freed, there = 0, _tensors(a)
    seen: set[int] = set()
    for name, mine in _tensors(b).items():
        other = there.get(name)
        if other is None or other.data_ptr() == mine.data_ptr() or not _same(other, mine):
            continue
        if mine.data_ptr() not in seen:  # a tied matrix has two names and lies there once
            freed += mine.nbytes
        seen.add(mine.data_ptr())
        mine.data = other.data
    return freed


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and x.device == y.device and torch.equal(x, y)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
