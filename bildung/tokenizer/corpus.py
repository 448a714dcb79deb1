"""The text that a tokenizer is learned from or measured on, in passages, and the part of it that is held out.

A source may be one novel or a million words. Long documents are cut at line ends into passages of at most 2,000
characters, and every twentieth passage is held out: it is measured on and not learned from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from bildung.data.rows import Row, Rows, Unusable
from bildung.data.sources import fingerprint, rows
from bildung.data.text import document, row_messages

LONGEST = 2_000  # characters of a passage
HELD_OUT_EVERY = 20


def texts(source: str, columns: Sequence[str] = (), limit: int | None = None) -> Rows[str]:
    """The text of each row of a source: its `columns`; by default `text`, or what is said in a conversation.

    Raises DataError, on iteration, when no row has any.
    """

    def parse(row: Row) -> str:
        if columns:
            values = [row.get(column) for column in columns]
            for column, value in zip(columns, values, strict=True):
                if not isinstance(value, str):
                    there = ", ".join(name for name, other in row.items() if isinstance(other, str)) or "none"
                    raise Unusable(f"no text in column {column!r}; columns with text: {there}")
            return "\n".join(map(str, values))
        if "text" in row:
            return document(row)
        try:
            return "\n".join(message["content"] for message in row_messages(row))
        except Unusable:
            there = ", ".join(name for name, value in row.items() if isinstance(value, str)) or "none"
            raise Unusable(f"no `text`; name `columns`, here: {there}") from None

    return rows(source).then(parse, limit)


def passages(documents: Iterable[str]) -> Iterator[str]:
    """The documents, cut where they are longer than LONGEST: after a line, else before a space, else anywhere."""
    for text in documents:
        while len(text) > LONGEST:
            cut = text.rfind("\n", 0, LONGEST) + 1 or text.rfind(" ", 1, LONGEST)
            cut = cut if cut > 0 else LONGEST
            yield text[:cut]
            text = text[cut:]
        if text:
            yield text


class Passages:
    """Passages of several sources, read anew on every iteration; those whose number `chosen` likes."""

    def __init__(self, sources: Sequence[Rows[str]], chosen: Callable[[int], bool]) -> None:
        self.sources, self.chosen = sources, chosen

    def __iter__(self) -> Iterator[str]:
        every = enumerate(passages(itertools.chain.from_iterable(self.sources)), 1)
        return (text for number, text in every if self.chosen(number))


class Corpus:
    """Several sources, as `training` and as `held_out` passages (none, when there are fewer than twenty)."""

    def __init__(self, sources: Sequence[str], columns: Sequence[str] = (), limit: int | None = None) -> None:
        self.sources = [texts(source, columns, limit) for source in sources]
        self.training = Passages(self.sources, lambda number: number % HELD_OUT_EVERY != 0)
        self.held_out = Passages(self.sources, lambda number: number % HELD_OUT_EVERY == 0)

    def notes(self) -> list[str]:
        """What was not used of each source, in the latest iteration."""
        return [f"{rows.name}: {report}" for rows in self.sources if (report := rows.report())]


def fingerprints(sources: Sequence[str]) -> dict[str, str]:
    """{file: sha256} of all sources."""
    return {name: digest for source in sources for name, digest in fingerprint(source).items()}
