"""BitFit: instruction tuning of the biases alone (Ben Zaken et al. 2022, ACL, arXiv 2106.10199).

    y = W x + b          every b trains: of the matrices and of the norms, a thousandth of BERT; W stays

Llama, Mistral, T5 and their like have no biases, or next to none, and are refused: adding some would be another method.
The result is an adapter directory with the new biases (model/adapter_bitfit.py); `bildung merge` makes it a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bildung.core.errors import TrainingError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model import adapter_file
from bildung.model.adapter_bitfit import biases
from bildung.model.store import load, write_model
from bildung.train.precision import FROZEN
from bildung.tune.instruction import Tuning, train, tune
from bildung.tune.lora import check_kind


@settings_class
class Options:
    """There is nothing to choose."""


@settings_class
class Settings(Tuning, Options):
    """Training the biases."""

    learning_rate: float = 1e-3  # at the top of the schedule; the paper chose among 1e-4 ... 1e-3


def bitfit(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Train the biases on conversations; `out` becomes an adapter directory (BITFIT).

    Raises TrainingError for a model without biases.
    """

    def work(job: Job) -> None:
        lm = load(source, FROZEN[settings.precision])
        check_kind(lm)
        adapter_file.check_place(lm.model, lm.base)
        add_bitfit(lm.model, settings)
        adapter_file.check_place(lm.model, lm.base)
        train(job, lm, settings)
        write_model(lm, job.out)

    return tune("tune bitfit", source, out, settings, work, force)


def add_bitfit(model: Any, settings: Options) -> dict[str, nn.Parameter]:
    """Freeze the model but for its biases, which are kept in float32 to train; returns them by name."""
    chosen = biases(model)
    if not chosen:
        raise TrainingError(
            f"this {model.config.model_type} has no biases, and BitFit trains nothing else. Use `bildung tune lora` or "
            f"`bildung tune ia3`."
        )
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.data = parameter.data.float()  # an update is smaller than half a step of bfloat16
        parameter.requires_grad_(True)
    model.retrained = tuple(sorted(chosen))
    return chosen
