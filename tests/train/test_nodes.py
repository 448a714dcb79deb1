"""Four processes on two machines (two torchrun agents that meet at a port of this one), as `torchrun --nnodes 2`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bildung.core.errors import SettingsError
from bildung.train.parallel import Parallel
from tests.train import nodes_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nodes")
    first, second = start(out, "--nnodes", "2"), start(out, "--nnodes", "2")
    try:
        ended = [agent.wait(timeout=500) for agent in (first, second)]
    finally:
        stop(first, second)
    assert ended == [0, 0], (out / "said").read_text()[-4000:]
    return out


def start(out: Path, *words: str, until: int = 0) -> subprocess.Popen[bytes]:
    """torchrun as on one of several machines, with two processes; all of one `out` meet."""
    port = out / "port"
    if not port.exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port.write_text(str(free.getsockname()[1]))
    command = [sys.executable, "-m", "torch.distributed.run", *words, "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port.read_text()}", "--rdzv_id", "bildung"]
    command += ["-m", "tests.train.nodes_run", str(out), *([str(until)] if until else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (out / "said").open("ab") as said:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)


def stop(*agents: subprocess.Popen[bytes]) -> None:
    """Agents with the processes they started."""
    for agent in agents:
        children = psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []
        for process in (agent, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        agent.wait()


@pytest.mark.slow
def test_a_machine_that_goes_is_done_without(tmp_path: Path) -> None:
    """--nnodes 1:2: when one of two machines dies the other starts again from the last checkpoint, on two ranks."""
    conf = "last_call_timeout=15,keep_alive_interval=2,keep_alive_max_attempt=2"
    words = ("--nnodes", "1:2", "--max-restarts", "3", "--rdzv_conf", conf)
    stays = start(tmp_path, *words, until=12)
    wait_for(lambda: answers(int((tmp_path / "port").read_text())), seconds=60)  # it is the one where all meet
    goes = start(tmp_path, *words, until=12)
    try:
        wait_for(lambda: any((tmp_path / "run").glob(".checkpoint-0*/part-3.safetensors")), seconds=300)
        stop(goes)
        ended = stays.wait(timeout=400)
    finally:
        stop(stays, goes)
    assert ended == 0, (tmp_path / "said").read_text()[-4000:]
    assert json.loads((tmp_path / "elastic.json").read_text())["machines"] == 1
    model, _ = nodes_run.train("none", steps=12)
    together = load_file(tmp_path / "elastic.safetensors")
    for name, weight in nodes_run.weights(model).items():
        torch.testing.assert_close(together[name], weight, atol=1e-6, rtol=0)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
        return True
    return False


def wait_for(found: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", nodes_run.WAYS)
def test_the_same_weights_as_one_process(runs: Path, kind: str) -> None:
    model, _ = nodes_run.train("none")
    together = load_file(runs / f"{kind}.safetensors")
    for name, weight in nodes_run.weights(model).items():
        torch.testing.assert_close(together[name], weight, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", nodes_run.WAYS)
def test_one_process_goes_on_where_four_stopped(runs: Path, kind: str) -> None:
    """Of ranks that hold the same part one has written it."""
    resumed, _ = nodes_run.train("none", runs / f"broken off {kind}")
    model, _ = nodes_run.train("none")
    for name, weight in nodes_run.weights(model).items():
        torch.testing.assert_close(nodes_run.weights(resumed)[name], weight, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_hybrid_shares_within_a_machine(runs: Path) -> None:
    """A half of everything on each rank of a machine, where zero3 holds a quarter."""
    hybrid, zero3 = (json.loads((runs / f"{kind}.json").read_text()) for kind in ("hybrid", "zero3"))
    _, alone = nodes_run.train("none")
    assert hybrid["machines"] == 2
    for part in ("weights", "gradients", "optimizer"):
        assert hybrid[part] == pytest.approx(alone[part] / 2, rel=0.1)
        assert zero3[part] == pytest.approx(alone[part] / 4, rel=0.15)


def test_one_machine_is_not_enough_for_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match="of 4 processes 4 are on this one"):
        Parallel("hybrid", torch.nn.Linear(2, 2), None)
