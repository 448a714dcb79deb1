"""Tokens per second and peak memory of LoRA training, against transformers + peft, on one model in one run.

    python benchmarks/train_lora.py MODEL_DIRECTORY [--rounds 2] [--steps 4]

Rank 16 on all seven kinds of matrices, 4 rows of 512 tokens, every token a target, AdamW. Each measurement is a
process of its own, and the contenders take turns (A B C A B C), so that a slow minute of the machine hits all of them.
The first step of each process warms up and is not counted. The peers: float32 weights under bfloat16 autocast, peft's
usual way, and everything in bfloat16, its leanest. Random tokens: speed only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

CONTENDERS = ("bildung", "peft, autocast", "peft, bf16 weights")
ROWS, LENGTH, RANK, ALPHA, THREADS = 4, 512, 16, 32, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        print(json.dumps(measure(given.contender, given.model, given.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    for number in range(given.rounds):
        for contender in CONTENDERS:
            load = os.getloadavg()[0]
            command = [sys.executable, __file__, given.model, "--steps", str(given.steps), "--contender", contender]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            made = json.loads(output.splitlines()[-1])
            found[contender].append(made)
            print(
                f"round {number + 1}  {contender:20} {made['tokens_per_second']:7.0f} tokens/s   "
                f"peak {made['peak_mb']:6.0f} MB   load {load:.1f}",
                flush=True,
            )
    ours = found["bildung"]
    for contender in CONTENDERS[1:]:
        speed = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, found[contender], strict=True)]
        memory = [a["peak_mb"] / b["peak_mb"] for a, b in zip(ours, found[contender], strict=True)]
        print(
            f"bildung / {contender}: {statistics.median(speed):.2f} x tokens per second "
            f"({min(speed):.2f}..{max(speed):.2f}), {statistics.median(memory):.2f} x peak memory"
        )


def measure(contender: str, path: str, steps: int) -> dict[str, float]:
    """Tokens per second (median over the steps after the first) and peak memory of this process."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokens_BL = torch.randint(100, 40000, (ROWS, LENGTH))
    step = bildung_step(path, tokens_BL) if contender == "bildung" else peft_step(path, tokens_BL, contender)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_second": tokens_BL.numel() / statistics.median(seconds[1:]), "peak_mb": peak, "loss": loss}


def bildung_step(path: str, tokens_BL) -> Callable[[], float]:  # type: ignore[no-untyped-def]
    import torch

    import bildung
    from bildung.data.batches import Batch
    from bildung.train.fit import fit
    from bildung.train.objectives import clm
    from bildung.train.optim import adamw
    from bildung.tune.lora import Settings, add_lora

    model = bildung.load(path, "bfloat16").model
    add_lora(model, Settings(data="none", rank=RANK, alpha=ALPHA))
    every = torch.ones_like(tokens_BL, dtype=torch.bool)
    targets = every.clone()
    targets[:, 0] = False
    positions_BL = torch.arange(LENGTH).expand(ROWS, LENGTH)
    batch = Batch(tokens_BL, targets, every, positions_BL)
    optimizer = adamw(model, 1e-4)
    return lambda: fit(model, lambda n: batch, clm, optimizer, steps=1, clip=1.0).rows[-1]["loss"]


def peft_step(path: str, tokens_BL, contender: str) -> Callable[[], float]:  # type: ignore[no-untyped-def]
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    autocast = contender == "peft, autocast"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if autocast else torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


if __name__ == "__main__":
    main()
