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

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bildung.data.batches import Batch
from bildung.data.prefix_lm import prefix_of
from bildung.model.base import CausalLM
from bildung.model.positions import padded_beyond
from bildung.train.loss import LossSum
from bildung.train.vocabulary import Vocabulary, vocabulary_of

# Logits alive at a time in float32. CPU: 32 MB; larger blocks would be fetched from the system and zeroed anew each
# time. GPU: 512 MB; smaller products leave most of it idle.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
# Where the unembedding trains, so many chunks of logits, in the type of the activations, share one product that is its
# gradient: each costs a pass over the whole matrix.
CHUNKS_OF_HEAD = 2


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
    """The final-norm states of a batch, packed or padded, BLD. A prefix language model reads what comes before a first
    target in both directions."""
    if model.prefix_lm:
        return model.hidden(
            batch.tokens_BL,
            positions_BL=batch.positions_BL,
            keep_BL=batch.keep_BL,
            segments_BL=batch.segments_BL,
            prefix_BL=prefix_of(batch),
        )
    if batch.segments_BL is not None:
        return model.hidden(
            batch.tokens_BL, positions_BL=batch.positions_BL, keep_BL=batch.keep_BL, segments_BL=batch.segments_BL
        )
    if bool((batch.keep_BL[:, 1:] <= batch.keep_BL[:, :-1]).all()):
        # Padding on the right is never seen by a real token, which looks back only: plain causal attention, the fast
        # kernel, gives the same numbers at every real token.
        context = getattr(model.config, "max_position_embeddings", None)
        return model.hidden(batch.tokens_BL, positions_BL=padded_beyond(context, batch.keep_BL))
    return model.hidden(batch.tokens_BL, positions_BL=batch.positions_BL, keep_BL=batch.keep_BL)


def surprisal(model: CausalLM, h_ND: Tensor, targets_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log p(target) in nats (N,), float32, of final-norm states and the tokens that follow them."""
    words = vocabulary_of(model)
    if not torch.is_grad_enabled():
        # The same arithmetic as with gradients: DPO's first step compares the two, and they agree to the last bit.
        nll = [
            words.nll_and_slope(words.logits(h_ND[rows]), targets_N[rows], smoothing)[0]
            for rows in _chunks(h_ND, words.most)
        ]
        return torch.cat([h_ND.new_empty(0, dtype=torch.float32), *nll])
    nll_N: Tensor = _Surprisal.apply(words.enter(h_ND), targets_N, words, smoothing, *words.head())
    return nll_N


def surprisal_sum(model: CausalLM, h_ND: Tensor, targets_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """The same, summed: faster where the unembedding trains."""
    if not torch.is_grad_enabled():
        return surprisal(model, h_ND, targets_N, smoothing).sum()
    words = vocabulary_of(model)
    total: Tensor = _SurprisalSum.apply(words.enter(h_ND), targets_N, words, smoothing, *words.head())
    return total


def _chunks(x: Tensor, vocab_size: int, times: int = 1) -> Iterator[slice]:
    """Stretches of the rows of `x`, so many that their logits are `times` as many as are alive at a time."""
    size = rows_at_a_time(x.device, vocab_size) * times
    return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))


def rows_at_a_time(device: torch.device, vocab_size: int) -> int:
    """How many rows of logits are alive at a time."""
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // vocab_size)


def _slopes(
    words: Vocabulary,
    logits_NV: Tensor,
    targets_N: Tensor,
    smoothing: float,
    spare_CV: Tensor,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-log p(target) (N,) and its slope, weighted, in the type of the logits; by chunks."""
    nll_N, slope_NV = torch.empty_like(targets_N, dtype=torch.float32), torch.empty_like(logits_NV)
    for rows in _chunks(logits_NV, words.most):
        nll_N[rows], slope_CV = words.nll_and_slope(logits_NV[rows], targets_N[rows], smoothing, spare_CV)
        slope_NV[rows] = slope_CV if weight_N is None else slope_CV.mul_(weight_N[rows, None])
    return nll_N, slope_NV


def _added(gradient: Tensor | None, share: Tensor, like: Tensor) -> Tensor:
    """gradient + share in the type of `like`. (A sum over two types is slow, and a copy of the whole would be memory
    fetched anew.)"""
    if gradient is None:
        return share.to(like.dtype)
    for one, other in zip(gradient.split(4096), share.split(4096), strict=True):
        one += other.to(like.dtype)
    return gradient


def _spare(h_ND: Tensor, words: Vocabulary) -> Tensor:
    """What the chunks' slopes are written to one after the other: memory fetched anew would be zeroed each time."""
    rows = min(rows_at_a_time(h_ND.device, words.most), len(h_ND))
    return torch.empty(rows, words.size, dtype=torch.float32, device=h_ND.device)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _random_as(device: torch.device, state: Tensor) -> Iterator[None]:
    """The device's random numbers as they were at `state`, and afterwards as before."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)
        yield


def _all(grads: Sequence[Tensor | None], head: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where no row came: with several ranks one may have no target."""
    return [torch.zeros_like(two[1]) if two[0] is None else two[0] for two in zip(grads, head, strict=True)]


class _Surprisal(torch.autograd.Function):
    """-log p(target) by chunks. Logits must treat rows one by one, as every unembedding does."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, targets_N: Tensor, words: Vocabulary, smoothing: float, *head: Tensor
    ) -> Tensor:
        ctx.words, ctx.smoothing, ctx.head = words, smoothing, head
        ctx.random_state = _random_state(h_ND.device) if head else None  # a delta on the unembedding may have dropout
        nll_N = h_ND.new_empty(h_ND.shape[0], dtype=torch.float32)
        slope_ND, spare_CV = torch.empty_like(h_ND), _spare(h_ND, words)
        for rows in _chunks(h_ND, words.most):
            h_CD = h_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits_CV = words.logits(h_CD)
            nll_N[rows], slope_CV = words.nll_and_slope(logits_CV.detach(), targets_N[rows], smoothing, spare_CV)
            (slope_ND[rows],) = torch.autograd.grad(logits_CV, h_CD, slope_CV.to(logits_CV.dtype))
            del logits_CV
        # Detached: a tied unembedding is also the embedding that h came from; only its share as a head belongs here.
        ctx.save_for_backward(slope_ND, targets_N, *([h_ND.detach()] if head else []))
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_N: Tensor) -> tuple[Tensor | None, ...]:
        slope_ND, targets_N, *rest = ctx.saved_tensors
        words: Vocabulary = ctx.words
        grad_h_ND = (slope_ND * weight_N[:, None]).to(slope_ND.dtype)  # a float16 holds no loss scale of 65536
        if not ctx.head:
            return grad_h_ND, None, None, None
        grads: list[Tensor | None] = [None] * len(ctx.head)
        spare_CV = _spare(rest[0], words)
        with (
            _random_as(slope_ND.device, ctx.random_state),
            words.leaves(slope_ND.dtype) as leaves,
        ):
            for rows in _chunks(rest[0], words.most, CHUNKS_OF_HEAD):
                with torch.enable_grad():
                    logits_CV = words.logits(rest[0][rows])
                given = logits_CV.detach(), targets_N[rows], ctx.smoothing, spare_CV, weight_N[rows]
                slope_CV = _slopes(words, *given)[1]
                shares = words.gradients(logits_CV, leaves, slope_CV)
                del given, logits_CV, slope_CV  # not to be there beside those of the next chunk
                grads = [_added(*three) for three in zip(grads, shares, ctx.head, strict=True)]
                del shares
        return grad_h_ND, None, None, None, *_all(grads, ctx.head)


class _SurprisalSum(torch.autograd.Function):
    """Its sum. One factor stands before all slopes, so those of the unembedding too are complete before it is known."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, targets_N: Tensor, words: Vocabulary, smoothing: float, *head: Tensor
    ) -> Tensor:
        total = h_ND.new_zeros((), dtype=torch.float32)
        slope_ND, spare_CV = torch.empty_like(h_ND), _spare(h_ND, words)
        grads: list[Tensor | None] = [None] * len(head)
        times = CHUNKS_OF_HEAD if head else 1
        with words.leaves(h_ND.dtype) as leaves:
            for rows in _chunks(h_ND, words.most, times):
                h_CD = h_ND[rows].detach().requires_grad_()
                with torch.enable_grad():
                    logits_CV = words.logits(h_CD)
                nll_C, slope_CV = _slopes(words, logits_CV.detach(), targets_N[rows], smoothing, spare_CV)
                total += nll_C.sum()
                slope_ND[rows], *shares = words.gradients(logits_CV, (h_CD, *leaves), slope_CV)
                del logits_CV, slope_CV  # not to be there beside those of the next chunk
                grads = [_added(*three) for three in zip(grads, shares, head, strict=True)]
                del shares
        ctx.save_for_backward(slope_ND, *_all(grads, head))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        slope_ND, *grads = (slope.mul_(weight) for slope in ctx.saved_tensors)
        return slope_ND, None, None, None, *grads
