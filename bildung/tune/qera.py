"""Low-rank adapters that start as what rounding took from each matrix, weighed by what the matrix really reads: QERA.

    E = W - W'                      lost by quantization (W' the quantized matrix), out x in
    R = mean of xᵀ x                over the tokens that the matrix reads (in x in)
    B A = svd_r(E R^½) R^-½         the rank-r matrix whose mean |x (E - B A)ᵀ|² is least

Zhang et al. 2024, "QERA: an Analytical Framework for Quantization Error Reconstruction", arXiv 2410.06040, theorem 1
(there transposed: y = x W). The plain svd_r(E), which LoftQ (Li et al. 2023, arXiv 2310.08659) and peft's
`replace_lora_weights_loftq` take, has the least |E - B A|² instead and regains far less of the loss (docs/log.md).
LoftQ also rounds anew after each svd; here the quantized directory stays as it is.
"""

# B batch, L positions, N tokens, I input features, O output features, R rank

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import ModelFileError, TrainingError
from bildung.data.batches import Batch
from bildung.model.linear import Dense, Linear, record_weights
from bildung.model.low_rank import LowRank, principal
from bildung.train.fit import mean_loss
from bildung.train.loss import Objective

DAMPING = 0.01  # of R's mean diagonal, added to it: few tokens leave directions that were never read
HELD_BYTES = 2**30  # of R matrices gathered in one pass over the data


def start_at_error(
    model: Any, original: Any, deltas: Mapping[str, LowRank], batches: list[Batch], objective: Objective
) -> list[str]:
    """Set A and B of each delta to what quantization took from its matrix; returns the names of those it changed.

    original: the model before quantization, which reads `batches`. A matrix that was not quantized keeps its delta.
    Raises ModelFileError when the models do not belong together, TrainingError when a matrix has read nothing.
    """
    there = original.linears()
    lossy = {name: linear for name, linear in model.linears().items() if name in deltas and _is_quantized(linear)}
    check_original(lossy, there)
    for names in _passes(lossy):
        moments = Moments(names)
        with record_weights(original, tuple(names), moments):
            for batch in batches:
                moments.keep_BL = batch.keep_BL.to(original.device)
                mean_loss(original, objective, [batch])
        for name in names:
            if not moments.count[name]:
                raise TrainingError(f"{name} read none of the {len(batches)} batches; its error cannot be weighed.")
            error_OI = there[name].base.dense().float() - lossy[name].base.dense().float()
            delta = deltas[name]
            lora_A, lora_B = reconstruction(error_OI, moments.sum_II[name] / moments.count[name], delta.rank)
            with torch.no_grad():
                delta.lora_A.copy_(lora_A / math.sqrt(delta.scaling))
                delta.lora_B.copy_(lora_B / math.sqrt(delta.scaling))
    return list(lossy)


def reconstruction(error_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) such that B A is nearest to the error for inputs of that second moment (theorem 1)."""
    damped_II = moment_II.double() + DAMPING * moment_II.diag().mean().double() * torch.eye(
        len(moment_II), dtype=torch.float64, device=moment_II.device
    )
    value_I, vector_II = torch.linalg.eigh(damped_II)
    root_II = (vector_II * value_I.sqrt()) @ vector_II.t()
    inverse_II = (vector_II / value_I.sqrt()) @ vector_II.t()
    lora_A, lora_B = principal(error_OI.double() @ root_II, rank)
    return (lora_A.double() @ inverse_II).float(), lora_B.float()


def check_original(lossy: Mapping[str, Linear], there: Mapping[str, Linear]) -> None:
    """Raises ModelFileError unless `there` holds each of these matrices, unquantized and without adapters."""
    if not lossy:
        raise ModelFileError("no matrix that gets an adapter is quantized; there is no error to start from.")
    for name, linear in lossy.items():
        other = there.get(name)
        shape = (linear.out_features, linear.in_features)
        if other is None or (other.out_features, other.in_features) != shape:
            found = "has no such matrix" if other is None else f"has {(other.out_features, other.in_features)}"
            raise ModelFileError(f"the original {found} for {name} of {shape}; give the model that was quantized.")
        if other.deltas or not isinstance(other.base, Dense):
            raise ModelFileError(f"{name} of the original is quantized or adapted itself; give the model before that.")


class Moments:
    """Sums xᵀ x over the real tokens that each matrix reads."""

    def __init__(self, names: list[str]):
        self.sum_II: dict[str, Tensor] = {}
        self.count = dict.fromkeys(names, 0)
        self.keep_BL: Tensor | None = None

    def inputs(self, name: str, x_BLI: Tensor) -> None:
        real = x_BLI.shape[:-1] == (self.keep_BL.shape if self.keep_BL is not None else None)
        x_NI = (x_BLI[self.keep_BL] if real else x_BLI.flatten(0, -2)).float()
        seen_II = x_NI.t() @ x_NI
        self.sum_II[name] = self.sum_II[name] + seen_II if name in self.sum_II else seen_II
        self.count[name] += len(x_NI)

    def gradients(self, name: str, x_BLI: Tensor, grad_BLO: Tensor) -> None:
        """Nothing: there is no backward pass."""


def _is_quantized(linear: Linear) -> bool:
    return not isinstance(linear.base, Dense)


def _passes(matrices: Mapping[str, Linear]) -> Iterator[list[str]]:
    """The names in groups whose R matrices fit HELD_BYTES; at least one in each."""
    group: list[str] = []
    held = 0
    for name, linear in matrices.items():
        size = 4 * linear.in_features**2
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
