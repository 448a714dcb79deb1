"""Instruction tuning of every parameter.

What trains is float32 whatever the activations are: at a learning rate of 2e-5 an update is smaller than half the
spacing of bfloat16 (2^-9 of the weight) and would be rounded away. It is saved in the source's type. Memory: 16 bytes
per parameter (weight, gradient, two moments).
"""

from __future__ import annotations

from pathlib import Path

from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model.store import load, write_model
from bildung.train.training import check_trainable
from bildung.tune.instruction import Tuning, train, tune


@settings_class
class Settings(Tuning):
    """Full fine-tuning."""

    learning_rate: float = 2e-5  # at the top of the schedule


def full(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train all parameters on conversations; `out` becomes a model directory like the source.

    Raises TrainingError for a quantized source or an adapter, whose weights cannot be trained in place.
    """

    def work(job: Job) -> None:
        stored = load(source)
        check_trainable(stored, source)
        dtype = stored.model.weight_dtype
        del stored
        lm = load(source, "float32")
        lm.model.requires_grad_(True)
        train(job, lm, settings)
        name = str(dtype).removeprefix("torch.")
        job.notes.append(f"trained in float32 with {settings.precision} activations, saved in {name} as the source")
        lm.model.to(dtype)
        write_model(lm, job.out)

    return tune("tune full", source, out, settings, work, force)
