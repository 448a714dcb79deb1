"""What is lost of a model's abilities, as a share: the gauges of a budget for forgetting (forgetting.py).

    OnTexts    (now - before) / before             before, now: the loss on general texts, in nats per token
    OnCard     mean of (before - now) / |before|   over the figures of the card, what is lost of each

Below 0 something was gained. `continual train` has another, over the tasks it learned before (continual/budget.py). Of
several the largest loss counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bildung.core.errors import SettingsError
from bildung.evaluate import card
from bildung.evaluate.card import Card, CardSettings
from bildung.model.store import LanguageModel, load
from bildung.train.fit import mean_loss
from bildung.tune.trunk import fixed_batches, text_loss, with_language_head

TEXTS, TEXT_LENGTH = 64, 256  # general texts that are read, and tokens of a piece


class Gauge(Protocol):
    """One way to measure it."""

    name: str  # in the log
    on: str  # what is measured, for the record

    def lost(self) -> float:
        """The share that the model has lost, as it is now."""

    def said(self, lost: float) -> str:
        """That share in words."""


class OnTexts:
    """The loss on general texts: of every next token, of an encoder that of masked ones, the masks always the same.

    before: of the source as it lies on the disk, because what a method adds may change the model before its first step.
    What is read then is read each time, no longer than both the source and the model can read.
    """

    name = "texts"

    def __init__(self, texts: str, source: Path, lm: LanguageModel):
        """lm: the model that is tuned, as a language model."""
        was = with_language_head(load(source, lm.model.weight_dtype))
        was.model.compute_dtype = lm.model.compute_dtype
        length = min(TEXT_LENGTH, *(one.config.max_position_embeddings for one in (was.model, lm.model)))
        self.on, self.lm = texts, lm
        self.batches = fixed_batches(was, texts, TEXTS, length)
        self.before = self._loss(was)

    def lost(self) -> float:
        return (self._loss(self.lm) - self.before) / self.before

    def said(self, lost: float) -> str:
        return f"{abs(lost):.2%} {'more' if lost >= 0 else 'less'} loss on {self.on} than the source has"

    def _loss(self, lm: LanguageModel) -> float:
        return mean_loss(lm.model, text_loss, self.batches)["loss"]


class OnCard:
    """The figures of the card."""

    name, on = "card", "card"

    def __init__(self, before: Card, lm: LanguageModel, settings: CardSettings):
        """before: the source's. lm: the model that is tuned, as a language model."""
        self.before, self.lm, self.settings = before, lm, replace(settings, sample_prompts=())

    def lost(self) -> float:
        return lost_on_card(self.before, card.card(self.lm, self.settings))

    def said(self, lost: float) -> str:
        return f"{abs(lost):.2%} of what the card measures is {'lost' if lost >= 0 else 'gained'}"


def lost_on_card(before: Card, now: Card) -> float:
    """Mean over the tasks of both cards of the part of the figure that is lost. Raises SettingsError without a task."""
    parts = []
    for name, task in before["tasks"].items():
        if name in now["tasks"] and task["value"]:
            change = (now["tasks"][name]["value"] - task["value"]) / abs(task["value"])
            parts.append(-change if task["higher_is_better"] else change)
    if not parts:
        raise SettingsError("the card has no task whose figure could fall; give forget_data with general texts.")
    return sum(parts) / len(parts)
