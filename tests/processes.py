"""Processes of a test's own that start in no time: forked from one that has imported torch and the package already.

`python -m ...` takes three to four seconds of a core before it does anything. What `torchrun` itself does is tested by
test_parallel.py, and by those that restart ranks or join machines (`make test-all`).
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

START = multiprocessing.get_context("forkserver")
# (An optimizer's first step imports torch._dynamo, another second.)
START.set_forkserver_preload(
    ["bildung.app.live", "bildung.tune.lora", "bildung.align.dpo", "torch._dynamo", "torch.distributed.fsdp"]
)


def two_ranks(main: Callable[[Path], None], out: Path) -> None:
    """main(out) on two ranks that find each other as those of torchrun do. Raises what a rank raised."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet, as torchrun's
    torch.multiprocessing.start_processes(_rank, (main, out, store.port), nprocs=2, start_method="forkserver")


def _rank(rank: int, main: Callable[[Path], None], out: Path, port: int) -> None:
    said: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {name: str(value) for name, value in said.items()}
    torch.set_num_threads(1)
    main(out)
    dist.barrier()
    dist.destroy_process_group()


def torchrun(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun` as users call it, with two processes on this machine, on `words`: its other flags, and what to run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "400"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def command_line(words: list[str], said: Path) -> None:
    """What `bildung WORDS` does, for START.Process; what it says on stderr is written to a file, the rest to nobody."""
    from bildung.app.cli import main

    os.environ["COLUMNS"] = "400"
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(words)
