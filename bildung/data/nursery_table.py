"""The table that `bildung nursery` prints: what there is, what is here, and whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from bildung.data import nursery


def show(names: Iterable[str], reasons: Mapping[str, str], *, with_origin: bool = False) -> None:
    """Print one line per entry; `reasons` tells why an entry is unavailable; `with_origin` whose the contents are."""
    title = f"nursery: {nursery.cache_directory()}"
    table = Table("name", "rows", "size", "what it is", "licence", "status", title=title)
    for name in names:
        rows, size, about, licence, status = describe(name, reasons.get(name))
        if with_origin:
            licence += f"; {nursery.entry_called(name)['origin']}"
        table.add_row(name, rows, size, about, licence, status)
    Console().print(table)


def describe(name: str, reason: str | None) -> tuple[str, str, str, str, str]:
    """(rows, size, what it is, licence, status) of one entry."""
    entry = nursery.entry_called(name)
    stamp, folder = nursery.read_stamp(name), nursery.cache_directory() / name
    rows = "\n".join(f"{split} {count:,}" for split, count in stamp.get("rows", {}).items())
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
    return rows, size, entry["about"], entry["licence"], status
