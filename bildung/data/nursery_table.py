"""The table that `bildung nursery` prints: what there is, what is here, and whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from bildung.data import nursery


def show(names: Iterable[str], reasons: Mapping[str, str], console: Console | None = None) -> None:
    """Print one line per entry; `reasons` tells why an entry is unavailable."""
    table = Table(
        "name", "rows", "size", "what it is", "licence", "status", title=f"nursery: {nursery.cache_directory()}"
    )
    for name in names:
        table.add_row(name, *describe(name, reasons.get(name)))
    (console or Console()).print(table)


def describe(name: str, reason: str | None) -> tuple[str, str, str, str, str]:
    """(rows, size, what it is, licence, status) of one entry."""
    entry = nursery.entry_called(name)
    stamp, folder = nursery.read_stamp(name), nursery.cache_directory() / name
    rows = "  ".join(f"{split} {count:,}" for split, count in stamp.get("rows", {}).items())
    files = [path for path in folder.iterdir() if path.name != nursery.STAMP] if stamp else []
    size = f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB" if files else ""
    if reason:
        status = f"unavailable: {reason}"
    elif nursery.is_current(name):
        left_out = sum(stamp.get("dropped", {}).values())
        status = f"here, {left_out:,} left out" if left_out else "here"
    elif stamp:
        status = "older: fetch again"
    else:
        status = "installed" if nursery.installed(entry) else "not fetched"
    return rows, size, entry["about"], f"{entry['licence']} ({entry['origin']})", status
