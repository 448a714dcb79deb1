"""Cards for the eye: what changed between two measurements, and whether it is more than chance, as a table.

The numbers come from evaluate/: an operation's record holds the paired "change" of every task it measured before and
after, and two models' cards are paired here by evaluate/metrics.py. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from bildung.evaluate.metrics import METRICS, paired_difference


@dataclasses.dataclass(frozen=True)
class Change:
    """One task, before and after."""

    task: str
    metric: str
    before: float | None
    after: float | None
    stderr: float | None = None  # of the difference, paired; None when the items cannot be paired
    higher_is_better: bool | None = None

    @property
    def difference(self) -> float | None:
        """After minus before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def better(self) -> bool | None:
        """Whether it is better by more than two standard errors; None when that cannot be told."""
        difference = self.difference
        if difference is None or self.stderr is None or self.higher_is_better is None:
            return None
        return (difference > 0) == self.higher_is_better if abs(difference) > 2 * self.stderr else None


def changes_of(event: Mapping[str, Any]) -> list[Change]:
    """What an operation changed, from its record or from that of a descendant."""
    old, new = _tasks(event["before"]), _tasks(event["after"])
    return [_change(task, old, new, (new.get(task, {}).get("change") or {}).get("stderr")) for task in {**new, **old}]


def differences_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Change]:
    """How two models' cards differ; with a standard error where both answered the same questions."""
    old, new = _tasks(first), _tasks(second)
    return [_change(task, old, new, _paired_stderr(old.get(task, {}), new.get(task, {}))) for task in {**new, **old}]


def card_table(rows: list[Change], before: str = "before", after: str = "after") -> Table:
    """Tasks by rows; a change of more than two standard errors is coloured by whether it is for the better."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("task", "metric", before, after, "change"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in rows:
        change = "" if row.difference is None else f"{row.difference:+.4g}"
        if row.stderr is not None:
            change += f" ± {row.stderr:.2g}"
        style = {True: "green", False: "red", None: ""}[row.better]
        table.add_row(row.task, row.metric, short_number(row.before), short_number(row.after), Text(change, style))
    return table


def short_number(value: Any) -> str:
    """A number as people write it, "-" for none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tasks(card: Mapping[str, Any]) -> Mapping[str, Any]:
    return card.get("tasks", {})


def _change(task: str, old: Mapping[str, Any], new: Mapping[str, Any], stderr: float | None) -> Change:
    before, after = old.get(task, {}), new.get(task, {})
    either = after or before
    metric, better = either.get("metric", ""), either.get("higher_is_better")
    return Change(task, metric, before.get("value"), after.get("value"), stderr, better)


def _paired_stderr(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    same = all(before.get(key) == after.get(key) for key in ("metric", "docs", "n"))
    known = before.get("metric") in METRICS and before.get("items") and after.get("items")
    return paired_difference(before["metric"], before["items"], after["items"]).stderr if same and known else None
