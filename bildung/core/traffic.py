"""How much a process has sent to others: what its exchanges with other ranks really cost."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from pathlib import Path

# Where `struct tcp_info` keeps tcpi_bytes_sent and after it tcpi_bytes_retrans, of them those that had to be sent again
# (Linux 4.19 and later, include/uapi/linux/tcp.h).
SENT_AT = 200


def sent_bytes() -> int:
    """Bytes that this process's open TCP connections have carried away, by the kernel's own count.

    gloo's exchanges go this way. NCCL's do not (NVLink, shared memory), and other systems than Linux do not count: 0.
    """
    if sys.platform != "linux":
        return 0
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or no socket
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    if len(told) >= SENT_AT + 16:
                        sent, again = struct.unpack_from("QQ", told, SENT_AT)
                        total += sent - again
    return total
