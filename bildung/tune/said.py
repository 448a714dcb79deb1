"""Tuning a model by very few numbers: intrinsic dimension (Aghajanyan, Zettlemoyer & Gupta 2021, arXiv 2012.13255).

    W_i + λ_i · P_i θ          θ is shared by all matrices, P_i is random and fixed (model/intrinsic.py)

`dimension` counts everything that trains: the m numbers λ (one per matrix) are taken out of it, so θ has dimension - m.
How small it can be says how simple the task is for this model, not how good the method is: `bildung tune
intrinsic_dimension` searches for the smallest that is enough.

The paper projects every parameter tensor; here the weight matrices (`target`), not norms, biases and embeddings. Each
step costs two Walsh-Hadamard transforms per matrix, more than the model itself when rows are short: a measuring
instrument, no cheap way to tune.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bildung.core.errors import SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.intrinsic import Intrinsic, seed_of
from bildung.model.linear import Linear, match_linears
from bildung.model.store import load, write_model
from bildung.model.transformer import Decoder
from bildung.train.precision import FROZEN
from bildung.tune.instruction import Tuning, train, tune

DELTA = "intrinsic"


@settings_class
class Settings(Tuning):
    """Tuning in a random subspace."""

    dimension: int = 1000  # numbers that train, in all
    scaled: bool = True  # one number per matrix scales its share (SAID); --no-scaled: none (DID)
    target: str | tuple[str, ...] = "all"  # which matrices: all, names such as q_proj, or patterns such as *.layers.3.*
    learning_rate: float = 1e-2  # at the top of the schedule


def said(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train `dimension` numbers on conversations; `out` becomes an adapter directory of θ, λ and a seed.

    Raises NoSuchLinear when a target fits no matrix, SettingsError for too few numbers, DataError, TrainingError.
    """

    def work(job: Job) -> None:
        lm = load(source, FROZEN[settings.precision])
        adapter_file.check_place(lm.model, lm.base)
        add_intrinsic(lm.model, settings)
        train(job, lm, settings)
        write_model(lm, job.out)

    return tune("tune said", source, out, settings, work, force)


def add_intrinsic(model: Decoder, given: Settings) -> dict[str, Linear]:
    """Freeze the model and add an Intrinsic to every matching matrix, all of one θ = 0; returns those by name.

    Raises SettingsError when nothing is left of `dimension` after one number per matrix, or other deltas are there.
    """
    chosen = match_linears(model, given.target)
    free = given.dimension - (len(chosen) if given.scaled else 0)
    if free < 1:
        raise SettingsError(
            f"dimension = {given.dimension} leaves nothing for θ: {len(chosen)} matrices take one number each. Give "
            f"more, fewer matrices (target), or scaled = false."
        )
    if carrying := [name for name, linear in chosen.items() if linear.deltas]:
        raise SettingsError(f"{carrying[0]} carries a delta already, and two kinds of adapter are not saved as one.")
    model.requires_grad_(False)
    theta_d = nn.Parameter(torch.zeros(free, device=model.device))
    for name, linear in chosen.items():
        shape = (linear.out_features, linear.in_features)
        linear.deltas[DELTA] = Intrinsic(theta_d, shape, seed_of(given.seed, name), given.scaled)
    return chosen
