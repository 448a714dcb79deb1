"""Truncated back-propagation through time: a recurrent model reads long streams in windows and keeps its state.

    stream 0   w0 | w1 | w2 | ...      step n trains on window n of every stream (data/streams.py)
    stream 1   w0 | w1 | w2 | ...      the state goes on over the border, the gradient stops there

So a window of 64 tokens costs the memory of 64 tokens, and the model still learns to use a state that has seen
thousands. The state is part of what a run goes on from: `carried` is kept in the checkpoints, and a run that is killed
and resumed is, bit for bit, the run that was not.
"""

# B streams, L tokens of a window, D hidden_size, N targets

from __future__ import annotations

from typing import Any

from torch import Tensor

from bildung.core.errors import TrainingError
from bildung.data.streams import Window
from bildung.model.rnn import RecurrentLM, RecurrentState
from bildung.train.loss import LossSum
from bildung.train.objectives import clm, surprisal_sum


class Carry:
    """An objective with a memory: -log p of every token of a window, given all of its stream before it.

    Batches that are no windows (held-out documents) are read from the zero state, as `clm` reads them.
    """

    def __init__(self) -> None:
        self.carried: dict[str, Tensor] = {}  # "layer.part" -> (B, D); give it to `fit`

    def __call__(self, model: RecurrentLM, batch: Any) -> LossSum:
        """Raises TrainingError for a window that goes on from a state which is not there."""
        if not isinstance(batch, Window):
            return clm(model, batch)
        inputs_BL, targets_BL = batch.tokens_BL[:, :-1], batch.tokens_BL[:, 1:]
        state = model.kv_cache(*inputs_BL.shape)
        if not batch.first:
            self._recall(state)
        h_BLD = model.hidden(inputs_BL, kv_cache=state)
        state.detach()
        for layer, parts in enumerate(state.layers):
            self.carried.update({f"{layer}.{number}": one for number, one in enumerate(parts)})
        return LossSum(surprisal_sum(model, h_BLD.flatten(0, 1), targets_BL.flatten()), targets_BL.numel())

    def _recall(self, state: RecurrentState) -> None:
        wanted = {f"{layer}.{number}" for layer, parts in enumerate(state.layers) for number in range(len(parts))}
        if set(self.carried) != wanted:
            raise TrainingError("this window goes on from a state, and the state of the window before it is not here.")
        state.layers = [
            tuple(self.carried[f"{layer}.{number}"] for number in range(len(parts)))
            for layer, parts in enumerate(state.layers)
        ]
