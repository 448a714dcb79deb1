"""What `bildung plan` prints: tables of arithmetic and of bytes, and the time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bildung.core.progress import duration, size

if TYPE_CHECKING:
    from bildung.app.planning.training import Subject
    from bildung.train.plan import Plan


def arithmetic(model: Any, length: int) -> Table:
    """The terms of a forward pass over one row: multiply-adds of each part, all layers together."""
    from bildung.model.count import count

    sums: dict[str, int] = {}
    for part in count(model, length):
        name = re.sub(r"layers\.\d+\.", "", part.name)
        sums[name] = sums.get(name, 0) + part.multiply_adds
    total = sum(sums.values())
    table = Table("of a row of", f"{length} tokens", "multiply-adds of a token", "share", box=None)
    for name, number in sums.items():
        if number:
            table.add_row("", name, f"{number / length:,.0f}", f"{number / total:.1%}")
    table.add_row("", "forward pass", f"{total / length:,.0f}", "")
    return table


def parts_table(parts: dict[str, int]) -> Table:
    """Bytes of each part at the fullest moment."""
    table = Table("at the fullest moment", "bytes", "share", box=None)
    peak = sum(parts.values())
    for name, value in parts.items():
        if value:
            table.add_row(name, size(value), f"{value / peak:.0%}")
    table.add_row("peak", size(peak), "")
    return table


def ranks_table(made: Plan, ranks: tuple[int, ...], room: int) -> Table:
    """Peak bytes of one of several devices."""
    from bildung.train.sharing import KINDS

    def said(cell: int) -> str:
        return f"{size(cell)}{'' if cell <= room else ' (too much)'}"

    table = Table("devices", *KINDS, *(["tensor"] if made.divisible > 1 else []), box=None)
    for count in ranks:
        shown = [said(made.on(count, kind)) for kind in KINDS]
        if made.divisible > 1:
            shown.append("does not divide" if made.divisible % count else said(made.on(count, "tensor")))
        table.add_row(str(count), *shown)
    return table


def textbook_table(trained: int, ranks: tuple[int, ...]) -> Table:
    """What the textbook says of P trained parameters (train/sharing.py): states held, and sent in a step."""
    from bildung.train.sharing import KINDS, held, sent

    table = Table("textbook, 16 P", *(f"{kind}" for kind in KINDS), box=None)
    for count in ranks:
        cells = [f"{size(held(trained, kind, count))}, sends {size(2 * sent(kind, count, trained))}" for kind in KINDS]
        table.add_row(str(count), *cells)
    return table


def time_line(planned: Subject, seconds: float) -> str:
    """How long it will take, from some steps now."""
    from bildung.train.speed import speed

    per_second = speed(planned.model, planned.objective, planned.batch, seconds)
    rows, length, given = planned.rows, planned.length, planned.given
    unit = "tokens" if length > 1 else "images"
    line = f"about {per_second * rows * length:,.0f} {unit}/s on this machine"
    if planned.steps is not None:
        tokens = planned.steps * given.micro_steps * rows * length
        took = duration(planned.steps * given.micro_steps / per_second)
        line += f": {planned.steps} steps of {tokens // planned.steps:,} {unit} in {took}"
    return line


def steps_seconds(planned: Subject, seconds: float) -> float:
    """How long an optimizer step takes here."""
    from bildung.train.speed import speed

    return float(planned.given.micro_steps / speed(planned.model, planned.objective, planned.batch, seconds))
