"""What a technique against forgetting may do, and when. Plain fine-tuning, this class, does none of it.

    prepare     before a task      bring in what earlier tasks left beside the model; say what trains
    training    its settings       where a technique's parts need another learning rate than the model
    rows        its data           mix old rows into the new ones
    old_rows    a budget           old rows of which there may be more, when it forgets too much (budget.py)
    objective   its loss           add a penalty
    settle      measured on the way    make the model what `finish` will make it
    finish      after it           leave beside the model what later tasks need
    select      before measuring   which task the next texts belong to

What a technique keeps lies in the task's directory, so a directory is all that the next task needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bildung.continual.tasks import Kind, Row, Task
from bildung.core.errors import SettingsError
from bildung.core.operation import Job
from bildung.model.adapter_head import head_of
from bildung.model.linear import Dense, linears
from bildung.model.low_rank import LowRank
from bildung.model.store import LanguageModel
from bildung.train.history import History
from bildung.train.loss import Objective
from bildung.train.training import Batches
from bildung.tune import lora
from bildung.tune.forgetting import Forgetting

DELTA = "default"  # what a delta that was loaded is called


@dataclass(frozen=True)
class Now:
    """Where in the sequence we are."""

    job: Job
    source: Path  # the model after the task before
    given: Forgetting
    kind: Kind
    names: Sequence[str]  # of all tasks
    number: int  # of this one, counted from 1


def lora_settings(rank: int, seed: int, target: str | tuple[str, ...] = "all") -> lora.Settings:
    """A LoRA of this rank, and strength 2."""
    return lora.Settings(data="", rank=rank, alpha=2.0 * rank, seed=seed, target=target)


class Method:
    """Plain fine-tuning of all weights; with a rank, of one LoRA, and a classifier's head, that go on learning through
    all tasks."""

    def __init__(self, rank: int | None = None):
        self.rank = rank

    def prepare(self, now: Now, lm: LanguageModel) -> None:
        """Called with the model as the task before left it."""
        if self.rank is None:
            if any(linear.deltas for linear in linears(lm.model).values()):
                raise SettingsError(f"{now.source} is an adapter; merge it first, or give rank to go on training it.")
            if any(not isinstance(linear.base, Dense) for linear in linears(lm.model).values()):
                raise SettingsError(
                    f"{now.source} is quantized: rounded weights cannot take small updates. Give rank, to train a LoRA "
                    f"beside them, or start from the model it was quantized from."
                )
            lm.model.requires_grad_(True)
            return
        head = head_of(lm.model)
        deltas = [delta for linear in linears(lm.model).values() for delta in linear.deltas.values()]
        if not deltas:
            target = "*.layers.*" if head else "all"  # a classifier's head trains whole
            lora.add_lora(lm.model, lora_settings(self.rank, now.given.seed, target), DELTA)
        else:
            lm.model.requires_grad_(False)
        for delta in deltas:
            if not isinstance(delta, LowRank) or delta.rank != self.rank:
                raise SettingsError(f"{now.source} carries another adapter than one of rank {self.rank}; merge it.")
            delta.requires_grad_(True)
        for parameter in head.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def training(self, now: Now) -> Forgetting:
        """How this task is trained."""
        return now.given

    def rows(self, now: Now, lm: LanguageModel, task: Task) -> list[Row]:
        """What is trained on."""
        return task.rows

    def old_rows(self, now: Now, lm: LanguageModel) -> list[Row]:
        """Rows of earlier tasks that may be rehearsed more; none where the technique keeps none."""
        return []

    def objective(self, now: Now, lm: LanguageModel, own: Objective, batch_at: Batches) -> Objective:
        """The loss, given that of the task alone. batch_at: the batches that it will be trained on."""
        return own

    def settle(self, now: Now, lm: LanguageModel) -> None:
        """Called before the model is measured in the middle of the task."""

    def finish(self, now: Now, lm: LanguageModel, task: Task, history: History) -> None:
        """Called with the trained model, before it is written into now.job.out."""

    def select(self, lm: LanguageModel, number: int) -> None:
        """The next texts belong to task `number`, counted from 1."""
