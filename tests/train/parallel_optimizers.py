"""What each rank of test_parallel_optimizers.py runs: some steps with each optimizer that ranks share; rank 0 saves."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from bildung.core import ranks
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import optimizer_from
from bildung.train.parallel import Parallel
from bildung.train.training import Training
from tests.train.parallel_run import KEYS, micro_batch

WAYS = [("muon", "zero1"), ("muon", "zero3"), ("adafactor", "zero1"), ("adamw_8bit", "ddp"), ("adamw_8bit", "zero1")]
STEPS, MICRO_STEPS = 3, 2  # one micro-batch per rank: gradients are added up in one order only


def train(optimizer: str, kind: str) -> dict[str, torch.Tensor]:
    given = Training(optimizer=optimizer, parallel=kind, learning_rate=1e-2, weight_decay=0.1)
    model = build(from_dict(KEYS), seed=3)
    parallel = Parallel(given.parallel, model, clm)
    made = parallel.optimizer(lambda: optimizer_from(model, given))
    fit(model, micro_batch, clm, made, steps=STEPS, micro_steps=MICRO_STEPS, parallel=parallel)
    parallel.finish()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    ranks.join()
    for optimizer, kind in WAYS:
        weights = train(optimizer, kind)
        if ranks.rank() == 0:
            save_file(weights, Path(sys.argv[1]) / f"{optimizer}-{kind}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
