"""Reading cards: what changed between two measurements of the same items, and how sure one may be.

A card is {"tasks": {name: {"metric", "value", "stderr", "n", "higher_is_better", "items": [one score per item]}}}. Two
cards of the same items are compared item by item: the differences of pairs vary far less than the scores themselves, so
the paired standard error sees changes that the two separate ones would hide (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Change:
    """One task, before and after."""

    task: str
    metric: str
    before: float | None
    after: float | None
    difference: float | None
    stderr: float | None  # of the difference, paired; None when the items cannot be paired
    better: bool | None  # None: unchanged, or nobody said which way is better

    @property
    def clear(self) -> bool:
        """Whether the difference is more than two standard errors."""
        return self.stderr is not None and self.difference is not None and abs(self.difference) > 2 * self.stderr


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every task of either card, those of `after` first."""
    old, new = before.get("tasks", {}), after.get("tasks", {})
    return [_change(task, old.get(task, {}), new.get(task, {})) for task in dict.fromkeys([*new, *old])]


def note_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """`after` with a "change" {difference, stderr} in every task measured twice: it outlives the items in ancestors."""
    noted = {change.task: change for change in changes(before, after) if change.difference is not None}
    tasks = {}
    for name, task in after.get("tasks", {}).items():
        change = noted.get(name)
        extra = {"change": {"difference": change.difference, "stderr": change.stderr}} if change else {}
        tasks[name] = extra | task
    return {**after, "tasks": tasks} if tasks else dict(after)


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    before, after = old.get("value"), new.get("value")
    difference = stderr = better = None
    if before is not None and after is not None:
        difference, stderr = after - before, _paired_stderr(old, new)
        if difference and "higher_is_better" in new:
            better = (difference > 0) == new["higher_is_better"]
        noted = new.get("change") or {}
        if stderr is None and noted.get("difference") == difference:
            stderr = noted.get("stderr")
    return Change(name, new.get("metric", old.get("metric", "")), before, after, difference, stderr, better)


def _paired_stderr(old: Mapping[str, Any], new: Mapping[str, Any]) -> float | None:
    """Standard error of the mean of the items' differences; None unless the values are the means of paired items."""
    first, second = _scores(old), _scores(new)
    if len(first) != len(second) or len(first) < 2:
        return None
    pairs = [b - a for a, b in zip(first, second, strict=True)]
    if not math.isclose(statistics.fmean(pairs), new["value"] - old["value"], rel_tol=1e-4, abs_tol=1e-6):
        return None  # a perplexity, for one, is no mean of its items
    return statistics.stdev(pairs) / math.sqrt(len(pairs))


def _scores(task: Mapping[str, Any]) -> list[float]:
    items = task.get("items") or []
    scores = [item.get("value", item.get("score")) if isinstance(item, Mapping) else item for item in items]
    usable = all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
    return [float(score) for score in scores] if usable else []
