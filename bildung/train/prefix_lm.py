"""Prefix language modelling: `clm`, with a prefix that sees itself in both directions and is no target."""

from __future__ import annotations

from bildung.data.prefix_lm import PrefixBatch
from bildung.model.base import CausalLM
from bildung.train.loss import LossSum
from bildung.train.objectives import sum_at_targets


def prefix_lm(model: CausalLM, batch: PrefixBatch, smoothing: float = 0.0) -> LossSum:
    """Sum of -log p(target) over the tokens after the prefixes, in nats. Packed rows too: a prefix is seen by its own
    example only. smoothing: ε of label smoothing (see objectives.clm), where the model trains."""
    rows = batch.batch
    h_BLD = model.hidden(
        rows.tokens_BL,
        positions_BL=rows.positions_BL,
        keep_BL=rows.keep_BL,
        segments_BL=rows.segments_BL,
        prefix_BL=batch.prefix_BL,
    )
    return sum_at_targets(model, h_BLD, rows, smoothing if model.training else 0.0)
