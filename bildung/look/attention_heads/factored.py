"""A large matrix of small rank, kept as its two factors: M = A B, of which only A and B are ever in memory.

    M        =    A        B            the QK circuit of a head, for all pairs of tokens, is 49152 x 49152 numbers in
    (m x n)       (m x r)  (r x n)      SmolLM2 (9.7 GB); its factors are 49152 x 64 and 64 x 49152 (25 MB)

What one asks of M is found at the small side, r x r:

    eigenvalues   those of A B, besides zeros, are those of B A        (A B v = λ v  gives  B A (B v) = λ (B v))
    trace         Σ over both of A ∘ B^T
    norm          ‖A B‖² = tr((A^T A) (B B^T))
    singular      those of R_A R_B^T, where A = Q_A R_A and B^T = Q_B R_B

TransformerLens has a FactoredMatrix of the same use; its eigenvalues are those of B A too.
"""

# m rows, n columns, r inner size; any leading dimensions (layers, heads)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError


@dataclass(frozen=True)
class Factored:
    """A_mr B_rn, with the same leading dimensions."""

    a_mr: Tensor
    b_rn: Tensor

    def __post_init__(self) -> None:
        if self.a_mr.shape[-1] != self.b_rn.shape[-2]:
            raise DataError(
                f"factors of shapes {tuple(self.a_mr.shape)} and {tuple(self.b_rn.shape)} do not fit: the last size of "
                f"the first must be the last but one of the second."
            )

    @property
    def shape(self) -> torch.Size:
        """Of the product: leading dimensions, m, n."""
        lead = torch.broadcast_shapes(self.a_mr.shape[:-2], self.b_rn.shape[:-2])
        return torch.Size((*lead, self.a_mr.shape[-2], self.b_rn.shape[-1]))

    @property
    def mT(self) -> Factored:
        """The transposed matrix."""
        return Factored(self.b_rn.mT, self.a_mr.mT)

    def __matmul__(self, other: Factored | Tensor) -> Factored:
        """M times a matrix, or times another product; the result is as narrow as the narrower of the two."""
        if isinstance(other, Tensor):
            return Factored(self.a_mr, self.b_rn @ other)
        between = self.b_rn @ other.a_mr
        if between.shape[-2] <= between.shape[-1]:
            return Factored(self.a_mr, between @ other.b_rn)
        return Factored(self.a_mr @ between, other.b_rn)

    def __rmatmul__(self, other: Tensor) -> Factored:
        """A matrix times M."""
        return Factored(other @ self.a_mr, self.b_rn)

    def dense(self) -> Tensor:
        """The matrix itself: m x n numbers."""
        return self.a_mr @ self.b_rn

    def eigenvalues(self) -> Tensor:
        """The r eigenvalues (complex) that need not be 0; the other m - r are. Raises DataError unless m = n."""
        if self.shape[-1] != self.shape[-2]:
            raise DataError(f"a matrix of {self.shape[-2]} x {self.shape[-1]} has no eigenvalues; a square one has.")
        return torch.linalg.eigvals(self.b_rn @ self.a_mr)

    def singular_values(self) -> Tensor:
        """The min(m, n, r) largest singular values, in falling order."""
        r_a, r_b = torch.linalg.qr(self.a_mr, "r").R, torch.linalg.qr(self.b_rn.mT, "r").R
        return torch.linalg.svdvals(r_a @ r_b.mT)

    def trace(self) -> Tensor:
        """Σ of the diagonal, which is the sum of the eigenvalues."""
        return (self.a_mr * self.b_rn.mT).sum((-2, -1))

    def norm(self) -> Tensor:
        """The Frobenius norm."""
        return reduced(self).norm(dim=(-2, -1))


def reduced(matrix: Factored) -> Tensor:
    """An r x r matrix of the same singular values: what A and B have in common with M, without their directions."""
    return torch.linalg.qr(matrix.a_mr, "r").R @ torch.linalg.qr(matrix.b_rn.mT, "r").R.mT


def positive_share(eigenvalues: Tensor) -> Tensor:
    """Σ λ / Σ |λ| in [-1, 1] (Elhage et al. 2021): 1 when a matrix gives every direction back to itself, -1 when it
    takes it away. Complex ones come in pairs, so the sum is real. 0 for a matrix of zeros."""
    return eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1).clamp_min(torch.finfo(eigenvalues.real.dtype).tiny)
