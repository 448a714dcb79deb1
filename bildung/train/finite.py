"""Weights that an update made infinite or no number: which they are, and what to say.

The loss and the gradient of a step are looked at before its update is made (step.py), and are finite then; the update
may still be too large for the type that the weights are kept in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bildung.train.shards import local


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold an infinity or a NaN, as far as this rank's parts of them say."""
    return [name for name, tensor in tensors.items() if not _is_finite(local(tensor).detach())]


def _is_finite(tensor: Tensor) -> bool:
    # One such value makes the sum one too, which is quicker than looking at each; so may many large finite ones.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def spoiled(step: int, names: Sequence[str], newest: int | None) -> str:
    """What to say of them. newest: the step of the newest checkpoint."""
    shown = ", ".join(name.removeprefix("model.model.").removeprefix("model.") for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    kept = "No checkpoint is kept." if newest is None else f"What was learned up to step {newest} is kept."
    return (
        f"step {step}: its update made weights infinite or no number ({shown}{more}), and they are not written. Lower "
        f"learning_rate, set clip, or use precision fp32. {kept}"
    )
