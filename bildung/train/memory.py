"""How much memory a device has to be used."""

from __future__ import annotations

import torch

from bildung.core.hardware import memory_there_is


def room_of(device: torch.device) -> int:
    """Bytes of a device's memory, or what this process may have of the machine's in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_there_is()
