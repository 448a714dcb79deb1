"""Measure what a model can do: `bildung evaluate DIR` prints its card, `bildung evaluate DIR OUT` also keeps it.

OUT holds card.json and a record; the model itself is not copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings
from bildung.evaluate.card import CardSettings, available, card
from bildung.evaluate.tasks import data_of
from bildung.model.store import load


@settings
class Settings:
    """What is measured, and how."""

    card: CardSettings = CardSettings()


@settings
class Command:
    """Measure what a model can do."""

    source: tyro.conf.Positional[Path]  # model directory, adapter directory or .gguf file
    out: tyro.conf.Positional[Path | None] = None  # directory for card.json and a record; none: print only
    settings: Annotated[CardSettings, tyro.conf.arg(name="")] = CardSettings()
    force: bool = False  # measure even if OUT is up to date


def command(settings: Command) -> None:
    """`bildung evaluate DIR [OUT]`."""
    if settings.out is None:
        made = card(load(settings.source), settings.settings)
    else:
        given = Settings(card=settings.settings)
        made = evaluate(settings.source, settings.out, given, force=settings.force).after
    Console(highlight=False).print(card_report(made))


def evaluate(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Measures the model in `source` and writes `out`/card.json; returns the record, whose `after` is the card."""

    def work(job: Job) -> None:
        job.after = card(load(source), settings.card)
        text = json.dumps(job.after, indent=1, ensure_ascii=False, allow_nan=False)
        (job.out / "card.json").write_text(text + "\n", encoding="utf-8")

    data: dict[str, str] = {}
    for name in settings.card.tasks:
        if (there := available(name)[0]) is not None:
            data |= data_of(there)
    return perform("evaluate", source, out, settings, work, data=data, force=force)


def card_report(card: Mapping[str, Any]) -> RenderableType:
    """A card for the terminal: every number with its standard error and n, then the sample answers."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("task", "metric", "", "value", "± stderr", "n"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, task in card["tasks"].items():
        stderr = "" if task["stderr"] is None else f"± {task['stderr']:.2g}"
        arrow = "↑" if task["higher_is_better"] else "↓"  # which way is better
        table.add_row(name, task["metric"], arrow, f"{task['value']:.4g}", stderr, str(task["n"]))
    parts: list[RenderableType] = [table]
    parts += [Text(f"not measured: {name}: {reason}", "yellow") for name, reason in card["skipped"].items()]
    parts += [Text(f"note: {note}", "yellow") for note in card["notes"]]
    for sample in card["samples"]:
        parts += [Text(f"\n> {sample['prompt']}", "dim"), Text(sample["answer"])]
    measured = f"\n{card['dtype']}, {'with' if card['bos'] else 'without'} BOS, {card['seconds']} s"
    return Group(*parts, Text(measured, "dim"))
