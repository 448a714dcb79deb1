"""A model as it is looked at: its weights as they are stored, its activations in float32, and numbers.

bfloat16 has three digits. A logit of 17 is then right to 0.06 and a probability to some percent, and what one looks for
is often smaller: of a LoRA of SmolLM2, the mean KL from its base came out as 0.038 nats instead of 0.043.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.model.store import LanguageModel, load


def load_precise(path: str | Path) -> LanguageModel:
    """`load`, and what is narrower than float32 computes in it. The weights, and so their hash, are those stored: what
    belongs to them (a tuned lens) still does."""
    lm = load(path)
    if torch.finfo(lm.model.dtype).bits < 32:
        lm.model.compute_dtype = torch.float32
    return lm


def check_numbers(x: Tensor, what: str) -> None:
    """Raises DataError where a model has computed what is no number: what is worked out from it would be none either,
    or, worse, look like one (a rank, an accuracy)."""
    if not bool(x.isfinite().all()):
        raise DataError(
            f"{what} has values that are no numbers (nan or inf): weights are broken, or too large for {x.dtype}. Load "
            "the model in float32; bildung.observe shows the first site that has them."
        )
