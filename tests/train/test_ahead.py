"""Batches made in a thread: same order, one ahead, errors where they were due."""

from __future__ import annotations

import contextlib
import threading

import pytest

from bildung.train.ahead import ahead


def test_order_and_distance():
    begun, threads = [], set()
    second = threading.Event()

    def batch_at(number):
        begun.append(number)
        threads.add(threading.current_thread())
        if number == 20:
            second.set()
        return number * 2

    with contextlib.closing(ahead(batch_at, iter([10, 20, 30]))) as batches:
        assert next(batches) == 20
        assert second.wait(20) and begun == [10, 20]  # the next one, and no other
        assert list(batches) == [40, 60]
    assert threading.main_thread() not in threads


def test_an_error_comes_where_its_batch_was_due():
    def batch_at(number):
        if number == 2:
            raise ValueError("row 17 is broken")
        return number

    batches = ahead(batch_at, range(4))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="row 17"):
        next(batches)


def test_no_thread_is_left():
    before = threading.active_count()
    batches = ahead(lambda number: number, iter(range(10**9)))
    next(batches)
    batches.close()
    assert threading.active_count() == before
