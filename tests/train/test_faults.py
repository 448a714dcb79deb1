"""A rank that dies or hangs, a batch that is too large, a gradient that is a spike."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import torchrun


def faulty(out: Path, kind: str, what: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    words = ("--max-restarts", str(restarts), "-m", "tests.train.faults_run", str(out), kind, what)
    return torchrun(*words, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero3", "ddp", "tensor"])
def test_a_rank_that_dies_is_started_again_and_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    undisturbed = faulty(tmp_path / "undisturbed", kind, "nothing")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    restarted = faulty(tmp_path / "restarted", kind, "dies", restarts=1)
    assert restarted.returncode == 0, restarted.stderr[-3000:]
    assert (tmp_path / "restarted/it happened").exists() and "made 8 lines" in restarted.stdout
    one, other = (tmp_path / name / "model.safetensors" for name in ("undisturbed", "restarted"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("kind", "exchange"),
    [
        pytest.param("ddp", "all_reduce of gradients", marks=pytest.mark.slow),
        pytest.param("tensor", "all_reduce of activations and of their gradients", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_with_the_exchange(tmp_path: Path, kind: str, exchange: str) -> None:
    done = faulty(tmp_path / "out", kind, "hangs")
    assert done.returncode != 0
    said = re.search(
        r"rank 0 says: rank 0 waited in vain at (.*?): rank 1 was last heard of (\d+) s ago, at (.*?)\. ", done.stdout
    )
    assert said is not None, done.stdout + done.stderr[-2000:]
    assert said[1] == f"step 6, micro-batch 0 ({exchange})" and 4 <= int(said[2]) <= 30
    assert said[3] == f"step 6, micro-batch {1 if kind == 'ddp' else 0} ({exchange})"
    assert sorted(path.name for path in (tmp_path / "out/run").glob(".checkpoint-0*"))[-1] == ".checkpoint-00000004"
