"""One task after another: each starts at the model that the one before left, and becomes a directory of its own.

    OUT/1-a/          an ordinary model directory with its record: the model after task a
    OUT/2-b/          the model after task b; beside it what the technique keeps (springs, memory, columns, ...)
    OUT/matrix.json   the accuracy matrix (matrix.py) and the four figures; matrix.png shows it

Every task is an operation inside the operation. A sequence that is killed finds its finished tasks up to date, and goes
on from the last checkpoint of the one it was in. The training loop is the one that everything uses (train/training.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from bildung.continual import budget, matrix
from bildung.continual.method import Method, Now
from bildung.continual.tasks import Kind, LabelledTexts, Task
from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings
from bildung.data.batches import Shuffled
from bildung.evaluate.card import Card, CardSettings
from bildung.model.linear import Linear
from bildung.model.store import LanguageModel, load, write_model
from bildung.train.training import COMPUTE, Batches, check_continues_text
from bildung.tune.classifier_head import outer_matrix, with_classifier
from bildung.tune.forgetting import Forgetting, run_within_budget
from bildung.tune.instruction import base_of
from bildung.tune.rehearsing import Rehearsing, nothing_raised


@settings
class Step:
    """One task of a sequence, for its record."""

    number: int  # counted from 1
    task: str  # its name
    seed: int  # of the sequence
    sequence: dict[str, Any]  # all settings


@dataclasses.dataclass(frozen=True)
class Course:
    """What is the same for every task of a sequence.

    root: what it starts from. known: that model's card, and how it was measured.
    """

    root: Path
    given: Forgetting
    kind: Kind
    tasks: Sequence[Task]
    method: Method
    known: tuple[Card, CardSettings] | None


def learn(
    job: Job,
    source: Path,
    given: Forgetting,
    kind: Kind,
    tasks: Sequence[Task],
    method: Method,
    data: Sequence[dict[str, str]],
    described: dict[str, Any],
    known: tuple[Card, CardSettings] | None = None,
) -> Path:
    """Learn the tasks in their order and fill in the job's numbers; returns the directory of the last.

    data: of each task, the hashes of what it reads. described: the settings, for the records. known: the source's card,
    and how it was measured.
    """
    names, course = [task.name for task in tasks], Course(source, given, kind, tasks, method, known)
    records: list[Record] = []
    for number, task in enumerate(tasks, start=1):
        place = job.out / f"{number}-{task.name}"
        step = Step(number=number, task=task.name, seed=given.seed, sequence=described)
        then = [record.measured["scores"][name]["score"] for name, record in zip(names, records, strict=False)]
        work = partial(_learn_task, source=source, course=course, number=number, then=then)
        records.append(
            perform("continual task", source, place, step, work, data=data[number - 1], companions=base_of(source))
        )
        source = place
    _sum_up(job, names, records, kind)
    return source


def _learn_task(job: Job, source: Path, course: Course, number: int, then: Sequence[float]) -> None:
    """source: the model after the task before. then: the score of each earlier task when it was learned."""
    given, kind, tasks, method = course.given, course.kind, course.tasks, course.method
    task = tasks[number - 1]
    lm = load(source, "float32")
    if isinstance(kind, LabelledTexts):
        lm = with_rows(job, lm, kind, given.seed)
    else:
        check_continues_text(lm)
    lm.model.compute_dtype = COMPUTE[given.precision]
    if number == 1:
        job.measured["scores_before"] = measure(lm, kind, tasks, method)
    now = Now(job, source, given, kind, [one.name for one in tasks], number)
    method.prepare(now, lm)
    items = kind.encode(lm.tokenizer, method.rows(now, lm, task))
    collate = partial(kind.collate, pad_id=lm.tokenizer.pad_id)
    batch_at: Batches = Shuffled(items, given.batch_size, given.seed, collate)
    gauges = budget.gauges(now, lm, given, tasks[: number - 1], then, method, course.root, course.known)
    raised = nothing_raised()
    old = kind.encode(lm.tokenizer, method.old_rows(now, lm)) if gauges else []
    if old:
        batch_at = Rehearsing(batch_at, Shuffled(old, given.batch_size, given.seed, collate), raised)
    given = method.training(now)
    objective = method.objective(now, lm, kind.objective, batch_at)
    what = f"task {number} of {len(tasks)}, {task.name}: {len(items):,} examples"
    history = run_within_budget(
        job,
        lm,
        given,
        batch_at,
        objective,
        gauges=gauges,
        raised=raised if old else None,
        old="earlier tasks" if old else None,
        settle=lambda _: method.settle(now, lm),
        what=what,
        notes=task.notes,
    )
    method.finish(now, lm, task, history)
    lm.model.compute_dtype = None
    write_model(lm, job.out)
    lm.model.compute_dtype = COMPUTE[given.precision]
    job.measured["scores"] = measure(lm, kind, tasks, method)


def measure(lm: LanguageModel, kind: Kind, tasks: Sequence[Task], method: Method) -> dict[str, dict[str, float]]:
    """Every task's score, one row of the matrix."""
    lm.model.eval()
    scores = {}
    for number, task in enumerate(tasks, start=1):
        method.select(lm, number)
        with torch.no_grad():
            scores[task.name] = kind.score(lm.model, lm.tokenizer, task.test)
    return scores


def with_rows(job: Job, lm: LanguageModel, kind: LabelledTexts, seed: int) -> LanguageModel:
    """The model with a head that has a row for every class of all tasks; rows of the same name are kept."""
    if len(kind.classes) < 2:
        raise SettingsError("the tasks have one class together; at least two are needed.")
    names = lm.config.raw.get("id2label") or {}
    known = {name: int(row) for row, name in names.items()}
    headed = with_classifier(job, lm, tuple(kind.classes), seed)
    old, new = outer_matrix(lm.model), cast(Linear, outer_matrix(headed.model))
    if headed.model is not lm.model and old is not None and (kept := [one for one in kind.classes if one in known]):
        rows, were = [kind.classes[one] for one in kept], [known[one] for one in kept]
        with torch.no_grad():
            for name, parameter in new.named_parameters():
                parameter[rows] = old.get_parameter(name)[were]
        job.notes.append(f"rows of the classifier that were kept: {', '.join(kept)}")
    return headed


def _sum_up(job: Job, names: Sequence[str], records: Sequence[Record], kind: Kind) -> None:
    """The accuracy matrix, printed, drawn, written and recorded."""
    before = {name: one["score"] for name, one in records[0].measured["scores_before"].items()}
    after = [{name: one["score"] for name, one in record.measured["scores"].items()} for record in records]
    figures = matrix.summary(names, before, after)
    job.measured |= {
        "tasks": list(names),
        "score": kind.score_name,
        "scores_before": records[0].measured["scores_before"],
        "scores": [record.measured["scores"] for record in records],
        **figures,
    }
    if held := {n: r.measured["forgetting"] for n, r in zip(names, records, strict=True) if "forgetting" in r.measured}:
        job.measured["forget_budget"] = held
    (job.out / "matrix.json").write_text(json.dumps(job.measured, indent=1) + "\n", encoding="utf-8")
    title = f"{job.settings.method}: the matrix R[after, task]"
    matrix.draw(names, before, after, job.out / "matrix.png", title, kind.score_name)
    print(f"{kind.score_name}\n{matrix.table(names, before, after, figures)}")
    job.tokens_seen = sum(record.tokens_seen for record in records)
    job.trained_tokens = sum(record.trained_tokens for record in records)
    job.notes += [f"{name}: {note}" for name, record in zip(names, records, strict=True) for note in record.notes]
