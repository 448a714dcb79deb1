"""Rules on logits equal transformers' classes; draws follow the distribution, the seed and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor

from bildung.core.errors import SettingsError
from bildung.run import decode


def logits(rows: int = 3, vocabulary: int = 50, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


IDS = [[4, 9, 9, 31], [0, 1, 2, 3], [49, 7, 7, 7]]
PEERS = {
    "temperature": (decode.temperature(0.7), transformers.TemperatureLogitsWarper(0.7)),
    "top_k": (decode.top_k(7), transformers.TopKLogitsWarper(7)),
    "top_k beyond the vocabulary": (decode.top_k(99), transformers.TopKLogitsWarper(99)),
    "top_p": (decode.top_p(0.8), transformers.TopPLogitsWarper(0.8)),
    "top_p tiny": (decode.top_p(1e-6), transformers.TopPLogitsWarper(1e-6)),
    "min_p": (decode.min_p(0.1), transformers.MinPLogitsWarper(0.1)),
    "min_p 1": (decode.min_p(1.0), transformers.MinPLogitsWarper(1.0)),
    "repetition_penalty": (decode.repetition_penalty(1.3), transformers.RepetitionPenaltyLogitsProcessor(1.3)),
}


@pytest.mark.parametrize("name", PEERS)
def test_rules_equal_transformers(name: str) -> None:
    rule, peer = PEERS[name]
    given = logits()
    ours, theirs = rule(given, IDS), peer(torch.tensor(IDS), given.clone())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert not torch.equal(ours, given) or name == "top_k beyond the vocabulary"
    assert torch.equal(given, logits()), "a rule must not change what it is given"


def test_all_rules_apply_in_the_order_of_transformers() -> None:
    sampling = decode.Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.5)
    theirs = logits()
    for peer in (
        transformers.RepetitionPenaltyLogitsProcessor(1.5),
        transformers.TemperatureLogitsWarper(1.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.1),
    ):
        theirs = peer(torch.tensor(IDS), theirs)
    torch.testing.assert_close(decode.apply(sampling.rules(), logits(), IDS), theirs, atol=1e-6, rtol=0)
    other_order = decode.temperature(1.7)(decode.top_p(0.8)(logits(), IDS), IDS)
    assert not torch.equal(other_order, decode.top_p(0.8)(decode.temperature(1.7)(logits(), IDS), IDS))


def test_min_p_is_relative_to_the_likeliest_token() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.06, 0.04, 0.1]])
    kept = decode.min_p(0.2)(probs.log(), [[]]).isfinite()
    assert kept.tolist() == [[True, True, False, False, True]]


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    changed = decode.repetition_penalty(2.0)(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), [[0, 1]])
    assert changed.tolist() == [[0.5, -2.0, 1.0, -1.0]]


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    choose = decode.sample(0)
    n = 4000
    counts = torch.bincount(torch.stack([choose(probs.log()[None])[0] for _ in range(n)]), minlength=5) / n
    assert counts[2] == 0
    assert bool(((counts - probs).abs() <= 4 * (probs * (1 - probs) / n).sqrt()).all())


def test_a_draw_depends_on_seed_and_row_only() -> None:
    one, other, third = decode.sample(1), decode.sample(1), decode.sample(2)
    flat = torch.zeros(4, 10**6)
    first = one(flat)
    torch.manual_seed(123)
    assert torch.equal(first, other(flat))
    assert not torch.equal(first, third(flat))
    assert not torch.equal(first, one(flat)), "the next step draws anew"
    assert len(set(first.tolist())) == 4, "rows draw apart"
    assert decode.sample(1)(flat[:1])[0] == first[0], "companions do not matter"


def test_a_draw_of_the_last_token_stays_in_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.Random.random", lambda self: 1 - 2**-53)
    drawn = decode.sample(0)(torch.tensor([[0.0, 1.0, 2.0, -math.inf, -math.inf]]))
    assert drawn.tolist() == [2]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert decode.greedy(torch.tensor([[1.0, 5.0, 5.0]])).tolist() == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1, "top_k": 0},
        {"temperature": 1, "top_p": 0},
        {"temperature": 1, "top_p": 1.1},
        {"temperature": 1, "top_p": math.nan},
        {"temperature": 1, "min_p": -0.1},
        {"temperature": 1, "min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"top_p": 0.9},
        {"top_k": "many"},
        {"top_q": 1},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=list(wrong)[-1]):
        decode.Sampling(**wrong).rules()
