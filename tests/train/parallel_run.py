"""What each rank of test_parallel.py runs: the same training in every way to share it; rank 0 saves the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from bildung.core import ranks
from bildung.core.traffic import sent_bytes
from bildung.data.batches import Batch, Example, pad
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.value_head import add_value_head, values
from bildung.train.fit import LossSum, fit, mean_loss
from bildung.train.objectives import clm, hidden, sum_at_targets
from bildung.train.optim import adamw, cosine
from bildung.train.parallel import Kind, Parallel
from bildung.train.shards import held_bytes

KEYS = dict(model_type="llama", vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3)
KEYS |= dict(num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)
KEYS |= dict(rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.1)
MICRO_STEPS, STEPS = 4, 5


def micro_batch(number: int) -> Batch:
    """Two sequences of one length, which differs from micro-batch to micro-batch: counts matter."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(5, 20, (1,), generator=generator))
    rows = torch.randint(0, 61, (2, length), generator=generator).tolist()
    return pad([Example(row, [False] + [True] * (length - 1)) for row in rows], None)


def with_values(model: torch.nn.Module, batch: Batch) -> LossSum:
    """Text, and a value at every token that is to be its place in the row: one pass for both."""
    h_BLD = hidden(model, batch)
    found, off_BL = sum_at_targets(model, h_BLD, batch), values(model, h_BLD) - batch.positions_BL / 10
    return LossSum(found.total + off_BL.square().sum(), found.count)


def train_values(kind: Kind) -> torch.nn.Module:
    model = build(from_dict({**KEYS, "num_hidden_layers": 1}), seed=3)
    add_value_head(model)
    parallel = Parallel(kind, model, with_values)
    optimizer = parallel.optimizer(lambda: adamw(model, 1e-2))
    fit(model, micro_batch, with_values, optimizer, steps=3, micro_steps=2, clip=0.5, parallel=parallel)
    parallel.finish()
    return model


def train(kind: Kind, out: Path | None = None, steps: int = STEPS, lora: bool = False) -> tuple[torch.nn.Module, dict]:
    model = build(from_dict(KEYS), seed=3)
    model.requires_grad_(not lora)
    for block in model.model.layers:  # (one of the two is enough to see that sharing and recomputing go together)
        block.recompute = "blocks" if lora else "none"
    if lora:
        for number, linear in enumerate(match_linears(model, "all").values()):
            generator = torch.Generator().manual_seed(number)
            linear.deltas["x"] = LowRank(linear.in_features, linear.out_features, 2, 1.0, 0.1, generator=generator)
            # With B = 0 the first gradients of A are zeros but for rounding, which Adam would blow up to full steps.
            torch.nn.init.normal_(linear.deltas["x"].lora_B, std=0.3, generator=generator)
    parallel = Parallel(kind, model, clm)
    optimizer = parallel.optimizer(lambda: adamw(model, 1e-2, weight_decay=0.1))
    schedule = cosine(STEPS)

    def evaluate(_: torch.nn.Module) -> dict[str, float]:
        return mean_loss(model, lambda _, batch: parallel.loss(batch), [micro_batch(99)])

    history = fit(
        model,
        micro_batch,
        clm,
        optimizer,
        steps=steps,
        micro_steps=MICRO_STEPS,
        schedule=schedule,
        clip=0.5,
        out=out,
        checkpoint_every=2 if out else 0,
        evaluate=evaluate,
        evaluate_every=1,
        patience=STEPS,  # the best weights are kept on the way and put back at the end
        parallel=parallel,
    )
    measured = {**held_bytes(model, optimizer), "losses": [row["loss"] for row in history.rows if "loss" in row]}
    parallel.finish()
    return model, measured


WIDE = {**KEYS, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "head_dim": 32}


def traffic() -> dict[str, float]:
    """Bytes that a rank sends in a step, on average over the ranks; and numbers sent per number that is exchanged."""
    found: dict[str, float] = {}
    x, half = torch.ones(10**5), torch.ones(10**5 // 2)
    for name, exchange in (
        ("all_reduce", lambda: dist.all_reduce(x)),
        ("all_gather", lambda: dist.all_gather_single(x, half)),
        ("reduce_scatter", lambda: dist.reduce_scatter_single(half, x)),
        ("reduce", lambda: dist.reduce(x, dst=0)),
    ):
        dist.barrier()
        before = sent_bytes()
        for _ in range(4):
            exchange()
        dist.barrier()
        found[name] = mean_of_ranks((sent_bytes() - before) / 4 / (4 * x.numel()))
    for micro_batches in (1, 3):
        for kind in ("ddp", "zero1", "zero2", "zero3"):
            model = build(from_dict(WIDE), seed=3)
            found["parameters"] = sum(p.numel() for p in model.parameters())
            found["in_blocks"] = sum(p.numel() for p in model.model.layers.parameters())
            seen: list[int] = []

            def objective(model: torch.nn.Module, batch: Batch, seen: list[int] = seen) -> LossSum:
                seen.append(sent_bytes())
                return clm(model, batch)

            parallel = Parallel(kind, model, objective)
            optimizer = parallel.optimizer(lambda model=model: adamw(model, 1e-3))
            micro_steps = micro_batches * ranks.world_size()
            fit(model, micro_batch, objective, optimizer, steps=4, micro_steps=micro_steps, parallel=parallel)
            parallel.finish()
            between = (
                seen[3 * micro_batches] - seen[micro_batches]
            ) / 2  # two steps, from their first micro-batches on
            found[f"{kind} {micro_batches}"] = mean_of_ranks(between)
    return found


def mean_of_ranks(number: float) -> float:
    return sum(ranks.gathered(number)) / ranks.world_size()


def main(out: Path) -> None:
    several = ranks.world_size() > 1
    kinds: tuple[Kind, ...] = ("ddp", "zero1", "zero2", "zero3") if several else ("none",)
    for kind in kinds:
        for lora in (False, True):
            model, measured = train(kind, lora=lora)
            if ranks.rank() == 0:
                name = f"{kind}{'_lora' if lora else ''}"
                save_file({n: p.detach().clone() for n, p in model.named_parameters()}, out / f"{name}.safetensors")
                (out / f"{name}.json").write_text(json.dumps(measured))
        if kind != "zero1":
            model = train_values(kind)
            if ranks.rank() == 0:
                save_file(
                    {n: p.detach().clone() for n, p in model.named_parameters()}, out / f"{kind}_values.safetensors"
                )
    # A run that is broken off here is gone on with on another number of ranks.
    if not several:
        for name in ("one_then_zero1", "one_then_zero3"):
            train("none", out / name, steps=3)
        return
    found = traffic()
    if ranks.rank() == 0:
        (out / "traffic.json").write_text(json.dumps(found))
    for kind in kinds:
        train(kind, out / f"broken_off_{kind}", steps=3)
    for name in ("zero1", "zero3"):
        model, _ = train(name, out / f"one_then_{name}")
        if ranks.rank() == 0:
            save_file({n: p.detach().clone() for n, p in model.named_parameters()}, out / f"resumed_{name}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
