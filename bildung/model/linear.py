"""The weight seam: every weight matrix of every model is one `Linear` from the start.

    y = base(x) + bias, changed by one enabled delta after the other      (Hu et al. 2021, eq. 3, for any kind of delta)

`base` says how the numbers are stored (Dense here; Int8 and Nf4 in quantized.py). `deltas` say what changed later: a
LoRA (low_rank.py), a knowledge edit, a merged task vector; each can be switched off or deleted. So nothing is ever
monkey-patched, renamed or wrapped, a method works on every store, and a store under every method.

`recorder`, when set, yields each weight's input x and output gradient: all that Fisher information, GPTQ, Wanda,
covariances of ROME and the hypernetworks of MEND need.
"""

# B L: any leading dimensions, I input features, O output features, J outputs of several matrices

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import NoSuchLinear, nearest


class WeightStore(nn.Module):
    """How one matrix W_OI is held in memory and on disk. Subclasses are final."""

    in_features: int
    out_features: int

    def forward(self, x_BLI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + bias, in the dtype of x."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The matrix W_OI itself, dequantized if need be."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """File suffix -> tensor, as written to safetensors (`q_proj` + `.weight`, ...)."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes this matrix takes in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class Dense(WeightStore):
    """An ordinary matrix of floats."""

    def __init__(self, weight_OI: nn.Parameter):
        super().__init__()
        self.weight = weight_OI
        self.out_features, self.in_features = weight_OI.shape
        self.packed: Tensor | None = None  # a copy in the kernel's own layout, while packed.py lends one
        self.cast: Tensor | None = None  # a copy in another type, while `cast_to` lends one

    def forward(self, x_BLI: Tensor, bias_O: Tensor | None) -> Tensor:
        if self.packed is not None and self.packed.dtype == x_BLI.dtype and not torch.is_grad_enabled():
            return packed_linear(x_BLI, self.packed, bias_O)
        # Master weights may be float32 while activations run in bfloat16: the cast's backward returns a float32 grad.
        weight_OI = self.weight if self.cast is None else self.cast
        return F.linear(x_BLI, weight_OI.to(x_BLI.dtype), None if bias_O is None else bias_O.to(x_BLI.dtype))

    @contextmanager
    def cast_to(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """A copy in `dtype` that stands in for the matrix, for many uses in a row; gradients go to the copy."""
        self.cast = self.weight.detach().to(dtype).requires_grad_()
        try:
            yield self.cast
        finally:
            self.cast = None

    def dense(self) -> Tensor:
        return self.weight

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


def packed_linear(x_BLI: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias for a matrix in oneDNN's layout. No gradient flows through it."""
    y_BLO: Tensor = torch.ops.mkldnn._linear_pointwise(
        x_BLI, packed_OI, None if bias_O is None else bias_O.to(x_BLI.dtype), "none", [], ""
    )
    return y_BLO


@dataclass(frozen=True)
class Joint:
    """Several matrices of one input as one, in oneDNN's layout."""

    packed_JI: Tensor
    bias_J: Tensor | None
    sizes: tuple[int, ...]


class Delta(nn.Module):
    """A change of a matrix's linear map, f(x) = W x + bias. Subclasses are final; parameters hold what was learned.

    What adds a matrix dW defines `forward` and `weight`. What changes the map otherwise (dora.py, ia3.py) defines
    `forward` and `applied`, and `reads` if it changes the input.
    """

    enabled: bool = True

    def forward(self, x_BLI: Tensor, y_BLO: Tensor) -> Tensor:
        """The output for `x` with this delta, given the output without: `y` (a dW adds its share to it)."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The dense matrix dW_OI that the delta adds."""
        raise NotImplementedError

    def reads(self, x_BLI: Tensor) -> Tensor:
        """What the map below this delta is given instead of `x`."""
        return x_BLI

    def applied(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The matrix and the bias with this delta, given those without."""
        return weight_OI + self.weight().to(weight_OI.dtype), bias_O


class Recorder(Protocol):
    """What listens to the weights of a model while it runs."""

    def inputs(self, name: str, x_BLI: Tensor) -> None:
        """Called in the forward pass with the input of matrix `name`."""

    def gradients(self, name: str, x_BLI: Tensor, grad_BLO: Tensor) -> None:
        """Called in the backward pass with the same input and the gradient of the loss at the output."""


class Linear(nn.Module):
    """One weight matrix: a store, an optional bias, named deltas, and a place to listen."""

    def __init__(self, base: WeightStore, bias: bool = False, name: str = ""):
        super().__init__()
        self.name = name
        self.base = base
        self.bias = nn.Parameter(torch.zeros(base.out_features)) if bias else None
        self.deltas = nn.ModuleDict()
        self.recorder: Recorder | None = None
        self.joint: Joint | None = None  # this matrix and its neighbours as one, while packed.py lends them

    @property
    def in_features(self) -> int:
        """I of W_OI."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """O of W_OI."""
        return self.base.out_features

    def forward(self, x_BLI: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y_BLO = self._changed(x_BLI) if self.deltas else self.base(x_BLI, self.bias)
        if self.recorder is not None:
            self.record(self.recorder, x_BLI, y_BLO)
        return y_BLO

    def _changed(self, x_BLI: Tensor) -> Tensor:
        """The output with the enabled deltas: inputs are handed down to the base, outputs come up again."""
        deltas = self.enabled_deltas()
        inputs = [x_BLI]
        for delta in reversed(deltas):
            inputs.append(delta.reads(inputs[-1]))
        y_BLO: Tensor = self.base(inputs.pop(), self.bias)
        for delta in deltas:
            y_BLO = delta(inputs.pop(), y_BLO)
        return y_BLO

    def record(self, recorder: Recorder, x_BLI: Tensor, y_BLO: Tensor) -> None:
        """Tell a recorder of one use of the matrix: what went in, and later the gradient of what came out."""
        recorder.inputs(self.name, x_BLI.detach())
        if y_BLO.requires_grad:
            y_BLO.register_hook(lambda grad: recorder.gradients(self.name, x_BLI.detach(), grad))

    def weight(self) -> Tensor:
        """Dense effective weight W_OI, enabled deltas included: for QK/OV circuits, and comparison."""
        return self.effective()[0]

    def effective(self, dtype: torch.dtype | None = None, below: Delta | None = None) -> tuple[Tensor, Tensor | None]:
        """(W_OI, bias_O) with the enabled deltas (those below one of them), summed in `dtype`: what merging writes."""
        weight_OI: Tensor = self.base.dense()
        bias_O: Tensor | None = self.bias
        if dtype is not None:
            weight_OI, bias_O = weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype)
        for delta in self.enabled_deltas():
            if delta is below:
                break
            weight_OI, bias_O = delta.applied(weight_OI, bias_O)
        return weight_OI, bias_O

    def is_plain(self) -> bool:
        """Nothing was added to the matrix and nobody listens to it."""
        return self.recorder is None and not self.deltas

    def enabled_deltas(self) -> list[Delta]:
        """The deltas that take part, in the order they were added."""
        return [delta for delta in cast("list[Delta]", list(self.deltas.values())) if delta.enabled]


def project(x_BLI: Tensor, *linears: Linear) -> Sequence[Tensor]:
    """The outputs of several matrices for one input; by one kernel call while a joint copy is lent."""
    joint = linears[0].joint
    if (
        joint is None
        or joint.packed_JI.dtype != x_BLI.dtype
        or torch.is_grad_enabled()
        or not all(linear.is_plain() for linear in linears)
    ):
        return [linear(x_BLI) for linear in linears]
    return packed_linear(x_BLI, joint.packed_JI, joint.bias_J).split(joint.sizes, dim=-1)


def dense_linear(in_features: int, out_features: int, *, bias: bool = False, name: str = "") -> Linear:
    """A Linear on an uninitialised Dense store (weights are drawn or loaded afterwards)."""
    return Linear(Dense(nn.Parameter(torch.empty(out_features, in_features))), bias, name)


def linears(model: nn.Module) -> dict[str, Linear]:
    """Module path -> Linear, in forward order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def match_linears(model: nn.Module, pattern: str | tuple[str, ...]) -> dict[str, Linear]:
    """The Linears whose path fits a shell pattern or ends in a dotted name ("q_proj", "mlp.*", "*.layers.3.*").

    "all" means every matrix except the unembedding `lm_head`. Raises NoSuchLinear, naming near misses, when one of the
    patterns fits nothing (peft checks only that all patterns together match something).
    """
    all_of_them = linears(model)
    found: dict[str, Linear] = {}
    for one in (pattern,) if isinstance(pattern, str) else pattern:
        if one == "all":
            hits = [name for name in all_of_them if name != "lm_head"]
        else:
            hits = [n for n in all_of_them if fnmatch.fnmatchcase(n, one) or fnmatch.fnmatchcase(n, f"*.{one}")]
        if not hits:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in all_of_them})
            raise NoSuchLinear(
                f"no weight matrix fits {one!r}; this model has {', '.join(kinds)} "
                f"(or full paths such as {next(iter(all_of_them))!r}). {nearest(one, kinds)}".strip()
            )
        found.update({name: all_of_them[name] for name in hits})
    return {name: linear for name, linear in all_of_them.items() if name in found}


@contextmanager
def deltas_off(model: nn.Module, name: str) -> Iterator[None]:
    """Run without the deltas called `name`: before/after as a switch, and DPO's reference model for free.

    Raises NoSuchLinear when no matrix carries such a delta.
    """
    deltas = [cast(Delta, linear.deltas[name]) for linear in linears(model).values() if name in linear.deltas]
    if not deltas:
        there = sorted({key for linear in linears(model).values() for key in linear.deltas})
        raise NoSuchLinear(f"no delta is called {name!r}; this model carries {', '.join(there) or 'none'}.")
    before = [delta.enabled for delta in deltas]
    for delta in deltas:
        delta.enabled = False
    try:
        yield
    finally:
        for delta, was in zip(deltas, before, strict=True):
            delta.enabled = was


@contextmanager
def record_weights(model: nn.Module, pattern: str | tuple[str, ...], recorder: Recorder) -> Iterator[None]:
    """Let `recorder` hear inputs and output gradients of the matching matrices while the block runs."""
    chosen = match_linears(model, pattern)
    for linear in chosen.values():
        linear.recorder = recorder
    try:
        yield
    finally:
        for linear in chosen.values():
            linear.recorder = None


def replace_stores(
    model: nn.Module, pattern: str | tuple[str, ...], make: Callable[[Linear], WeightStore]
) -> list[str]:
    """Give matching matrices another store (quantization, merging); returns their names."""
    chosen = match_linears(model, pattern)
    for linear in chosen.values():
        linear.base = make(linear)
    return list(chosen)
