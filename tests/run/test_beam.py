"""Beam search: equal to trying everything, to greedy decoding, and for each prompt to the search alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from bildung.core.errors import SettingsError
from bildung.model.base import CausalLM
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.encoder_decoder import EncoderDecoder
from bildung.model.transformer import Decoder
from bildung.run.beam import Beam, Hypothesis, Search, beam_search, best_attainable, no_repeat_ngram
from bildung.run.decode import repetition_penalty
from bildung.run.loop import decode
from tests.model.tiny import CONFIG, tiny_decoder

PROMPTS = [[5, 17, 42, 8], [9], [77, 3, 3, 60, 12, 99, 31]]
FIVE: dict[str, Any] = {
    "vocab_size": 5,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "initializer_range": 0.2,
    "eos_token_id": 4,
    "bos_token_id": 0,
}
EOS = 4


def five_tokens(seed: int) -> Decoder:

    return build(from_dict({**CONFIG, **FIVE}), seed=seed).eval()


def encoder_decoder() -> EncoderDecoder:
    """Random, with attention sharp enough to differ from word to word."""
    common = {"causal": False, "norm": "layer", "positions": "learned", "gated": False}
    config = from_dict({**CONFIG, "num_key_value_heads": 6})
    encoder = replace(config, **common)
    decoder = replace(config, **{**common, "causal": True}, kind="encoder-decoder", cross=True, encoder=encoder)
    torch.manual_seed(5)
    model = EncoderDecoder(decoder)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def everything(model: CausalLM, prompt: list[int], new_tokens: int, beam: Beam) -> list[tuple[float, tuple[int, ...]]]:
    """(score, tokens) of every answer there is, scored without a cache; the best first."""
    found = []
    ids = range(model.config.vocab_size)
    for length in range(1, new_tokens + 1):
        for tokens in itertools.product(ids, repeat=length):
            complete = tokens[-1] == EOS or length == new_tokens
            if EOS in tokens[:-1] or not complete or (tokens[-1] == EOS and length <= beam.min_tokens):
                continue
            found.append(tokens)
    scored = []
    for tokens in found:
        with torch.no_grad():
            log_probs_LV = model(torch.tensor([[*prompt, *tokens]]))[0].log_softmax(-1)
        total = sum(log_probs_LV[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens))
        scored.append((total / beam.penalty(len(tokens)), tokens))
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("settings", [
    dict(length_penalty=0.0),
    dict(length_penalty=0.6),
    dict(length_penalty=2.5),
    dict(length_penalty=1.0, length_norm="average"),
    dict(length_penalty=-1.0, length_norm="average"),
    dict(length_penalty=0.6, min_tokens=2),
])  # fmt: skip
@pytest.mark.parametrize("seed", [2, 5])
def test_a_wide_beam_finds_what_trying_everything_finds(settings: dict[str, Any], seed: int) -> None:
    model, prompt = five_tokens(seed), [0, 2]
    beam = Beam(beams=300, n_best=6, **settings)
    best = everything(model, prompt, 4, beam)[:6]
    (found,) = beam_search(model, [prompt], new_tokens=4, beam=beam, stop_ids={EOS})
    assert [one.tokens for one in found] == [tokens for _, tokens in best]
    torch.testing.assert_close([one.score for one in found], [score for score, _ in best], atol=1e-4, rtol=0)
    assert {one.ended for one in found} <= {"stop", "length"}
    assert all((one.tokens[-1] == EOS) == (one.ended == "stop") for one in found)


def test_the_exhaustive_answers_differ_from_setting_to_setting() -> None:
    """Or the test above would show nothing about the penalties."""
    model = five_tokens(5)
    best = {alpha: everything(model, [0, 2], 4, Beam(length_penalty=alpha))[0][1] for alpha in (-3.0, 0.6, 2.5)}
    assert set(best.values()) == {(4,), (3, 4), (3, 3, 3, 3)}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_one_beam_is_greedy_decoding(alpha: float) -> None:
    model = tiny_decoder()
    free = decode(model, PROMPTS, new_tokens=12)
    for stop_ids in (set(), {free[0].tokens[3], free[2].tokens[5]}):
        greedy = decode(model, PROMPTS, new_tokens=12, stop_ids=stop_ids, rules=[repetition_penalty(1.3)])
        searched = beam_search(
            model,
            PROMPTS,
            new_tokens=12,
            beam=Beam(length_penalty=alpha),
            stop_ids=stop_ids,
            rules=[repetition_penalty(1.3)],
        )
        for answer, (one,) in zip(greedy, searched, strict=True):
            assert list(one.tokens) == answer.tokens and one.ended == answer.ended
            torch.testing.assert_close(list(one.log_probs), answer.log_probs, atol=2e-4, rtol=0)


def test_equal_logits_are_taken_as_greedy_decoding_takes_them() -> None:
    model = tiny_decoder()
    torch.nn.init.zeros_(model.lm_head.base.weight)  # type: ignore[arg-type]
    (answer,) = decode(model, PROMPTS[:1], new_tokens=4)
    ((one,),) = beam_search(model, PROMPTS[:1], new_tokens=4, beam=Beam())
    assert list(one.tokens) == answer.tokens == [0, 0, 0, 0]


def test_more_answers_leave_the_best_one_as_it_is() -> None:
    for seed in range(4):
        model = five_tokens(seed)
        found = [
            beam_search(model, [[0, 1]], new_tokens=8, beam=Beam(beams=5, n_best=n), stop_ids={EOS})[0]
            for n in (1, 2, 5)
        ]
        for few, more in itertools.pairwise(found):
            assert more[: len(few)] == few
        scores = [one.score for one in found[-1]]
        assert scores == sorted(scores, reverse=True) and len({one.tokens for one in found[-1]}) == 5


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 4}])
def test_a_padded_batch_finds_what_each_prompt_finds_alone(changes: dict[str, Any]) -> None:
    model = tiny_decoder(**changes)
    stop = decode(model, PROMPTS, new_tokens=6)[1].tokens[-1]  # so that the prompts end at different steps
    beam = Beam(beams=4, n_best=3, no_repeat_ngram=2)
    together = beam_search(model, PROMPTS, new_tokens=9, beam=beam, stop_ids={stop})
    assert any(one.ended == "stop" for found in together for one in found)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = beam_search(model, [prompt], new_tokens=9, beam=beam, stop_ids={stop})
        assert [one.tokens for one in alone] == [one.tokens for one in found]
        torch.testing.assert_close([one.score for one in alone], [one.score for one in found], atol=2e-4, rtol=0)


def test_each_row_keeps_its_source() -> None:
    """Hypotheses of several sources fork and die; none may end up with another's memory or padding."""
    whole = encoder_decoder()
    sources = torch.tensor([[5, 17, 42, 8], [9, 11, 0, 0], [77, 3, 60, 0]])
    keep = torch.tensor([[True] * 4, [True, True, False, False], [True] * 3 + [False]])
    stop = decode(whole.given(sources, keep), [[1]] * 3, new_tokens=5)[1].tokens[-1]
    for coverage in (0.0, 0.7):
        beam = Beam(beams=4, n_best=4, coverage_penalty=coverage)
        together = beam_search(whole.given(sources, keep), [[1]] * 3, new_tokens=7, beam=beam, stop_ids={stop})
        assert len({found[0].tokens for found in together}) == 3, "the sources matter"
        for source, real, found in zip(sources, keep, together, strict=True):
            given = whole.given(source[real][None])
            (alone,) = beam_search(given, [[1]], new_tokens=7, beam=beam, stop_ids={stop})
            assert [one.tokens for one in alone] == [one.tokens for one in found]
            torch.testing.assert_close([one.score for one in alone], [one.score for one in found], atol=2e-4, rtol=0)


def test_the_coverage_penalty_is_that_of_the_paper() -> None:
    from bildung.model.taps import observe

    whole, source = encoder_decoder(), torch.tensor([[5, 17, 42, 8, 60]])
    beam = Beam(beams=6, n_best=6, coverage_penalty=0.7)
    (found,) = beam_search(whole.given(source), [[1]], new_tokens=5, beam=beam)
    for one in found:
        with torch.no_grad(), observe(whole, "decoder.layers.1.cross.probs") as seen:
            log_probs_LV = whole(source, torch.tensor([[1, *one.tokens[:-1]]]))[0].log_softmax(-1)
        attention_LS = seen["decoder.layers.1.cross.probs"][0].mean(dim=0)
        coverage = 0.7 * attention_LS.sum(0).clamp(max=1).log().sum().item()
        log_prob = sum(log_probs_LV[i, token].item() for i, token in enumerate(one.tokens))
        assert coverage < -0.01 and one.score == pytest.approx(log_prob / (10 / 6) ** 0.6 + coverage, abs=1e-3)
    with pytest.raises(SettingsError, match="attends to no source"):
        beam_search(tiny_decoder(), PROMPTS, new_tokens=2, beam=beam)


def test_the_search_goes_on_while_a_running_hypothesis_may_win() -> None:
    """joeynmt PR 149: it ended with the first finished hypothesis, before the penalty let a longer one overtake it."""
    beam = Beam(beams=2, length_penalty=1.0, length_norm="average")
    search = Search(beam, new_tokens=4, stop_ids={EOS})
    assert search.advance([[(EOS, -1.0), (1, -1.2)]], [0.0]) == [0]  # finished: score -1.0
    assert search.finished[0].score == -1.0 and search.running, "-1.2 / 4 = -0.3 can still be reached"
    search.advance([[(1, -0.1), (EOS, -9.0)]], [0.0])
    search.advance([[(EOS, -0.1), (1, -5.0)]], [0.0])
    assert search.finished[0].tokens == (1, 1, EOS) and search.finished[0].score == pytest.approx(-1.4 / 3)
    assert not search.running, "-6.3 / 4 is worse than -1.4 / 3: nothing left to win"


def test_on_real_searches_the_first_finished_is_not_always_the_best() -> None:
    overtaken = 0
    for seed in range(12):
        (found,) = beam_search(
            five_tokens(seed), [[0, 1]], new_tokens=6, beam=Beam(beams=400, length_penalty=2.0), stop_ids={EOS}
        )
        first = everything(five_tokens(seed), [0, 1], 1, Beam(length_penalty=2.0))
        ended = next(score for score, tokens in first if tokens == (EOS,))
        overtaken += found[0].score > ended  # type: ignore[operator]
    assert overtaken >= 6


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.6, 2.0])
def test_no_continuation_exceeds_the_bound(alpha: float) -> None:
    model = five_tokens(3)
    for norm in ("wu", "average"):
        beam = Beam(length_penalty=alpha, length_norm=norm)  # type: ignore[arg-type]
        answers = everything(model, [0], 4, beam)
        with torch.no_grad():
            first = model(torch.tensor([[0]]))[0, -1].log_softmax(-1)
        for token in range(4):
            reached = max(score for score, tokens in answers if tokens[0] == token and len(tokens) > 1)
            one = Hypothesis((token,), (first[token].item(),))
            assert reached <= best_attainable(one, beam, 4) + 1e-5


def test_blocked_ngrams_do_not_appear_twice_and_do_not_change_what_is_allowed() -> None:
    model = tiny_decoder()
    (free,) = beam_search(model, PROMPTS[2:], new_tokens=24, beam=Beam(beams=3))
    beam = Beam(beams=3, no_repeat_ngram=2)
    (found,) = beam_search(model, PROMPTS[2:], new_tokens=24, beam=beam)
    ids = [*PROMPTS[2], *found[0].tokens]
    pairs = list(itertools.pairwise(ids))
    assert len(set(pairs)) == len(pairs)
    free_pairs = list(itertools.pairwise([*PROMPTS[2], *free[0].tokens]))
    assert len(set(free_pairs)) < len(free_pairs), "without it, the model does repeat itself"
    with torch.no_grad():
        log_probs_LV = model(torch.tensor([ids]))[0].log_softmax(-1)
    own = [log_probs_LV[6 + i, token].item() for i, token in enumerate(found[0].tokens)]
    torch.testing.assert_close(list(found[0].log_probs), own, atol=1e-3, rtol=0)


def test_the_ngram_rule_by_hand() -> None:
    logits = torch.zeros(2, 6)
    banned = no_repeat_ngram(3)(logits, [[1, 2, 3, 1, 2], [1, 2]]).isinf()
    assert banned.nonzero().tolist() == [[0, 3]] and not logits.isinf().any()
    assert no_repeat_ngram(1)(logits, [[1, 4], [0]]).isinf().nonzero().tolist() == [[0, 1], [0, 4], [1, 0]]


def test_no_stop_before_min_tokens() -> None:
    model = tiny_decoder()
    stop = decode(model, PROMPTS[:1], new_tokens=1)[0].tokens[0]
    short, long = (
        beam_search(model, PROMPTS[:1], new_tokens=9, beam=Beam(beams=1, min_tokens=n), stop_ids={stop})[0][0]
        for n in (0, 4)
    )
    assert short.tokens == (stop,) and stop not in long.tokens[:4] and len(long.tokens) > 4


def test_settings_that_cannot_be_are_refused() -> None:
    model = tiny_decoder()
    for wrong in (
        dict(beams=0),
        dict(beams=2, n_best=3),
        dict(no_repeat_ngram=-1),
        dict(min_tokens=-1),
        dict(length_penalty=float("nan")),
        dict(coverage_penalty=-0.1),
    ):
        with pytest.raises(SettingsError, match=next(reversed(wrong))):
            beam_search(model, PROMPTS, new_tokens=2, beam=Beam(**wrong))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="every way on from prompt 0"):
        beam_search(five_tokens(0), [[0, 1, 2, 3, 4]], new_tokens=2, beam=Beam(no_repeat_ngram=1))


def test_fewer_answers_where_there_are_no_more() -> None:
    (found,) = beam_search(five_tokens(0), [[0]], new_tokens=1, beam=Beam(beams=9, n_best=9), stop_ids={EOS})
    assert len(found) == 5


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_recurrent_model_searches_as_an_attending_one(cell: str) -> None:
    """Its state is what a fork copies: a padded batch finds what each prompt finds alone, a wide beam the best."""
    sizes = {"hidden_size": 24, "embedding_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5}
    model = build(from_dict({"model_type": "rnn", "cell": cell, "vocab_size": 5, "eos_token_id": EOS, **sizes}), seed=3)
    beam = Beam(beams=300, n_best=5)
    prompts = [[0, 2, 1], [3], [1, 1, 0, 2]]
    together = beam_search(model.eval(), prompts, new_tokens=4, beam=beam, stop_ids={EOS})
    assert len({tuple(one.tokens for one in found) for found in together}) > 1, "the prompts matter"
    for prompt, found in zip(prompts, together, strict=True):
        best = everything(model, prompt, 4, beam)[:5]
        assert [one.tokens for one in found] == [tokens for _, tokens in best]


@pytest.mark.parametrize("attention", ["none", "bahdanau", "general"])
def test_a_seq2seq_model_keeps_each_row_with_its_source(attention: str) -> None:
    keys = {"model_type": "rnn_seq2seq", "attention": attention, "cell": "gru", "vocab_size": 40, "hidden_size": 24}
    more = {"embedding_size": 16, "attention_size": 20, "initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 2}
    model = build(from_dict({**keys, **more}), seed=3).eval()
    sources = torch.tensor([[5, 17, 32, 8], [9, 11, 0, 0], [37, 3, 20, 0]])
    keep = torch.tensor([[True] * 4, [True, True, False, False], [True] * 3 + [False]])
    beam = Beam(beams=4, n_best=4, coverage_penalty=0.0 if attention == "none" else 0.5)
    together = beam_search(model.given(sources, keep), [[0]] * 3, new_tokens=7, beam=beam, stop_ids={2})
    assert len({found[0].tokens for found in together}) == 3, "the sources matter"
    for source, real, found in zip(sources, keep, together, strict=True):
        (alone,) = beam_search(model.given(source[real][None]), [[0]], new_tokens=7, beam=beam, stop_ids={2})
        assert [one.tokens for one in alone] == [one.tokens for one in found]
        torch.testing.assert_close([one.score for one in alone], [one.score for one in found], atol=2e-4, rtol=0)
