"""How good a classifier is that may give a text several labels or none: each label is a yes or no of its own.

    per_label    precision, recall and F1 of one label; None where they are not defined
    micro_f1     F1 = 2 hits / (called + there) of all labels' decisions in one heap: frequent labels decide
    macro_f1     the mean of the labels' F1: every label counts the same. A label that no text has and none was given
                 has no F1 and is left out (scikit-learn counts it as 0)
    exact        texts whose set of labels is right
    hamming      decisions that are wrong
    nll          nats per decision; ece: calibration error over the decisions (evaluate/classification.py)

A label is given where its probability is above a half. Standard errors: of `exact` over texts; of micro_f1 by the
linearisation of a ratio (Cochran, Sampling Techniques, eq. 6.13): a text's influence is 2 hits - F1 (called + there).
"""

# N texts, C labels

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError
from bildung.evaluate.classification import expected_calibration_error


def several_labels_figures(logits_NC: Tensor, true_NC: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """All of the above. true_NC: 1 where a label holds. Raises DataError for none, or shapes that do not agree."""
    N, C = logits_NC.shape
    if N == 0 or true_NC.shape != (N, C) or len(classes) != C:
        raise DataError(f"{N} texts with {C} logits, {tuple(true_NC.shape)} labels and {len(classes)} names.")
    logits_NC, true_NC = logits_NC.double(), true_NC.double()
    p_NC = logits_NC.sigmoid()
    given_NC = (logits_NC > 0).double()
    hits_NC = given_NC * true_NC
    two_N, both_N = 2 * hits_NC.sum(1), (given_NC + true_NC).sum(1)
    micro = float(two_N.sum() / both_N.sum()) if both_N.sum() else None
    exact = float((given_NC == true_NC).all(1).double().mean())
    right_NC = (given_NC == true_NC).double()
    per_label = {name: _of_label(hits_NC[:, c], given_NC[:, c], true_NC[:, c]) for c, name in enumerate(classes)}
    defined = [one["f1"] for one in per_label.values() if one["f1"] is not None]
    return {
        "micro_f1": micro,
        "micro_f1_stderr": _ratio_stderr(two_N, both_N, micro),
        "macro_f1": math.fsum(defined) / len(defined) if defined else None,
        "exact": exact,
        "exact_stderr": math.sqrt(exact * (1 - exact) / max(N - 1, 1)),
        "hamming": 1 - float(right_NC.mean()),
        "nll": float(F.binary_cross_entropy_with_logits(logits_NC, true_NC)),
        "ece": expected_calibration_error(torch.maximum(p_NC, 1 - p_NC).flatten(), right_NC.flatten()),
        "per_label": per_label,
        "texts": N,
    }


def _of_label(hits_N: Tensor, given_N: Tensor, true_N: Tensor) -> dict[str, Any]:
    hits, given, there = (int(one.sum()) for one in (hits_N, given_N, true_N))
    return {
        "precision": hits / given if given else None,
        "recall": hits / there if there else None,
        "f1": 2 * hits / (given + there) if given + there else None,
        "texts": there,
    }


def _ratio_stderr(x_N: Tensor, c_N: Tensor, ratio: float | None) -> float | None:
    N = len(x_N)
    if ratio is None or N < 2:
        return None
    influence_N = (x_N - ratio * c_N) / c_N.sum()
    return math.sqrt(N / (N - 1) * float(influence_N.square().sum()))


def label_table(figures: dict[str, Any]) -> str:
    """The labels' figures as text, a row each."""
    width = max(5, *map(len, figures["per_label"]))
    head = f"{'label':<{width}}  texts  precision  recall     F1"
    rows = [
        f"{name:<{width}}  {one['texts']:>5}  {_number(one['precision']):>9}  {_number(one['recall']):>6}  "
        f"{_number(one['f1']):>5}"
        for name, one in figures["per_label"].items()
    ]
    return "\n".join([head, *rows])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
