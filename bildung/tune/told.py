"""What a classifier tells of a text: one class, any number of labels, or a number. For each the loss and the figures.

The figures stand beside those of a guess that does not read: the class, the set of labels, or the mean that training
suggests for every text.
"""

# N texts, C classes

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.data.labelled import Labelled
from bildung.evaluate.classification import classification_figures, confusion_table
from bildung.evaluate.regression import regression_figures
from bildung.evaluate.several_labels import label_table, several_labels_figures
from bildung.train.classify import Classify, ClassifySeveral, Regress
from bildung.train.loss import Objective

Logits = Callable[[Any, Any], Tensor]


class Told(Protocol):
    """What differs between the problems."""

    def check(self, label_smoothing: float, balance: bool) -> None:
        """Raises SettingsError for a setting that means nothing here."""

    def what(self, classes: Sequence[str]) -> str:
        """In words."""

    def objective(self, logits: Logits, train: Labelled, label_smoothing: float, balance: bool) -> Objective:
        """The loss."""

    def figures(self, logits_NC: Tensor, train: Labelled, final: Labelled) -> dict[str, Any]:
        """How good the logits of `final` are."""

    def shown(self, measured: dict[str, Any]) -> str:
        """The figures in words."""


class OneClass:
    """softmax over the classes."""

    def check(self, label_smoothing: float, balance: bool) -> None:
        pass

    def what(self, classes: Sequence[str]) -> str:
        return f"of {len(classes)} classes"

    def objective(self, logits: Logits, train: Labelled, label_smoothing: float, balance: bool) -> Objective:
        return Classify(logits, label_smoothing, balanced(train) if balance else None)

    def figures(self, logits_NC: Tensor, train: Labelled, final: Labelled) -> dict[str, Any]:
        most = Counter(train.labels).most_common(1)[0][0]
        return {
            **classification_figures(logits_NC.log_softmax(-1), final.labels, train.classes),
            "majority_class": train.classes[most],
            "majority_accuracy": final.labels.count(most) / len(final),
            "test_texts": len(final),
            "classes": list(train.classes),
        }

    def shown(self, measured: dict[str, Any]) -> str:
        m = measured
        line = (
            f"of {m['test_texts']:,} texts: accuracy {m['accuracy']:.3f} ± {m['accuracy_stderr']:.3f} "
            f"(always {m['majority_class']!r}: {m['majority_accuracy']:.3f}), calibration error {m['ece']:.3f}"
        )
        return f"{line}\n{confusion_table(m, m['classes'])}"


class SeveralLabels:
    """A sigmoid for every label."""

    def check(self, label_smoothing: float, balance: bool) -> None:
        if label_smoothing:
            raise SettingsError(
                f"label_smoothing = {label_smoothing} spreads one class over the others; of problem multi_label every "
                f"label is decided for itself. Leave it out."
            )

    def what(self, classes: Sequence[str]) -> str:
        return f"with any of {len(classes)} labels"

    def objective(self, logits: Logits, train: Labelled, label_smoothing: float, balance: bool) -> Objective:
        return ClassifySeveral(logits, yes_weights(train) if balance else None)

    def figures(self, logits_NC: Tensor, train: Labelled, final: Labelled) -> dict[str, Any]:
        most = Counter(train.labels).most_common(1)[0][0]
        return {
            **several_labels_figures(logits_NC, torch.tensor(final.labels), train.classes),
            "majority_set": [name for name, holds in zip(train.classes, most, strict=True) if holds],
            "majority_exact": final.labels.count(most) / len(final),
            "test_texts": len(final),
            "classes": list(train.classes),
        }

    def shown(self, measured: dict[str, Any]) -> str:
        m = measured
        line = (
            f"of {m['test_texts']:,} texts: F1 {_number(m['micro_f1'])} ± {_number(m['micro_f1_stderr'])} over all "
            f"labels (micro), {_number(m['macro_f1'])} the labels' mean (macro); all labels right {m['exact']:.3f} ± "
            f"{m['exact_stderr']:.3f} (always {m['majority_set'] or 'none'}: {m['majority_exact']:.3f})"
        )
        return f"{line}\n{label_table(m)}"


class OneNumber:
    """The head's only number is the answer."""

    def check(self, label_smoothing: float, balance: bool) -> None:
        if label_smoothing or balance:
            given = f"label_smoothing = {label_smoothing}" if label_smoothing else "balance"
            raise SettingsError(f"{given} was given; it is for classes, and problem is regression. Leave it out.")

    def what(self, classes: Sequence[str]) -> str:
        return f"with a number each, {classes[0]!r}"

    def objective(self, logits: Logits, train: Labelled, label_smoothing: float, balance: bool) -> Objective:
        return Regress(logits)

    def figures(self, logits_NC: Tensor, train: Labelled, final: Labelled) -> dict[str, Any]:
        true_N = torch.tensor(final.labels).double().flatten()
        mean = float(torch.tensor(train.labels).double().mean())
        return {
            **regression_figures(logits_NC[:, 0], true_N),
            "mean": mean,
            "mean_mse": float((true_N - mean).square().mean()),
            "test_texts": len(final),
        }

    def shown(self, measured: dict[str, Any]) -> str:
        m = measured
        return (
            f"of {m['test_texts']:,} texts: mean squared error {m['mse']:.4f} ± {_number(m['mse_stderr'])} (always "
            f"{m['mean']:.3f}: {m['mean_mse']:.4f}), Pearson {_number(m['pearson'])} ± {_number(m['pearson_stderr'])}, "
            f"Spearman {_number(m['spearman'])}"
        )


TOLD: dict[str, Told] = {"single_label": OneClass(), "multi_label": SeveralLabels(), "regression": OneNumber()}


def balanced(train: Labelled) -> tuple[float, ...]:
    """N / (C · N_c) for each class: all count the same."""
    counts = Counter(train.labels)
    return tuple(len(train) / (len(counts) * counts[c]) if counts[c] else 0.0 for c in range(len(train.classes)))


def yes_weights(train: Labelled) -> tuple[float, ...]:
    """(N - N_c) / N_c for each label; 1 where no text, or every text, has it."""
    N, there = len(train), [sum(column) for column in zip(*train.labels, strict=True)]
    return tuple((N - n) / n if 0 < n < N else 1.0 for n in there)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
