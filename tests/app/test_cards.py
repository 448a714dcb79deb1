"""The table of what changed, and which changes are more than chance."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from bildung.app.cards import Change, card_table, changes_of, differences_of


def card(*items, metric="acc", better=True, **more):
    task = {"metric": metric, "value": sum(items) / len(items), "n": len(items), "higher_is_better": better}
    return {"tasks": {"t": task | {"docs": "d", "items": list(items)} | more}}


def test_two_models_are_paired_item_by_item():
    [change] = differences_of(card(1.0, 0.0, 1.0, 0.0), card(1.0, 1.0, 1.0, 0.0))
    # differences 0 1 0 0: standard deviation 1/2, over sqrt(4)
    assert (change.before, change.after, change.difference) == (0.5, 0.75, 0.25)
    assert change.stderr == pytest.approx(0.25) and change.better is None


def test_a_small_but_steady_change_is_seen_though_the_items_vary_widely():
    old = [float(n) for n in range(100)]
    new = [item + 1 + 0.1 * (-1) ** n for n, item in enumerate(old)]
    [change] = differences_of(card(*old, better=False), card(*new, better=False))
    assert change.stderr == pytest.approx(0.1 / math.sqrt(99), rel=1e-3) and change.better is False


@pytest.mark.parametrize("other", [{"docs": "e"}, {"n": 5}, {"items": []}, {"metric": "acc_norm"}])
def test_other_questions_are_not_paired(other):
    [change] = differences_of(card(1.0, 0.0), card(1.0, 1.0, **other))
    assert change.stderr is None and change.difference == 0.5


def test_the_change_an_operation_noted_is_not_taken_for_that_to_another_model():
    noted = card(1.0, 1.0, change={"difference": 0.5, "stderr": 9.0})
    assert changes_of({"before": card(1.0, 0.0), "after": noted})[0].stderr == 9.0
    assert differences_of(card(1.0, 0.0), noted)[0].stderr == pytest.approx(0.5)


def test_a_task_of_one_card_only():
    rows = changes_of({"before": card(1.0), "after": {}})
    assert [(row.task, row.before, row.after, row.difference) for row in rows] == [("t", 1.0, None, None)]
    assert changes_of({"before": {}, "after": {}}) == []


def test_better_and_worse_are_coloured():
    rows = [Change("up", "acc", 0.0, 1.0, 0.1, True), Change("down", "acc", 1.0, 0.0, 0.1, True)]
    rows += [Change("chance", "acc", 1.0, 0.9, 0.1, True)]
    console = Console(force_terminal=True, color_system="standard", record=True, width=80, file=io.StringIO())
    console.print(card_table(rows))
    up, down, chance = console.export_text(styles=True).splitlines()[1:]
    assert "\x1b[32m" in up and "\x1b[31m" in down and "\x1b[3" not in chance
