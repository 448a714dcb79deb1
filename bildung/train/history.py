"""What happened in a run, and its log: one line of JSON per step in metrics.jsonl, TensorBoard when asked."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from bildung.core.errors import SettingsError

METRICS = "metrics.jsonl"


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

    def counters(self) -> dict[str, Any]:
        """Everything but the rows, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rows"}

    def summary(self) -> dict[str, Any]:
        """For the record: the loss as the mean over the first and the last tenth of the steps, and the pace."""
        losses = [row["loss"] for row in self.rows if "loss" in row]
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
    """`with Log(out, tensorboard, history) as log: log.add(row)`. The file begins with the rows history has already."""

    def __init__(self, out: Path | None, tensorboard: Path | None, history: History):
        self.history = history
        self._board = None if tensorboard is None else _summary_writer(tensorboard, history.steps)
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
        if self._board is not None:
            self._board.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to history and log."""
        self.history.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, float) and math.isfinite(value):
                    self._board.add_scalar(name, value, row["step"])


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            "tensorboard was asked for and is not installed: pip install 'bildung[tensorboard]'."
        ) from error
    # purge_step: what a killed run logged beyond its checkpoint is hidden by what is logged now.
    return SummaryWriter(str(folder), purge_step=step + 1)
