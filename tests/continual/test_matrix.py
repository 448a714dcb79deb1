"""The accuracy matrix of a hand-made sequence, reckoned on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bildung.continual.matrix import draw, summary, table
from bildung.core.errors import DataError

NAMES = ("a", "b", "c")
BEFORE = {"a": 0.5, "b": 0.5, "c": 0.3}
AFTER = [{"a": 0.9, "b": 0.6, "c": 0.35}, {"a": 0.95, "b": 0.8, "c": 0.4}, {"a": 0.7, "b": 0.85, "c": 0.75}]


def test_the_four_figures_of_a_hand_made_matrix() -> None:
    found = summary(NAMES, BEFORE, AFTER)
    assert found["average_accuracy"] == pytest.approx((0.7 + 0.85 + 0.75) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8)) / 2)
    assert found["forward_transfer"] == pytest.approx(((0.6 - 0.5) + (0.4 - 0.3)) / 2)
    # a was best after b (0.95); b was best after b (0.8), and is better now: negative.
    assert found["forgetting"] == pytest.approx(((0.95 - 0.7) + (0.8 - 0.85)) / 2)


def test_one_task_leaves_nothing_to_compare() -> None:
    assert summary("a", {"a": 0.5}, [{"a": 0.9}]) == {
        "average_accuracy": 0.9,
        "backward_transfer": None,
        "forward_transfer": None,
        "forgetting": None,
    }


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DataError, match="row 2 of the accuracy matrix has no score of c"):
        summary(NAMES, BEFORE, [AFTER[0], {"a": 1, "b": 1}, AFTER[2]])
    with pytest.raises(DataError, match="3 tasks and scores after 2"):
        summary(NAMES, BEFORE, AFTER[:2])


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    text = table(NAMES, BEFORE, AFTER, summary(NAMES, BEFORE, AFTER))
    assert text.splitlines()[3].split() == ["after", "b", "0.950", "0.800", "0.400"]
    assert "average accuracy 0.767, backward transfer -0.075, forward transfer 0.100, forgetting 0.100" in text
    draw(NAMES, BEFORE, AFTER, tmp_path / "matrix.png", "plain", "accuracy")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert picture.width > 300
