"""The training loop: steps, evaluations, checkpoints, log.

    for each step:   step.py makes it            batches come from a thread, one ahead (ahead.py)
                     evaluate, if it is due      the best so far gets a checkpoint of its own
                     one line of metrics.jsonl   and to whoever watches (watch.py)
                     checkpoint, if it is due    written by a thread (checkpoint.py)

Everything random is a function of (seed, step): batch n comes from `batches(n)`, and the random generators are set
anew for each step. What a step decides by the steps before it (spikes, float16's loss scale) it reads from the log. A
run that is killed and resumed is therefore the run that was not, bit for bit on the same machine.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bildung.core import ranks
from bildung.core.errors import TrainingError
from bildung.core.hardware import Tidy, keeping_memory
from bildung.core.progress import progress
from bildung.core.staging import END
from bildung.train.ahead import ahead
from bildung.train.checkpoint import Checkpoints, put, trained
from bildung.train.finite import not_finite, spoiled
from bildung.train.history import METRICS, History, Log, read_rows
from bildung.train.interrupt import CtrlC
from bildung.train.loss import LossSum, Objective
from bildung.train.optim import Schedule, constant
from bildung.train.overfitting import newly_overfitting
from bildung.train.parallel import Parallel
from bildung.train.roll_call import answered
from bildung.train.step import NONE_KEPT, Stepper
from bildung.train.watch import Watch

__all__ = ["METRICS", "History", "LossSum", "Objective", "fit", "mean_loss"]

Also = tuple[int, Callable[[Any], Mapping[str, Any]]]  # every so many steps, of the model: more for the log
STOP = "stop"  # with this key among what it adds, the run ends


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
    spike: float | None = None,
    scale_loss: bool = False,
    seed: int = 0,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    also: Sequence[Also] = (),
    patience: int | None = None,
    out: Path | None = None,
    checkpoint_every: int = 0,
    keep_last: int = 1,
    async_checkpoints: bool = True,
    watch: Sequence[Watch] = (),
    full_speed: float | None = None,
    title: str = "training",
    parallel: Parallel | None = None,
    rank_timeout: float = 1800.0,
    carried: dict[str, Tensor] | None = None,
) -> History:
    """Train the parameters that require gradients for `steps` optimizer steps; the model is left in evaluation mode.

    batches      batch number -> batch; step s uses numbers s * micro_steps ... (s + 1) * micro_steps - 1. Called in a
                 thread, one batch ahead
    schedule     step -> factor of the learning rates that the optimizer was made with
    clip         largest allowed global gradient norm (the norm before clipping is logged)
    spike        skip a step whose gradient norm is above so many times the median of the last 50
    scale_loss   for float16 (see loss_scale.py)
    evaluate     called before the first step, after every `evaluate_every` steps and after the last; its "loss" decides
                 early stopping
    also         (every so many steps, what then adds to the log: samples, cards); after the last step too. STOP among
                 what is added ends the run
    patience     stop after that many evaluations without a lower loss, and put the best weights back
    out          metrics.jsonl is written here, and checkpoints every `checkpoint_every` steps, where the held-out loss
                 is the lowest so far, and after the last. A checkpoint found here is gone on from. Ctrl-C finishes the
                 step, leaves a checkpoint, and stops.
    keep_last    newest checkpoints that are kept, beside the best
    watch        who else gets the log (see watch.py)
    full_speed   tokens per second at which the device would do nothing but multiply; what share of it is reached is
                 logged as flops_utilisation
    parallel     how several ranks share the work: made before the optimizer (see training.run). A step then has
                 `micro_steps` micro-batches in all, and checkpoints fit any number of ranks
    rank_timeout seconds after which a rank that does not answer is given up (see roll_call.py)
    carried      tensors that the objective hands from each step to the next (see carry.py), kept in checkpoints
    Raises TrainingError when a step has no target, its loss, gradient or update is not a finite number, it does not fit
    into memory, or a rank is missing.
    """
    if steps < 1 or micro_steps < 1:
        raise TrainingError(f"steps = {steps} and micro_steps = {micro_steps} were given; both must be at least 1.")
    if patience is not None and (evaluate is None or not evaluate_every):
        raise TrainingError(
            f"patience = {patience} needs a held-out loss to watch: keep rows out of training (held_out), and set "
            f"evaluate_every."
        )
    parallel = parallel or Parallel("none", model, objective)
    mine = parallel.mine(micro_steps)
    saved = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        background = async_checkpoints and checkpoint_every > 0
        saved = Checkpoints(
            out, model, optimizer, carried, keep_last=keep_last, in_background=background, rank_timeout=rank_timeout
        )
    history, best = _resume(out, saved)
    if out is not None and (out / END).exists():
        history.notes.append((out / END).read_text(encoding="utf-8"))
        model.eval()
        return history

    def look(step: int) -> dict[str, float]:
        """Held-out metrics of the model as it is; where the loss is the lowest so far, its weights are kept."""
        if evaluate is None:
            return {}
        found = {f"held_out_{name}": value for name, value in evaluate(model).items()}
        parallel.at_rest()
        loss = found["held_out_loss"]
        if history.best_loss is None or loss < history.best_loss:
            history.best_loss, history.best_step, history.waited = loss, step, 0
            if patience is not None:
                best.update({name: tensor.detach().clone() for name, tensor in trained(model).items()})
        else:
            history.waited += 1
        return found

    kept = -1  # the step that was kept last: the same one twice would meet itself on other ranks

    def keep() -> None:
        nonlocal kept
        if saved is not None and checkpoint_every and kept != history.steps:
            kept = history.steps
            log.to_disk()
            goes_on = history.steps < steps and not run.stopped
            saved.save(history.steps, history.counters(), best, goes_on=goes_on)

    def what_is_kept() -> str:
        newest = saved.newest() if saved is not None else None
        return NONE_KEPT if newest is None else f"What was learned up to step {newest} is kept."

    def what_led_here() -> str:
        """The same, after a step whose numbers are not finite."""
        again = " Going on from it with the same settings leads here again."
        return what_is_kept() + (again if saved is not None and saved.newest() == history.steps else "")

    numbers = (step * micro_steps + micro for step in range(history.steps, steps) for micro in mine)
    devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda][:1]
    first = ranks.rank() == 0
    with (
        torch.random.fork_rng(devices=devices),
        keeping_memory(),
        saved or contextlib.nullcontext(),
        Log(out if first else None, history, [one(history) for one in watch] if first else ()) as log,
        progress(title, steps, done=history.steps, console=None if first else Console(quiet=True)) as bar,
        CtrlC() as ctrl_c,
        contextlib.closing(ahead(batches, numbers)) as coming,
        answered(datetime.timedelta(seconds=rank_timeout), what_is_kept),
    ):
        run = Stepper(
            model, coming, parallel, optimizer, micro_steps, schedule or constant(), clip, seed, what_led_here
        )
        run.spike, run.scale_loss, run.ctrl_c = spike, scale_loss, ctrl_c
        resumed_at, earlier, start, tidy = history.steps, history.seconds, time.monotonic(), Tidy()
        if history.steps == 0 and evaluate is not None:
            log.add({"step": 0, **look(0)})
        while (
            history.steps < steps
            and (patience is None or history.waited < patience)
            and not (history.rows and history.rows[-1].get(STOP))
        ):
            began = time.monotonic()
            row = run.take(history.steps, history.rows)
            tidy()
            history.steps += 1
            history.tokens_seen += row["tokens"]
            history.trained_tokens += row["targets"]
            row["tokens_per_second"] = row["tokens"] / (time.monotonic() - began)
            if full_speed:
                row["flops_utilisation"] = row["tokens_per_second"] / full_speed
            if history.steps == steps or (evaluate_every and history.steps % evaluate_every == 0):
                row |= look(history.steps)
            for every, look_at in also:
                if history.steps % every == 0 or history.steps == steps:
                    row |= look_at(model)
            history.seconds = row["seconds"] = earlier + time.monotonic() - start
            row["seconds_left"] = (time.monotonic() - start) / (history.steps - resumed_at) * (steps - history.steps)
            log.add(row)
            if first:
                _say(title, row, history)
            bar.advance(1, tokens=row["tokens"], loss=row["loss"], **_share(row))
            if run.stopped:
                keep()
                raise KeyboardInterrupt(f"Step {history.steps} is in a checkpoint." if checkpoint_every else "")
            if checkpoint_every and (history.steps % checkpoint_every == 0 or history.best_step == history.steps):
                keep()
        if history.steps > resumed_at and history.steps % max(checkpoint_every, 1):
            keep()
        if history.steps > resumed_at and not best:
            wrong = sorted({name for names in ranks.gathered(not_finite(trained(model))) for name in names})
            if wrong:
                raise TrainingError(spoiled(history.steps, wrong, saved.newest() if saved is not None else None))
    if best:
        put(model, best)
    model.eval()
    return history


def _resume(out: Path | None, saved: Checkpoints | None) -> tuple[History, dict[str, Tensor]]:
    """What an interrupted run left: its history and its best weights; both empty at a start."""
    if out is None or saved is None:
        return History(), {}
    counters, best, notes = saved.load()
    history = History() if counters is None else History(rows=read_rows(out, counters["steps"]), **counters)
    history.notes += notes
    return history, best


def _say(title: str, row: Mapping[str, Any], history: History) -> None:
    """What a step gives reason to say aloud."""
    if "spike" in row:
        said = f"the gradient norm {row['grad_norm']:.3g} is {row['spike']:.3g} times the median; the step is skipped"
        print(f"{title}: step {row['step']}: {said}", file=sys.stderr)
    if said_of_fit := newly_overfitting(history.rows):
        print(f"{title}: {said_of_fit}", file=sys.stderr)


def _share(row: Mapping[str, Any]) -> dict[str, str]:
    return {"MFU": f"{row['flops_utilisation']:.0%}"} if "flops_utilisation" in row else {}


def mean_loss(model: nn.Module, objective: Objective, batches: Iterable[Any]) -> dict[str, float]:
    """{"loss": mean, ...} of an objective over batches, without dropout and gradients: the `evaluate` of `fit`."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count, tidy = 0, Tidy()
    with torch.no_grad():
        for batch in batches:
            found = objective(model, batch.to(device))
            count += found.count
            for name, summed in {"loss": found.total, **found.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(summed)
            tidy()
    model.train(was_training)
    if count == 0:
        raise TrainingError("the held-out data has no target token; give other data to evaluate on.")
    return {name: summed / count for name, summed in sums.items()}
