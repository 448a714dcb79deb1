"""The training loop, and the only optimizer step of the package.

    for each step:   gradients of Σ loss over the micro-steps   /   Σ count          (one division, at the end)
                     clip, set the learning rate, optimizer step, one line of metrics.jsonl

An objective returns a SUM and a COUNT, never a mean: a mean of micro-batch means weighs a token of a short batch more
than one of a long batch (transformers #34191; trainers differed by percents for years). So micro_steps=4 with a quarter
of the batch is the same step, and so is the same batch spread over several processes.

Everything random is a function of (seed, step): batch n comes from `batches(n)`, and the random generators are set anew
for each step. A run that is killed and resumed is therefore the run that was not, bit for bit on the same machine.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bildung.core import ranks
from bildung.core.errors import TrainingError
from bildung.core.progress import progress
from bildung.train import checkpoint
from bildung.train.history import METRICS, History, Log, read_rows
from bildung.train.interrupt import CtrlC
from bildung.train.loss import LossSum, Objective
from bildung.train.optim import Schedule, constant
from bildung.train.overfitting import newly_overfitting
from bildung.train.parallel import Parallel, whole

__all__ = ["METRICS", "History", "LossSum", "Objective", "fit", "mean_loss"]


def fit(
    model: nn.Module,
    batches: Callable[[int], Any],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    micro_steps: int = 1,
    schedule: Schedule | None = None,
    clip: float | None = None,
    seed: int = 0,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    patience: int | None = None,
    out: Path | None = None,
    checkpoint_every: int = 0,
    tensorboard: Path | None = None,
    title: str = "training",
    parallel: Parallel | None = None,
    carried: dict[str, Tensor] | None = None,
) -> History:
    """Train the parameters that require gradients for `steps` optimizer steps; the model is left in evaluation mode.

    batches      batch number -> batch; step s uses numbers s * micro_steps ... (s + 1) * micro_steps - 1
    schedule     step -> factor of the learning rates that the optimizer was made with
    clip         largest allowed global gradient norm (the norm before clipping is logged)
    evaluate     called before the first and after every `evaluate_every` steps; its "loss" decides early stopping
    patience     stop after that many evaluations without a lower loss, and put the best weights back
    out          metrics.jsonl is written here, and checkpoints every `checkpoint_every` steps and after the last. A
                 checkpoint found here is gone on from. Ctrl-C finishes the step, leaves a checkpoint, and stops.
    parallel     how several ranks share the work: made before the optimizer (see training.run). A step then has
                 `micro_steps` micro-batches in all, and checkpoints fit any number of ranks
    carried      tensors that the objective hands from each step to the next (see carry.py), kept in checkpoints
    Raises TrainingError when a step has no target or its loss or gradient is not a finite number.
    """
    if steps < 1 or micro_steps < 1:
        raise TrainingError(f"steps = {steps} and micro_steps = {micro_steps} were given; both must be at least 1.")
    if patience is not None and (evaluate is None or not evaluate_every):
        raise TrainingError("patience needs a held-out loss to watch: give evaluate and evaluate_every.")
    parallel = parallel or Parallel("none", model, objective)
    run = _Run(model, batches, parallel, optimizer, micro_steps, schedule or constant(), clip, seed)
    history, best = _resume(out, model, optimizer, carried)

    def look(step: int) -> dict[str, float]:
        """Held-out metrics of the model as it is; where the loss is the lowest so far, its weights are kept."""
        if evaluate is None:
            return {}
        found = {f"held_out_{name}": value for name, value in evaluate(model).items()}
        loss = found["held_out_loss"]
        if history.best_loss is None or loss < history.best_loss:
            history.best_loss, history.best_step, history.waited = loss, step, 0
            if patience is not None:
                best.update({name: tensor.detach().clone() for name, tensor in checkpoint.trained(model).items()})
        else:
            history.waited += 1
        return found

    def keep() -> None:
        if out is not None and checkpoint_every:
            checkpoint.save(out, history.steps, model, optimizer, history.counters(), best, carried)

    devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda][:1]
    with (
        torch.random.fork_rng(devices=devices),
        Log(*((out, tensorboard) if ranks.rank() == 0 else (None, None)), history) as log,
        progress(title, steps, done=history.steps) as bar,
        CtrlC() as ctrl_c,
    ):
        resumed_at, earlier, start = history.steps, history.seconds, time.monotonic()
        if history.steps == 0 and evaluate is not None:
            log.add({"step": 0, **look(0)})
        while history.steps < steps and (patience is None or history.waited < patience):
            began = time.monotonic()
            row = run.step(history.steps)
            history.steps += 1
            history.tokens_seen += row["tokens"]
            history.trained_tokens += row["targets"]
            row["tokens_per_second"] = row["tokens"] / (time.monotonic() - began)
            if evaluate_every and history.steps % evaluate_every == 0:
                row |= look(history.steps)
            history.seconds = row["seconds"] = earlier + time.monotonic() - start
            log.add(row)
            if ranks.rank() == 0 and (said := newly_overfitting(history.rows)):
                print(f"{title}: {said}", file=sys.stderr)
            bar.advance(1, tokens=row["tokens"], loss=row["loss"])
            if ctrl_c.pressed:
                keep()
                raise KeyboardInterrupt
            if checkpoint_every and history.steps % checkpoint_every == 0:
                keep()
        if history.steps > resumed_at and history.steps % max(checkpoint_every, 1):
            keep()
    if best:
        checkpoint.put(model, best)
    model.eval()
    return history


def _resume(
    out: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, carried: dict[str, Tensor] | None
) -> tuple[History, dict[str, Tensor]]:
    """What an interrupted run left in `out`: its history and its best weights; both empty at a start."""
    if out is None:
        return History(), {}
    out.mkdir(parents=True, exist_ok=True)
    found = checkpoint.load(out, model, optimizer, carried)
    if found is None:
        return History(), {}
    counters, best = found
    return History(rows=read_rows(out, counters["steps"]), **counters), best


@dataclasses.dataclass
class _Run:
    model: nn.Module
    batches: Callable[[int], Any]
    parallel: Parallel
    optimizer: torch.optim.Optimizer
    micro_steps: int
    schedule: Schedule
    clip: float | None
    seed: int

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; its line of the log."""
        self.model.train()
        torch.manual_seed(random.Random(f"{self.seed} {step}").getrandbits(63))
        self.optimizer.zero_grad(set_to_none=True)
        device = next(self.model.parameters()).device
        total, count, tokens, targets = 0.0, 0, 0, 0
        metrics: dict[str, float] = {}
        mine = self.parallel.mine(self.micro_steps)
        for micro in mine:
            batch = self.batches(step * self.micro_steps + micro).to(device)
            with self.parallel.micro(last=micro == mine[-1]):
                loss = self.parallel.loss(batch)
                value = float(loss.total.detach())
                if not math.isfinite(value):
                    raise TrainingError(
                        f"step {step + 1}, micro-batch {micro}: the loss is {value}. Lower learning_rate, set clip, or "
                        f"use precision fp32; what was learned up to the last checkpoint is kept."
                    )
                if loss.count or self.parallel.world > 1:  # with others, everybody takes part in every exchange
                    loss.total.backward()
            total, count = total + value, count + loss.count
            tokens, targets = tokens + batch.num_tokens, targets + batch.num_targets
            for name, summed in loss.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + float(summed)
        sums = self.parallel.summed({"loss": total, "count": count, "tokens": tokens, "targets": targets, **metrics})
        total, count = sums.pop("loss"), int(sums.pop("count"))
        tokens, targets = int(sums.pop("tokens")), int(sums.pop("targets"))
        if count == 0:
            raise TrainingError(f"step {step + 1}: no token of its batch is a target, nothing can be learned from it.")
        norm = self._scale_gradients(step, count)
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["taken"] = group["initial_lr"] * factor, step
        self.optimizer.step()
        row = {"step": step + 1, "loss": total / count, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm}
        means = {name: summed / count for name, summed in sums.items()}
        return {**row, **means, "tokens": tokens, "targets": targets}

    def _scale_gradients(self, step: int, count: int) -> float:
        """Turn the gradient of the sum into that of the mean, clipped; returns its norm before clipping."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale = self.parallel.gradient_scale / count
        norm = float(whole(torch.nn.utils.get_total_norm(gradients))) * scale
        if not math.isfinite(norm):
            raise TrainingError(f"step {step + 1}: the gradient norm is {norm}; lower learning_rate or use fp32.")
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for gradient in gradients:
            gradient.mul_(factor * scale)
        return norm


def mean_loss(model: nn.Module, objective: Objective, batches: Iterable[Any]) -> dict[str, float]:
    """{"loss": mean, ...} of an objective over batches, without dropout and gradients: the `evaluate` of `fit`."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count = 0
    with torch.no_grad():
        for batch in batches:
            found = objective(model, batch.to(device))
            count += found.count
            for name, summed in {"loss": found.total, **found.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(summed)
    model.train(was_training)
    if count == 0:
        raise TrainingError("the held-out data has no target token; give other data to evaluate on.")
    return {name: summed / count for name, summed in sums.items()}
