"""How far a long loop is: a bar on a terminal, a line now and then in a log file.

    with progress("tune lora", total=steps) as bar:
        for step in range(steps):
            bar.advance(1, tokens=batch.num_tokens, loss=2.31)

Shows tokens per second (over the last half minute, so a slow start does not stick), whatever columns are passed, and
the time left.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
WINDOW_SECONDS = 30.0


class Bar:
    """Counts; what it has to say is in `status()` and shown by `show` whenever it changes."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.columns: dict[str, object] = {}
        self._marks = collections.deque([(time.monotonic(), done, 0)])  # (when, steps, tokens), for the rates
        self._tokens = 0

    def advance(self, n: int = 1, tokens: int = 0, **columns: object) -> None:
        """`n` more of `total` are done, in which `tokens` tokens went by; `columns` are the numbers to show."""
        self.done += n
        self._tokens += tokens
        self.columns.update(columns)
        now = time.monotonic()
        self._marks.append((now, self.done, self._tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW_SECONDS:
            self._marks.popleft()
        self.show()

    def show(self) -> None:
        """Overridden by the two ways of showing."""

    def status(self) -> str:
        """ "loss 2.31  812 tokens/s"."""
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.columns.items()
        ]
        seconds, _, tokens = self._since_first_mark()
        if tokens and seconds > 0:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """From the pace of the last half minute; None before there is one."""
        seconds, steps, _ = self._since_first_mark()
        return (self.total - self.done) * seconds / steps if steps else None

    def _since_first_mark(self) -> tuple[float, int, int]:
        (first, steps, tokens), (last, last_steps, last_tokens) = self._marks[0], self._marks[-1]
        return last - first, last_steps - steps, last_tokens - tokens


class _Drawn(Bar):
    def draw_on(self, drawing: Progress) -> None:
        self._drawing = drawing
        self._task = drawing.add_task(self.title, total=self.total, completed=self.done, status="")

    def show(self) -> None:
        self._drawing.update(self._task, completed=self.done, status=self.status())


class _Printed(Bar):
    def print_on(self, console: Console) -> None:
        self._console, self._last = console, time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES or self.done >= self.total:
            self._last = now
            left = self.seconds_left()
            rest = f"  {duration(left)} left" if left and self.done < self.total else ""
            line = f"{self.title}  {self.done}/{self.total}  {self.status()}{rest}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0, console: Console | None = None) -> Iterator[Bar]:
    """A counter from `done` (not 0 when a run goes on) to `total`, shown on standard error."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        printed = _Printed(title, total, done)
        printed.print_on(console)
        yield printed
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as drawing:
        drawn = _Drawn(title, total, done)
        drawn.draw_on(drawing)
        yield drawn


def duration(seconds: float) -> str:
    """For people: "0.4 s", "3 min 20 s", "2 h 5 min"."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes for people: "87 B", "1.2 MB"; powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
