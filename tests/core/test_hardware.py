"""Peak memory is that of the block, not of the process's whole past."""

from __future__ import annotations

import os
import resource
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bildung.core import hardware


@pytest.mark.parametrize("kernel_keeps_the_mark", [True, False])
def test_the_peak_is_of_this_block(monkeypatch, kernel_keeps_the_mark):
    if not kernel_keeps_the_mark:
        monkeypatch.setattr(hardware, "_reset_high_water_mark", lambda: False)
    elif not hardware._reset_high_water_mark():
        pytest.skip("this system does not let a process reset its high-water mark")
    with hardware.PeakMemory() as large:
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])  # touch every page
        if not kernel_keeps_the_mark:
            large._over.wait(0.1)
        del block
    with hardware.PeakMemory() as small:
        pass
    assert 150_000_000 < large.bytes - small.bytes < 300_000_000


def test_versions_name_what_is_installed():
    assert {"python", "bildung", "torch"} <= set(hardware.versions())
    assert hardware.hardware()["memory_bytes"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to give memory back")
def test_a_peak_does_not_stand_on_what_was_freed_before():
    with hardware.PeakMemory() as before:
        pass
    # Many pieces below the size that is mapped apart, freed but for the last one: glibc keeps the heap below it.
    pieces = [bytearray(100_000) for _ in range(3000)]
    last = pieces[-1]
    del pieces
    with hardware.PeakMemory() as peak:
        assert len(last) == 100_000
    assert peak.bytes < before.bytes + 100e6


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to keep memory")
def test_memory_that_is_kept_is_not_fetched_again():
    """A block above glibc's own limit, made and freed: a page fault for each 4 kB of it, or none."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(64_000_000)[::4096] = bytes(15625)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = 64_000_000 // os.sysconf("SC_PAGESIZE")
    with hardware.keeping_memory():
        faults()
        assert faults() < pages // 100
    assert faults() > pages // 2  # it is over


def test_a_loop_gives_back_what_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes of 10 MB a turn on top of 500 MB, where the least is what a turn needs; steady loops are left alone."""
    held, given_back = {"rss": 500e6}, []

    class Process:
        def memory_info(self) -> Any:
            return SimpleNamespace(rss=held["rss"])

    monkeypatch.setattr(hardware.psutil, "Process", Process)
    monkeypatch.setattr(hardware, "give_back_memory", lambda: (given_back.append(1), held.update(rss=300e6)))
    tidy, most = hardware.Tidy(), 0.0
    for turn in range(100):
        held["rss"] = max(held["rss"], 500e6) + (10e6 if turn < 50 else 0)
        most = max(most, held["rss"])
        tidy()
    assert most <= 510e6 + 10e6 + hardware.Tidy.SLACK + 10e6
    assert 5 <= len(given_back) <= 10


def test_shapes_that_never_come_again_are_forgotten() -> None:
    """Of each shape of a product oneDNN and PyTorch keep the code; 64 are enough for a step (bildung/__init__.py)."""
    assert {os.environ.get(name) for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")} == {"64"}
