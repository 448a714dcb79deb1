"""How much memory there is to be used: of a device, and by this process."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is no limit


def room_of(device: torch.device) -> int:
    """Bytes of a device's memory, or what this process may have of the machine's in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    room = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        room = min(room, int(CGROUP.read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        # `ulimit -v` limits addresses, of which a process has more than memory: libraries, stacks, reserved arenas.
        own = psutil.Process().memory_info()
        room = min(room, max(0, limit - (own.vms - own.rss)))
    return room
