"""Figures of predicted numbers, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bildung.core.errors import DataError
from bildung.evaluate.regression import ranks, regression_figures


def test_figures_of_four_numbers() -> None:
    """Errors 1, 0, -1, 2; the truth's variance is 5 / 4."""
    found = regression_figures(torch.tensor([2.0, 2.0, 2.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found["mse"] == 1.5 and found["rmse"] == math.sqrt(1.5) and found["mae"] == 1.0
    assert found["mse_stderr"] == pytest.approx(torch.tensor([1.0, 0.0, 1.0, 4.0]).std() / 2)
    assert found["r2"] == pytest.approx(1 - 1.5 / 1.25)
    assert found["pearson"] == pytest.approx(6 / math.sqrt(12 * 5))  # (-1 -1 -1 3) and (-3 -1 1 3) / 2
    assert found["spearman"] == pytest.approx(3 / math.sqrt(3 * 5))  # ranks 2 2 2 4 and 1 2 3 4


def test_equal_numbers_share_a_rank_and_constant_ones_have_no_correlation() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    flat = regression_figures(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    assert flat["pearson"] is None and flat["spearman"] is None
    with pytest.raises(DataError, match="2 predictions of 3"):
        regression_figures(torch.ones(2), torch.ones(3))
