"""How near predicted numbers come to the true ones.

    mse, rmse, mae      mean squared error, its root, mean absolute error
    r2                  1 - mse / the truth's variance: the share of the variance that is explained; below 0: worse
                        than always naming the mean
    pearson             covariance over both spreads: do they lie on a line?
    spearman            Pearson's of the ranks: are they in the same order? Equal numbers share the mean of their ranks

Standard errors: of mse and mae over texts; of a correlation sqrt((1 - r²) / (N - 2)). A correlation with numbers that
are all the same is not defined: None.
"""

# N texts

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from bildung.core.errors import DataError


def regression_figures(predicted_N: Tensor, true_N: Tensor) -> dict[str, Any]:
    """All of the above. Raises DataError for none, or for another number of the two."""
    predicted_N, true_N = predicted_N.double().flatten(), true_N.double().flatten()
    N = len(true_N)
    if N == 0 or len(predicted_N) != N:
        raise DataError(f"{len(predicted_N)} predictions of {N} numbers.")
    squared_N, absolute_N = (predicted_N - true_N).square(), (predicted_N - true_N).abs()
    mse = float(squared_N.mean())
    spread = float(true_N.var(correction=0))
    pearson, spearman = correlation(predicted_N, true_N), correlation(ranks(predicted_N), ranks(true_N))
    return {
        "mse": mse,
        "mse_stderr": _stderr(squared_N),
        "rmse": math.sqrt(mse),
        "mae": float(absolute_N.mean()),
        "mae_stderr": _stderr(absolute_N),
        "r2": 1 - mse / spread if spread else None,
        "pearson": pearson,
        "pearson_stderr": _correlation_stderr(pearson, N),
        "spearman": spearman,
        "spearman_stderr": _correlation_stderr(spearman, N),
        "texts": N,
    }


def correlation(a_N: Tensor, b_N: Tensor) -> float | None:
    """Pearson's r; None where one of the two does not vary."""
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    size = float(a_N.norm() * b_N.norm())
    return max(-1.0, min(1.0, float(a_N @ b_N) / size)) if size else None


def ranks(values_N: Tensor) -> Tensor:
    """1 for the smallest; of equal ones the mean of the places that they fill."""
    _, which_N, counts = values_N.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks_N: Tensor = (last - (counts - 1).double() / 2)[which_N]
    return ranks_N


def _stderr(values_N: Tensor) -> float | None:
    return float(values_N.std() / math.sqrt(len(values_N))) if len(values_N) > 1 else None


def _correlation_stderr(r: float | None, N: int) -> float | None:
    return math.sqrt((1 - r * r) / (N - 2)) if r is not None and N > 2 else None
