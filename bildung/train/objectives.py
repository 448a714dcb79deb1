"""Causal language modelling as a sum: -log p of the target tokens, in nats, and how many there were.

    hidden states  ->  rows that predict a target  ->  logits, a chunk of rows at a time  ->  log p(target)

Three things keep this small and fast. Only rows that predict a target are unembedded (in instruction tuning about half
of them). Logits exist for one chunk of rows at a time: all of them would take rows x vocabulary floats, at 2048 tokens
and 49152 words 400 MB, several times over. And since log p of a row depends on that row's hidden state alone,

    d/dh of any weighted sum   Σ w_i log p_i   is   w_i · (d log p_i / d h_i)

so the slope is computed while the chunk's logits are there and scaled when the weights w are known. The same function
serves the plain sum here and DPO's weighted rows, and the logits are computed once. (Liger and TRL's chunked loss do
this for the plain sum only.) Where the unembedding trains, the plain sum takes its gradient from the same logits; rows
of unequal weights need them a second time, in the backward pass.

Label smoothing (Szegedy et al. 2015, arXiv 1512.00567, section 7) takes ε of the target's weight and spreads it evenly
over all V tokens, the target among them:

    loss = (1 - ε) · -log p(target)  +  ε · mean over v of -log p(v)

A model is then never rewarded for certainty. The loss is no longer a surprisal: measure with ε = 0.
"""

# B rows of the batch, L length, D hidden size, N target tokens, C rows of a chunk, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bildung.data.batches import Batch
from bildung.model.base import CausalLM
from bildung.train.loss import LossSum

# Logits alive at a time: 32 MB in float32. Larger blocks would be fetched from the system and zeroed anew each time.
CHUNK_ELEMENTS = 2**23


def clm(model: CausalLM, batch: Batch, smoothing: float = 0.0) -> LossSum:
    """Sum of -log p(target) over the batch's target tokens. Pretraining and instruction tuning alike: the masks of the
    batch, made in data/examples.py, say what is a target. smoothing: ε of label smoothing, in [0, 1)."""
    return sum_at_targets(model, hidden(model, batch), batch, smoothing)


def token_logprobs(model: CausalLM, batch: Batch, sequence_BL: Tensor | None = None) -> Tensor:
    """Sum over the targets of each sequence of log p(target), float32: log π(y|x) of DPO and its kin.

    sequence_BL: the number, from 0, of the sequence that each token belongs to, where rows hold several; by default
    each row is one. Sums, not means (counts are sums of the mask). Differentiable, with the memory of one chunk of
    logits.
    """
    if sequence_BL is None:
        rows = torch.arange(batch.tokens_BL.shape[0], device=batch.tokens_BL.device)
        sequence_BL = rows[:, None].expand_as(batch.tokens_BL)
    nll_N = nll_at_targets(model, hidden(model, batch), batch)
    sequence_N = sequence_BL[:, 1:][batch.loss_mask_BL[:, 1:]]
    return nll_N.new_zeros(int(sequence_BL.max()) + 1).index_add(0, sequence_N, -nll_N)


def sum_at_targets(model: CausalLM, h_BLD: Tensor, batch: Batch, smoothing: float = 0.0) -> LossSum:
    """The surprisal of the batch's targets, of final-norm states of its tokens, summed."""
    h_ND, targets_N = _targets(h_BLD, batch)
    return LossSum(surprisal_sum(model, h_ND, targets_N, smoothing), targets_N.numel())


def nll_at_targets(model: CausalLM, h_BLD: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """The same of each target, in reading order (N,), float32."""
    return surprisal(model, *_targets(h_BLD, batch), smoothing)


def _targets(h_BLD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    is_target_BL = batch.loss_mask_BL[:, 1:]  # the state before a target predicts it
    return h_BLD[:, :-1][is_target_BL], batch.tokens_BL[:, 1:][is_target_BL]


def hidden(model: CausalLM, batch: Batch) -> Tensor:
    """The final-norm states of a batch, packed or padded, BLD."""
    if batch.segments_BL is not None:
        return model.hidden(
            batch.tokens_BL, positions_BL=batch.positions_BL, keep_BL=batch.keep_BL, segments_BL=batch.segments_BL
        )
    if bool((batch.keep_BL[:, 1:] <= batch.keep_BL[:, :-1]).all()):
        # Padding on the right is never seen by a real token, which looks back only: plain causal attention, the fast
        # kernel, gives the same numbers at every real token.
        return model.hidden(batch.tokens_BL)
    return model.hidden(batch.tokens_BL, positions_BL=batch.positions_BL, keep_BL=batch.keep_BL)


def surprisal(model: CausalLM, h_ND: Tensor, targets_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log p(target) in nats (N,), float32, of final-norm states and the tokens that follow them."""
    vocab_size: int = model.config.vocab_size
    if not torch.is_grad_enabled():
        chunks = _chunks(h_ND, vocab_size)
        nll = [_nll(model.unembed(h_ND[rows]), targets_N[rows], smoothing)[0] for rows in chunks]
        return torch.cat([h_ND.new_empty(0, dtype=torch.float32), *nll])
    nll_N: Tensor = _Surprisal.apply(h_ND, targets_N, model.unembed, vocab_size, smoothing, *_head(model))
    return nll_N


def surprisal_sum(model: CausalLM, h_ND: Tensor, targets_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """The same, summed: faster where the unembedding trains."""
    if not torch.is_grad_enabled():
        return surprisal(model, h_ND, targets_N, smoothing).sum()
    vocab_size: int = model.config.vocab_size
    total: Tensor = _SurprisalSum.apply(h_ND, targets_N, model.unembed, vocab_size, smoothing, *_head(model))
    return total


def _head(model: CausalLM) -> list[Tensor]:
    return [parameter for parameter in model.lm_head.parameters() if parameter.requires_grad]


def _chunks(h_ND: Tensor, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return (slice(start, start + size) for start in range(0, h_ND.shape[0], size))


def _nll(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """-log p(target) (C,), smoothed, and log p of every token (C, V), both float32."""
    logp_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    nll_C = -logp_CV.gather(1, targets_C[:, None])[:, 0]
    if smoothing:
        nll_C = (1 - smoothing) * nll_C - smoothing * logp_CV.mean(dim=-1)
    return nll_C, logp_CV


def _slope(logp_CV: Tensor, targets_C: Tensor, smoothing: float) -> Tensor:
    """d loss / d logits = p - what p should be: (1 - ε) one_hot(target) + ε / V. Overwrites `logp_CV`."""
    p_CV = logp_CV.exp_()
    p_CV[torch.arange(len(targets_C), device=p_CV.device), targets_C] -= 1 - smoothing
    return p_CV.sub_(smoothing / p_CV.shape[-1]) if smoothing else p_CV


class _Surprisal(torch.autograd.Function):
    """-log p(target) by chunks. `unembed` must treat rows one by one, as every unembedding does."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        targets_N: Tensor,
        unembed: Callable[[Tensor], Tensor],
        vocab_size: int,
        smoothing: float,
        *head: Tensor,
    ) -> Tensor:
        ctx.unembed, ctx.vocab_size, ctx.smoothing, ctx.head = unembed, vocab_size, smoothing, head
        ctx.random_state = torch.get_rng_state() if head else None  # a delta on the unembedding may have dropout
        nll_N = h_ND.new_empty(h_ND.shape[0], dtype=torch.float32)
        slope_ND = torch.empty_like(h_ND)
        for rows in _chunks(h_ND, vocab_size):
            h_CD = h_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits_CV = unembed(h_CD)
            nll_N[rows], logp_CV = _nll(logits_CV.detach(), targets_N[rows], smoothing)
            slope_CV = _slope(logp_CV, targets_N[rows], smoothing).to(logits_CV.dtype)
            (slope_ND[rows],) = torch.autograd.grad(logits_CV, h_CD, slope_CV)
        # Detached: a tied unembedding is also the embedding that h came from; only its share as a head belongs here.
        ctx.save_for_backward(slope_ND, targets_N, *([h_ND.detach()] if head else []))
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_N: Tensor) -> tuple[Tensor | None, ...]:
        slope_ND, targets_N, *rest = ctx.saved_tensors
        grad_h_ND = slope_ND * weight_N[:, None].to(slope_ND.dtype)
        if not ctx.head:
            return grad_h_ND, None, None, None, None
        grads = [torch.zeros_like(parameter) for parameter in ctx.head]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random_state)
            for rows in _chunks(rest[0], ctx.vocab_size):
                with torch.enable_grad():
                    logits_CV = ctx.unembed(rest[0][rows])
                logp_CV = _nll(logits_CV.detach(), targets_N[rows], ctx.smoothing)[1]
                slope_CV = _slope(logp_CV, targets_N[rows], ctx.smoothing)
                slope_CV = slope_CV.mul_(weight_N[rows, None]).to(logits_CV.dtype)
                for grad, share in zip(grads, torch.autograd.grad(logits_CV, ctx.head, slope_CV), strict=True):
                    grad += share
        return grad_h_ND, None, None, None, None, *grads


class _SurprisalSum(torch.autograd.Function):
    """Its sum. One factor stands before all slopes, so those of the unembedding too are complete before it is known."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        targets_N: Tensor,
        unembed: Callable[[Tensor], Tensor],
        vocab_size: int,
        smoothing: float,
        *head: Tensor,
    ) -> Tensor:
        total = h_ND.new_zeros((), dtype=torch.float32)
        slope_ND = torch.empty_like(h_ND)
        grads: list[Tensor] = []
        for rows in _chunks(h_ND, vocab_size):
            h_CD = h_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits_CV = unembed(h_CD)
            nll_C, logp_CV = _nll(logits_CV.detach(), targets_N[rows], smoothing)
            total += nll_C.sum()
            slope_CV = _slope(logp_CV, targets_N[rows], smoothing).to(logits_CV.dtype)
            slope_ND[rows], *shares = torch.autograd.grad(logits_CV, (h_CD, *head), slope_CV)
            grads = [grad.add_(share) for grad, share in zip(grads, shares, strict=True)] if grads else shares
        ctx.save_for_backward(slope_ND, *(grads or [torch.zeros_like(parameter) for parameter in head]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        slope_ND, *grads = (slope.mul_(weight.to(slope.dtype)) for slope in ctx.saved_tensors)
        return slope_ND, None, None, None, None, *grads
