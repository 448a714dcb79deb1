"""How good a classifier's probabilities are, not only how often its first guess is right.

    accuracy, per class precision, recall, F1     of the first guesses
    confusion[i][j]                               texts of class i that were called j
    nll, brier                                    proper scores of the probabilities: nats, and squared distance
    ece                                           expected calibration error (Naeini et al. 2015; Guo et al. 2017,
                                                  arXiv 1706.04599, eq. 3): with texts sorted into equal bins of
                                                  confidence, the mean over texts of |accuracy - confidence| of its bin

Standard errors of means are over texts.
"""

# N texts, C classes

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bildung.core.errors import DataError

BINS = 15


def classification_figures(logp_NC: Tensor, labels_N: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """All of the above, of log-probabilities that are normalised over the classes. Raises DataError for none."""
    labels = torch.tensor(labels_N)
    N, C = logp_NC.shape
    if N == 0 or len(labels) != N or len(classes) != C:
        raise DataError(f"{N} texts with {C} log-probabilities, {len(labels)} labels and {len(classes)} classes.")
    p_NC = logp_NC.double().exp()
    guesses, confidence_N = p_NC.argmax(-1), p_NC.max(-1).values
    right_N = (guesses == labels).double()
    accuracy = float(right_N.mean())
    confusion_CC = torch.zeros(C, C, dtype=torch.long).index_put_((labels, guesses), torch.tensor(1), accumulate=True)
    target_NC = torch.nn.functional.one_hot(labels, C).double()
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / max(N - 1, 1)),
        "nll": -float(logp_NC.double()[torch.arange(N), labels].mean()),
        "brier": float((p_NC - target_NC).square().sum(-1).mean()),
        "ece": expected_calibration_error(confidence_N, right_N),
        "confusion": confusion_CC.tolist(),
        "per_class": {name: _of_class(confusion_CC, number) for number, name in enumerate(classes)},
        "texts": N,
    }


def expected_calibration_error(confidence_N: Tensor, right_N: Tensor, bins: int = BINS) -> float:
    """Σ over bins of (texts in it / N) · |accuracy - mean confidence|; a bin is (i / bins, (i + 1) / bins]."""
    number_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1
    gap_bins = torch.zeros(bins, dtype=torch.double).index_add_(0, number_N, right_N - confidence_N)
    return float(gap_bins.abs().sum() / len(confidence_N))


def _of_class(confusion_CC: Tensor, number: int) -> dict[str, float | None]:
    """Precision, recall and F1 of one class; None where nothing was called so, or nothing is."""
    hits = int(confusion_CC[number, number])
    called, there = int(confusion_CC[:, number].sum()), int(confusion_CC[number].sum())
    return {
        "precision": hits / called if called else None,
        "recall": hits / there if there else None,
        "f1": 2 * hits / (called + there) if called + there else None,
    }


def confusion_table(figures: dict[str, Any], classes: Sequence[str]) -> str:
    """The confusion matrix as text: a row per true class."""
    width = max(map(len, classes))
    head = " " * (width + 8) + "  ".join(f"{name:>{max(len(name), 6)}}" for name in classes)
    rows = [
        f"is {name:<{width}} called " + "  ".join(f"{n:>{max(len(c), 6)}}" for n, c in zip(row, classes, strict=True))
        for name, row in zip(classes, figures["confusion"], strict=True)
    ]
    return "\n".join([head, *rows])
