"""A computation on paper: every tensor has a shape and no numbers, and what is born and dies is written down.

    with Ledger(kind_of) as ledger:
        loss = objective(without_numbers(model), batch)          any forward pass, backward pass, optimizer step
        loss.total.backward()
    ledger.fullest                                        the most bytes of each kind that were there at a time

Nothing is estimated by a formula: autograd keeps what it keeps, frees what it frees, and a tensor counts from the
operation that makes it to the moment when nobody holds it. So every family, adapter, attention kernel and loss counts
as it is. What a kernel takes for itself while it runs is not seen.

Batches may be real: masks then say how many rows they choose, which a tensor without numbers could not.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHOOSING = {  # operations whose masks are looked into
    torch.ops.aten.index,
    torch.ops.aten._unsafe_index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
}
MAKING = {  # operations that make tensors from nothing
    torch.ops.aten.empty,
    torch.ops.aten.empty_strided,
    torch.ops.aten.zeros,
    torch.ops.aten.ones,
    torch.ops.aten.full,
    torch.ops.aten.rand,
    torch.ops.aten.randn,
}
SMALL = 4096  # numbers: what is not a parameter and smaller than this (code tables, frequencies) stays real


class Ledger(TorchDispatchMode):
    """Bytes alive, by kind.

    kind_of: what a tensor is, told when its memory is born. paper: the mode of a model without numbers (`paper_of`).
    """

    def __init__(self, kind_of: Callable[[Tensor], str], paper: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.kind_of, self.paper = kind_of, paper
        self.alive: Counter[str] = Counter()
        self.fullest: Counter[str] = Counter()
        self.moments: dict[int, Counter[str]] = {}  # bytes of gradients there -> the fullest moment with so many
        self._known: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **(kwargs or {}))
        if func.overloadpacket in CHOOSING and not _is_real(args):
            args = (args[0], _places(args[1]), *args[2:])
        with self._made_on_paper(func, kwargs or {}):
            found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default and not found[3].numel():
            found = (*found[:3], found[3].new_empty(_workspace(args[0], found[0])))
        for made, returned in zip(found if len(_returns(func)) > 1 else (found,), _returns(func), strict=True):
            if not returned:
                continue
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, Tensor):
                    self.note(tensor)
        return found

    def _made_on_paper(self, func: Any, kwargs: Any) -> contextlib.AbstractContextManager[Any]:
        """Floating numbers made from nothing beside a model on paper are on paper too; tokens and masks are real."""
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if self.paper is None or func.overloadpacket not in MAKING or not dtype.is_floating_point:
            return contextlib.nullcontext()
        return self.paper

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Write a tensor's memory down, if it is new; with `kind`, what it turned out to be."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            if kind is not None:
                was, size = self._known[key]
                self._known[key] = (kind, size)
                self.alive[was] -= size
                self.alive[kind] += size
                self._look()
            return
        kind, size = kind or self.kind_of(tensor), storage.nbytes()
        self._known[key] = (kind, size)
        self.alive[kind] += size
        weakref.finalize(storage, self._gone, key)
        self._look()

    def _look(self) -> None:
        total = self.alive.total()
        if total > self.fullest.total():
            self.fullest = self.alive.copy()
        gradients = self.alive["gradients"]
        if gradients not in self.moments or total > self.moments[gradients].total():
            self.moments[gradients] = self.alive.copy()

    def _gone(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.alive[kind] -= size


def _workspace(x_TBI: Tensor, h_TBH: Tensor) -> int:
    """Bytes that oneDNN's LSTM keeps of a layer for the backward pass: gates, states and their slopes. PyTorch says on
    paper that there are none. Measured for 64 to 512 numbers: 15.2 to 15.7 for each of a state where the input is no
    wider, 35.3 where it is four times as wide; in bfloat16 11.1 in place of 15.4."""
    steps, rows, size = h_TBH.shape
    count = steps * rows * (8.7 * size + 6.7 * max(x_TBI.shape[-1], size))
    return int(count * (4 if h_TBH.dtype == torch.float32 else 2.9))


@cache
def _returns(func: Any) -> tuple[bool, ...]:
    """Of each value that an operation returns: whether it has memory of its own, or is a view, or what was changed."""
    return tuple(value.alias_info is None for value in func._schema.returns)


def paper_of(model: Any) -> FakeTensorMode | None:
    """Where the numbers of a model `without_numbers` would be; None for one that has them."""
    for parameter in model.parameters():
        return parameter.fake_mode if isinstance(parameter, FakeTensor) else None
    return None


def _is_real(args: Any) -> bool:
    return not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))


def _places(indices: Any) -> list[Any]:
    """Masks as the places they choose: how many those are decides the shape of what comes."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found


def without_numbers(model: Any, paper: FakeTensorMode | None = None) -> Any:
    """The same model without numbers: shapes, types, deltas and requires_grad. It costs no memory, and the model itself
    is not touched; it may lie on the meta device (model.count.on_paper). paper: where another model's numbers would be
    (`paper_of`), so that the two can be computed with together."""
    mode = paper or FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}

    def faked(tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(faked(parameter.data), requires_grad=parameter.requires_grad)
    for module in model.modules():
        held = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in (*held, *module.buffers(recurse=False)):
            small = tensor.numel() < SMALL and not tensor.is_meta
            memo.setdefault(id(tensor), tensor if small else faked(tensor))
    return copy.deepcopy(model, memo)
