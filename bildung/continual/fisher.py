"""The diagonal of the Fisher information: how much an example's log-probability changes when one weight does.

    F_i = mean over examples x of  E_{y ~ p(y|x)} [ (d log p(y|x) / d theta_i)² ]        Kirkpatrick et al. 2017

The square stands inside the mean over EXAMPLES. The square of a batch's mean gradient is something else, about as many
times smaller as the batch has examples, and it is what much public code computes (avalanche's EWC plugin does). So the
result here must not depend on the batch size, and a test says so.

y is drawn from the model ("true"), taken from the data ("empirical": near 0 where the model is right, whatever the
curvature), or summed over with its probability ("exact"). Martens 2020 (arXiv 1412.1193, section 11) compares them.

Cheap where every trained parameter belongs to a weight matrix: a matrix' gradient of one example is Σ_t g_t x_tᵀ, and
the weight seam's recorder hears x and g of a whole batch in one backward pass. Else: one example at a time.
"""

# B examples, T tokens, I input features, O output features, R rank

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core.errors import TrainingError
from bildung.model.linear import Dense, Linear, linears, record_weights
from bildung.model.low_rank import LowRank
from bildung.train.checkpoint import trained

Outcomes = Callable[[Any, Any], Iterator[tuple[Tensor, Tensor]]]


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Any], outcomes: Outcomes, *, by_recorder: bool | None = None
) -> dict[str, Tensor]:
    """Parameter name -> F, float32, for every parameter that requires a gradient.

    outcomes: (model, batch) -> pairs of weight_B and -log p(outcome)_B, whose weights sum to 1 for each example.
    by_recorder: a batch at a time; default: where it is possible. Raises TrainingError without an example.
    """
    was_training = model.training
    model.eval()
    parameters = trained(model)
    fast = covered(model, parameters) if by_recorder is None else by_recorder
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    count = 0
    for batch in batches:
        batch = batch.to(next(iter(parameters.values())).device)
        if fast:
            count += _add_batch(model, batch, outcomes, sums)
        else:
            count += sum(_add_example(model, one, outcomes, parameters, sums) for one in _rows(batch))
    model.train(was_training)
    if not count:
        raise TrainingError("there is no example to measure the Fisher information on.")
    return {name: summed / count for name, summed in sums.items()}


def covered(model: nn.Module, parameters: Iterable[str]) -> bool:
    """Whether the recorder alone can tell the gradients of these parameters."""
    return set(parameters) <= {
        name for linear in linears(model).values() if linear.name != "lm_head" for name in _parts(linear)
    }


def _parts(linear: Linear) -> dict[str, Any]:
    """Name -> what it is, for the parameters of a matrix whose gradients follow from x and g."""
    parts: dict[str, Any] = {}
    if isinstance(linear.base, Dense):
        parts[f"{linear.name}.base.weight"] = None
    if linear.bias is not None:
        parts[f"{linear.name}.bias"] = None
    for name, delta in linear.deltas.items():
        if isinstance(delta, LowRank):
            parts |= {f"{linear.name}.deltas.{name}.lora_{factor}": delta for factor in "AB"}
    return parts


class _Squares:
    """Hears x and g of matrices, and adds the weighted squares of each example's gradient to `sums`."""

    def __init__(self, matrices: dict[str, Linear], sums: dict[str, Tensor]):
        self.matrices, self.sums = matrices, sums
        self.weight_B = torch.empty(0)
        self.uses: dict[str, int] = {}  # of a matrix in the forward pass
        self.heard: dict[str, list[dict[str, Tensor]]] = {}

    def inputs(self, name: str, x_BTI: Tensor) -> None:
        self.uses[name] = self.uses.get(name, 0) + 1

    def gradients(self, name: str, x_BTI: Tensor, grad_BTO: Tensor) -> None:
        B = len(self.weight_B)
        if len(x_BTI) != B:
            raise TrainingError(f"{name} mixes the {B} examples of a batch; their gradients cannot be told apart.")
        x_BTI, grad_BTO = (one.float().reshape(B, -1, one.shape[-1]) for one in (x_BTI, grad_BTO))
        heard = self.heard.setdefault(name, [])
        heard.append(self._of_examples(self.matrices[name], x_BTI, grad_BTO))
        if len(heard) == self.uses[name]:  # a matrix that is used twice has one gradient: their sum
            for parameter in heard[0]:
                grad = sum((use[parameter] for use in heard[1:]), heard[0][parameter])
                self.sums[parameter] += torch.einsum("b,b...->...", self.weight_B, grad.square_())
            del self.heard[name]

    def _of_examples(self, linear: Linear, x_BTI: Tensor, grad_BTO: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, delta in _parts(linear).items():
            if name not in self.sums:
                continue
            if delta is None:
                is_bias = name.endswith(".bias")
                found[name] = grad_BTO.sum(1) if is_bias else grad_BTO.mT @ x_BTI
            elif name.endswith("lora_A"):
                found[name] = delta.scaling * (grad_BTO @ delta.lora_B.detach().float()).mT @ x_BTI
            else:
                found[name] = delta.scaling * grad_BTO.mT @ (x_BTI @ delta.lora_A.detach().float().t())
        return found


def _add_batch(model: nn.Module, batch: Any, outcomes: Outcomes, sums: dict[str, Tensor]) -> int:
    parameters = trained(model)
    matrices = {name: linear for name, linear in linears(model).items() if set(_parts(linear)) & set(parameters)}
    squares = _Squares(matrices, sums)
    count = 0
    with record_weights(model, tuple(matrices), squares):
        for weight_B, nll_B in outcomes(model, batch):
            squares.weight_B, count = weight_B.float(), len(nll_B)
            torch.autograd.grad(nll_B.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    return count


def _add_example(
    model: nn.Module, one: Any, outcomes: Outcomes, parameters: dict[str, nn.Parameter], sums: dict[str, Tensor]
) -> int:
    for weight_B, nll_B in outcomes(model, one):
        grads = torch.autograd.grad(nll_B.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                sums[name] += weight_B.float() * grad.float().square()
    return 1


def _rows(batch: Any) -> Iterator[Any]:
    """The examples of a batch, each as a batch."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for b in range(len(next(iter(tensors.values())))):
        yield replace(batch, **{name: t if t is None else t[b : b + 1] for name, t in tensors.items()})
