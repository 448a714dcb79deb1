"""How the rows of a batch divide into sequences that each carry a state of their own.

A recurrent model must not be moved by padding, and not carry its state from one packed document into the next:

    tokens    a b . c | d e      row 0: padding after b, then segment 2 begins
    segments  1 1 0 1 | 2 2
              one sequence a b c, another d e

Every step advances all sequences that are still running. They are sorted by length, longest first, so that these are
always the first ones: torch's packed form, which its kernels read, and which the loop written out in Python reads too.

    step 0  a d   step 1  b e   step 2  c         order: the places of a d b e c in the batch;  sizes: 2 2 1
"""

# B batch, L length, N real tokens, Q sequences, K any number of features

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or, of an LSTM, (h, c); each (rows, features)


class Sequences:
    """The sequences of a batch of rows. keep_BL: False marks padding; segments_BL: a new number begins a new sequence.

    backward: read from the last token to the first (the other direction of a bidirectional encoder).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        keep_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        *,
        backward: bool = False,
    ):
        self.B, self.L = shape
        self.backward = backward
        self.sizes = [self.B] * self.L
        # Nothing to take apart: every row is one sequence of all its tokens.
        one_segment = segments_BL is None or bool((segments_BL[:, 1:] == segments_BL[:, :-1]).all())
        self.whole = one_segment and (keep_BL is None or bool(keep_BL.all()))
        if not self.whole:
            self._divide(keep_BL, segments_BL)

    def _divide(self, keep_BL: Tensor | None, segments_BL: Tensor | None) -> None:
        if keep_BL is None:
            assert segments_BL is not None
            keep_BL = torch.ones_like(segments_BL, dtype=torch.bool)
        places_N = keep_BL.expand(self.B, self.L).flatten().nonzero()[:, 0]
        row_N = places_N // self.L
        starts_N = torch.ones_like(row_N, dtype=torch.bool)
        starts_N[1:] = row_N[1:] != row_N[:-1]
        self.first_Q = starts_N  # which sequences go on from their row's state; cut down to Q below
        if segments_BL is not None:
            segment_N = segments_BL.flatten()[places_N]
            new_N = starts_N.clone()
            new_N[1:] |= segment_N[1:] != segment_N[:-1]
        else:
            new_N = starts_N
        sequence_N = new_N.cumsum(0) - 1
        begin_Q = new_N.nonzero()[:, 0]
        length_Q = torch.bincount(sequence_N, minlength=len(begin_Q))
        time_N = torch.arange(len(places_N), device=places_N.device) - begin_Q[sequence_N]
        if self.backward:
            time_N = length_Q[sequence_N] - 1 - time_N
        by_length_Q = torch.argsort(length_Q, descending=True, stable=True)
        rank_Q = torch.argsort(by_length_Q)
        order_N = torch.argsort(time_N * len(begin_Q) + rank_Q[sequence_N])
        self.order_N = places_N[order_N]
        self.batch_sizes = torch.bincount(time_N).cpu()  # torch's kernels want them on the CPU
        self.sizes = self.batch_sizes.tolist()
        self.row_Q = row_N[begin_Q][by_length_Q]
        self.first_Q = starts_N[begin_Q][by_length_Q]
        last_Q = torch.ones_like(begin_Q, dtype=torch.bool)
        last_Q[:-1] = starts_N[begin_Q[1:]]
        self.last_Q = last_Q[by_length_Q]

    # ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def places(self, step: int) -> Tensor:
        """The places (row * L + column) of the tokens that `step` reads."""
        if not self.whole:
            return self.order_N.split(self.sizes)[step]
        column = self.L - 1 - step if self.backward else step
        return torch.arange(self.B) * self.L + column

    def pack(self, x_BLK: Tensor) -> Tensor:
        """The real tokens in the order in which they are read (N, K)."""
        return x_BLK.flatten(0, 1)[self.order_N]

    def unpack(self, x_NK: Tensor) -> Tensor:
        """Back to rows (B, L, K); zeros where padding stands."""
        empty = x_NK.new_zeros(self.B * self.L, x_NK.shape[-1])
        return empty.index_copy(0, self.order_N, x_NK).view(self.B, self.L, -1)

    def steps(self, x_BLK: Tensor) -> Sequence[Tensor]:
        """What each step reads: tensors (running sequences, K)."""
        if not self.whole:
            return self.pack(x_BLK).split(self.sizes)
        steps = x_BLK.unbind(1)
        return steps[::-1] if self.backward else steps

    def rows(self, steps: Sequence[Tensor]) -> Tensor:
        """The inverse of `steps`: (B, L, K)."""
        if not self.whole:
            return self.unpack(torch.cat(list(steps)))
        return torch.stack(list(steps)[::-1] if self.backward else list(steps), dim=1)

    # ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, state: State) -> State:
        """The states of the sequences before their first step: the row's state for its first one, zeros for others."""
        if self.whole:
            return state
        zero_or_row = [one_BK[self.row_Q] * self.first_Q[:, None].to(one_BK.dtype) for one_BK in state]
        return tuple(zero_or_row)

    def finish(self, before: State, after: State) -> State:
        """The states of the rows after their last sequence; a row of padding alone keeps what it had."""
        if self.whole:
            return after
        rows = self.row_Q[self.last_Q]
        return tuple(
            old_BK.index_copy(0, rows, new_QK[self.last_Q]) for old_BK, new_QK in zip(before, after, strict=True)
        )
