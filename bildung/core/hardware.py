"""What a run ran on and what it took: versions, machine, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import psutil

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is no limit
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
# The packages whose version can change a number in the result.
PACKAGES = ("bildung", "torch", "tokenizers", "safetensors", "gguf")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result; imports none of them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in bytes and, when torch runs on one, the accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"system": platform.system(), "processor": _processor(), "cores": cores}
    found["memory_bytes"] = psutil.virtual_memory().total
    if torch := _torch_on_cuda():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


class PeakMemory:
    """`with PeakMemory() as peak: ...`; afterwards `peak.bytes` is the highest resident memory of this process inside.

    Linux keeps that mark itself (VmHWM) and lets a process set it back: exact and free. Where it cannot be set back
    (other systems, some containers) a thread looks every 20 ms and may miss a shorter peak.
    `peak.accelerator_bytes` is what torch allocated at most on the accelerator, 0 without one.
    """

    bytes: int = 0
    accelerator_bytes: int = 0
    innermost: ClassVar[PeakMemory | None] = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        give_back_memory()
        self._outer, PeakMemory.innermost = PeakMemory.innermost, self
        self._process = psutil.Process()
        self._over = threading.Event()
        self._sampler = None if _reset_high_water_mark() else threading.Thread(target=self._sample, daemon=True)
        if self._sampler:
            self._sampler.start()
        if torch := _torch_on_cuda():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        PeakMemory.innermost = self._outer
        if self._sampler:
            self._over.set()
            self._sampler.join()
        self.bytes = self.so_far()
        if torch := _torch_on_cuda():
            self.accelerator_bytes = torch.cuda.max_memory_allocated()

    def so_far(self) -> int:
        """The highest resident memory since the block began."""
        return self.bytes if self._sampler else _high_water_mark()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            if self._over.wait(0.02):
                return


def peak_so_far() -> int:
    """The highest resident memory since the innermost PeakMemory began; 0 outside of one."""
    return PeakMemory.innermost.so_far() if PeakMemory.innermost is not None else 0


def memory_there_is() -> int:
    """Bytes of memory that this process may have in all: the machine's, a container's, or what `ulimit` leaves."""
    room = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        room = min(room, int(CGROUP.read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        # `ulimit -v` limits addresses, of which a process has more than memory: libraries, stacks, reserved arenas.
        own = psutil.Process().memory_info()
        room = min(room, max(0, limit - (own.vms - own.rss)))
    return room


def give_back_memory() -> None:
    """Return to the system what is free. glibc keeps what an operation freed, 2 GB after a training run here, and the
    next operation's peak would stand on top of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Inside, what is freed stays with the process, for the next tensor of that size; so every step but the first few
    finds its memory there.

    By itself glibc gives blocks above 32 MB, and the free end of its heap, back to the system at once, and fetches the
    next with a page fault for each 4 kB: 230,000 to 420,000 in each step of 2,048 tokens of SmolLM2, a tenth to a
    quarter of its time on a virtual machine. That is switched off here, by mallopt(3) and for all of the process.
    Afterwards what is free is given back, and both thresholds are what glibc makes of them once a block of 32 MB was
    freed. With another C library nothing changes.
    """
    c_library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(c_library, "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**26)
        give_back_memory()


class Tidy:
    """`tidy()` after every turn of a loop: memory is given back once the process holds SLACK more than after two turns.

    glibc before 2.38 cannot put an aligned block into the hole that one of the same size has left. So each turn may
    leave a hole, and a long evaluation grows by a tensor of activations a batch. Giving back after every turn would
    have the next one fetch all its memory anew, which is a third of the time of a small model's step.
    """

    SLACK = 40_000_000

    def __init__(self) -> None:
        self._turns = self._usual = 0

    def __call__(self) -> None:
        now = psutil.Process().memory_info().rss
        self._turns += 1
        if self._turns <= 2:
            self._usual = now
        elif now > self._usual + self.SLACK:
            give_back_memory()
            self._turns = 1  # what it will hold after the next turn is usual from now on


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 sets VmHWM back to the current resident size
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _torch_on_cuda() -> Any:
    """torch, if this process has imported it already and it has started CUDA; never imports or starts anything."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
