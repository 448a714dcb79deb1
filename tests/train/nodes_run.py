"""What each of four ranks of test_nodes.py runs, two on each of two machines that torchrun believes in."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from bildung.core import ranks
from bildung.data.batches import Batch
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw
from bildung.train.parallel import Parallel
from bildung.train.shards import held_bytes
from tests.train.parallel_run import micro_batch
from tests.train.tensor_run import LLAMA, weights

WAYS: dict[str, dict[str, Any]] = {"hybrid": {}, "zero3": {}, "tensor": {"tensor_ranks": 2}}
STEPS, MICRO_STEPS = 3, 8


def slowly(number: int) -> Batch:
    time.sleep(0.3)
    return micro_batch(number)


def train(
    kind: str, out: Path | None = None, steps: int = STEPS, batch_at: Any = micro_batch, **given: Any
) -> tuple[Any, dict[str, Any]]:
    model = build(from_dict(LLAMA), seed=3)
    parallel = Parallel(kind, model, clm, **given)
    optimizer = parallel.optimizer(lambda: adamw(model, 1e-2, weight_decay=0.1, eps=1e-3))
    checkpoints: dict[str, Any] = dict(out=out, checkpoint_every=1 if out else 0)
    fit(model, batch_at, clm, optimizer, steps=steps, micro_steps=MICRO_STEPS, parallel=parallel, **checkpoints)
    measured = {**held_bytes(model, optimizer), "machines": ranks.world_size() // ranks.local_world_size()}
    parallel.finish()
    return model, measured


def main(out: Path, until: int = 0) -> None:
    """All ways; or, with `until`, one long training that may lose a machine."""
    if until:
        model, measured = train("zero3", out / "run", steps=until, batch_at=slowly)
        if ranks.rank() == 0:
            save_file(weights(model), out / "elastic.safetensors")
            (out / "elastic.json").write_text(json.dumps(measured))
    for kind, given in ({} if until else WAYS).items():
        model, measured = train(kind, **given)
        train(kind, out / f"broken off {kind}", steps=2, **given)
        if ranks.rank() == 0:
            save_file(weights(model), out / f"{kind}.safetensors")
            (out / f"{kind}.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
