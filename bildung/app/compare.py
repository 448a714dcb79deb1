"""Two models side by side: how they were made, and what they can do, item by item.

Compares the records and opens no weights. A task's difference gets a standard error only when both models answered the
same questions, and means little when their cards were measured in different ways, which is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.text import Text

from bildung.app.cards import card_table, differences_of
from bildung.app.log import record_of
from bildung.core.inputs import changed
from bildung.core.record import Record
from bildung.core.settings import settings


@settings
class Command:
    a: tyro.conf.Positional[Path]  # a directory that bildung made
    b: tyro.conf.Positional[Path]  # another one


def command(settings: Command) -> None:
    """`bildung compare A B`."""
    console = Console(highlight=False)
    a, b = record_of(settings.a), record_of(settings.b)
    for title, lines in (("how they were made", made_differently(a, b)), ("their ancestors", lives_apart(a, b))):
        console.print(Text(title, "bold cyan"))
        console.print("\n".join(f"  {line}" for line in lines) or "  the same", markup=False, soft_wrap=True)
    console.print(Text("what they can do", "bold cyan"))
    first, second = card_of(a), card_of(b)
    for directory, card in ((settings.a, first), (settings.b, second)):
        if not card.get("tasks"):
            hint = f"  {directory} was not evaluated; `bildung evaluate {directory} OUT` does it"
            console.print(hint, markup=False, soft_wrap=True)
    if first.get("tasks") and second.get("tasks"):
        if first.get("fingerprint") != second.get("fingerprint"):
            console.print("  the cards were not measured in the same way: mind that in the differences", style="yellow")
        console.print(card_table(differences_of(first, second), "A", "B"))


def made_differently(a: Record, b: Record) -> list[str]:
    """What differs in operation, settings, source, companions and data: "settings.rank 8 -> 16"."""
    return changed(vars(a), vars(b))


def lives_apart(a: Record, b: Record) -> list[str]:
    """The operations that only one of the two has gone through, after their common youth."""
    lives = [[(event["operation"], event["fingerprint"]) for event in record.ancestors] for record in (a, b)]
    common = 0
    while common < min(map(len, lives)) and lives[0][common] == lives[1][common]:
        common += 1
    return [
        f"only {name}: {operation} ({fingerprint[:8]})"
        for name, life in zip("AB", lives, strict=True)
        for operation, fingerprint in life[common:]
    ]


def card_of(record: Record) -> Mapping[str, Any]:
    """What the model can do: measured after the operation, or before one that left the model as it was."""
    return record.after or record.before
