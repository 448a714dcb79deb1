"""QLoRA: LoRA over a base in 4 bits, with the settings of its paper (Dettmers et al. 2023, arXiv 2305.14314).

    bildung quantize MODEL NF4 --method nf4        1  NF4 with double quantization: 4.127 bits per weight (model/nf4.py)
    bildung tune qlora NF4 OUT --data ...          2  this: `tune lora` with other defaults

    rank 64, alpha 16, dropout 0.1, every matrix       as in the released script for 7B; dropout 0.05 above 13B
    2e-4 (1e-4 above 13B), constant after 3 % warmup   Hugging Face's "constant" has no warmup, whatever is asked of it
    paged AdamW, β₂ 0.999, gradient norm at most 0.3, 16 rows a step

`--reconstruct MODEL`, not in the paper, lets A and B start as what rounding took from MODEL's matrices instead of at 0
(qera.py): of a small model, which 4 bits cost much, that gives back most of it before the first step.

The base is dequantized for each use, matrix by matrix, forwards and backwards; gradients reach A and B alone. The
result is an adapter on the quantized directory. Merging dequantizes; rounding the merged weights to 4 bits again would
round much of the update away, so `bildung quantize` after it measures what that costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from bildung.core.errors import ModelFileError, SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.low_rank import LowRank
from bildung.model.quantized import Nf4
from bildung.model.store import load, write_model
from bildung.train.optim import OptimizerName, ScheduleName
from bildung.train.precision import FROZEN
from bildung.train.training import COMPUTE
from bildung.tune import lora
from bildung.tune.instruction import TrainingData, train, tune
from bildung.tune.qera import start_at_error


@settings_class
class Settings(lora.Settings):
    """LoRA over a 4-bit base."""

    rank: int = 64  # inner dimension of the update
    alpha: float = 16.0  # strength: the update is scaled by alpha / rank
    dropout: float = 0.1  # of the update's input, while training
    learning_rate: float = 2e-4  # at the top of the schedule
    schedule: ScheduleName = "constant"  # course of the learning rate after the warmup
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    clip: float | None = 0.3  # largest norm of the gradient
    optimizer: OptimizerName = "paged_adamw"  # what turns gradients into steps, and how much it keeps
    micro_steps: int = 4  # micro-steps whose gradients are summed into one optimizer step
    reconstruct: Path | None = None  # the model before quantization: start from what was lost (QERA), not from 0
    reconstruct_batches: int = 16  # batches of the training data whose activations weigh what was lost


def qlora(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train low-rank deltas over an NF4 directory; `out` becomes a PEFT adapter directory on it.

    Raises ModelFileError for a base that is not in NF4 and for a model to reconstruct that is not what was quantized,
    else as `tune lora`.
    """
    lora.check(settings)
    lora.check_ratio(settings.learning_rate_ratio)
    if settings.reconstruct is not None:
        check_reconstruction(settings)

    def work(job: Job) -> None:
        lm = load(source, FROZEN[settings.precision])
        lora.check_kind(lm)
        if settings.reconstruct is not None and hasattr(lm.model, "given"):
            raise SettingsError(f"{source} is an encoder-decoder; reconstruct is for models that continue text.")
        stores = [linear.base for linear in lm.model.linears().values()]
        if not any(isinstance(store, Nf4) for store in stores):
            raise ModelFileError(
                f"{source} is not in NF4. `bildung quantize {source} OUT --method nf4` makes such a base; over any "
                f"other `bildung tune lora` trains."
            )
        chosen = lora.add_lora(lm.model, settings)
        adapter_file.check_place(lm.model, lm.base)
        job.measured["base_matrix_bytes"] = sum(store.stored_bytes for store in stores)

        def from_what_was_lost(data: TrainingData) -> TrainingData:
            assert settings.reconstruct is not None
            original = load(settings.reconstruct, FROZEN[settings.precision])
            original.model.compute_dtype = COMPUTE[settings.precision]
            batches = [data.batch_at(number) for number in range(settings.reconstruct_batches)]
            deltas = {name: cast(LowRank, linear.deltas[lora.DELTA]) for name, linear in chosen.items()}
            started = start_at_error(lm.model, original.model, deltas, batches, data.objective)
            job.measured["reconstructed_matrices"] = len(started)
            return data

        train(job, lm, settings, from_what_was_lost if settings.reconstruct is not None else None)
        write_model(lm, job.out)

    companions = {} if settings.reconstruct is None else {"original": settings.reconstruct}
    return tune("tune qlora", source, out, settings, work, force, companions)


def check_reconstruction(settings: Settings) -> None:
    """Raises SettingsError where A and B cannot start from what was lost."""
    if settings.dora or settings.initialise != "uniform":
        raise SettingsError(
            f"reconstruct says where A and B start; it goes neither with dora = {settings.dora} nor with "
            f"initialise = {settings.initialise!r}."
        )
    if settings.reconstruct_batches < 1:
        raise SettingsError(f"reconstruct_batches = {settings.reconstruct_batches} was given; it must be at least 1.")
