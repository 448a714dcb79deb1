"""A model directory from a run that is not finished: `bildung export RUN OUT`, while it trains or after a kill.

    bildung pretrain causal words lives/small ...          # running, or killed
    bildung export lives/small snapshot                    # its newest checkpoint
    bildung export lives/small snapshot --step 400         # an older one that is still there

The checkpoint is linked into a place of work of its own, with a mark that training ends there; then the run's own
operation finishes the work there as always: last measurements, model directory, record. The run itself is only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tyro

from bildung.core.errors import OutputError, SettingsError
from bildung.core.record import read_record, write_record
from bildung.core.settings import as_dict, resolve, settings
from bildung.core.staging import END, INPUTS, check_name, staging_of
from bildung.core.verbs import find, verbs

# What belongs to the run and not to its result: who shares the work, and who is told of it.
ALONE = {"parallel": "none", "offload": False, "tensor_ranks": None, "tensorboard": None, "wandb": None, "mlflow": None}
ATTEMPTS = 5  # a run that goes on removes old checkpoints: what was chosen may go while it is being linked


@settings
class Command:
    run: tyro.conf.Positional[Path]  # what the run is to make, or its place of work (RUN.partial)
    out: tyro.conf.Positional[Path]  # the model directory to make
    step: int | None = None  # after which step; default: the newest checkpoint
    best: bool = False  # the checkpoint with the lowest held-out loss instead


def command(settings: Command) -> None:
    """`bildung export RUN OUT`."""
    step = export(settings.run.expanduser(), settings.out.expanduser(), settings.step, best=settings.best)
    print(f"{settings.out} is the model after step {step}")


def export(run: Path, out: Path, step: int | None = None, *, best: bool = False) -> int:
    """Make `out` from a checkpoint of `run`; returns its step.

    Raises OutputError when there is no such run or `out` is occupied, SettingsError for a step without a checkpoint.
    """
    work = _place_of(run)
    target = work.with_name(work.name.removesuffix(".partial"))
    check_name(out)
    place = staging_of(out)
    if out.exists() or place.exists() or out.resolve() == target.resolve():
        raise OutputError(f"{out} is there already, or is what the run itself will make; choose another place.")
    inputs = json.loads((work / INPUTS).read_text(encoding="utf-8"))
    verb = find(inputs["operation"], verbs())
    module = verb.load()
    given = resolve(module.Settings, inputs["settings"])
    alone = {name: value for name, value in ALONE.items() if hasattr(given, name)}
    given = dataclasses.replace(given, **alone)
    source = inputs["source"] and Path(os.path.normpath(target / inputs["source"]["path"]))
    try:
        step = _link(work, place, step, best)
        note = f"exported after step {step} of {target.name}, whose training had not ended"
        (place / END).write_text(note, encoding="utf-8")
        (place / INPUTS).write_text(json.dumps({**inputs, "settings": as_dict(given)}), encoding="utf-8")
        record = getattr(module, verb.module.rpartition(".")[2])(source, out, given)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    # The same inputs would make the finished model: this is another.
    record.fingerprint = hashlib.sha256(f"{record.fingerprint} {step}".encode()).hexdigest()
    write_record(out, record)
    return step


def _place_of(run: Path) -> Path:
    """The place of work of a run that can be exported."""
    for place in (run, staging_of(run)):
        if (place / INPUTS).is_file():
            return place
    finished = run.is_dir() and read_record(run) is not None
    why = "is finished, and a model directory already" if finished else "is no training run, nor is there a .partial"
    raise OutputError(f"{run} {why}; give what a run that was killed, or is going on, was to make.")


def _link(work: Path, place: Path, step: int | None, best: bool) -> int:
    """Link a checkpoint, the log and the encoded text of a run into another place of work."""
    for _ in range(ATTEMPTS):
        chosen = _choose(work, step, best)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            shutil.copytree(chosen, place / chosen.name, copy_function=_link_or_copy)
        except shutil.Error:  # gone meanwhile
            continue
        for other in [*work.glob("*.jsonl"), *work.glob(".tokens-*")]:
            if other.is_dir():
                shutil.copytree(other, place / other.name, copy_function=_link_or_copy)
            else:
                shutil.copy2(other, place / other.name)  # the run goes on writing it
        return int(chosen.name.rpartition("-")[2])
    raise OutputError(f"{work} removes its checkpoints faster than they can be read; set keep_last to more than 1.")


def _choose(work: Path, step: int | None, best: bool) -> Path:
    from bildung.train.checkpoint import NUMBERS, all_in, step_of

    there = all_in(work)
    if not there:
        raise OutputError(f"{work} has no checkpoint yet; one is made every `checkpoint_every` steps.")
    if best:
        state = json.loads((there[-1] / NUMBERS).read_text(encoding="utf-8"))["state"]
        step = json.loads(state)["counters"]["best_step"]
    found = [one for one in there if step is None or step_of(one) == step]
    if not found:
        steps = ", ".join(str(step_of(one)) for one in there)
        raise SettingsError(f"{work} has no checkpoint of step {step}; there are: {steps}.")
    return found[-1]


def _link_or_copy(source: str, target: str) -> Any:
    """A second name for the same bytes; a copy where the file systems differ. Finished parts are never changed."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
    return target
