"""Attention between the states of two recurrent networks: where in the source does the decoder look?

    scores_i = score(q, s_i)      weights = softmax(scores)      context = Σ_i weights_i s_i

    dot        q · s_i                                                         Luong et al. 2015, arXiv 1508.04025
    general    q · W s_i                                                       Luong
    concat     v · tanh(W [q; s_i])  =  v · tanh(W_q q + W_s s_i)              Luong
    bahdanau   v · tanh(W q + U s_i)                                           Bahdanau et al. 2014, arXiv 1409.0473

Bahdanau's and Luong's concat have the same formula; they differ in what q is. Bahdanau's is the decoder's state BEFORE
it reads the next token, and the context is part of what it reads. Luong's is the state AFTER, and the context only
helps to say the next token. What does not depend on q, the key W s_i, is computed once per source.

Scaling the states s by a factor scales the scores of dot and general too, so the weights get sharper or flatter and the
direction of the context changes.
"""

# B batch, L target length, S source length, D decoder's size, M size of a source state, A size of a key

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bildung.model.linear import dense_linear
from bildung.model.recurrent import Tap

Attention = Literal["none", "bahdanau", "dot", "general", "concat"]


def context(weights_BLS: Tensor, states_BSM: Tensor) -> Tensor:
    """Σ_i weights_i s_i: (B, L, M), or without the batch dimension (L, M)."""
    return weights_BLS @ states_BSM


def attend(scores_BLS: Tensor, keep_BS: Tensor | None = None) -> Tensor:
    """Weights: the softmax of the scores over the real tokens of the source, in float32. keep_BS: False is padding."""
    if keep_BS is not None:
        scores_BLS = scores_BLS.masked_fill(~keep_BS[..., None, :], -torch.inf)
    return scores_BLS.softmax(dim=-1, dtype=torch.float32).to(scores_BLS.dtype)


def multiplicative_scores(query_BLD: Tensor, keys_BSD: Tensor) -> Tensor:
    """q · k_i (dot with k = s, general with k = W s)."""
    return query_BLD @ keys_BSD.transpose(-1, -2)


class Alignment(nn.Module):
    """The score function of a decoder, with its matrices; see the top of this file."""

    def __init__(self, kind: Attention, query_size: int, state_size: int, size: int):
        super().__init__()
        additive = kind in ("bahdanau", "concat")
        self.key_proj = None if kind == "dot" else dense_linear(state_size, size if additive else query_size)
        self.query_proj = dense_linear(query_size, size) if additive else None
        self.v_proj = dense_linear(size, 1) if additive else None

    def keys(self, states_BSM: Tensor) -> Tensor:
        """What queries are compared with: once per source."""
        return states_BSM if self.key_proj is None else self.key_proj(states_BSM)

    def forward(
        self, query_BLD: Tensor, keys_BSA: Tensor, states_BSM: Tensor, keep_BS: Tensor | None, tap: Tap
    ) -> Tensor:
        """The contexts (B, L, M). tap: for the sites scores and probs (B, L, S), out (B, L, M)."""
        scores_BLS = tap("scores", self.scores(query_BLD, keys_BSA))
        probs_BLS = tap("probs", attend(scores_BLS, keep_BS))
        return tap("out", context(probs_BLS, states_BSM))

    def scores(self, query_BLD: Tensor, keys_BSA: Tensor) -> Tensor:
        """How well each source state fits each query (B, L, S)."""
        if self.query_proj is None or self.v_proj is None:
            return multiplicative_scores(query_BLD, keys_BSA)
        return self.v_proj(torch.tanh(self.query_proj(query_BLD)[:, :, None] + keys_BSA[:, None]))[..., 0]
