"""In which numbers a model is trained.

    precision   activations   products      what trains                    what is frozen
    bf16        bfloat16      bfloat16      float32 masters, or bfloat16   bfloat16         the default
    fp16        float16       float16       float32 masters                float16          the loss is scaled
    fp8         bfloat16      8 bits        float32 masters                bfloat16         GPUs that have it (fp8.py)
    fp32        float32       float32       float32                        float32

No autocast: a model casts its weights to `compute_dtype`, and norms, softmax and the loss are float32 in any case. What
trains is float32, because a small update of a bfloat16 rounds to nothing; `weights` says how to keep it in bfloat16 all
the same (rounding.py). float16 has three bits more than bfloat16 and a much smaller range: gradients below 6e-8 would
be 0, so the loss is scaled (loss_scale.py).
"""

from __future__ import annotations

from typing import Literal

import torch

from bildung.core.errors import SettingsError

Precision = Literal["bf16", "fp16", "fp8", "fp32"]

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""The type activations run in."""

FROZEN = {"bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16", "fp32": "float32"}
"""The type to load weights in that do not train: they are only ever multiplied, so they are cast once."""


def check_precision(precision: Precision, weights: str) -> None:
    """Raises SettingsError for settings that exclude each other."""
    if precision == "fp16" and weights != "fp32":
        raise SettingsError(
            f"precision = 'fp16' with weights = {weights!r}: rounding is for weights in bfloat16; use precision bf16."
        )
