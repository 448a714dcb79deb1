"""The biography of a model: every operation it went through, what it cost, what it changed.

Reads record.json alone, so it works on a copy, on a directory whose ancestors are gone, and without torch.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console, Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from bildung.app.cards import card_table, changes_of, short_number
from bildung.core.errors import RecordError
from bildung.core.progress import duration, size
from bildung.core.record import Record, read_record
from bildung.core.settings import settings


@settings
class Command:
    directory: tyro.conf.Positional[Path]  # a directory that bildung made
    json: bool = False  # the whole record instead, for programs


def command(settings: Command) -> None:
    """`bildung log DIR`."""
    record = record_of(settings.directory)
    if settings.json:
        json.dump(dataclasses.asdict(record), sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        Console(highlight=False).print(biography(settings.directory, record))


def record_of(directory: Path) -> Record:
    """The record of a directory; RecordError when it has none."""
    record = read_record(directory)
    if record is None:
        what = "has no record.json: bildung did not make it" if directory.is_dir() else "is not a directory"
        raise RecordError(f"{directory} {what}. `bildung adopt {directory} OUT` begins a record")
    return record


def biography(directory: Path, record: Record) -> Tree:
    """The chain of operations, oldest first, each with its before and after."""
    life = [*record.ancestors, dataclasses.asdict(record)]
    tree = Tree(Text(str(directory), "bold"))
    for number, event in enumerate(life, 1):
        tree.add(_event(number, event))
    return tree


def _event(number: int, event: Mapping[str, Any]) -> RenderableType:
    when = event["started"][:16].replace("T", " ")
    head = Text.assemble((f"{number}. {event['operation']}", "bold cyan"), f"  {when}  {_cost(event)}")
    parts: list[RenderableType] = [head, Text(_inputs(event), "dim")]
    parts += [Text(f"note: {note}", "yellow") for note in event["notes"]]
    shown = {name: value for name, value in event["measured"].items() if not name.startswith("predicted_")}
    if measured := _numbers(shown):
        parts.append(
            Text("measured: " + ", ".join(f"{name} {short_number(value)}" for name, value in measured.items()))
        )
    if event["before"].get("tasks") or event["after"].get("tasks"):
        parts.append(card_table(changes_of(event)))
    return Group(*parts, Text())


def _cost(event: Mapping[str, Any]) -> str:
    predicted = event["measured"].get("predicted_peak_bytes")
    memory = size(event["peak_bytes"]) + (f" (predicted {size(predicted)})" if predicted else "")
    parts = [duration(event["seconds"]), memory]
    if event["trained_tokens"]:
        parts.append(f"{event['trained_tokens']:,} of {event['tokens_seen']:,} tokens trained")
    return ", ".join(parts)


def _inputs(event: Mapping[str, Any]) -> str:
    """Where it came from and how: "from ../base (1f3a); rank 8, alpha 16; data nursery:alpaca"."""
    parts = []
    if source := event["source"]:
        parts.append(f"from {source['path']} ({source['hash'][:8]})")
    parts += [f"{name} {model['path']} ({model['hash'][:8]})" for name, model in event["companions"].items()]
    if event["settings"]:
        parts.append(", ".join(f"{name} {_short(value)}" for name, value in event["settings"].items()))
    parts += [f"{name} ({digest[:8]})" for name, digest in event["data"].items()]
    return "; ".join(parts)


def _numbers(measured: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The single values in what was measured: {"difference.kl_mean": 0.01}; curves and lists are for the report."""
    found: dict[str, Any] = {}
    for name, value in measured.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            found[prefix + name] = value
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
