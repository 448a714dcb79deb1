"""The decoding loop: cached = uncached, padded = single, stop tokens, log-probabilities, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.taps import observe
from bildung.run.decode import Sampling, sample, top_k
from bildung.run.loop import decode, decode_steps
from tests.model.tiny import tiny_decoder

PROMPTS = [[5, 17, 42, 8], [9], [77, 3, 3, 60, 12, 99, 31]]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mha": {"num_key_value_heads": 6},
    "window": {"model_type": "mistral", "sliding_window": 4},
    "qwen3": {"model_type": "qwen3"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [None, 7])
def test_cached_equals_uncached_token_for_token(family: str, seed: int | None) -> None:
    model = tiny_decoder(**FAMILIES[family])
    for prompts in ([PROMPTS[2]], PROMPTS):
        runs = []
        for use_cache in (True, False):
            choice = {} if seed is None else {"choose": sample(seed), "rules": [top_k(20)]}
            runs.append(decode(model, prompts, new_tokens=20, use_cache=use_cache, **choice))
        for cached, uncached in zip(*runs, strict=True):
            assert cached.tokens == uncached.tokens
            assert len(set(cached.tokens)) > 1  # one token over and over would prove little
            torch.testing.assert_close(cached.log_probs, uncached.log_probs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_answers_as_each_prompt_alone(family: str) -> None:
    model = tiny_decoder(**FAMILIES[family])
    together = decode(model, PROMPTS, new_tokens=12)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        (alone,) = decode(model, [prompt], new_tokens=12)
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(answer.log_probs, alone.log_probs, atol=2e-4, rtol=0)


def test_the_first_row_of_a_sampled_batch_is_the_single_answer() -> None:
    model = tiny_decoder()
    alone = decode(model, PROMPTS[:1], new_tokens=12, choose=sample(3))[0]
    assert decode(model, PROMPTS, new_tokens=12, choose=sample(3))[0].tokens == alone.tokens


def test_greedy_tokens_are_the_argmax_of_the_plain_forward_pass() -> None:
    model = tiny_decoder()
    (answer,) = decode(model, PROMPTS[:1], new_tokens=6)
    whole = torch.tensor([PROMPTS[0] + answer.tokens])
    with torch.no_grad():
        log_probs_BLV = model(whole).log_softmax(-1)
    for i, token in enumerate(answer.tokens, start=len(PROMPTS[0]) - 1):
        assert log_probs_BLV[0, i].argmax() == token
        assert abs(log_probs_BLV[0, i, token].item() - answer.log_probs[i - len(PROMPTS[0]) + 1]) < 2e-4


def test_rows_end_on_their_own() -> None:
    model = tiny_decoder()
    free = decode(model, PROMPTS, new_tokens=10)
    stop = free[0].tokens[3]
    answers = decode(model, PROMPTS, new_tokens=10, stop_ids={stop})
    for answer, before in zip(answers, free, strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 10
        assert answer.tokens == before.tokens[:end]
        assert answer.ended == ("stop" if stop in before.tokens else "length")
        assert len(answer.log_probs) == len(answer.tokens)
    assert len(answers[0].tokens) <= 4


def test_it_stops_computing_when_every_row_has_ended() -> None:
    model = tiny_decoder()
    stop = decode(model, PROMPTS[:1], new_tokens=1)[0].tokens
    assert len(list(decode_steps(model, PROMPTS[:1], new_tokens=50, stop_ids=stop))) == 1


def test_a_cache_goes_on_where_it_was() -> None:
    model = tiny_decoder()
    cache = model.kv_cache(1, 40)
    first = [step.tokens[0] for step in decode_steps(model, PROMPTS[:1], new_tokens=5, kv_cache=cache)]
    assert cache.length == len(PROMPTS[0]) + 4
    longer = [PROMPTS[0] + first + [11, 12]]
    lengths = []
    with observe(model, "embed") as seen:
        tokens = []
        for step in decode_steps(model, longer, new_tokens=5, kv_cache=cache):
            tokens += step.tokens
            lengths.append(seen["embed"].shape[1])
    assert lengths == [3, 1, 1, 1, 1], "only what the cache does not hold is computed"
    assert tokens == decode(model, longer, new_tokens=5)[0].tokens
    with pytest.raises(SettingsError, match="cache"):
        next(decode_steps(model, PROMPTS[:1], new_tokens=1, kv_cache=cache))


def test_a_training_model_generates_without_dropout_and_trains_on() -> None:
    model = tiny_decoder()
    before = decode(model, PROMPTS[:1], new_tokens=8)[0].tokens
    for linear in match_linears(model, "all").values():
        linear.deltas["noisy"] = LowRank(linear.in_features, linear.out_features, 2, 1.0, dropout=0.9)
        torch.nn.init.normal_(linear.deltas["noisy"].lora_B, std=0.1)
    quiet = decode(model.eval(), PROMPTS[:1], new_tokens=8)[0].tokens
    model.train()
    assert decode(model, PROMPTS[:1], new_tokens=8)[0].tokens == quiet != before
    assert model.training
    loss = model(torch.tensor(PROMPTS[:1])).sum()
    loss.backward()  # nothing was left in inference mode, no packed matrix stays behind
    assert match_linears(model, "q_proj")["model.layers.0.self_attn.q_proj"].deltas["noisy"].lora_A.grad is not None


def test_the_callers_gradient_mode_is_left_alone_between_steps() -> None:
    for _ in decode_steps(tiny_decoder(), PROMPTS[:1], new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_rules_see_prompt_and_answer_but_no_padding() -> None:
    model, seen = tiny_decoder(), []

    def spy(logits_BV, ids):  # type: ignore[no-untyped-def]
        seen.append([list(row) for row in ids])
        return logits_BV

    answers = decode(model, PROMPTS[:2], new_tokens=2, rules=[spy])
    assert seen[0] == PROMPTS[:2]
    assert seen[1] == [p + a.tokens[:1] for p, a in zip(PROMPTS, answers, strict=False)]


@pytest.mark.parametrize("new_tokens", [0, -3, 1.5, True])
def test_new_tokens_must_be_a_whole_number_from_one(new_tokens: Any) -> None:
    with pytest.raises(SettingsError, match="new_tokens"):
        decode(tiny_decoder(), PROMPTS, new_tokens=new_tokens)


def test_prompts_that_cannot_be_answered_are_refused() -> None:
    model = tiny_decoder()
    with pytest.raises(DataError, match="empty prompt"):
        decode(model, [[1], []], new_tokens=1)
    with pytest.raises(DataError, match="empty prompt"):
        decode(model, [], new_tokens=1)
    with pytest.raises(DataError, match="token 101"):
        decode(model, [[101]], new_tokens=1)
    with pytest.raises(SettingsError, match="at most 8 new tokens"):
        decode(model, [[5] * 120], new_tokens=9)
    assert len(decode(model, [[5] * 120], new_tokens=8)[0].tokens) == 8
    with pytest.raises(SettingsError, match="shorten"):
        decode(model, [[5] * 128], new_tokens=1)


def test_logits_that_are_not_numbers_are_an_error() -> None:
    model = tiny_decoder()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for choose in (Sampling().choose(), Sampling(temperature=1.0).choose()):
        with pytest.raises(ModelFileError, match="not finite"):
            decode(model, PROMPTS[:1], new_tokens=2, choose=choose)
