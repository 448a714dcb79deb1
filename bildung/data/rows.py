"""Rows: what every reader of data gives back. An iterable that counts what it could not use.

Real data has blank lines, broken JSON, empty answers. A reader that skips them silently hides how much was lost; one
that stops at the first wastes the rest. So an unusable row is left out, counted by reason, and the first few of each
reason are named by file and line. A source with nothing usable at all is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from bildung.core.errors import DataError

T = TypeVar("T")
U = TypeVar("U")
Row = dict[str, Any]
Drop = Callable[[str, str], None]  # (reason, place) -> counted
NAMED_PER_REASON = 3


class Unusable(Exception):
    """Raised while one row is read: its text is the reason under which the row is counted."""


class Rows(Generic[T]):
    """Items of one source, read anew on every iteration.

    dropped  Counter: reason -> number of rows left out in the latest iteration (so far, if it was not read to its end)
    places   reason -> the first few places ("notes.jsonl:17")
    """

    def __init__(self, name: str, read: Callable[[Drop], Iterator[tuple[str, T]]], limit: int | None = None) -> None:
        """`read(drop)` yields (place, item) and calls `drop(reason, place)` for what it leaves out."""
        if limit is not None and limit < 1:
            raise DataError(f"limit = {limit} of {name}: at least 1 row, or None for all")
        self.name, self._read, self.limit = name, read, limit
        self.dropped: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[T]:
        self.dropped, self.places = Counter(), {}
        given = 0
        for _, item in self._read(self._drop):
            yield item
            given += 1
            if given == self.limit:
                return
        if not given:
            raise DataError(f"{self.name}: no usable row. {self.report() or 'It is empty.'}")

    def _drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        named = self.places.setdefault(reason, [])
        if len(named) < NAMED_PER_REASON:
            named.append(place)

    def then(self, parse: Callable[[T], U], limit: int | None = None) -> Rows[U]:
        """Rows of `parse(item)`; an item for which `parse` raises Unusable is dropped under that reason.
        `limit` counts usable results; this object's own limit no longer applies."""

        def read(drop: Drop) -> Iterator[tuple[str, U]]:
            for place, item in self._read(drop):
                try:
                    parsed = parse(item)
                except Unusable as reason:
                    drop(str(reason), place)
                    continue
                yield place, parsed

        return Rows(self.name, read, limit)

    def report(self) -> str:
        """One sentence about what was left out, "" when nothing was: for a progress line or a record's notes."""
        if not self.dropped:
            return ""
        parts = []
        for reason, count in self.dropped.most_common():
            places = ", ".join(self.places[reason])
            parts.append(f"{count} {reason} ({places}{', ...' if count > len(self.places[reason]) else ''})")
        total = sum(self.dropped.values())
        return f"{total} row{'s' if total > 1 else ''} not used: " + "; ".join(parts)
