"""What each rank of test_faults.py runs: `faults_run OUT KIND WHAT`; rank 1 dies or hangs once, in its sixth step."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from bildung.core import ranks
from bildung.core.errors import TrainingError
from bildung.data.batches import Batch
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.train.fit import fit
from bildung.train.objectives import clm
from bildung.train.optim import adamw
from bildung.train.parallel import Parallel
from tests.train.parallel_run import KEYS, micro_batch
from tests.train.tensor_run import LLAMA

FAULT_AT, STEPS = 5, 8


def main(out: Path, kind: str, what: str) -> None:
    mark = out / "it happened"

    def batch_at(number: int) -> Batch:
        if ranks.rank() == 1 and number // 2 == FAULT_AT and what != "nothing" and not mark.exists():
            mark.touch()
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return micro_batch(number)

    model = build(from_dict(LLAMA if kind == "tensor" else KEYS), seed=3)
    parallel = Parallel(kind, model, clm)
    optimizer = parallel.optimizer(lambda: adamw(model, 1e-2))
    given = dict(steps=STEPS, micro_steps=2, out=out / "run", checkpoint_every=2, keep_last=2, parallel=parallel)
    try:
        history = fit(model, batch_at, clm, optimizer, **given, rank_timeout=5.0 if what == "hangs" else 60.0)
    except TrainingError as error:
        print(f"rank {ranks.rank()} says: {error}", flush=True)
        os._exit(1)
    parallel.finish()
    if ranks.rank() == 0:
        print(f"made {len(history.rows)} lines", flush=True)
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, out / "model.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
