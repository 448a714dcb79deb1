"""Proportions to the item, every item of a source before any twice, random access."""

from __future__ import annotations

from collections import Counter

import pytest

from bildung.core.errors import DataError
from bildung.data.mixture import Mixture, Phases


def mixture(batch_size: int = 4) -> Mixture[str, list[str]]:
    sources = [([f"a{n}" for n in range(60)], 3.0), ([f"b{n}" for n in range(7)], 1.0)]
    return Mixture(sources, batch_size, 5, list)


def test_shares_hold_after_any_number_of_items() -> None:
    items = [item for n in range(100) for item in mixture()(n)]
    for count in (1, 7, 50, 400):
        given = sum(item.startswith("a") for item in items[:count])
        assert abs(given - 0.75 * count) <= 1


def test_each_source_is_passed_through_before_it_repeats() -> None:
    items = [item for n in range(100) for item in mixture()(n)]
    assert set(Counter([i for i in items if i.startswith("b")][:14]).values()) == {2}
    assert len(set([i for i in items if i.startswith("a")][:60])) == 60


def test_a_batch_follows_from_its_number() -> None:
    assert mixture()(23) == mixture()(23) != mixture()(24)
    assert [*mixture(4)(0), *mixture(4)(1)] == mixture(8)(0)


def test_phases() -> None:
    phases = Phases([(2, lambda n: f"short {n}"), (3, lambda n: f"long {n}")])
    assert [phases(n) for n in range(6)] == ["short 0", "short 1", "long 0", "long 1", "long 2", "long 3"]
    assert phases.batches_per_epoch == 5


def test_bad_weights() -> None:
    with pytest.raises(DataError, match="above 0"):
        Mixture([([1], 0.0)], 1, 0, list)
    with pytest.raises(DataError, match="at least 1"):
        Phases([(0, str)])
