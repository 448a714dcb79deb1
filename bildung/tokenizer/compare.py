"""Compare tokenizers on texts: tokens per word, bytes per token, unknown rate, as a table and a plot.

    bildung tokenizer compare lives/en lives/both --data nursery:kjv nursery:sparv notes.txt --plot compare.png

Every text is a row of its own, so one file or source per language shows which languages a vocabulary serves. Mind that
a text flatters the tokenizers that were learned from it.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from bildung.core.errors import SettingsError
from bildung.core.settings import settings
from bildung.tokenizer.corpus import passages, texts
from bildung.tokenizer.measure import Measured, measure
from bildung.tokens.tokenizer import Tokenizer


@settings
class Command:
    """Compare tokenizers on texts."""

    tokenizers: tyro.conf.Positional[tuple[Path, ...]]  # tokenizer or model directories
    data: tuple[str, ...]  # texts: files, folders, nursery:NAME, mini:NAME, hub:OWNER/NAME
    columns: tuple[str, ...] = ()  # the columns that hold text; default: text, or what is said in conversations
    limit: int = 2000  # rows of each text
    plot: Path | None = Path("tokenizers.png")  # where to draw it; None: nowhere


def command(settings: Command) -> None:
    """`bildung tokenizer compare`. Raises SettingsError, TokenizerError and DataError."""
    if settings.plot is not None and settings.plot.suffix != ".png":
        raise SettingsError(f"plot = {settings.plot}: a name that ends in .png is expected")
    found = compare(settings.tokenizers, settings.data, columns=settings.columns, limit=settings.limit)
    console = Console(highlight=False)
    console.print(table(found))
    if settings.plot is not None:
        from bildung.tokenizer.plot import draw

        draw(found, settings.plot.expanduser())
        console.print(f"plot: {settings.plot}", markup=False, soft_wrap=True)


def compare(
    directories: tuple[Path, ...] | list[Path],
    data: tuple[str, ...] | list[str],
    *,
    columns: tuple[str, ...] = (),
    limit: int | None = None,
) -> dict[str, dict[str, Measured]]:
    """{text: {tokenizer: what was measured}}. Raises SettingsError when there is nothing to compare."""
    if not directories or not data:
        raise SettingsError("name at least one tokenizer directory and, after --data, at least one text")
    loaded = {name: Tokenizer.load(path) for name, path in zip(short_names(directories), directories, strict=True)}
    found: dict[str, dict[str, Measured]] = {}
    for source in dict.fromkeys(data):
        rows = list(passages(texts(source, columns, limit)))
        found[source] = {name: measure(tokenizer, rows) for name, tokenizer in loaded.items()}
    return found


def short_names(directories: tuple[Path, ...] | list[Path]) -> list[str]:
    """The directories' last names, or as much of their paths as tells them apart. Raises SettingsError."""
    for parts in range(1, 100):
        names = ["/".join(path.expanduser().absolute().parts[-parts:]) for path in directories]
        if len(set(names)) == len(names):
            return names
    raise SettingsError(f"a tokenizer is named twice: {', '.join(map(str, directories))}")


def table(found: dict[str, dict[str, Measured]]) -> Table:
    """One row per text and tokenizer. Of those that lose nothing, the one with the fewest tokens is printed bold."""
    made = Table(box=None, pad_edge=False)
    made.add_column("text", overflow="fold")
    made.add_column("tokenizer", overflow="fold")
    for name in ("tokens", "tokens per word", "bytes per token", "unknown"):
        made.add_column(name, justify="right")
    for source, by_tokenizer in found.items():
        best = min((of.tokens for of in by_tokenizer.values() if not of.unknown), default=None)
        for place, (name, of) in enumerate(by_tokenizer.items()):
            style = "bold" if of.tokens == best and not of.unknown and len(by_tokenizer) > 1 else ""
            made.add_row(
                "" if place else source,
                name,
                f"{of.tokens:,}",
                f"{of.tokens_per_word:.3f}",
                f"{of.bytes_per_token:.3f}",
                f"{of.unknown_rate:.2%}" if of.unknown else "0",
                style=style,
            )
    return made
