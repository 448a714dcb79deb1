"""Peak memory is that of the block, not of the process's whole past."""

from __future__ import annotations

import sys

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
