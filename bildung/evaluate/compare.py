"""Two models side by side: paired differences of their cards, and how far their predictions are apart.

The difference of two cards is taken item by item (metrics.py). A difference of more than two of its standard errors is
called significant here, and that word means nothing more; with ten tasks, expect every second comparison of equal
models to show one.

Accuracy of a small sample sees little. The KL divergence of next-token distributions sees any change of a model, with a
few thousand tokens (llama.cpp reports it for quantized models for that reason, #4739, #12557).
"""

# B rows, L tokens of a row, D hidden size, N places, C places of one chunk, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.core.hardware import give_back_memory
from bildung.evaluate.likelihood import batches, chunks, evaluating, rolling
from bildung.evaluate.metrics import paired_difference
from bildung.tokens.frames import decoder_frame, encode_sentence, frame_of

if TYPE_CHECKING:
    from bildung.model.base import CausalLM
    from bildung.model.store import LanguageModel

Card = Mapping[str, Any]
CONTEXT, BATCH_TOKENS = 512, 2048  # tokens of a row, and of a batch, that two models are compared on


@dataclass(frozen=True)
class Difference:
    """One metric of two models on the same items; `difference` is b - a."""

    task: str
    metric: str
    higher_is_better: bool
    a: float
    b: float
    difference: float
    stderr: float | None
    n: int

    @property
    def significant(self) -> bool:
        """More than two standard errors apart."""
        return self.stderr is not None and abs(self.difference) > 2 * self.stderr

    @property
    def better(self) -> bool | None:
        """Whether b is significantly better than a; None when that cannot be told."""
        return (self.difference > 0) == self.higher_is_better if self.significant else None


def compare_cards(a: Card, b: Card) -> list[Difference]:
    """The tasks that both cards measured on the same items, in the order of `b`. Tasks whose items differ are left out:
    their difference has no pairs; `unpaired` names them."""
    differences = []
    for task, after in b.get("tasks", {}).items():
        before = a.get("tasks", {}).get(task)
        if before is None or not _same_items(before, after):
            continue
        made = paired_difference(after["metric"], before["items"], after["items"])
        differences.append(
            Difference(
                task=task,
                metric=after["metric"],
                higher_is_better=after["higher_is_better"],
                a=before["value"],
                b=after["value"],
                difference=made.value,
                stderr=made.stderr,
                n=made.n,
            )
        )
    return differences


def unpaired(a: Card, b: Card) -> list[str]:
    """What `compare_cards` leaves out, and why."""
    there, reasons = (a.get("tasks", {}), b.get("tasks", {})), []
    for task in dict.fromkeys([*there[0], *there[1]]):
        if task not in there[0] or task not in there[1]:
            reasons.append(f"{task} was measured on one of the two only")
        elif not _same_items(there[0][task], there[1][task]):
            reasons.append(f"{task} was measured on other items or with another metric")
    return reasons


def _same_items(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two entries of cards answer the same questions (ancestors in a record keep no items)."""
    return bool(before.get("items") and after.get("items")) and all(
        before.get(key) == after.get(key) for key in ("metric", "docs", "n")
    )


def model_difference(
    lm_a: LanguageModel,
    lm_b: LanguageModel,
    texts: Iterable[str],
    *,
    context: int = CONTEXT,
    batch_tokens: int = BATCH_TOKENS,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """How far b's predictions are from a's over all tokens of `texts`.

    kl_mean, kl_median, kl_999   KL(a || b) of the next-token distribution in nats: mean, median, 99.9 % quantile
    kl_stderr                    standard error of the mean, texts being the independent items
    same_top                     share of places where both rank the same token first
    max_logit_difference         largest |logit_a - logit_b|
    perplexity_a, perplexity_b   of the texts;  tokens: how many were predicted

    a is the original (unquantized, unmerged) model: KL asks what b lost of it. Both must have the same vocabulary.
    The same model may be given twice, with an adapter of one switched by the caller. dtype: of the activations.
    Encoders and classifiers predict no next token: of them, state_error and tokens (see `encoder_difference`). A model
    of images reads no text: tokens = 0. Raises DataError for different vocabularies or no text.
    """
    if lm_a.config.kind == "vision":
        return {"tokens": 0}
    context = min(context, lm_a.config.max_position_embeddings)
    if lm_a.config.kind in ("encoder", "classifier"):
        return encoder_difference(lm_a, lm_b, texts, context=context, dtype=dtype)
    if lm_a.config.vocab_size != lm_b.config.vocab_size:
        raise DataError(f"vocabularies of {lm_a.config.vocab_size} and {lm_b.config.vocab_size} tokens share no logits")
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in rolling(lm_a.tokenizer, text, context)]
    if not pieces:
        raise DataError("no text to compare the models on")
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(lm_a.model, dtype), evaluating(lm_b.model, dtype):
        for batch in batches([len(piece) - 1 for _, piece in pieces], batch_tokens):
            numbers = torch.tensor([pieces[index][0] for index in batch])
            parts += compare_batch(lm_a, lm_b, [pieces[index][1] for index in batch], numbers)
    kl_N, same_N, gap_N, nll_a_N, nll_b_N, text_N = (torch.cat(part) for part in zip(*parts, strict=True))
    kl_N = kl_N.clamp(min=0).double()  # rounding alone makes it negative
    return {
        "kl_mean": kl_N.mean().item(),
        "kl_stderr": _clustered_stderr(kl_N, text_N),
        "kl_median": kl_N.median().item(),
        "kl_999": torch.sort(kl_N).values[min(len(kl_N) - 1, math.ceil(0.999 * len(kl_N)) - 1)].item(),
        "same_top": same_N.double().mean().item(),
        "max_logit_difference": gap_N.max().item(),
        "perplexity_a": nll_a_N.double().mean().exp().item(),
        "perplexity_b": nll_b_N.double().mean().exp().item(),
        "tokens": len(kl_N),
    }


def encoder_difference(
    lm_a: LanguageModel, lm_b: LanguageModel, texts: Iterable[str], *, context: int, dtype: torch.dtype | None
) -> dict[str, float]:
    """How far b's last states are from a's: |h_a - h_b| / |h_a| over all tokens of `texts`, each cut to `context`."""
    frame = (frame_of if lm_a.config.kind == "encoder" else decoder_frame)(lm_a.tokenizer)
    lost, total, tokens = 0.0, 0.0, 0
    with torch.no_grad(), evaluating(lm_a.model, dtype), evaluating(lm_b.model, dtype):
        for text in texts:
            tokens_1L = torch.tensor([encode_sentence(lm_a.tokenizer, frame, text, None, context).tokens])
            h_a, h_b = (lm.model.hidden(tokens_1L.to(lm.model.device)).double().cpu() for lm in (lm_a, lm_b))
            lost, total = lost + float((h_a - h_b).pow(2).sum()), total + float(h_a.pow(2).sum())
            tokens += tokens_1L.shape[1]
    if not tokens:
        raise DataError("no text to compare the models on")
    return {"state_error": math.sqrt(lost / total), "tokens": tokens}


def compare_batch(
    lm_a: LanguageModel, lm_b: LanguageModel, pieces: list[Any], numbers_B: Tensor
) -> list[tuple[Tensor, ...]]:
    """Per place, in chunks: KL, same top token, largest logit gap, surprisal in a and in b, number of the text."""
    length = max(len(piece) for piece in pieces)
    tokens_BL = torch.zeros(len(pieces), length, dtype=torch.int64)
    target_BL = torch.zeros(len(pieces), length, dtype=torch.bool)
    for b, piece in enumerate(pieces):
        tokens_BL[b, : len(piece)] = torch.tensor(piece.tokens)
        target_BL[b, : len(piece)] = torch.tensor(piece.loss_mask)
    is_target, targets_N = target_BL[:, 1:], tokens_BL[:, 1:][target_BL[:, 1:]]
    text_N = numbers_B[:, None].expand_as(is_target)[is_target]
    give_back_memory()  # neither does the place of logits hold activations, nor the other way round
    h_a, h_b = (_states(lm.model, tokens_BL[:, :-1])[is_target.to(lm.model.device)] for lm in (lm_a, lm_b))
    give_back_memory()
    made = []
    for start, a_CV in chunks(lm_a.model, h_a):
        here = slice(start, start + len(a_CV))
        b_CV = lm_b.model.unembed(h_b[here])
        found = _compare_logits(a_CV.float(), b_CV.float().to(a_CV.device), targets_N[here, None].to(a_CV.device))
        made.append((*(part.cpu() for part in found), text_N[here]))
        del a_CV, b_CV  # a table of logits less while the next two are made
    return made


def _compare_logits(a_CV: Tensor, b_CV: Tensor, target_C1: Tensor) -> tuple[Tensor, ...]:
    """KL, same top token, largest gap, surprisals. At most four tables of this size are there at a time."""
    same, gap = a_CV.argmax(-1) == b_CV.argmax(-1), (a_CV - b_CV).abs_().amax(-1)
    logp_CV, logq_CV = a_CV.log_softmax(-1), b_CV.log_softmax(-1)
    nll_a, nll_b = (-logp.gather(1, target_C1)[:, 0] for logp in (logp_CV, logq_CV))
    change_CV = logq_CV.neg_().add_(logp_CV)
    kl = torch.einsum("cv,cv->c", logp_CV.exp_(), change_CV)
    return kl, same, gap, nll_a, nll_b


def _states(model: Any, tokens_BL: Tensor) -> Tensor:
    """Final states. A model that answers sources is given the text as its source too: both models see the same."""
    tokens_BL = tokens_BL.to(model.device)
    conditioned: CausalLM = model.given(tokens_BL) if hasattr(model, "given") else model
    return conditioned.hidden(tokens_BL)


def _clustered_stderr(values_N: Tensor, text_N: Tensor) -> float:
    """Standard error of the mean when the tokens of one text are not independent; nan for a single text."""
    texts, of = torch.unique(text_N, return_inverse=True)
    m = len(texts)
    if m < 2:
        return math.nan
    residual = torch.zeros(m, dtype=torch.float64).index_add(0, of, values_N - values_N.mean()) / len(values_N)
    return math.sqrt(m / (m - 1) * float((residual**2).sum()))
