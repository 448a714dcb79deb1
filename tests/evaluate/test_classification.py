"""Figures of a classifier, by hand."""

from __future__ import annotations

import pytest
import torch

from bildung.core.errors import DataError
from bildung.evaluate.classification import classification_figures, confusion_table, expected_calibration_error

P = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
LABELS = [0, 1, 1, 0]


def test_figures_of_four_texts() -> None:
    found = classification_figures(P.log(), LABELS, ["no", "yes"])
    assert found["accuracy"] == 0.75 and found["accuracy_stderr"] == pytest.approx(0.25)
    assert found["confusion"] == [[2, 0], [1, 1]]
    assert found["per_class"]["no"] == {"precision": 2 / 3, "recall": 1.0, "f1": 0.8}
    assert found["per_class"]["yes"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})
    assert found["nll"] == pytest.approx(-sum(map(float, torch.tensor([0.9, 0.4, 0.8, 0.7]).log())) / 4)
    assert found["brier"] == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04 + 2 * 0.09) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)  # each in a bin of its own
    assert "is yes called      1       1" in confusion_table(found, ["no", "yes"])


def test_calibration_within_a_bin_cancels() -> None:
    """Ten texts of confidence 0.7, of which seven are right, are calibrated; of which all are right, are 0.3 off."""
    confidence = torch.full((10,), 0.7, dtype=torch.double)
    assert expected_calibration_error(confidence, torch.tensor([1.0] * 7 + [0.0] * 3).double()) == pytest.approx(0)
    assert expected_calibration_error(confidence, torch.ones(10).double()) == pytest.approx(0.3)
    assert expected_calibration_error(torch.ones(4).double(), torch.ones(4).double()) == 0


def test_a_class_that_never_occurs() -> None:
    found = classification_figures(torch.log_softmax(torch.eye(3), -1)[:2], [0, 1], ["a", "b", "c"])
    assert found["per_class"]["c"] == {"precision": None, "recall": None, "f1": None}
    with pytest.raises(DataError, match="2 texts with 3"):
        classification_figures(torch.zeros(2, 3), [0], ["a", "b", "c"])
