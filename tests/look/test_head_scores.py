"""Scores of heads: a circuit set by hand is found head by head, falls apart without its first half, and the loss says
the same."""

from __future__ import annotations

import math

import pytest
import torch

from bildung.core.errors import DataError, NoSuchSite
from bildung.look.attention_heads.head_scores import Repeats, head_scores, pattern_scores, repeated_tokens, without_head
from bildung.look.attention_heads.in_context_score import in_context_score
from bildung.model.taps import intervene
from tests.look.induction_model import INDUCTION, PREVIOUS, SIZE, induction_lm
from tests.model.tiny import tiny_lm


def repeats_of(stretch: int, copies: int, rows: int = 3) -> Repeats:
    """Tokens of the hand-set model, with token 0 in front."""
    random = torch.Generator().manual_seed(0)
    drawn = [1 + torch.randperm(SIZE - 1, generator=random)[:stretch].repeat(copies) for _ in range(rows)]
    return Repeats(torch.cat((torch.zeros(rows, 1, dtype=torch.long), torch.stack(drawn)), 1), stretch, 1)


@pytest.mark.parametrize(("stretch", "copies"), [(15, 2), (7, 4)])
def test_a_circuit_set_by_hand_is_found_and_falls_apart(stretch: int, copies: int) -> None:
    lm = induction_lm()
    repeats = repeats_of(stretch, copies)
    seen = head_scores(lm, repeats)
    assert seen.strongest("induction") == INDUCTION and seen.scores["induction"][INDUCTION] > 0.999
    assert seen.strongest("previous token", 1) == PREVIOUS and seen.scores["previous token"][PREVIOUS] > 0.999
    assert seen.scores["copying"][INDUCTION] > 0.999
    others = seen.scores["induction"].clone()
    others[INDUCTION] = 0
    assert others.max() < 0.2
    assert seen.stretch_loss(copies - 1) < 0.1 and seen.in_context < -2
    assert seen.scores["copying"][PREVIOUS] == 0  # what it writes is no token
    with intervene(lm.model, without_head(*PREVIOUS)):
        broken = head_scores(lm, repeats)
    with pytest.raises(NoSuchSite, match="head 99 is not there"), intervene(lm.model, without_head(0, 99)):
        head_scores(lm, repeats)
    assert broken.scores["induction"][INDUCTION] < 0.2
    assert broken.stretch_loss(copies - 1) > seen.stretch_loss(copies - 1) + 1
    assert broken.scores["previous token"][PREVIOUS] > 0.999  # it still looks there; what it found is not passed on


def test_perfect_patterns_score_one_and_detect_heads_formula_only_without_bos() -> None:
    """The scores of patterns against those of TransformerLens 3.5 (`head_detector`, error measure "mul"): the attention
    on the places asked for, divided by all attention; with exclude_bos, by all but that to BOS."""
    stretch = 20
    length = 1 + 2 * stretch
    perfect = torch.zeros(length, length)
    perfect[:, 0] = 1  # heads rest at BOS
    asked = torch.zeros(length, length)
    for query in range(1 + stretch, length):
        asked[query, query - (stretch - 1)] = 1
    rows = asked.sum(1) > 0
    perfect[rows] = asked[rows]
    repeats = Repeats(torch.zeros(1, length, dtype=torch.long), stretch, 1)
    score = pattern_scores(perfect[None, None], repeats)["induction"]
    assert score == 1
    default = (perfect * asked).sum() / perfect.sum()
    excluded = perfect.clone()
    excluded[:, 0] = 0
    assert default == pytest.approx(0.488, abs=5e-4)
    assert (excluded * asked).sum() / excluded.sum() == pytest.approx(float(score))
    uniform = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    found = pattern_scores(uniform[None, None], repeats)
    expected = torch.tensor([1 / (query + 1) for query in range(1 + stretch, length)]).mean()
    assert found["induction"] == found["duplicate token"] == found["first token"] == pytest.approx(float(expected))
    previous = torch.tensor([1 / (query + 1) for query in range(1, length)]).mean()
    assert found["previous token"] == pytest.approx(float(previous))


def test_scores_are_those_of_transformer_lens_over_the_queries_that_have_such_a_place() -> None:
    """TransformerLens 2.16.1, compute_head_attention_similarity_score(probs, pattern, exclude_bos=False,
    exclude_current_token=False, error_measure="mul") with its three detection patterns for tokens 0 12345 12345. It
    divides by the attention of all 11 queries; here the mean is over those that are asked, 5 or, for previous, 10."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(11, 11, generator=random, dtype=torch.float64).float()
    probs = scores.masked_fill(~torch.ones(11, 11).tril().bool(), float("-inf")).softmax(-1)
    found = pattern_scores(probs[None, None], Repeats(torch.zeros(1, 11, dtype=torch.long), 5, 1))
    theirs = {"previous token": 0.20738815, "duplicate token": 0.05719841, "induction": 0.02773360}
    queries = {"previous token": 10, "duplicate token": 5, "induction": 5}
    for name, value in theirs.items():
        assert float(found[name]) * queries[name] / 11 == pytest.approx(value, abs=1e-6)


def test_drawn_tokens_are_ordinary_distinct_and_repeated() -> None:
    lm = tiny_lm()
    repeats = repeated_tokens(lm, stretch=30, copies=3, rows=4)
    assert repeats.tokens_RL.shape == (4, 91) and repeats.copies == 3
    assert repeats.tokens_RL[:, 0].eq(lm.tokenizer.bos_id).all()
    stretch = repeats.tokens_RL[:, 1:31]
    assert torch.equal(repeats.tokens_RL[:, 1:], stretch.repeat(1, 3))
    assert all(len(row.unique()) == 30 for row in stretch) and not torch.equal(stretch[0], stretch[1])
    assert not set(stretch.flatten().tolist()) & set(lm.tokenizer.special_tokens.values())
    with pytest.raises(DataError, match="context has 128"):
        repeated_tokens(lm, stretch=100)
    with pytest.raises(DataError, match="ordinary ones"):
        repeated_tokens(lm, stretch=300)


def test_in_context_score_is_late_minus_early_loss() -> None:
    lm = induction_lm()
    tokens_RL = repeats_of(15, 2).tokens_RL
    found = in_context_score(lm, tokens_RL)
    assert (found.early, found.late) == (3, 30)  # 50 and 500 of 512, in a row of 31
    logp = lm.model(tokens_RL).detach().log_softmax(-1)
    loss = [-logp[torch.arange(3), at - 2, tokens_RL[:, at - 1]] for at in (3, 30)]
    assert found.score == pytest.approx(float((loss[1] - loss[0]).mean()), abs=1e-5)
    assert found.stderr == pytest.approx(float((loss[1] - loss[0]).std()) / math.sqrt(3), abs=1e-5)
    with pytest.raises(DataError, match="too short"):
        in_context_score(lm, tokens_RL[:, :8])
