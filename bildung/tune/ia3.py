"""(IA)³: instruction tuning by rescaling keys, values and the feed-forward's inside.

Liu et al. 2022 (arXiv 2205.05638). One factor per feature is all that trains, 1 at the start (model/ia3.py); the result
is a PEFT adapter directory of a few kilobytes. The paper's settings for T0: learning rate 3e-3, 1000 steps of 8
examples. So large a rate can unteach a model what it knew: peft's benchmark found 16 times the forgetting of its lower
rate. The card before and after shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bildung.core.errors import SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.ia3 import Rescale, Side
from bildung.model.linear import Linear, match_linears
from bildung.model.store import load, write_model
from bildung.train.precision import FROZEN
from bildung.tune.instruction import Tuning, train, tune
from bildung.tune.lora import check_kind


@settings_class
class Options:
    """What is rescaled."""

    outputs: tuple[str, ...] = ("k_proj", "v_proj")  # matrices whose output is scaled
    inputs: tuple[str, ...] = ("down_proj",)  # matrices whose input is scaled


@settings_class
class Settings(Tuning, Options):
    """Rescaling activations."""

    learning_rate: float = 3e-3  # at the top of the schedule


def ia3(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train factors of activations on conversations; `out` becomes a PEFT adapter directory (IA3).

    Raises NoSuchLinear when a name fits no matrix, SettingsError, DataError, TrainingError.
    """

    def work(job: Job) -> None:
        lm = load(source, FROZEN[settings.precision])
        check_kind(lm)
        add_ia3(lm.model, settings)
        adapter_file.check_place(lm.model, lm.base)
        train(job, lm, settings)
        write_model(lm, job.out)

    return tune("tune ia3", source, out, settings, work, force)


def add_ia3(model: Any, settings: Options, delta: str = "ia3") -> dict[str, Linear]:
    """Freeze the model and add one trainable Rescale, named `delta`, per matching matrix; returns those by name."""
    chosen: dict[str, tuple[Linear, Side]] = {}
    sides: tuple[tuple[Side, tuple[str, ...]], ...] = (("output", settings.outputs), ("input", settings.inputs))
    for side, names in sides:
        for name, linear in match_linears(model, names).items() if names else ():
            if name in chosen:
                raise SettingsError(f"{name} stands in outputs and in inputs; a matrix is scaled on one side.")
            chosen[name] = linear, side
    if not chosen:
        raise SettingsError("outputs and inputs are both empty: nothing would be trained.")
    model.requires_grad_(False)
    for linear, side in chosen.values():
        features = linear.out_features if side == "output" else linear.in_features
        linear.deltas[delta] = Rescale(features, side, device=model.device)
    return {name: linear for name, (linear, _) in chosen.items()}
