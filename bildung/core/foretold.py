"""What was foretold of an operation by whoever runs it, to stand in its record beside what was measured.

`perform` asks just before the work begins: then it is certain that there is work, what the process holds by then is
known, and neither the time nor the peak of the work counts the asking. Only the next operation is asked about: those
that its work performs in turn are not. An operation that predicts itself (train/predict.py) has the last word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from bildung.core.progress import size


@dataclasses.dataclass(frozen=True)
class Foretold:
    """measured: numbers for the record, `predicted_...`. notes: why there are none."""

    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


Teller = Callable[[Path | None], Foretold]  # told where the source lies
_teller: ContextVar[Teller | None] = ContextVar("teller", default=None)


@contextlib.contextmanager
def foretelling(teller: Teller) -> Iterator[None]:
    """Inside, the next operation that works asks `teller` first."""
    token = _teller.set(teller)
    try:
        yield
    finally:
        _teller.reset(token)


def ask(source: Path | None) -> Foretold:
    """What is foretold of the operation that is about to work; of the next one, nothing."""
    teller = _teller.get()
    _teller.set(None)
    return teller(source) if teller is not None else Foretold()


def say(peak: int, parts: Mapping[str, int], room: int) -> None:
    """Print a prediction, with a warning if it is more than the memory there is."""
    shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
    print(f"  predicted peak memory {size(peak)}: {shown}", file=sys.stderr)
    if peak > room:
        print(
            f"  that is more than the {size(room)} there are; the system may end this process. `bildung plan` says "
            f"which settings would fit.",
            file=sys.stderr,
        )
