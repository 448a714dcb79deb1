"""What changed in the weights, matrix by matrix: how much, in how many directions, and in which.

    dW = W_B - W_A                          σ_i its singular values, u_i, v_i its left and right singular vectors

    relative          |dW|_F / |W_A|_F
    rank              how many σ_i > σ_1 · max(O, I) · 2⁻²³ (what is smaller is rounding of float32)
    stable rank       |dW|_F² / σ_1²                                                    1: one direction; ≤ rank
    effective rank    exp(- Σ p_i ln p_i), p_i = σ_i / Σ σ          (Roy & Vetterli 2007)         ≤ rank
    overlap out       φ = |U_k(dW)ᵀ U_k(W_A)|_F² / k                (Hu et al. 2021, LoRA, eq. 4)
    overlap in        the same of the right vectors, V_k

φ lies between 0 and 1, and is k/O (k/I) by chance: does the change write where W already writes most, and read what it
reads most? k is the rank of dW, at most 16.

Everything goes through the weight seam, so stores are dequantized and deltas are included. Where both models stand on
the same stored numbers, dW is the difference of their low-rank deltas, from their factors: the rank of a LoRA is its
rank. Of two separate directories dW is a difference of rounded numbers, and has full rank by rounding alone, in
bfloat16 visibly; stable and effective rank are then the ones to read.
"""

# O output features, I input features, S the smaller of the two, K directions

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bildung.model.linear import Delta, Dense, Linear, linears
from bildung.model.low_rank import POWER_STEPS, LowRank

DIRECTIONS = 16
EPSILON = 2.0**-23  # of float32


@dataclass(frozen=True)
class MatrixChange:
    """One matrix. Without a change only the norms are numbers, and 0."""

    name: str
    layer: int | None
    kind: str  # "self_attn.q_proj": the name without its layer
    shape: tuple[int, int]
    norm: float  # |dW|_F
    relative: float
    rank: int
    stable_rank: float
    effective_rank: float
    directions: int  # k
    overlap_out: float
    overlap_in: float

    @property
    def by_chance(self) -> tuple[float, float]:
        """What the overlaps (out, in) of random directions are on average."""
        return self.directions / self.shape[0], self.directions / self.shape[1]


@dataclass(frozen=True)
class WeightChange:
    """All matrices in forward order; `others`: relative change of norms, biases and embeddings, those that changed;
    `unlike`: what only one of the two has, or in another shape."""

    matrices: list[MatrixChange]
    others: dict[str, float]
    unlike: list[str]

    @property
    def changed(self) -> list[MatrixChange]:
        """Those that changed, most first."""
        return sorted((one for one in self.matrices if one.norm > 0), key=lambda one: -one.relative)


@torch.no_grad()
def weight_change(a: nn.Module, b: nn.Module) -> WeightChange:
    """From model A to model B, any stores and deltas; matrices are paired by their names."""
    there_a, there_b = linears(a), linears(b)
    matrices, unlike = [], [name for name in {**there_a, **there_b} if (name in there_a) != (name in there_b)]
    for name in (name for name in there_a if name in there_b):
        first, second = there_a[name], there_b[name]
        if (first.out_features, first.in_features) == (second.out_features, second.in_features):
            matrices.append(matrix_change(name, first, second))
        else:
            unlike.append(name)
    others, more = _others(a, b)
    return WeightChange(matrices, others, unlike + more)


@torch.no_grad()
def matrix_change(name: str, a: Linear, b: Linear) -> MatrixChange:
    """One matrix of both models."""
    shape = (a.out_features, a.in_features)
    found = re.match(r"^(.*?)layers\.(\d+)\.(.*)$", name)
    layer, kind = (int(found[2]), f"{found[1].removeprefix('model.')}{found[3]}") if found else (None, name)
    sigma_S, u_OS, v_IS = change(a, b)
    norm = float(torch.linalg.vector_norm(sigma_S))
    if norm == 0:
        return MatrixChange(name, layer, kind, shape, 0.0, 0.0, 0, 0.0, 0.0, 0, math.nan, math.nan)
    W_OI = a.effective(torch.float32)[0]
    rank = int((sigma_S > sigma_S[0] * max(shape) * EPSILON).sum())
    p_S = sigma_S[:rank] / sigma_S[:rank].sum()
    k = min(rank, DIRECTIONS)
    top_OK, top_IK = leading(W_OI, k)
    return MatrixChange(
        name=name,
        layer=layer,
        kind=kind,
        shape=shape,
        norm=norm,
        relative=norm / max(float(torch.linalg.vector_norm(W_OI)), 1e-30),
        rank=rank,
        stable_rank=norm**2 / float(sigma_S[0]) ** 2,
        effective_rank=float(torch.exp(-(p_S * p_S.log()).sum())),
        directions=k,
        overlap_out=overlap(u_OS[:, :k], top_OK),
        overlap_in=overlap(v_IS[:, :k], top_IK),
    )


def change(a: Linear, b: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values and vectors of dW, in float64; of no change a single value, 0."""
    mine, other = _additive(a), _additive(b)
    if mine is None or other is None or not _same_numbers(a, b):
        return decompose(b.effective(torch.float64)[0] - a.effective(torch.float64)[0])
    parts = [(delta, 1.0) for delta in other] + [(delta, -1.0) for delta in mine]
    if all(isinstance(delta, LowRank) for delta, _ in parts):
        device = _stored(a)[0].device
        left = [torch.zeros(a.out_features, 1, dtype=torch.float64, device=device)]
        right = [torch.zeros(1, a.in_features, dtype=torch.float64, device=device)]
        for delta, sign in parts:
            lora_A, lora_B = (factor.double() for factor in cast(LowRank, delta).factors())
            left.append(sign * cast(LowRank, delta).scaling * lora_B)
            right.append(lora_A)
        return decompose_product(torch.cat(left, 1), torch.cat(right))
    return decompose(sum(sign * delta.weight().double() for delta, sign in parts))  # type: ignore[arg-type]


def decompose_product(left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`decompose` of left · right, which is never made: of R x R at most."""
    q_OR, r_RR = torch.linalg.qr(left_OR)
    p_IR, t_RR = torch.linalg.qr(right_RI.mT)
    u_RS, sigma_S, vh_SR = torch.linalg.svd(r_RR @ t_RR.mT, full_matrices=False)
    return sigma_S, q_OR @ u_RS, p_IR @ vh_SR.mT


def leading(weight_OI: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors, O x K and I x K, by subspace iteration (Halko et al. 2011).

    Where the spectrum is flat the last of them are not exact, nor would exact ones mean much. The same each time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, _, v = torch.svd_lowrank(weight_OI, q=min(2 * count, *weight_OI.shape), niter=POWER_STEPS)
    return u[:, :count].double(), v[:, :count].double()


def decompose(x_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values S (largest first), left and right vectors O x S, I x S.

    By the eigenvectors of the smaller of x xᵀ and xᵀ x, several times faster than a singular value decomposition; in
    float64 that resolves values down to 1e-8 of the largest.
    """
    if x_OI.shape[0] > x_OI.shape[1]:
        sigma_S, u_IS, v_OS = decompose(x_OI.mT)
        return sigma_S, v_OS, u_IS
    squares_S, u_OS = torch.linalg.eigh(x_OI @ x_OI.mT)
    sigma_S, u_OS = squares_S.flip(0).clamp_min(0).sqrt(), u_OS.flip(1)
    # Columns of no length stay 0: nobody asks for directions beyond the rank.
    v_IS = (x_OI.mT @ u_OS) / sigma_S.clamp_min(1e-300)
    return sigma_S, u_OS, v_IS


def overlap(x_OK: Tensor, y_OK: Tensor) -> float:
    """φ of two orthonormal bases of K directions: 1 when they span the same, 0 when they are at right angles."""
    return float((x_OK.mT @ y_OK).pow(2).sum() / x_OK.shape[1])


def _additive(linear: Linear) -> list[Delta] | None:
    """The enabled deltas, if each of them adds a matrix that does not depend on the others."""
    deltas = linear.enabled_deltas()
    return deltas if all(type(delta).applied is Delta.applied for delta in deltas) else None


def _same_numbers(a: Linear, b: Linear) -> bool:
    """Whether both stand on the same place in memory (see model/twin.py)."""
    mine, other = _stored(a), _stored(b)
    return type(a.base) is type(b.base) and [t.data_ptr() for t in mine] == [t.data_ptr() for t in other]


def _stored(linear: Linear) -> list[Tensor]:
    return [linear.base.weight] if isinstance(linear.base, Dense) else list(linear.base.buffers())


def _others(a: nn.Module, b: nn.Module) -> tuple[dict[str, float], list[str]]:
    """Relative change of every parameter that is no matrix's; names that do not pair."""
    mine, other = _plain(a), _plain(b)
    changed, unlike = {}, [name for name in {**mine, **other} if (name in mine) != (name in other)]
    for name in (name for name in mine if name in other):
        x, y = mine[name].double(), other[name].double()
        if x.shape != y.shape:
            unlike.append(name)
        elif (far := float(torch.linalg.vector_norm(y - x))) > 0:
            changed[name] = far / max(float(torch.linalg.vector_norm(x)), 1e-30)
    return changed, unlike


def _plain(model: nn.Module) -> dict[str, Tensor]:
    inside = tuple(f"{name}.{part}." for name in linears(model) for part in ("base", "deltas"))
    return {name: p.detach() for name, p in model.named_parameters() if not name.startswith(inside)}
