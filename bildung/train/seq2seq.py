"""Learning to answer a source with a target: -log p of every target token, given the source and the target before it.

`model.given(source)` is a causal model of the target, so this is `clm` of that: for an encoder-decoder Transformer and
for a recurrent one alike. In training the decoder always reads the true target (teacher forcing).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bildung.data.seq2seq import Seq2SeqBatch
from bildung.model.base import CausalLM
from bildung.train.loss import LossSum
from bildung.train.objectives import clm


class Givens(Protocol):
    """A model that answers a source."""

    def given(self, source_BS: Tensor, keep_BS: Tensor | None = None) -> CausalLM:
        """The model of the target, with this source in mind."""


def seq2seq(model: Givens, batch: Seq2SeqBatch, smoothing: float = 0.0) -> LossSum:
    """Sum of -log p(target token | source, target before it) over the batch, in nats.

    smoothing: ε of label smoothing (see objectives.clm), where the model trains; held-out losses are the model's own.
    """
    conditioned = model.given(batch.source_BS, batch.source_keep_BS)
    return clm(conditioned, batch.target, smoothing if conditioned.training else 0.0)
