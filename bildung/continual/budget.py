"""The budget for forgetting over a sequence of tasks (tune/forgetting.py): what it measures while a task is learned.

    bildung continual train SOURCE OUT --tasks a=DATA b=DATA c=DATA --forget-budget 0.05

    earlier tasks   mean over them of (then - now) / |then|         from the second task on; then: when it was learned
    the source      the loss on forget_data, or the card's figures  from the first on, if there is one of the two

A task's score is that of the accuracy matrix, on its own evaluation set. The larger of the two shares is held to the
budget. Beyond it the technique `rehearsal` gets more old rows: a tenth, a quarter, then half of the batches are of
these alone, beside the share that it mixes in anyway. When that is not enough, and with the other techniques at once,
the task's training stops, and its last weights within the budget are what the next task starts from and what stands in
the matrix. A progressive network loses nothing of earlier tasks; its first may stop, for what the source knew.

Shares are what is lost since each task was learned, not since the task before: what a sequence loses in small parts
adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bildung.continual.method import Method, Now
from bildung.continual.tasks import Task
from bildung.core.errors import SettingsError
from bildung.evaluate.card import Card, CardSettings
from bildung.model.store import LanguageModel
from bildung.tune.forgetting import Forgetting, check_budget
from bildung.tune.gauges import Gauge, OnCard, OnTexts
from bildung.tune.trunk import speaking


class OnEarlierTasks:
    """The scores of the tasks that were learned before."""

    name, on = "tasks", "the earlier tasks"

    def __init__(self, now: Now, lm: LanguageModel, tasks: Sequence[Task], then: Sequence[float], method: Method):
        """tasks: the earlier ones. then: the score of each when it was learned."""
        self.now, self.lm, self.tasks, self.then, self.method = now, lm, tasks, then, method

    def lost(self) -> float:
        self.lm.model.eval()
        parts = []
        for number, (task, then) in enumerate(zip(self.tasks, self.then, strict=True), start=1):
            self.method.select(self.lm, number)
            with torch.no_grad():
                score = self.now.kind.score(self.lm.model, self.lm.tokenizer, task.test)["score"]
            if then:  # of nothing, nothing can be lost
                parts.append((then - score) / abs(then))
        self.method.select(self.lm, self.now.number)
        return sum(parts) / max(len(parts), 1)

    def said(self, lost: float) -> str:
        return f"{abs(lost):.2%} of the earlier tasks' scores is {'lost' if lost >= 0 else 'gained'}"


class OfTheSource:
    """What a gauge of the source's abilities says of the model as it is without later tasks' parts."""

    def __init__(self, gauge: Gauge, now: Now, lm: LanguageModel, method: Method):
        self.gauge, self.now, self.lm, self.method = gauge, now, lm, method
        self.name, self.on, self.said = gauge.name, gauge.on, gauge.said

    def lost(self) -> float:
        self.method.select(self.lm, 1)
        found = self.gauge.lost()
        self.method.select(self.lm, self.now.number)
        return found


def gauges(
    now: Now,
    lm: LanguageModel,
    given: Forgetting,
    earlier: Sequence[Task],
    then: Sequence[float],
    method: Method,
    root: Path,
    known: tuple[Card, CardSettings] | None,
) -> list[Gauge]:
    """What is measured while this task is learned; nothing without a budget.

    root: the model that the sequence starts from. known: its card, and how it was measured. Raises SettingsError for
    forget_data where the model has no language head.
    """
    if given.forget_budget is None:
        return []
    found: list[Gauge] = [OnEarlierTasks(now, lm, earlier, then, method)] if earlier else []
    of_source: Gauge | None = None
    if given.forget_data is not None:
        of_source = OnTexts(given.forget_data, root, speaking(lm, root))
    elif known is not None and known[0]["tasks"]:
        of_source = OnCard(known[0], speaking(lm, root), known[1])
    if of_source is not None:
        found.append(OfTheSource(of_source, now, lm, method))
    return found


def check(given: Forgetting, card: CardSettings | None) -> None:
    """Raises SettingsError for a budget that cannot be held, and for rows to rehearse that are not the sequence's."""
    check_budget(given, card, more=True)
    if given.rehearse is not None:
        raise SettingsError(
            f"rehearse = {given.rehearse!r} was given; a sequence rehearses rows of its own earlier tasks. Leave it "
            f"out, and set method rehearsal."
        )
