"""Progress says how fast, how good and how long, on a terminal and in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bildung.core import progress as progress_module
from bildung.core.progress import duration, progress, size


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_a_log_file_gets_a_line_now_and_then_and_one_at_the_end(clock):
    file = io.StringIO()
    with progress("tune lora", total=100, console=Console(file=file, width=30)) as bar:
        for step in range(100):
            clock.now += 1
            bar.advance(1, tokens=50, loss=3 - step / 100, rate="1e-4")
    lines = file.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[9] == "tune lora  50/100  loss 2.51  rate 1e-4  50 tokens/s  50 s left"
    assert lines[-1] == "tune lora  100/100  loss 2.01  rate 1e-4  50 tokens/s"


def test_the_pace_is_that_of_the_last_half_minute(clock):
    with progress("x", total=1000, console=Console(file=io.StringIO())) as bar:
        clock.now += 500  # a slow start: loading, compiling
        bar.advance(1, tokens=1)
        for _ in range(60):
            clock.now += 1
            bar.advance(2, tokens=10)
        assert bar.status() == "10 tokens/s"
        assert bar.seconds_left() == pytest.approx((1000 - 121) / 2)


def test_going_on_does_not_count_what_was_done_before_as_pace(clock):
    with progress("x", total=100, done=90, console=Console(file=io.StringIO())) as bar:
        assert bar.seconds_left() is None
        clock.now += 10
        bar.advance(1)
        assert bar.seconds_left() == pytest.approx(90)


def test_a_terminal_gets_a_bar():
    file = io.StringIO()
    with progress("tune lora", total=4, console=Console(file=file, force_terminal=True, width=120)) as bar:
        bar.advance(3, tokens=5, loss=2.5)
        bar._drawing.refresh()
        assert "3/4" in file.getvalue() and "loss 2.5" in file.getvalue() and "tune lora" in file.getvalue()


def test_numbers_for_people():
    assert [duration(s) for s in (0.44, 12.3, 59.6, 200, 7500)] == [
        "0.4 s",
        "12 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert [size(n) for n in (87, 1_234_567, 1_900_000_000)] == ["87 B", "1.2 MB", "1.90 GB"]
