"""Instruction tuning of every parameter.

What trains is float32 whatever the activations are: at a learning rate of 2e-5 an update is smaller than half the
spacing of bfloat16 (2^-9 of the weight) and would be rounded away. It is saved in the source's type. Memory: 16 bytes
per parameter (weight, gradient, two moments).
"""

from __future__ import annotations

from pathlib import Path

from bildung.core.errors import TrainingError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model.linear import Dense
from bildung.model.store import LanguageModel, load, write_model
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


def check_trainable(lm: LanguageModel, source: Path) -> None:
    """Raises TrainingError for a quantized model or one that carries deltas."""
    linears = lm.model.linears()
    if quantized := [name for name, linear in linears.items() if not isinstance(linear.base, Dense)]:
        kind = type(linears[quantized[0]].base).__name__
        raise TrainingError(
            f"{source} is quantized ({kind}): rounded weights cannot take small updates. Use `bildung tune lora`, "
            f"which trains beside them, or start from the model it was quantized from."
        )
    if any(linear.deltas for linear in linears.values()):
        raise TrainingError(f"{source} is an adapter; `bildung merge` it into its base first, or use `tune lora`.")
