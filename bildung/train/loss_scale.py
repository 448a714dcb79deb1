"""Loss scaling for float16, whose smallest number is 6e-8: smaller gradients would be 0.

    gradients of  S · loss  are S times as large; they are divided by S before the step, in float32
    one overflows        no step is made, S ← S / 2
    2000 steps without   S ← 2 S

The rule is torch.amp.GradScaler's (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2), which starts at S = 2^16
of a loss that is a mean over tokens; this one is a sum, so it starts lower. Ours keeps no state: S follows from the
lines of the log, so a resumed run has the S it would have had. bfloat16 has float32's range and needs none of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bildung.core.errors import TrainingError

START, GROW_AFTER, LEAST = 2.0**10, 2000, 2.0**-14


def loss_scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """S of the next step, given the rows of those before. Raises TrainingError when no S is small enough."""
    last = rows[-1] if rows else {}
    if "loss_scale" not in last:
        return START
    scale = float(last["loss_scale"])
    if last.get("overflow"):
        if scale / 2 < LEAST:
            raise TrainingError(
                f"step {last['step']}: gradients overflow in float16 even with the loss scaled by {scale:g}; use "
                f"precision bf16 or fp32."
            )
        return scale / 2
    since = 0
    for row in reversed(rows[-GROW_AFTER:]):
        if row.get("loss_scale") != scale:
            break
        since += 1
    return scale * 2 if since == GROW_AFTER else scale
