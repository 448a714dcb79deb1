"""Two models side by side: how they were made, and what they can do, item by item.

Compares the records; it opens no weights. Their cards must have measured the same items for the differences to mean
anything, which the cards' fingerprints tell.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.text import Text

from bildung.app.log import card_table, record_of
from bildung.core.cards import changes
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
    first, second = record_of(settings.a), record_of(settings.b)
    for title, lines in (
        ("how they were made", made_differently(first, second)),
        ("ancestors", lines_of(first, second)),
    ):
        console.print(Text(title, "bold cyan"))
        console.print("\n".join(f"  {line}" for line in lines) or "  the same", markup=False, soft_wrap=True)
    console.print(Text("what they can do", "bold cyan"))
    cards = (_card(first), _card(second))
    if not all(card.get("tasks") for card in cards):
        without = " and ".join(
            str(d) for d, card in zip((settings.a, settings.b), cards, strict=True) if not card.get("tasks")
        )
        console.print(
            f"  {without}: not evaluated; `bildung evaluate DIR OUT` makes a card", markup=False, soft_wrap=True
        )
        return
    if cards[0].get("fingerprint") != cards[1].get("fingerprint"):
        console.print(
            "  the cards were measured on other items or in another way: differences are not paired", style="yellow"
        )
        cards = tuple({**card, "tasks": {n: {**t, "items": []} for n, t in card["tasks"].items()}} for card in cards)  # type: ignore[assignment]
    console.print(card_table(changes(*cards), "A", "B"))


def made_differently(first: Record, second: Record) -> list[str]:
    """What differs in operation, settings, source, companions and data: "settings.rank 8 -> 16"."""
    return changed(vars(first), vars(second))


def lines_of(first: Record, second: Record) -> list[str]:
    """The operations that only one of the two lives has gone through, after their common youth."""
    lives = [[(event["operation"], event["fingerprint"]) for event in record.ancestors] for record in (first, second)]
    common = 0
    while common < min(map(len, lives)) and lives[0][common] == lives[1][common]:
        common += 1
    return [
        f"only {name}: {operation} ({fingerprint[:8]})"
        for name, life in zip("AB", lives, strict=True)
        for operation, fingerprint in life[common:]
    ]


def _card(record: Record) -> dict:
    """What the model can do: measured after the operation, or before it when the operation left the model as it was."""
    return record.after or record.before
