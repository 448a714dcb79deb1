"""Paired differences of two cards."""

from __future__ import annotations

import math

import pytest

from bildung.core.cards import changes, note_changes
from bildung.core.operation import perform
from bildung.core.settings import settings


def card(*scores, value=None, better=True, **more):
    mean = sum(scores) / len(scores)
    task = {"metric": "accuracy", "value": mean if value is None else value, "higher_is_better": better}
    return {"fingerprint": "f", "tasks": {"t": task | {"items": list(scores)} | more}}


def test_the_standard_error_is_that_of_the_pairs():
    [change] = changes(card(1.0, 0.0, 1.0, 0.0), card(1.0, 1.0, 1.0, 0.0))
    # differences 0 1 0 0: mean 1/4, standard deviation 1/2, over sqrt(4)
    assert (change.before, change.after, change.difference) == (0.5, 0.75, 0.25)
    assert change.stderr == pytest.approx(0.25)
    assert change.better is True and not change.clear


def test_a_small_but_steady_change_is_clear_though_the_scores_vary_widely():
    old = [float(n) for n in range(100)]
    new = [score + 1 + 0.1 * (-1) ** n for n, score in enumerate(old)]
    [change] = changes(card(*old, better=False), card(*new, better=False))
    assert change.clear and change.better is False
    assert change.stderr == pytest.approx(0.1 / math.sqrt(99), rel=1e-3)


@pytest.mark.parametrize(
    "after",
    [
        card(1.0, 0.0),  # other items
        card(1.0, 0.0, 1.0, 1.0, value=20.1),  # a value that is no mean of its items, as a perplexity
        card(1.0, 0.0, 1.0, math.nan, value=0.5),
    ],
)
def test_what_cannot_be_paired_has_no_standard_error(after):
    [change] = changes(card(1.0, 0.0, 1.0, 0.0), after)
    assert change.stderr is None and change.difference is not None and not change.clear


def test_items_may_be_mappings():
    old, new = ({"tasks": {"t": {"value": v, "items": [{"value": v}, {"value": v}]}}} for v in (0.0, 1.0))
    assert changes(old, new)[0].stderr == 0


def test_a_task_of_one_card_only():
    rows = changes({"tasks": {"old": {"value": 1.0}}}, {"tasks": {"new": {"value": None}}})
    assert [(row.task, row.before, row.after, row.difference) for row in rows] == [
        ("new", None, None, None),
        ("old", 1.0, None, None),
    ]
    assert changes({}, {}) == []


def test_the_noted_change_outlives_the_items(tmp_path):
    @settings
    class Toy:
        pass

    def work(job):
        job.before, job.after = card(1.0, 0.0, 1.0, 0.0), card(1.0, 1.0, 1.0, 0.0)
        (job.out / "model").write_text("x")

    perform("toy", None, tmp_path / "a", Toy(), work)
    record = perform("toy", tmp_path / "a", tmp_path / "b", Toy(), work)
    [ancestor] = record.ancestors
    assert "items" not in ancestor["after"]["tasks"]["t"]
    [change] = changes(ancestor["before"], ancestor["after"])
    assert (change.difference, change.stderr) == (0.25, pytest.approx(0.25))


def test_a_change_that_the_evaluation_noted_itself_stays():
    own = {"difference": 0.25, "stderr": 0.125}
    after = card(1.0, 1.0, 1.0, 0.0, change=own)
    assert note_changes(card(1.0, 0.0, 1.0, 0.0), after)["tasks"]["t"]["change"] == own
