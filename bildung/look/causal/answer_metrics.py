"""One number for how far a model still gives the answer: what patching moves.

    logit_difference   mean logit of the answers - mean logit of the wrong answers      linear in the residual stream
    probability        the answers' probability together                               what one cares for; saturates
    kl                 KL(clean run ‖ this run) of the next token, in nats              needs no answers; 0 = as clean

    recovered = (patched - corrupted) / (clean - corrupted)      0: as the corrupted run, 1: as the clean one

Heimersheim & Nanda 2024 (arXiv 2404.15255) on which to choose: the logit difference sees a part that works against the
answer, the probability hardly does. `recovered` is the ratio of means over rows, not the mean of ratios, which one row
with clean = corrupted would blow up.
"""

# B rows, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.causal.prompt_pairs import Pair, Pairs
from bildung.look.precise import check_numbers

MetricName = Literal["logit_difference", "probability", "kl"]


def answer_metric(name: MetricName, logits_BV: Tensor, rows: Sequence[Pair], clean_BV: Tensor) -> Tensor:
    """The metric B of every row, from the logits after the last token; `clean_BV` are those of the clean run.

    Raises DataError for logits that are no numbers."""
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    logits_BV, clean_BV = logits_BV.to(wide), clean_BV.to(wide)
    check_numbers(logits_BV, "what the model answers")
    if name == "kl":
        clean, run = clean_BV.log_softmax(-1), logits_BV.log_softmax(-1)
        return (clean.exp() * (clean - run)).sum(-1)
    if name == "probability":
        probs_BV = logits_BV.softmax(-1)
        return torch.stack([probs_BV[row, list(pair.answers)].sum() for row, pair in enumerate(rows)])
    return torch.stack(
        [
            logits_BV[row, list(pair.answers)].mean() - logits_BV[row, list(pair.wrong)].mean()
            for row, pair in enumerate(rows)
        ]
    )


def check_metric(name: MetricName, pairs: Pairs) -> None:
    """Raises DataError where the rows lack what the metric needs."""
    without = sum(not pair.wrong for pair in pairs.rows)
    if name == "logit_difference" and without:
        raise DataError(
            f'{without} of {len(pairs.rows)} rows have no "wrong" answer, which the logit difference needs; '
            "choose --metric probability or kl."
        )


def recovered(value: Tensor | float, clean: float, corrupted: float) -> Tensor | float:
    """Where `value` lies between the corrupted (0) and the clean run (1). Raises DataError if the two are the same."""
    if abs(clean - corrupted) < 1e-9:
        raise DataError(
            f"the metric is {clean:.4g} on clean and on corrupted prompts: there is nothing to recover. Another "
            "metric, or pairs that the model tells apart, is needed."
        )
    return (value - corrupted) / (clean - corrupted)
