"""The plan of commands that hold no model: what they read, and what their memory grows with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bildung.app.planning.passes import own_bytes
from bildung.app.planning.passing import settings_for
from bildung.app.planning.reading import READING_OPERATIONS
from bildung.core.errors import BildungError, SettingsError
from bildung.core.progress import size
from bildung.core.verbs import find, verbs

PLAIN: Mapping[str, str] = {
    "compare": "It reads two records and no weights; its memory grows with their cards.",
    "log": "It reads one record and no weights.",
    "report": "It reads a life's records, logs and cards, all at once, and no weights; the page is made in memory.",
    "nursery": "It fetches packages to the disk and converts them row by row.",
    "data repeats": "It reads text row by row and keeps how often each different word occurs.",
    "look curves": "It reads the training logs of the runs, whole, and no weights.",
    "look pairs": "It loads the tokenizer alone, and keeps the pairs that it makes.",
    "pretrain tokenize": "It loads the tokenizer alone; text is read row by row, and the tokens of one part, four "
    "million, are kept.",
    "tokenizer train": "Text is read row by row, more than once; the trainer keeps the different words and how often "
    "each occurs.",
    "tokenizer compare": "It loads the tokenizers, and of one text after the other as many rows as `limit` says.",
    "tokenizer trace": "It loads tokenizers, or learns them from as many rows as `limit` says.",
    "plan": "It runs a step or a pass on paper, without numbers. Where it measures time, what it plans is there for as "
    "long (--seconds 0: on paper only).",
}


def parts(operation: str, source: str, values: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of what such a command keeps beside the process itself; none of those that hardly keep anything, or whose
    data nobody gave. Raises SettingsError for what cannot be planned, DataError for data that is not there."""
    given, assumed = settings_for(operation, values)
    if operation not in READING_OPERATIONS or "data" in assumed:
        return {}
    return READING_OPERATIONS[operation](source, given)


def lines(operation: str, source: Path, values: Mapping[str, Any]) -> list[str]:
    """What is to be said of such a command. Raises SettingsError for a source that is not there."""
    reads_places = operation not in ("nursery", "plan", "tokenizer compare", "tokenizer trace")
    if reads_places and ":" not in str(source) and not source.exists():  # nursery:NAME and the like are no places
        raise SettingsError(f"{source} is not there; `bildung {operation} --help` says what it starts from.")
    own = own_bytes(find(operation, verbs()).load().__name__, source)
    try:
        kept = parts(operation, str(source), values)
        said = [f"  Beside it: {', '.join(f'{name} {size(count)}' for name, count in kept.items())}."] if kept else []
    except BildungError as error:
        said = [f"  Not planned: {error}"]
    return [
        f"  It holds no model. {PLAIN[operation]}",
        f"  The process itself takes about {size(own)} with its code loaded.",
        *said,
    ]
