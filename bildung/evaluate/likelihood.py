"""How probable a model finds given text: the measurement under perplexity, multiple choice and KL divergence.

A thing to score is an `Example`: token ids, and a mask that says which of them are targets. Log-probabilities are
summed in nats and counted; a mean is taken once, at the end, over everything (a mean of means weighs short texts too
much).

The model is causal, so the logits after a prefix do not depend on what follows. Two examples of which one's input
begins with the other's therefore share one row of the batch: " positive" and " negative" after the same review cost one
forward pass, not two. (A prefix language model reads what comes before the first target in both directions; examples
share a row where that is the same.) Only places that predict a target are unembedded. log softmax is taken in float32.
"""

# B rows, L tokens of a row, D hidden size, N places that predict a target, C of a chunk, M targets in it, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError, ModelFileError
from bildung.data.examples import Example
from bildung.model.linear import Dense
from bildung.model.transformer import Decoder
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.objectives import rows_at_a_time


@dataclass(frozen=True)
class Score:
    """Log-probability of an example's targets."""

    token_logprobs: tuple[float, ...]  # nats, one per target, in order
    is_greedy: bool  # every target is the most probable token at its place

    @property
    def logprob(self) -> float:
        """log p(targets | context) in nats."""
        return math.fsum(self.token_logprobs)

    @property
    def count(self) -> int:
        return len(self.token_logprobs)


def score(model: Decoder, examples: Sequence[Example], *, batch_tokens: int = 2048) -> list[Score]:
    """The score of each example.

    batch_tokens: tokens of one forward pass, padding included; it changes the speed, and the result only by rounding.
    Raises DataError for an example without targets, ModelFileError when the model's output is not a number.
    """
    if empty := [index for index, example in enumerate(examples) if not example.num_targets]:
        raise DataError(f"examples {empty[:5]} have no target token: there is nothing to score")
    inputs = [input_of(example) for example in examples]
    given = [example.loss_mask.index(True) if model.prefix_lm else 0 for example in examples]
    rows, row_of, given_of = share_rows(inputs, given)
    wanted: dict[int, list[int]] = {}  # row -> the examples that it serves
    for index, row in enumerate(row_of):
        wanted.setdefault(row, []).append(index)
    scores: dict[int, Score] = {}
    with evaluating(model):
        for batch in batches([len(row) for row in rows], batch_tokens):
            tokens_BL = _padded([rows[row] for row in batch], model.device)
            prefix_BL = _first([given_of[row] for row in batch], tokens_BL) if model.prefix_lm else None
            h_BLD = model.hidden(tokens_BL, prefix_BL=prefix_BL)
            served = [(b, index) for b, row in enumerate(batch) for index in wanted[row]]
            scores.update(score_batch(model, h_BLD, served, examples))
    return [scores[index] for index in range(len(examples))]


def input_of(example: Example) -> tuple[int, ...]:
    """The tokens the model must read: all before the last target."""
    last = max(index for index, is_target in enumerate(example.loss_mask) if is_target)
    return tuple(example.tokens[:last])


def score_batch(
    model: Decoder, h_BLD: Tensor, served: list[tuple[int, int]], examples: Sequence[Example]
) -> dict[int, Score]:
    """{example: its score} of those that one batch serves, from its final states.

    served: (row of the batch, number of the example that reads it); a row may serve several, whose tokens before the
    last target are the row's first. A score is in nats, over the example's targets alone.
    """
    length = h_BLD.shape[1]
    places, targets, ends = [], [], []
    for b, index in served:
        example = examples[index]
        for position, (token, is_target) in enumerate(zip(example.tokens, example.loss_mask, strict=True)):
            if is_target:
                places.append(b * length + position - 1)
                targets.append(token)
        ends.append(len(targets))
    # Examples that share a row may also share places: each place is unembedded once.
    distinct_N, at = torch.unique(torch.tensor(places), return_inverse=True)
    h_ND = h_BLD.flatten(0, 1)[distinct_N.to(h_BLD.device)]
    logprobs, greedy = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
    target = torch.tensor(targets)
    for start, logits_CV in chunks(model, h_ND):
        here = (at >= start) & (at < start + len(logits_CV))
        logp_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
        row_M, target_M = (at[here] - start).to(logp_CV.device), target[here].to(logp_CV.device)
        logprobs[here] = logp_CV[row_M, target_M].cpu()
        greedy[here] = (logp_CV.argmax(dim=-1)[row_M] == target_M).cpu()
    if not bool(logprobs.isfinite().all()):
        raise ModelFileError("the model's log-probabilities are not finite numbers: its weights are damaged")
    starts = [0, *ends[:-1]]
    return {
        index: Score(tuple(logprobs[start:end].tolist()), bool(greedy[start:end].all()))
        for (_, index), start, end in zip(served, starts, ends, strict=True)
    }


def chunks(model: Decoder, h_ND: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, logits_CV) over all rows, a bounded number of logits at a time."""
    # One row more than fits 2^23 numbers: from 32 MiB on glibc maps a block apart, and frees it whole. Smaller tables
    # leave holes that no other fills, in a comparison of two models 100 MB a chunk.
    size = rows_at_a_time(h_ND.device, model.config.vocab_size) + 1
    return ((start, model.unembed(h_ND[start : start + size])) for start in range(0, len(h_ND), size))


def share_prefixes(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The inputs that are no prefix of another one, and for every input the number of the row that begins with it."""
    rows: list[tuple[int, ...]] = []
    row_of = [0] * len(inputs)
    # In sorted order everything that begins with x follows x directly, so looking at one neighbour is enough.
    for index in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        if not rows or rows[-1][: len(inputs[index])] != inputs[index]:
            rows.append(inputs[index])
        row_of[index] = len(rows) - 1
    return rows, row_of


def share_rows(
    inputs: Sequence[tuple[int, ...]], given: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
    """As `share_prefixes`, among inputs of which equally many tokens are `given`, that is, read in both directions:
    others see something else. Returns for every row how many, too."""
    rows: list[tuple[int, ...]] = []
    row_of, given_of = [0] * len(inputs), []
    for number in sorted(set(given)):
        alike = [index for index in range(len(inputs)) if given[index] == number]
        found, at = share_prefixes([inputs[index] for index in alike])
        for index, row in zip(alike, at, strict=True):
            row_of[index] = len(rows) + row
        rows += found
        given_of += [number] * len(found)
    return rows, row_of, given_of


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers grouped so that rows times the longest fits `batch_tokens` (at least one row). Longest first: rows of
    a batch are of like length, and what does not fit the memory shows at once."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Right-padded token ids. No mask: a real token looks back only, so it never sees what stands to its right."""
    tokens_BL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens_BL[b, : len(row)] = torch.tensor(row)
    return tokens_BL.to(device)


def _first(counts: Sequence[int], tokens_BL: Tensor) -> Tensor:
    """True for so many tokens at the beginning of each row."""
    places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    return places_L < torch.tensor(counts, device=tokens_BL.device)[:, None]


@contextmanager
def evaluating(model: Decoder, dtype: torch.dtype | None = None) -> Iterator[None]:
    """No dropout, no gradients, activations in `dtype` (None: as they are). Everything is put back afterwards."""
    was_training, was_dtype = model.training, model.compute_dtype
    model.eval()
    model.compute_dtype = dtype or was_dtype
    # Master weights in float32 are rounded once here instead of in every forward pass, which for a decoded token would
    # be most of the work. A tied weight is one Parameter and is swapped once.
    weights = {linear.base.weight for linear in model.linears().values() if isinstance(linear.base, Dense)}
    masters = {weight: weight.data for weight in weights if weight.dtype != model.dtype}
    for weight, master in masters.items():
        weight.data = master.to(model.dtype)
    try:
        with torch.no_grad():  # inference_mode would leave cached tensors behind that training cannot use
            yield
    finally:
        for weight, master in masters.items():
            weight.data = master
        model.train(was_training)
        model.compute_dtype = was_dtype


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Example:
    """A context and the continuation to score, tokenized as lm-eval does it (TemplateLM._encode_pair).

    Both are encoded together, and the first len(encode(context)) tokens are the context. Spaces at the end of the
    context go to the continuation, because in most vocabularies a space belongs to the word after it: "Answer: " +
    "yes" is scored as "Answer:" + " yes". An empty context is the BOS token (without one, EOS).
    """
    words = context.rstrip()
    context, continuation = words, context[len(words) :] + continuation
    if not context:
        start = prefix_token(tokenizer)
        if start is None:
            raise DataError("this tokenizer has neither BOS nor EOS: give the text a context to follow")
        tokens = tokenizer.encode(continuation, bos=False)
        whole, given = [start, *tokens], 1
    else:
        whole, given = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    if given >= len(whole):
        raise DataError(f"the continuation {continuation!r} adds no token to the context ...{context[-40:]!r}")
    return Example(whole, [False] * given + [True] * (len(whole) - given))


def prefix_token(tokenizer: Tokenizer) -> int | None:
    """What stands before the first word of a text: BOS, else EOS, which separates texts (lm-eval's rule)."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def rolling(tokenizer: Tokenizer, text: str, context: int) -> list[Example]:
    """A text in windows of at most `context` input tokens, such that every token is a target exactly once.

    Windows do not overlap, so the first targets of a window have seen little; the last window, which may be short, is
    filled up from before (lm-eval's get_rolling_token_windows with context_len 1). The first token is predicted from
    BOS, else EOS; where there is neither it is not scored.
    """
    if context < 1:
        raise DataError(f"context = {context}: at least 1 token")
    tokens = tokenizer.encode(text, bos=False)
    start = prefix_token(tokenizer)
    full = tokens if start is None else [start, *tokens]
    if len(full) < 2:
        raise DataError(f"the text {text[:40]!r} has no token to predict")
    examples = []
    for done in range(0, len(full) - 1, context):
        end = min(done + context, len(full) - 1)  # the input is full[first:end], the targets full[done + 1 : end + 1]
        first = max(0, end - context)
        examples.append(Example(full[first : end + 1], [False] * (done + 1 - first) + [True] * (end - done)))
    return examples


def perplexity(nats: float, count: int) -> float:
    """exp of the mean surprisal; `nats` is -log p, summed. Comparable between models with the same tokenizer only."""
    return math.exp(min(nats / count, 700.0))  # exp(710) overflows


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Surprisal in bits per UTF-8 byte: comparable between tokenizers."""
    return nats / math.log(2) / text_bytes
