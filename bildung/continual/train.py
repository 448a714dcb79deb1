"""Learn a sequence of tasks, one after the other, by a technique against forgetting; print the accuracy matrix.

    bildung continual train lives/bert/base OUT --method ewc \\
        --tasks films=nursery:imdb opinions=reviews.jsonl genres=genres.jsonl

    plain             fine-tuning, which forgets                       lower bound
    rehearsal         old rows among the new ones                      rehearsal.py
    ewc               springs at the weights that mattered             ewc.py
    progressive       a frozen column per task                         progressive.py
    lwf               the old model's answers to the new texts         lwf.py
    orthogonal_lora   a LoRA per task, in directions of its own        orthogonal_lora.py
    fel               a fixed, sparse, wide layer below the head       fel.py

With `--forget-budget` a task's training ends, or more is rehearsed, when too much of what was there before is lost
(budget.py).

A task is labelled texts, for an encoder or a decoder, which gets a head, or conversations, for a model that continues
text. A decoder could learn either: conversations, unless it has a head already or `--learn labelled` says so.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

from bildung.continual import budget
from bildung.continual.ewc import Ewc, EwcSettings
from bildung.continual.fel import Fel, FelSettings
from bildung.continual.lwf import Lwf, LwfSettings
from bildung.continual.method import Method
from bildung.continual.orthogonal_lora import OrthogonalLora, OrthogonalLoraSettings
from bildung.continual.progressive import Progressive, ProgressiveSettings
from bildung.continual.rehearsal import Rehearsal, RehearsalSettings
from bildung.continual.sequence import learn
from bildung.continual.tasks import Conversations, Kind, LabelledTexts, named
from bildung.core.errors import SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import as_dict
from bildung.core.settings import settings as settings_class
from bildung.data.sources import fingerprint
from bildung.evaluate import card
from bildung.evaluate.card import CardSettings
from bildung.model.base import CausalLM
from bildung.model.store import LanguageModel, load
from bildung.train.optim import ScheduleName
from bildung.train.training import check_ranges
from bildung.tune.forgetting import Forgetting, budget_sources
from bildung.tune.instruction import base_of
from bildung.tune.trunk import for_card

Technique = Literal["plain", "rehearsal", "ewc", "progressive", "lwf", "orthogonal_lora", "fel"]


@settings_class
class Settings(Forgetting):
    """A sequence of tasks."""

    tasks: tuple[str, ...]  # NAME=DATA of each, in order: texts with their classes, or conversations
    tests: tuple[str, ...] = ()  # NAME=DATA to measure a task on; default: held_out rows of its data
    learn: Literal["labelled", "conversations"] | None = None  # default: conversations, if the model continues text
    method: Technique = "plain"  # the technique against forgetting
    heads: Literal["own", "shared"] = "own"  # a text chooses between its task's classes (task-incremental), or all
    held_out: int = 100  # rows of a task kept out of training, to measure on
    limit: int | None = None  # use only the first so many rows of a task's data
    text: str = "text"  # column of the text
    second: str | None = None  # column of a second text, for pairs to be judged together
    label: str = "label"  # column of the class
    max_length: int = 128  # tokens of a text or conversation; longer ones are cut
    rank: int | None = None  # train one LoRA of this rank (plain, rehearsal, ewc, lwf), and the head; default: all
    learning_rate: float | None = None  # type: ignore[assignment]
    """At the top of the schedule; default: 5e-5, with a rank 2e-4, orthogonal_lora and fel 2e-3."""
    schedule: ScheduleName = "linear"  # course of the learning rate after the warmup
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    batch_size: int = 16  # rows per micro-step
    checkpoint_every: int = 100  # steps between checkpoints; a killed run goes on from the last
    rehearsal: RehearsalSettings = field(default_factory=RehearsalSettings)
    ewc: EwcSettings = field(default_factory=EwcSettings)
    progressive: ProgressiveSettings = field(default_factory=ProgressiveSettings)
    lwf: LwfSettings = field(default_factory=LwfSettings)
    orthogonal_lora: OrthogonalLoraSettings = field(default_factory=OrthogonalLoraSettings)
    fel: FelSettings = field(default_factory=FelSettings)
    card: CardSettings | None = None  # measure these tasks before the first and after the last
    forget_data: str | None = None  # general texts whose loss tells, beside earlier tasks; default: the card, if any
    rehearse: str | None = None  # of no use here: a sequence rehearses its own rows (method rehearsal)


def train(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Learn the tasks; `out` becomes a directory with one model directory per task and the accuracy matrix.

    Raises SettingsError for a name that is given twice and what a technique cannot do, DataError, TrainingError.
    """
    source = Path(source)
    check_ranges(settings)
    if (
        settings.learning_rate is None
    ):  # of few or fresh numbers larger steps: those of `tune lora`, benchmarks/continual.py
        rate = 2e-3 if settings.method in ("orthogonal_lora", "fel") else 5e-5 if settings.rank is None else 2e-4
        settings = replace(settings, learning_rate=rate)
    tasks, tests = named(settings.tasks, "tasks"), named(settings.tests, "tests")
    check(settings, tasks, tests)
    budget.check(settings, settings.card)
    data = {name: fingerprint(place) for name, place in tasks.items()}
    for name, place in tests.items():
        data[name] |= fingerprint(place)

    def work(job: Job) -> None:
        lm = load(source)
        if settings.card is not None:
            card.before(job, for_card(lm, source), settings.card)
        kind = kind_of(lm, settings)
        columns = {"text": settings.text, "second": settings.second, "label": settings.label, "limit": settings.limit}
        read = [
            kind.read(name, place, tests.get(name), settings.held_out, settings.seed, **columns)
            for name, place in tasks.items()
        ]
        del lm
        method = technique(settings, kind)
        hashes = [one | budget_sources(settings) for one in data.values()]
        known = None if settings.card is None else (job.before, settings.card)
        last = learn(job, source, settings, kind, read, method, hashes, as_dict(settings), known)
        if settings.card is not None:
            card.after(job, for_card(load(last), source), settings.card)

    everything = {key: one for hashes in data.values() for key, one in hashes.items()} | budget_sources(settings)
    return perform(
        "continual train", source, out, settings, work, data=everything, companions=base_of(source), force=force
    )


def check(settings: Settings, tasks: Mapping[str, str], tests: Mapping[str, str]) -> None:
    """Raises SettingsError for what does not go together, before anything is read."""
    if len(tasks) < 2:
        raise SettingsError(f"{len(tasks)} tasks were given; a sequence has at least 2. (--tasks a=DATA b=DATA)")
    for name in typing.get_args(Technique):
        own = getattr(settings, name, None)
        if own is not None and settings.method != name and own != type(own)():
            raise SettingsError(f"settings of {name} were given, and method is {settings.method!r}; set method {name}.")
    if unknown := [name for name in tests if name not in tasks]:
        raise SettingsError(f"tests: {unknown[0]!r} is none of the tasks: {', '.join(tasks)}.")
    if not settings.held_out and (without := [name for name in tasks if name not in tests]):
        raise SettingsError(f"held_out = 0 leaves nothing to measure {without[0]!r} on; give it among the tests.")
    if settings.parallel != "none" or settings.evaluate_every or settings.patience:
        raise SettingsError(
            "a sequence runs on one process and measures after each task: leave out parallel, evaluate_every, patience."
        )


def kind_of(lm: LanguageModel, settings: Settings) -> Kind:
    """What the tasks are. Raises SettingsError for a model that cannot learn it."""
    labelled = settings.learn == "labelled" or (settings.learn is None and not isinstance(lm.model, CausalLM))
    if not labelled and isinstance(lm.model, CausalLM):
        return Conversations(settings.max_length)
    if not labelled or lm.config.kind not in ("encoder", "decoder", "classifier"):
        what = "labelled texts" if labelled else "conversations"
        raise SettingsError(
            f"a {lm.config.model_type} of kind {lm.config.kind!r} learns no {what} here: an encoder or a decoder "
            f"learns labelled texts, a model that continues text conversations (--learn)."
        )
    length = min(settings.max_length, lm.config.max_position_embeddings)
    return LabelledTexts(length, settings.heads == "own", lm.config.kind != "encoder")


def technique(settings: Settings, kind: Kind) -> Method:
    """The technique of that name with its settings. Raises SettingsError."""
    rank = settings.rank
    if rank is not None and settings.method in ("progressive", "orthogonal_lora", "fel"):
        raise SettingsError(f"{settings.method} decides itself what trains; leave out rank.")
    match settings.method:
        case "rehearsal":
            return Rehearsal(settings.rehearsal, rank)
        case "ewc":
            return Ewc(settings.ewc, rank)
        case "progressive":
            return Progressive(settings.progressive)
        case "lwf":
            return Lwf(settings.lwf, rank)
        case "orthogonal_lora":
            return OrthogonalLora(settings.orthogonal_lora)
        case "fel":
            return Fel(settings.fel)
        case "plain":
            return Method(rank)
