"""Four processes on two machines (two torchrun agents that meet at a port of this one), as `torchrun --nnodes 2`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bildung.core.errors import SettingsError
from bildung.train.parallel import Parallel
from tests.train import nodes_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "bildung"]
    command += ["-m", "tests.train.nodes_run", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    agents = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        said = [agent.communicate(timeout=500)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-4000:]
    return out


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
