"""Log-likelihoods: against the plain formula, against lm-eval's rules, and independent of batching."""

from __future__ import annotations

import math
import random

import pytest
import torch

from bildung.core.errors import DataError, ModelFileError
from bildung.data.examples import Example
from bildung.evaluate.likelihood import (
    batches,
    bits_per_byte,
    encode_pair,
    evaluating,
    perplexity,
    prefix_token,
    rolling,
    score,
    share_prefixes,
)
from bildung.train import objectives
from bildung.train.objectives import clm


def make(tokens, *targets):
    return Example(list(tokens), [index in targets for index in range(len(tokens))])


@pytest.fixture
def examples():
    random.seed(0)
    made = []
    for length in (2, 3, 5, 9, 17, 30, 30):
        tokens = [random.randrange(3, 300) for _ in range(length)]
        made.append(make(tokens, *range(random.randrange(1, length), length)))
    return [*made, make(made[-1].tokens, 2, 7, 11)]


def by_hand(model, example):
    logp = model(torch.tensor([example.tokens])).log_softmax(-1)[0]
    targets = [i for i, is_target in enumerate(example.loss_mask) if is_target]
    logprobs = [logp[i - 1, example.tokens[i]].item() for i in targets]
    return logprobs, all(logp[i - 1].argmax() == example.tokens[i] for i in targets)


def test_scores_are_the_formula_one_example_at_a_time(tiny_lm, examples):
    for example, made in zip(examples, score(tiny_lm.model, examples), strict=True):
        expected, greedy = by_hand(tiny_lm.model, example)
        assert made.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert made.is_greedy == greedy and made.count == example.num_targets
        assert made.logprob == pytest.approx(sum(expected), abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_neither_the_batch_nor_its_padding_matters(tiny_lm, examples, batch_tokens, monkeypatch):
    expected = [score(tiny_lm.model, [example])[0] for example in examples]
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", 7 * tiny_lm.config.vocab_size)  # seven places at a time
    for one, alone in zip(score(tiny_lm.model, examples, batch_tokens=batch_tokens), expected, strict=True):
        assert one.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-5)
        assert one.is_greedy == alone.is_greedy


def test_the_sum_is_the_training_loss(tiny_lm, examples):
    from bildung.data.batches import pad

    total = clm(tiny_lm.model, pad(examples, None))
    scores = score(tiny_lm.model, examples)
    assert -sum(made.logprob for made in scores) == pytest.approx(total.total.item(), rel=1e-5)
    assert sum(made.count for made in scores) == total.count


def test_is_greedy_is_seen(tiny_lm):
    tokens = [5, 6, 7]
    best = int(tiny_lm.model(torch.tensor([tokens]))[0, -1].argmax())
    yes, no = score(tiny_lm.model, [make([*tokens, best], 3), make([*tokens, best - 1], 3)])
    assert yes.is_greedy and not no.is_greedy


def test_what_begins_alike_is_read_once(tiny_lm):
    context, read = [5, 6, 7, 8], []
    choices = [make([*context, choice], 4) for choice in (10, 11, 12)] + [make([*context, 10, 11], 4, 5)]
    hidden = tiny_lm.model.hidden
    tiny_lm.model.hidden = lambda tokens_BL, **given: read.append(tuple(tokens_BL.shape)) or hidden(tokens_BL, **given)
    made = score(tiny_lm.model, choices)
    assert read == [(1, 5)]  # [5 6 7 8 10] serves all four
    tiny_lm.model.hidden = hidden
    for example, one in zip(choices, made, strict=True):
        assert one.token_logprobs == pytest.approx(by_hand(tiny_lm.model, example)[0], abs=1e-5)


def test_share_prefixes():
    inputs = [(1, 2), (1, 2, 3), (1, 3), (1,), (1, 2, 3), (2,)]
    rows, row_of = share_prefixes(inputs)
    assert sorted(rows) == [(1, 2, 3), (1, 3), (2,)]
    assert all(rows[row][: len(given)] == given for given, row in zip(inputs, row_of, strict=True))


def test_batches_fill_up_and_hold_every_row_once():
    groups = batches([3, 9, 1, 4, 4], batch_tokens=9)
    assert groups == [[1], [3, 4], [0, 2]]
    assert batches([50], batch_tokens=9) == [[0]]


def test_nothing_to_score_is_an_error(tiny_lm):
    with pytest.raises(DataError, match=r"examples \[1\] have no target"):
        score(tiny_lm.model, [make([1, 2], 1), make([1, 2])])


def test_damaged_weights_are_an_error(tiny_lm):
    tiny_lm.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ModelFileError, match="damaged"):
        score(tiny_lm.model, [make([1, 2], 1)])


# ── evaluating ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluating_gives_the_same_numbers_as_casting_at_every_pass(tiny_lm):
    model, tokens = tiny_lm.model, torch.tensor([[5, 6, 7, 8]])
    model.compute_dtype = torch.bfloat16
    expected = model(tokens)
    model.compute_dtype = None
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    with evaluating(model, torch.bfloat16):
        assert model.lm_head.base.weight.dtype == torch.bfloat16 and not model.training
        assert torch.equal(model(tokens), expected)
        assert not model(tokens).requires_grad
    assert model.training and model.compute_dtype is None
    assert model.lm_head.base.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


def test_evaluating_puts_back_after_an_error(tiny_lm):
    with pytest.raises(KeyError), evaluating(tiny_lm.model, torch.bfloat16):
        raise KeyError
    assert {p.dtype for p in tiny_lm.model.parameters()} == {torch.float32}


def test_training_goes_on_after_evaluating(tiny_lm):
    with evaluating(tiny_lm.model):
        tiny_lm.model(torch.tensor([[5, 6]]))
    tiny_lm.model(torch.tensor([[5, 6]])).sum().backward()
    assert tiny_lm.model.model.embed_tokens.weight.grad is not None


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_context_and_continuation_are_encoded_together(tiny_lm):
    tokenizer = tiny_lm.tokenizer
    pair = encode_pair(tokenizer, "The capital of France is", " Paris")
    assert pair.tokens == tokenizer.encode("The capital of France is Paris")
    assert tokenizer.decode([t for t, m in zip(pair.tokens, pair.loss_mask, strict=True) if m]) == " Paris"


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation(tiny_lm):
    spaced = encode_pair(tiny_lm.tokenizer, "The capital of France is ", "Paris")
    assert spaced == encode_pair(tiny_lm.tokenizer, "The capital of France is", " Paris")


def test_an_empty_context_is_the_bos_token(tiny_lm):
    pair = encode_pair(tiny_lm.tokenizer, "", "Paris")
    assert pair.tokens == [0, *tiny_lm.tokenizer.encode("Paris", bos=False)] and pair.loss_mask[:2] == [False, True]


def test_bos_stands_in_front_once_when_the_model_uses_it(tiny_lm):
    tiny_lm.tokenizer.uses_bos = True
    pair = encode_pair(tiny_lm.tokenizer, "The capital", " of")
    assert pair.tokens[0] == 0 and pair.tokens.count(0) == 1 and not pair.loss_mask[0]


def test_without_bos_and_eos_an_empty_context_is_refused(tiny_lm):
    tiny_lm.tokenizer.named |= {"bos_token": None, "eos_token": None}
    assert prefix_token(tiny_lm.tokenizer) is None
    with pytest.raises(DataError, match="neither BOS nor EOS"):
        encode_pair(tiny_lm.tokenizer, " ", "Paris")


def test_a_continuation_without_tokens_is_refused(tiny_lm):
    with pytest.raises(DataError, match="adds no token"):
        encode_pair(tiny_lm.tokenizer, "The capital", "")


@pytest.mark.parametrize("context", [1, 4, 7, 100])
def test_windows_score_every_token_once_with_the_stated_context(tiny_lm, context):
    text = "The capital of Spain is Madrid, in the middle."
    full = [0, *tiny_lm.tokenizer.encode(text, bos=False)]
    windows = rolling(tiny_lm.tokenizer, text, context)
    scored = [token for w in windows for token, m in zip(w.tokens, w.loss_mask, strict=True) if m]
    assert scored == full[1:]
    assert all(len(window) - 1 <= context for window in windows)
    if len(full) > context:  # the last window is filled up from before
        assert windows[-1].tokens == full[-context - 1 :]


def test_windows_as_in_lm_eval(tiny_lm):
    """lm_eval.utils.get_rolling_token_windows of range(10), prefix 100, max_seq_len 4, context_len 1, made disjoint."""
    tokenizer = tiny_lm.tokenizer
    tokenizer.encode = lambda text, bos: list(range(10))
    tokenizer.bos_id = 100
    made = [
        ([t for t, m in zip(w.tokens, w.loss_mask, strict=True) if not m], w.num_targets)
        for w in rolling(tokenizer, "x", 4)
    ]
    assert made == [([100], 4), ([3], 4), ([5, 6, 7], 2)]


def test_perplexity_and_bits():
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert bits_per_byte(80 * math.log(2), 80) == pytest.approx(1.0)  # one bit for each of 80 bytes
