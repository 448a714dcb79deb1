"""The plan of operations that train several times: of each training its peak and its steps.

    tune compare               each method, with what it shares with the others
    tune by_examples           the two ways, as often as there are numbers of examples and draws
    tune intrinsic_dimension   full tuning, and one training for each dimension
    continual train            each task, and what its technique holds beside the model

The peak is that of the largest, the time the sum of all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bildung.app.planning.training import Subject, subject
from bildung.core.settings import field_names, resolve
from bildung.tune import by_examples, classify, classify_words, compare, full, said
from bildung.tune import intrinsic_dimension as intrinsic
from bildung.tune.instruction import Tuning

SEVERAL = ("tune compare", "tune by_examples", "tune intrinsic_dimension", "continual train")
STANDS_IN: Mapping[str, Any] = {
    "data": "mini:chat",
    "test": "mini:chat",
    "words": ("no", "yes"),
    "methods": ("lora",),
    "tasks": ("first=mini:chat", "second=mini:chat"),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One of the trainings. times: how often it is made, with as many steps each; None: its data says how many."""

    name: str
    planned: Subject
    steps: int | None
    beside: Mapping[str, int] = dataclasses.field(default_factory=dict)  # bytes of what is not the model being trained

    def parts(self, on_accelerator: bool) -> dict[str, int]:
        """Its memory, part by part."""
        return {**self.planned.plan(on_accelerator).parts, **self.beside}


def trainings(operation: str, source: Path, given: Any) -> list[Training]:
    """Those that an operation of SEVERAL makes. Raises SettingsError, ConfigError."""
    match operation:
        case "tune compare":
            return [
                Training(name, planned := subject(f"tune {method.__name__}", source, own), planned.steps)
                for name, (method, own) in compare.methods(given).items()
            ]
        case "tune by_examples":
            return _by_examples(source, given)
        case "tune intrinsic_dimension":
            return _dimensions(source, given)
    return _tasks(source, given)


def _by_examples(source: Path, given: by_examples.Settings) -> list[Training]:
    """The short ones first. Nothing is trained with no example."""
    made = []
    runs = Counter((way, size) for way, size, _ in by_examples.planned(given) if size)
    shared = {name: getattr(given, name) for name in ("data", "max_length", "batch_size", "precision", "seed")}
    for (way, size), times in runs.items():
        steps = by_examples.steps_of(given, size)
        common: dict[str, Any] = {**shared, "steps": steps, "checkpoint_every": 200}
        if way == "generative":
            words = {name: getattr(given, name) for name in ("words", "template", "rank", "alpha")}
            planned = subject("tune classify_words", source, classify_words.Settings(**common, **words))
        else:
            lora = {"rank": given.rank, "alpha": given.alpha, "target": "*.layers.*"}
            settings = resolve(classify.Settings, {**common, "method": "lora", "lora": lora})
            planned = subject("tune classify", source, settings)
        made.append(Training(f"{way}, {size:,} examples, {times} times", planned, steps * times))
    return made


def _dimensions(source: Path, given: intrinsic.Settings) -> list[Training]:
    common = {name: getattr(given, name) for name in field_names(Tuning)}
    whole = full.Settings(**common | {"learning_rate": given.full_learning_rate})
    made = [Training("full", planned := subject("tune full", source, whole), planned.steps)]
    for dimension in sorted(set(given.dimensions)):
        few = said.Settings(**common, scaled=given.scaled, target=given.target, dimension=dimension)
        planned = subject("tune said", source, few)
        made.append(Training(f"{dimension:,} numbers", planned, planned.steps))
    return made


def _tasks(source: Path, given: Any) -> list[Training]:
    """All tasks train alike, and the second holds what its technique keeps of the first."""
    planned = subject("continual train", source, given)
    trained = sum(one.nbytes for one in planned.model.parameters() if one.requires_grad)
    model = sum(one.nbytes for one in {id(one): one for one in planned.model.parameters()}.values())
    beside = {"ewc": {"springs and where they are held": 2 * trained}, "lwf": {"the model of the task before": model}}
    steps = None if planned.steps is None else planned.steps * len(given.tasks)
    return [Training(f"each of {len(given.tasks)} tasks", planned, steps, beside.get(given.method, {}))]


def beside_in_words(given: Any) -> str:
    """What of a technique against forgetting is not counted; "" where all is."""
    added = {
        "progressive": "a column of layers for every task before",
        "orthogonal_lora": "the LoRAs of the tasks before",
        "fel": "its wide layer",
    }
    what = added.get(getattr(given, "method", ""), "")
    return f"not counted: what {given.method} adds to the model, {what}" if what else ""


def steps_of(made: list[Training]) -> int | None:
    """Steps of all of them, None where the data says how many."""
    known = [one.steps for one in made if one.steps is not None]
    return sum(known) if len(known) == len(made) else None


def with_stand_ins(kind: type, values: Mapping[str, Any]) -> Any:
    """Settings with something for what cannot be left out and says nothing about the memory. Raises SettingsError."""
    without = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [one.name for one in dataclasses.fields(kind) if (one.default, one.default_factory) == without]
    return resolve(kind, {**{name: STANDS_IN[name] for name in needed if name in STANDS_IN}, **values})
