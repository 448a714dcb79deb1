"""Instruction tuning by low-rank adaptation: LoRA, rsLoRA, DoRA, PiSSA, LoRA+; QLoRA when the source is quantized.

    y = W x + scaling · B A x          W frozen as it is stored; A (rank x in) and B (out x rank) are trained in float32
    scaling = alpha / rank             LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1
    scaling = alpha / sqrt(rank)       rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; does not fade as rank grows
    dora                               the length of each row of W learns apart (model/dora.py)
    initialise: pissa                  A and B start with W's principal directions, not with 0 (model/low_rank.py)
    learning_rate_ratio                LoRA+: B learns so many times faster than A (train/lora_plus.py)

Training starts at the source exactly. The result is an adapter directory in PEFT's format that names its base; of a
PiSSA one of twice the rank, for the base stays as it is. A source that is an adapter itself keeps its deltas frozen
under the new ones; both are saved as one adapter of summed rank. Over a quantized base the matrices are dequantized for
each use (QLoRA: qlora.py).

Defaults differ between peers: peft trains q_proj and v_proj with alpha 8; here every matrix, as the QLoRA paper found
necessary to match full tuning, with alpha = 2 · rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bildung.core.errors import SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.dora import DoRA
from bildung.model.linear import Linear, match_linears
from bildung.model.low_rank import LowRank, principal
from bildung.model.store import LanguageModel, load, write_model
from bildung.train.precision import FROZEN
from bildung.train.training import check_continues_text
from bildung.tune.instruction import Tuning, train, tune

DELTA = "lora"


@settings_class
class Options:
    """What a low-rank delta can be told."""

    rank: int = 8  # inner dimension of the update
    alpha: float = 16.0  # strength: the update is scaled by alpha / rank
    dropout: float = 0.0  # of the update's input, while training
    target: str | tuple[str, ...] = "all"  # which matrices: all, names such as q_proj, or patterns such as *.layers.3.*
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    dora: bool = False  # the length of each row of a matrix learns apart from its direction
    initialise: Literal["uniform", "gaussian", "pissa"] = "uniform"  # A; with pissa A and B from the matrix itself
    seed: int = 0  # decides the first values


@settings_class
class Settings(Tuning, Options):
    """Low-rank adaptation."""

    learning_rate_ratio: float = 1.0  # LoRA+: the learning rate of B over that of A (published: 16)


def lora(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train low-rank deltas on conversations; `out` becomes a PEFT adapter directory.

    Raises NoSuchLinear when a target fits no matrix, SettingsError, DataError, TrainingError.
    """
    check(settings)
    check_ratio(settings.learning_rate_ratio)

    def work(job: Job) -> None:
        # The frozen matrices are only ever multiplied in the precision of the activations: cast once, not every step.
        lm = load(source, FROZEN[settings.precision])
        check_kind(lm)
        add_lora(lm.model, settings)
        adapter_file.check_place(lm.model, lm.base)  # now, and not when hours of training are to be saved
        train(job, lm, settings)
        write_model(lm, job.out)

    return tune("tune lora", source, out, settings, work, force)


def check(settings: Options) -> None:
    """Raises SettingsError for a rank, dropout or alpha out of range; with alpha 0 the update would stay off."""
    if not (math.isfinite(settings.alpha) and settings.alpha > 0):
        raise SettingsError(f"alpha = {settings.alpha} was given; it must be above 0 and finite.")
    if settings.rank < 1 or not 0 <= settings.dropout < 1:
        raise SettingsError(
            f"rank = {settings.rank} and dropout = {settings.dropout} were given; "
            f"rank must be at least 1 and dropout lie in [0, 1)."
        )


def check_ratio(ratio: float) -> None:
    """Raises SettingsError for a ratio of learning rates that is no positive number."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise SettingsError(f"learning_rate_ratio = {ratio} was given; it must be above 0 (LoRA: 1, LoRA+: 16).")


def add_lora(model: Any, settings: Options, delta: str = DELTA) -> dict[str, Linear]:
    """Freeze the model and add one trainable delta, named `delta`, per matching matrix; returns those by name.

    The first values are a function of (seed, matrices matched).
    """
    chosen = chosen_for(model, settings.target, settings.rank)
    scaling = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    generator = torch.Generator().manual_seed(settings.seed)
    model.requires_grad_(False)
    for linear in chosen.values():
        update = LowRank(
            linear.in_features,
            linear.out_features,
            settings.rank,
            scaling,
            settings.dropout,
            generator=generator,
            device=model.device,
        )
        if settings.initialise == "gaussian":
            lora_A = torch.empty(update.lora_A.shape).normal_(0, 1 / settings.rank, generator=generator)
            update.lora_A = nn.Parameter(lora_A.to(model.device))
        elif settings.initialise == "pissa":
            lora_A, lora_B = principal(linear.weight(), settings.rank, settings.seed)
            update.start_at(lora_A / math.sqrt(scaling), lora_B / math.sqrt(scaling))
        linear.deltas[delta] = DoRA(linear, update) if settings.dora else update
    return chosen


def check_kind(lm: LanguageModel) -> None:
    """Raises DataError for a model that learns neither from conversations nor from sources and targets."""
    if not hasattr(lm.model, "given"):
        check_continues_text(lm)


def chosen_for(model: Any, target: str | tuple[str, ...], rank: int) -> dict[str, Linear]:
    """The matrices for a low-rank delta; "all" leaves out vectors (matrices of one row), as of Bahdanau's attention.

    Raises SettingsError for a rank above a matrix's own: more numbers than the matrix has, for nothing.
    """
    chosen = match_linears(model, target)
    if target == "all":
        chosen = {name: one for name, one in chosen.items() if min(one.in_features, one.out_features) > 1}
    name, linear = min(chosen.items(), key=lambda item: min(item[1].in_features, item[1].out_features))
    most = min(linear.in_features, linear.out_features)
    if rank > most:
        raise SettingsError(
            f"rank = {rank} was given, and {name} is a matrix of ({linear.out_features}, {linear.in_features}), whose "
            f"rank is at most {most}. Lower rank, or leave that matrix out of target."
        )
    return chosen
