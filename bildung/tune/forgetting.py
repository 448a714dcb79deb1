"""A budget for forgetting: tuning that stops before it costs the model more than was agreed.

    bildung tune lora SOURCE OUT --data DATA --forget-budget 0.02 --forget-data nursery:moby-dick

Every `forget_every` steps the model is measured, and compared with the source:

    with forget_data    the loss on these texts
    without             the figures of the card                                            (both: gauges.py)

and after the last step. Within the budget, the weights are kept; beyond it, training stops and the kept weights are put
back. Where there are rows to rehearse, their share of the batches is raised first, and training stops when the largest
share is not enough. A method may start beyond the budget (stretched positions, a random prompt): it goes on while no
more is lost than at that start, until it is within the budget for the first time. What comes out was within the budget,
or is what the method starts with, or has lost no more than that; which of them is said. "Measure what was forgotten" is
in the guides of tuning libraries; trainers that do it are not.

What is kept lies in the checkpoints, so a run that goes on after a kill decides as the one that was not killed.

It is on every operation that tunes: on conversations, `long_lora`, `classify_words`, `align dpo` (which only stops, as
rows to rehearse are no pairs), `tune classify` (measured through the source's language head, trunk.py) and `continual
train`, which measures the tasks that it learned before as well (continual/budget.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bildung.core.errors import SettingsError, TrainingError
from bildung.core.operation import Job
from bildung.core.settings import settings
from bildung.data.sources import fingerprint
from bildung.evaluate.card import CardSettings
from bildung.model.store import LanguageModel
from bildung.train.checkpoint import put, trained
from bildung.train.fit import STOP, Also, History, Objective, mean_loss
from bildung.train.training import Batches, Training, run, steps_of
from bildung.tune.gauges import Gauge, OnCard, OnTexts
from bildung.tune.rehearsing import nothing_raised
from bildung.tune.trunk import speaking

SHARES = (0.1, 0.25, 0.5)  # of the batches, of rehearsed rows, one after the other
MOST = 1.0  # a larger budget is a slip: all that the source knows, or twice its loss


@settings
class Forgetting(Training):
    """What a tuning operation can be told about forgetting."""

    forget_budget: float | None = None  # stop when more than this share of the source's abilities is lost; 0.02: 2 %
    forget_data: str | None = None  # general texts whose loss tells; default: the tasks of the card
    forget_every: int = 25  # steps between two measurements of it
    rehearse: str | None = None  # conversations to mix in, more and more, before the budget makes an end


def check_budget(given: Forgetting, measured: CardSettings | None, *, more: bool = False) -> None:
    """Raises SettingsError for a budget without anything to measure, and the other way round.

    more: the operation measures something besides texts and card.
    """
    if given.forget_budget is None:
        for name in ("forget_data", "rehearse"):
            if getattr(given, name) is not None:
                raise SettingsError(f"{name} does nothing without forget_budget; give both.")
        return
    if not (0 <= given.forget_budget < math.inf) or given.forget_every < 1:
        raise SettingsError(
            f"forget_budget = {given.forget_budget}, forget_every = {given.forget_every}; the budget must be at least "
            f"0 (0.02: a fiftieth), the steps at least 1."
        )
    if given.forget_budget > MOST:
        raise SettingsError(
            f"forget_budget = {given.forget_budget:g} is {100 * given.forget_budget:g} %; the budget is a share of at "
            f"most {MOST:g}. {given.forget_budget:g} % is {given.forget_budget / 100:g}."
        )
    if given.forget_data is None and measured is None and not more:
        raise SettingsError(
            "forget_budget needs something to measure: give forget_data with general texts, or a card where the "
            "operation has one."
        )
    if given.parallel != "none":
        raise SettingsError("forget_budget measures a whole model; leave out parallel.")


def budget_sources(given: Forgetting) -> dict[str, str]:
    """The hashes of the texts that the budget reads."""
    names = (given.forget_data, given.rehearse)
    return {file: sha256 for name in names if name is not None for file, sha256 in fingerprint(name).items()}


def gauge(job: Job, source: Path, lm: LanguageModel, given: Forgetting, measured: CardSettings | None) -> Gauge:
    """What tells how much of `source` is lost in `lm`, which is tuned. measured: the card that the job has of the
    source, where there are no texts. Raises SettingsError for a model without a language head."""
    speaker = speaking(lm, source)
    if given.forget_data is not None:
        return OnTexts(given.forget_data, source, speaker)
    return OnCard(job.before, speaker, cast(CardSettings, measured))


def run_within_budget(
    job: Job,
    lm: LanguageModel,
    given: Forgetting,
    batch_at: Batches,
    objective: Objective,
    *,
    measured: CardSettings | None = None,
    gauges: Sequence[Gauge] | None = None,
    held_out: Sequence[Any] = (),
    raised: dict[str, Tensor] | None = None,
    old: str | None = None,
    settle: Callable[[Any], object] | None = None,
    **told: Any,
) -> History:
    """`train.training.run`, held to the budget when there is one. Arguments beside those of `run`:

    measured: the card that tells, where there is no forget_data. gauges: what tells instead of both; without any there
    is no budget. raised: what `Rehearsing` reads, when batch_at may be one; None: nothing can be rehearsed. old: what
    is rehearsed, in words; default: given.rehearse. settle: makes the model, in the middle of training, what it is
    afterwards.
    """
    if given.forget_budget is None or (gauges is not None and not gauges):
        return run(job, lm.model, given, batch_at, objective, held_out=held_out, **told)
    if gauges is None:
        gauges = [gauge(job, cast(Path, job.source), lm, given, measured)]
    budget = Budget(job, lm, given, gauges, raised, old or given.rehearse, settle)
    told |= {"held_out": held_out, "also": budget.also, "carried": budget.carried}
    history = run(job, lm.model, given, batch_at, objective, **told)
    if (
        budget.finish(history, steps_of(given, batch_at.batches_per_epoch)) and held_out
    ):  # what was measured last was of other weights
        found = mean_loss(lm.model, objective, held_out)
        row = {f"held_out_{name}": value for name, value in found.items()}
        history.rows.append({"step": int(budget.carried["kept_step"]), **row})
        job.measured["held_out_loss_last"] = found["loss"]
    return history


class Budget:
    """Watches one tuning run. `carried` holds the newest weights within the budget and what was decided."""

    def __init__(
        self,
        job: Job,
        lm: LanguageModel,
        given: Forgetting,
        gauges: Sequence[Gauge],
        raised: dict[str, Tensor] | None = None,
        old: str | None = None,
        settle: Callable[[Any], object] | None = None,
    ):
        self.job, self.lm, self.given, self.gauges, self.settle = job, lm, given, gauges, settle
        self.can_rehearse, self.old = raised is not None, old
        self.parts: dict[str, float] = {}  # of several gauges, what each said last
        self.at_start = self.lost()
        if not math.isfinite(self.at_start):
            raise TrainingError(
                f"forget_budget: what {lm.path} knows is measured before the first step, on "
                f"{' and '.join(one.on for one in gauges)}, and is no number. Give other texts, or another source."
            )
        self.carried = nothing_raised() if raised is None else raised
        self._keep(0, self.at_start)
        self.carried |= {"looks": torch.tensor(0), "within": torch.tensor(int(self.at_start <= self.budget))}
        if self.at_start > self.budget:
            self._say(f"before the first step {self._in_words(self.at_start)}; training goes on unless more is lost")

    @property
    def also(self) -> list[Also]:
        """What `fit` looks at."""
        return [(self.given.forget_every, self.look)]

    def look(self, model: Any) -> Mapping[str, Any]:
        """How much is lost now, for the log; STOP ends the run."""
        self.carried["looks"] = self.carried["looks"] + 1
        step = int(self.carried["looks"]) * self.given.forget_every
        lost = self.lost()
        if lost <= self.allowed:
            self._keep(step, lost)
            if lost <= self.budget:
                self.carried["within"] = torch.tensor(1)
            return {"forgetting": lost, **self.parts}
        raised = self.carried["rehearsal"]
        if self.old is not None and len(raised) < len(SHARES) and math.isfinite(lost):
            # One batch is drawn ahead: what was drawn already stays, whether the run is interrupted or not.
            share, start = SHARES[len(raised)], (step + 1) * self.given.micro_steps + 1
            row = torch.tensor([[start, share]], dtype=torch.float64)
            self.carried["rehearsal"] = torch.cat([raised.cpu(), row])
            self._say(f"{self._in_words(lost)}; from here on {share:.0%} of the batches are of {self.old}")
            return {"forgetting": lost, **self.parts, "rehearsal": share}
        return {"forgetting": lost, **self.parts, STOP: 1}

    def lost(self) -> float:
        """The share of the source's abilities that is lost; below 0: gained; infinite: a measurement is no number."""
        if self.settle is not None:
            self.settle(self.lm.model)
        found = {f"forgetting_{one.name}": one.lost() for one in self.gauges}
        self.parts = found if len(found) > 1 else {}
        return max(math.inf if math.isnan(lost) else lost for lost in found.values())

    def finish(self, history: History, steps: int) -> bool:
        """Puts the kept weights back where the last ones are beyond the budget, and records what was seen. Returns
        whether they were put back. steps: so many were to be made."""
        stopped = bool(history.rows and history.rows[-1].get(STOP)) and history.steps < steps
        looks = [[row["step"], row["forgetting"]] for row in history.rows if "forgetting" in row]
        if self.given.patience is not None:  # the weights are now those of the lowest held-out loss
            looks.append([history.best_step, self.lost()])
        elif not looks or looks[-1][0] < history.steps:
            looks.append([history.steps, self.lost()])
        (step, lost), kept = looks[-1], int(self.carried["kept_step"])
        beyond = lost > self.allowed
        if beyond:
            put(self.lm.model, {name: self.carried[f"kept.{name}"] for name in trained(self.lm.model)})
            when = f"{'stopped ' * stopped}after step {step}{', the last' * (step == steps)}"
            note = f"{when}: {self._in_words(lost)}; the weights are those of step {kept}"
            step, lost = kept, float(self.carried["kept_lost"])
            if not kept:
                note += (
                    ": no step was within the budget, and nothing was learned. Lower learning_rate or forget_every, "
                    "raise forget_budget" + (", or rehearse" if self.can_rehearse and not self.old else "")
                )
            self._note(note)
        else:
            self._say(f"after step {step} {self._in_words(lost)}")
        if lost > self.budget:
            self._note(f"the budget was not reached: {self._in_words(lost)}; it was {self.at_start:.2%} at the start")
        self.job.measured["forgetting"] = {
            "budget": self.given.forget_budget,
            "measured_on": " and ".join(one.on for one in self.gauges),
            "at_start": self.at_start,
            "looks": looks,
            "stopped_after": history.steps if stopped else None,
            "kept_step": step,
            "lost": lost,
            "rehearsal": self.carried["rehearsal"].tolist(),
        }
        return beyond

    @property
    def budget(self) -> float:
        """The share that may be lost."""
        return cast(float, self.given.forget_budget)

    @property
    def allowed(self) -> float:
        """The share at which training stops: where a method starts beyond the budget, that start's, at first."""
        return self.budget if int(self.carried["within"]) else max(self.budget, self.at_start)

    def _in_words(self, lost: float) -> str:
        if not math.isfinite(lost):
            return f"what is measured is no number any more, and the budget is {self.budget:.2%}"
        said = self.gauges[0].said(lost)
        if len(self.gauges) > 1:
            said = f"{lost:.2%} is lost of {' or of '.join(one.on for one in self.gauges)}, whichever lost more"
        return f"{said}, and the budget is {self.budget:.2%}"

    def _say(self, line: str) -> None:
        print(f"forgetting: {line}", file=sys.stderr)

    def _note(self, line: str) -> None:
        self.job.notes.append(line)
        self._say(line)

    def _keep(self, step: int, lost: float) -> None:
        for name, parameter in trained(self.lm.model).items():
            self.carried[f"kept.{name}"] = parameter.detach().clone()
        self.carried["kept_step"] = torch.tensor(step)
        self.carried["kept_lost"] = torch.tensor(lost, dtype=torch.float64)
