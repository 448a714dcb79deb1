"""Optimizers on two processes: equal to one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import torchrun
from tests.train import parallel_optimizers

pytestmark = pytest.mark.slow  # AdamW on two processes: test_parallel.py


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that two processes ended with."""
    out = tmp_path_factory.mktemp("together")
    done = torchrun("-m", "tests.train.parallel_optimizers", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("optimizer, kind", parallel_optimizers.WAYS)
def test_the_same_weights_as_one_process(together: Path, optimizer: str, kind: str) -> None:
    """Muon's products are in bfloat16, which turns a gradient's last bit into a hundredth of its step (0.01)."""
    alone = parallel_optimizers.train(optimizer, "none")
    shared = load_file(together / f"{optimizer}-{kind}.safetensors")
    assert set(alone) == set(shared)
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, atol=5e-4 if optimizer == "muon" else 1e-6, rtol=0)


def test_how_muon_is_shared_changes_nothing(together: Path) -> None:
    """zero1 gives each rank whole matrices, zero3 a part of each, which Muon gathers."""
    whole, parts = (load_file(together / f"muon-{kind}.safetensors") for kind in ("zero1", "zero3"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-6, rtol=0)
