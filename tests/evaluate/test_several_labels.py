"""Figures of several labels, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bildung.core.errors import DataError
from bildung.evaluate.several_labels import label_table, several_labels_figures

GIVEN = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
TRUE = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])


def test_figures_of_four_texts() -> None:
    logits = math.log(9) * (2 * GIVEN - 1.0)  # sure by 0.9 of every decision
    found = several_labels_figures(logits, TRUE, ["a", "b", "never"])
    assert found["per_label"]["a"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "texts": 3}
    assert found["per_label"]["b"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "texts": 1})
    assert found["per_label"]["never"]["f1"] is None
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["exact"] == 0.5 and found["hamming"] == pytest.approx(2 / 12)
    assert found["nll"] == pytest.approx(-(10 * math.log(0.9) + 2 * math.log(0.1)) / 12)
    assert found["ece"] == pytest.approx(0.9 - 10 / 12)
    influences = torch.tensor([2 - 0.75 * 2, 2 - 0.75 * 3, 2 - 0.75 * 3, 0]) / 8
    assert found["micro_f1_stderr"] == pytest.approx(float((4 / 3 * influences.square().sum()).sqrt()))
    assert "never      0          –" in label_table(found)
    with pytest.raises(DataError, match="4 texts with 3 logits"):
        several_labels_figures(logits, TRUE[:, :2], ["a", "b", "c"])
