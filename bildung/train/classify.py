"""Classification as a sum: -log p(class) of every example, in nats, beside how many are right.

    states -> a head -> one logit per class -> softmax -> -log p(the label)                        Classify
                        one logit per label -> sigmoid of each -> mean of -log p(yes or no)        ClassifySeveral
                        one number          -> (number - truth)²                                   Regress

Per example, these are the losses of transformers' heads of the same names (problem_type).

What differs between an image, a sentence's [CLS] and anything else is the way to the logits, so that is a function:

    fit(model, batches, Classify(image_logits), ...)
    fit(model, batches, Classify(lambda model, batch: model.classify(model.hidden(batch.tokens_BL))), ...)
"""

# B batch, C classes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.train.loss import LossSum


@dataclass(frozen=True)
class Classify:
    """The objective of a classifier: call it with (model, batch); the batch has `labels_B`, numbers of classes.

    class_weights: N / (C · N_c) makes every class count the same, however rare; the mean over the training data is then
    1, and the loss stays a sum over examples.

    label_smoothing ε: the target is 1 - ε + ε/C on the label and ε/C on the other classes (Szegedy et al. 2016, arXiv
    1512.00567, section 7): no logit is driven to infinity. The metric `nll` is the plain -log p(label).
    """

    logits: Callable[[Any, Any], Tensor]  # (model, batch) -> BC
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None  # factor of each class's loss, in training only

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise SettingsError(f"label_smoothing = {self.label_smoothing} was given; it must lie in [0, 1).")

    def __call__(self, model: Any, batch: Any) -> LossSum:
        """The summed loss with `accuracy` and `nll`. Raises DataError for a label that is no class."""
        logits_BC, labels_B = self.logits(model, batch).float(), batch.labels_B
        C = logits_BC.shape[-1]
        if len(wrong := labels_B[(labels_B < 0) | (labels_B >= C)]):
            raise DataError(f"the label {int(wrong[0])} is none of the model's {C} classes, 0 to {C - 1}.")
        weights_C = None
        if self.class_weights is not None and model.training:
            weights_C = logits_BC.new_tensor(self.class_weights)
        total = F.cross_entropy(logits_BC, labels_B, weights_C, reduction="sum", label_smoothing=self.label_smoothing)
        detached = logits_BC.detach()
        right = (detached.argmax(-1) == labels_B).sum()
        nll = F.cross_entropy(detached, labels_B, reduction="sum")
        return LossSum(total, len(labels_B), {"accuracy": right, "nll": nll})


@dataclass(frozen=True)
class ClassifySeveral:
    """Labels that hold or do not, each for itself; the batch has `labels_B`, BC of zeros and ones.

    yes_weights: factor of a label's loss where it holds, in training only; (N - N_c) / N_c lets a rare label's few
    texts weigh as much as all the others.
    """

    logits: Callable[[Any, Any], Tensor]  # (model, batch) -> BC
    yes_weights: tuple[float, ...] | None = None

    def __call__(self, model: Any, batch: Any) -> LossSum:
        """The summed loss, each example the mean over labels, with `exact`: all labels right."""
        logits_BC, true_BC = self.logits(model, batch).float(), batch.labels_B
        if logits_BC.shape != true_BC.shape:
            raise DataError(f"the model gives {tuple(logits_BC.shape)} logits for {tuple(true_BC.shape)} labels.")
        weights_C = None
        if self.yes_weights is not None and model.training:
            weights_C = logits_BC.new_tensor(self.yes_weights)
        loss_BC = F.binary_cross_entropy_with_logits(logits_BC, true_BC, reduction="none", pos_weight=weights_C)
        exact = ((logits_BC.detach() > 0) == true_BC.bool()).all(-1).sum()
        return LossSum(loss_BC.mean(-1).sum(), len(true_BC), {"exact": exact})


@dataclass(frozen=True)
class Regress:
    """A number; the batch has `labels_B`, B1 of floats."""

    number: Callable[[Any, Any], Tensor]  # (model, batch) -> B1

    def __call__(self, model: Any, batch: Any) -> LossSum:
        """The summed squared error, with `absolute_error`."""
        number_B1, true_B1 = self.number(model, batch).float(), batch.labels_B
        if number_B1.shape != true_B1.shape:
            raise DataError(f"the model gives {tuple(number_B1.shape)} numbers for {tuple(true_B1.shape)} true ones.")
        error_B1 = number_B1 - true_B1
        return LossSum(error_B1.square().sum(), len(true_B1), {"absolute_error": error_B1.detach().abs().sum()})


def image_logits(model: Any, batch: Any) -> Tensor:
    """A vision model's logits of an ImageBatch."""
    logits_BC: Tensor = model(batch.pixels_BCHW)
    return logits_BC
