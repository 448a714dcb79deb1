"""Long text as parallel streams, read window by window: what a model with a carried state learns from.

    tokens      a b c d e f g h i j k l m        2 streams, windows of 3
    stream 0    a b c | d e f |                  window 0: a b c -> b c d      window 1: d e f -> e f g
    stream 1    g h i | j k l |                            g h i -> h i j                j k l -> k l m

Batch n is window n of every stream, each the continuation of the one before. Where an epoch ends the streams begin
again, with borders moved by a few tokens (decided by seed and epoch), and so does the state.
"""

# B streams, L tokens of a window

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bildung.core.errors import DataError


@dataclass(frozen=True)
class Window:
    """tokens_BL: L + 1 tokens, the first L are read and the last L are targets. first: no state goes before."""

    tokens_BL: Tensor
    first: bool

    def to(self, device: torch.device | str) -> Window:
        """The same window on another device."""
        return Window(self.tokens_BL.to(device), self.first)

    @property
    def num_tokens(self) -> int:
        """Tokens that are read."""
        return self.tokens_BL.shape[0] * (self.tokens_BL.shape[1] - 1)

    @property
    def num_targets(self) -> int:
        return self.num_tokens


class Streams:
    """`streams(n)` is window n of `batch_size` streams of equal length, a function of (tokens, seed, n) alone."""

    def __init__(self, tokens: NDArray[np.integer], batch_size: int, window: int, seed: int):
        if batch_size < 1 or window < 1:
            raise DataError(f"batch_size = {batch_size} and window = {window}: both must be at least 1")
        # One target beyond the last window, and room to move the borders.
        self.length = (len(tokens) - 1 - (window - 1)) // batch_size
        self.windows = self.length // window
        if not self.windows:
            raise DataError(
                f"{len(tokens)} tokens are less than one window of {window} for each of {batch_size} streams; lower "
                f"batch_size or window, or give more text"
            )
        self.tokens, self.batch_size, self.window, self.seed = tokens, batch_size, window, seed

    @property
    def batches_per_epoch(self) -> float:
        """Windows of a stream."""
        return float(self.windows)

    def __call__(self, n: int) -> Window:
        """Window n, counted from 0 over all epochs."""
        if n < 0:
            raise DataError(f"window {n}: windows are counted from 0")
        epoch, number = divmod(n, self.windows)
        shift = random.Random(f"{self.seed} {epoch}").randrange(self.window)
        starts = shift + np.arange(self.batch_size) * self.length + number * self.window
        rows = np.stack([self.tokens[start : start + self.window + 1] for start in starts])
        return Window(torch.from_numpy(rows.astype(np.int64)), first=number == 0)
