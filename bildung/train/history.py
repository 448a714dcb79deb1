"""What happened in a run, and its log: a line of JSON per step, in metrics.jsonl and to whoever watches (watch.py)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

METRICS = "metrics.jsonl"


class Watcher(Protocol):
    """Gets every line of the log as it is written."""

    def add(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass
class History:
    """rows: the lines of metrics.jsonl. tokens_seen: without padding; trained_tokens: those that carried loss."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steps: int = 0
    tokens_seen: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None  # lowest held-out loss, and after which step
    best_step: int = 0
    waited: int = 0  # evaluations since then
    notes: list[str] = dataclasses.field(default_factory=list)  # what went wrong and was mended

    def counters(self) -> dict[str, Any]:
        """Everything but the rows, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rows"}

    def summary(self) -> dict[str, Any]:
        """For the record: the loss as the mean over the first and the last tenth of the steps (without those of texts
        rehearsed beside a classifier's), and the pace."""
        losses = [row["loss"] for row in self.rows if "loss" in row and not row.get("rehearsed")]
        tenth = max(1, len(losses) // 10)
        found: dict[str, Any] = {
            "steps": self.steps,
            "loss_first": sum(losses[:tenth]) / tenth,
            "loss_last": sum(losses[-tenth:]) / tenth,
            "tokens_per_second": self.tokens_seen / max(self.seconds, 1e-9),
        }
        held_out = [row["held_out_loss"] for row in self.rows if "held_out_loss" in row]
        if held_out:
            found |= {"held_out_loss_first": held_out[0], "held_out_loss_last": held_out[-1]}
            found |= {"held_out_loss_best": self.best_loss, "best_step": self.best_step}
        if used := [row["flops_utilisation"] for row in self.rows[1:] if "flops_utilisation" in row]:
            found["flops_utilisation"] = sum(used) / len(used)
        if skipped := [row["step"] for row in self.rows if row.get("skipped")]:
            found["skipped_steps"] = skipped
        return found


def read_rows(out: Path, up_to_step: int) -> list[dict[str, Any]]:
    """The lines of the log up to a step. What a killed run wrote after its last checkpoint is done once more; a line
    that it could not finish writing is the last one."""
    path = out / METRICS
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= up_to_step:
            rows.append(row)
    return rows


class Log:
    """`with Log(out, history, watchers) as log: log.add(row)`. The file begins with the rows history has already."""

    def __init__(self, out: Path | None, history: History, watchers: Sequence[Watcher] = ()):
        self.history, self._watchers = history, watchers
        self._file = None
        if out is not None:
            rewritten = out / f".{METRICS}"  # renamed when whole: a kill here must not lose the rows
            rewritten.write_text("".join(json.dumps(row) + "\n" for row in history.rows), encoding="utf-8")
            rewritten.replace(out / METRICS)
            self._file = (out / METRICS).open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        for watcher in self._watchers:
            watcher.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to history, log and watchers."""
        self.history.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        for watcher in self._watchers:
            watcher.add(row)

    def to_disk(self) -> None:
        """Wait until the lines are on the disk: a checkpoint must not be newer than its log."""
        if self._file is not None:
            os.fsync(self._file.fileno())
