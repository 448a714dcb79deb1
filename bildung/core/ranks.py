"""Which of several processes this is, as `torchrun` says it in the environment. A single process is rank 0 of 1."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from typing import Any

from bildung.core.errors import SettingsError


def rank() -> int:
    """This process's number, from 0. Rank 0 alone writes files and records."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: which of the machine's devices is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def device() -> Any:
    """Where this rank's model goes, a torch.device: what BILDUNG_DEVICE says (cpu, cuda, cuda:1), else the GPU with its
    local number where there is one, else the CPU. Raises SettingsError for a device that is not there."""
    import torch

    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    own = f"cuda:{local_rank()}"
    wanted = os.environ.get("BILDUNG_DEVICE") or (own if there else "cpu")
    if wanted == "cuda":
        wanted = own
    if wanted not in ["cpu", *there]:
        raise SettingsError(
            f"{wanted} is not there for rank {rank()} (BILDUNG_DEVICE, LOCAL_RANK); there is: "
            f"{', '.join(['cpu', *there])}."
        )
    return torch.device(wanted)


def join() -> None:
    """Meet the other ranks, once per process. One that does not come within 30 minutes, or dies, ends the run."""
    import torch
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    on = device()
    if on.type == "cuda":
        torch.cuda.set_device(on)
    patience = datetime.timedelta(minutes=30)
    store, _, _ = next(dist.rendezvous("env://", rank(), world_size(), timeout=patience))
    store = dist.PrefixStore(_name_of_this_attempt(store, patience), store)
    backend = "nccl" if on.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=patience)


def _name_of_this_attempt(store: Any, patience: datetime.timedelta) -> str:
    """A name that all ranks of this attempt agree on, and none of an earlier one knew.

    torchrun keeps its store over a restart (torch 2.13; pytorch #135712): ranks would read the addresses of those that
    died, and wait for them for ever. So each rank says hello by a name of its own, and rank 0 answers that name; it
    goes on answering until all have said that they know, because a hello may be one that was left behind.
    """
    own = uuid.uuid4().hex
    if rank() > 0:
        store.set(f"hello {rank()}", own)
        store.wait([f"welcome {own}"], patience)
        attempt = str(store.get(f"welcome {own}").decode())
        store.set(f"{attempt} knows {rank()}", "")
        return attempt
    until = time.monotonic() + patience.total_seconds()
    waiting = set(range(1, world_size()))
    while waiting and time.monotonic() < until:
        for other in list(waiting):
            if store.check([f"hello {other}"]):
                store.set(f"welcome {store.get(f'hello {other}').decode()}", own)
            if store.check([f"{own} knows {other}"]):
                waiting.remove(other)
        time.sleep(0.01)
    return own


def told(value: Any = None) -> Any:
    """What rank 0 says; every rank calls this, and waits until all have."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    join()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def side_group(seconds: float) -> Any:
    """A group of all ranks for a second thread, so that what it tells does not meet what the first one does; None for a
    single process. Every rank must call this. One that does not answer it within `seconds` is given up."""
    if world_size() == 1:
        return None
    import torch.distributed as dist

    join()
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))


def gathered(value: Any, group: Any = None) -> list[Any]:
    """What every rank says, in their order; every rank calls this, and waits until all have."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    said: list[Any] = [None] * world_size()
    dist.all_gather_object(said, value, group=group)
    return said
