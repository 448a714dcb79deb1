"""Instruction tuning by low-rank adaptation: LoRA, rsLoRA, and QLoRA when the source is quantized.

    y = W x + scaling · B A x          W frozen as it is stored; A (rank x in) and B (out x rank) are trained in float32
    scaling = alpha / rank             LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1
    scaling = alpha / sqrt(rank)       rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; does not fade as rank grows

B starts at 0, so training starts at the source exactly. The result is an adapter directory in PEFT's format that names
its base. A source that is an adapter itself keeps its deltas frozen under the new ones; both are saved as one adapter
of summed rank. Over a quantized base the matrices are dequantized for each use (QLoRA: Dettmers et al. 2023).

Defaults differ between peers: peft trains q_proj and v_proj with alpha 8; here every matrix, as the QLoRA paper found
necessary to match full tuning, with alpha = 2 · rank.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from bildung.core.errors import SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.linear import Linear, match_linears
from bildung.model.low_rank import LowRank
from bildung.model.store import load, write_model
from bildung.model.transformer import Decoder
from bildung.tune.instruction import Tuning, train, tune

DELTA = "lora"


@settings_class
class Settings(Tuning):
    """Low-rank adaptation."""

    rank: int = 8  # inner dimension of the update
    alpha: float = 16.0  # strength: the update is scaled by alpha / rank
    dropout: float = 0.0  # of the update's input, while training
    target: str | tuple[str, ...] = "all"  # which matrices: all, names such as q_proj, or patterns such as *.layers.3.*
    rslora: bool = False  # scale by alpha / sqrt(rank) instead


def lora(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train low-rank deltas on conversations; `out` becomes a PEFT adapter directory.

    Raises NoSuchLinear when a target fits no matrix, SettingsError, DataError, TrainingError.
    """
    check(settings)

    def work(job: Job) -> None:
        # The frozen matrices are only ever multiplied in the precision of the activations: cast once, not every step.
        lm = load(source, "bfloat16" if settings.precision == "bf16" else "float32")
        adapter_file.check_place(lm.model, lm.base)  # now, and not when hours of training are to be saved
        add_lora(lm.model, settings)
        train(job, lm, settings)
        write_model(lm, job.out)

    return tune("tune lora", source, out, settings, work, force)


def check(settings: Settings) -> None:
    """Raises SettingsError for a rank, dropout or alpha out of range; with alpha 0 the update would stay off."""
    if not (math.isfinite(settings.alpha) and settings.alpha > 0):
        raise SettingsError(f"alpha = {settings.alpha} was given; it must be above 0 and finite.")
    if settings.rank < 1 or not 0 <= settings.dropout < 1:
        raise SettingsError(
            f"rank = {settings.rank} and dropout = {settings.dropout} were given; "
            f"rank must be at least 1 and dropout lie in [0, 1)."
        )


def add_lora(model: Decoder, settings: Settings, delta: str = DELTA) -> dict[str, Linear]:
    """Freeze the model and add one trainable LowRank, named `delta`, per matching matrix; returns those by name.

    The first values are a function of (seed, matrices matched).
    """
    chosen = match_linears(model, settings.target)
    scaling = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    generator = torch.Generator().manual_seed(settings.seed)
    model.requires_grad_(False)
    for linear in chosen.values():
        linear.deltas[delta] = LowRank(
            linear.in_features,
            linear.out_features,
            settings.rank,
            scaling,
            settings.dropout,
            generator=generator,
            device=model.device,
        )
    return chosen
