"""Classification: the sum, its metrics, label smoothing by hand, any way to the logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bildung.core.errors import DataError, SettingsError
from bildung.train.classify import Classify


def batch(*labels: int) -> SimpleNamespace:
    return SimpleNamespace(labels_B=torch.tensor(labels))


def test_the_sum_by_hand() -> None:
    logits_BC = torch.tensor([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2]]).log()
    found = Classify(lambda model, batch: logits_BC)(None, batch(2, 1))
    assert float(found.total) == pytest.approx(1.6094 + 0.3567, abs=1e-4)  # exam row 6: Cherry and Banana
    assert (found.count, float(found.metrics["accuracy"])) == (2, 1.0)
    assert float(found.metrics["nll"]) == pytest.approx(float(found.total))


def test_label_smoothing_by_hand() -> None:
    p = torch.tensor([0.1, 0.7, 0.2])
    found = Classify(lambda model, batch: p.log()[None], label_smoothing=0.3)(None, batch(1))
    target = torch.tensor([0.1, 0.8, 0.1])  # 1 - 0.3 + 0.3/3 on the label
    assert float(found.total) == pytest.approx(float(-(target * p.log()).sum()), abs=1e-6)
    assert float(found.metrics["nll"]) == pytest.approx(0.3567, abs=1e-4)
    with pytest.raises(SettingsError, match="label_smoothing = 1"):
        Classify(lambda model, batch: p, label_smoothing=1.0)


def test_the_gradient_is_that_of_the_sum() -> None:
    logits_BC = torch.randn(4, 3, requires_grad=True)
    Classify(lambda model, batch: model)(logits_BC, batch(0, 1, 2, 1)).total.backward()
    expected = logits_BC.softmax(-1).detach()
    expected[range(4), [0, 1, 2, 1]] -= 1
    assert torch.allclose(logits_BC.grad, expected, atol=1e-6)


@pytest.mark.parametrize("label", [3, -1, 99])
def test_labels_outside_the_classes(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} is none of the model's 3 classes"):
        Classify(lambda model, batch: torch.zeros(2, 3))(None, batch(0, label))
