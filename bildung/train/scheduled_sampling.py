"""Scheduled sampling: a decoder that is to write on its own learns on what it wrote itself (Bengio et al. 2015).

Under teacher forcing the decoder always reads the true target before it, in decoding its own, faults included. Here
each token it reads is true with probability ε and its own guess otherwise; ε falls in the course of training
(arXiv 1506.03099, section 2.4):

    linear              ε = max(least, 1 - i / over)                   i: the step
    inverse_sigmoid     ε = k / (k + exp(i / k)), k such that ε = 1/2 at half of `over`; never below `least`

No gradient flows through a guess, so the guesses are made first, without gradients and dropout, token by token; then
the decoder reads the mixture in one go, as it reads a target. So every model with a cache can be trained in this way, a
Transformer too. The loss is on the true targets always.
"""

# B rows, L tokens of the target

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.data.seq2seq import Seq2SeqBatch
from bildung.model.base import CausalLM
from bildung.train.loss import LossSum
from bildung.train.objectives import sum_at_targets
from bildung.train.seq2seq import Givens, seq2seq
from bildung.train.training import Batches

Decay = Literal["linear", "inverse_sigmoid"]


@dataclass(frozen=True)
class Numbered:
    """A batch that knows which step it belongs to."""

    batch: Seq2SeqBatch
    step: int

    def to(self, device: torch.device | str) -> Numbered:
        """The same batch on another device."""
        return Numbered(self.batch.to(device), self.step)

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    @property
    def num_targets(self) -> int:
        return self.batch.num_targets


@dataclass(frozen=True)
class NumberedBatches:
    """Batches that know their step. micro_steps: batches of one step."""

    batches: Batches
    micro_steps: int = 1

    @property
    def batches_per_epoch(self) -> float:
        return self.batches.batches_per_epoch

    def __call__(self, n: int) -> Numbered:
        return Numbered(self.batches(n), n // self.micro_steps)


def true_share(decay: Decay, step: int, over: int, least: float) -> float:
    """ε: the probability that the decoder reads the true token at `step`."""
    if decay == "linear":
        return max(least, 1 - step / over)
    k = _sigmoid_k(over / 2)
    return max(least, 1 / (1 + math.exp(min(step / k, 700.0)) / k))


def _sigmoid_k(middle: float) -> float:
    """k with k ln k = middle, where k / (k + exp(i / k)) = 1/2 at i = middle; by Newton's method."""
    k = max(middle, 2.0)
    for _ in range(50):
        k -= (k * math.log(k) - middle) / (math.log(k) + 1)
    return k


class ScheduledSampling:
    """The objective of `seq2seq` with scheduled sampling; batches without a number (held-out ones) are teacher-forced.

    over: steps of the decay. least: ε at its end. guesses: "greedy" the likeliest token, "sample" a draw.
    Deterministic: the draws are taken from torch's generator, which `fit` sets anew for every step.
    """

    def __init__(
        self,
        decay: Decay,
        over: int,
        least: float = 0.0,
        *,
        guesses: Literal["greedy", "sample"] = "greedy",
        smoothing: float = 0.0,
    ):
        if over < 2 or not 0 <= least <= 1:
            raise SettingsError(
                f"scheduled sampling over {over} steps down to {least}: at least 2 steps, and a probability are needed."
            )
        self.decay, self.over, self.least, self.guesses, self.smoothing = decay, over, least, guesses, smoothing

    def __call__(self, model: Givens, batch: Numbered | Seq2SeqBatch) -> LossSum:
        if isinstance(batch, Seq2SeqBatch):
            return seq2seq(model, batch, self.smoothing)
        share = true_share(self.decay, batch.step, self.over, self.least)
        target = batch.batch.target
        given = model.given(batch.batch.source_BS, batch.batch.source_keep_BS)
        read_BL = mixed(given, target.tokens_BL, share, self.guesses)
        h_BLD = given.hidden(read_BL)  # the padding is on the right, where nothing looks
        loss = sum_at_targets(given, h_BLD, target, self.smoothing)
        return replace(loss, metrics={"true_share": share * loss.count})


@torch.no_grad()
def mixed(model: CausalLM, true_BL: Tensor, share: float, guesses: Literal["greedy", "sample"] = "greedy") -> Tensor:
    """What a decoder reads when each token but the first is the true one with probability `share`, its guess otherwise.

    The same random numbers give the same tokens, in whatever order steps are run.
    """
    if share >= 1:
        return true_BL
    own_BL = torch.rand(true_BL.shape, device=true_BL.device) >= share
    draws_BL = torch.rand(true_BL.shape, device=true_BL.device)
    was_training = model.training
    model.eval()
    cache = model.kv_cache(*true_BL.shape)
    read = [true_BL[:, 0]]
    for column in range(1, true_BL.shape[1]):
        logits_BV = model.unembed(model.hidden(read[-1][:, None], kv_cache=cache)[:, 0]).float()
        guess_B = logits_BV.argmax(-1) if guesses == "greedy" else _drawn(logits_BV, draws_BL[:, column])
        read.append(torch.where(own_BL[:, column], guess_B, true_BL[:, column]))
    model.train(was_training)
    return torch.stack(read, dim=1)


def _drawn(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """A token of each row by inverting its cumulative distribution."""
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)[:, 0]
