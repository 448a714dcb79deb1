"""Batches by number of tokens: everything once per epoch, never too large, and a function of (seed, n)."""

import random
from collections import Counter

import pytest

from bildung.core.errors import DataError
from bildung.data.bucketing import Bucketed

ITEMS = [[number] * random.Random(number).randint(1, 12) for number in range(100)]


def bucketed(seed=0, tokens=40):
    return Bucketed(ITEMS, tokens, seed, list)


def test_every_epoch_holds_every_item_once_and_no_batch_is_too_large():
    batch_at = bucketed()
    size = int(batch_at.batches_per_epoch)
    for epoch in range(2):
        batches = [batch_at(epoch * size + n) for n in range(size)]
        assert Counter(row[0] for batch in batches for row in batch) == Counter(range(100))
        assert all(len(batch) * max(map(len, batch)) <= 40 for batch in batches)


def test_there_is_little_padding_and_batches_are_full():
    batch_at = bucketed()
    batches = [batch_at(n) for n in range(int(batch_at.batches_per_epoch))]
    space = sum(len(batch) * max(map(len, batch)) for batch in batches)
    assert sum(map(len, ITEMS)) / space > 0.9
    assert sum(map(len, ITEMS)) / (40 * len(batches)) > 0.8


def test_batches_are_a_function_of_seed_and_number():
    assert [bucketed()(n) for n in (30, 2, 17)] == [bucketed()(n) for n in (30, 2, 17)]
    size = int(bucketed().batches_per_epoch)
    assert [bucketed()(n) for n in range(size)] != [bucketed()(size + n) for n in range(size)]  # another epoch
    assert bucketed()(0) != bucketed(seed=1)(0)


def test_the_order_does_not_go_from_short_to_long():
    batch_at = bucketed()
    lengths = [len(batch_at(n)[0]) for n in range(int(batch_at.batches_per_epoch))]
    assert lengths != sorted(lengths)


def test_bad_input():
    with pytest.raises(DataError, match="12 tokens does not fit a batch of 11"):
        bucketed(tokens=11)
    with pytest.raises(DataError, match="nothing"):
        Bucketed([], 5, 0, list)
    with pytest.raises(DataError, match="from 0"):
        bucketed()(-1)
