"""Reading a common beginning once gives the scores of reading it each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bildung.data.examples import Example
from bildung.evaluate import shared_prefix
from bildung.evaluate.likelihood import score
from bildung.evaluate.shared_prefix import common_beginning, score_sharing
from tests.contract.test_families import made


def examples(count: int = 7, beginning: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, 40, (beginning,), generator=generator).tolist()
    found = []
    for number in range(count):
        rest = torch.randint(3, 40, (2 + number % 3,), generator=generator).tolist()
        for answer in ([5], [6, 7]):
            tokens = start + rest + answer
            found.append(Example(tokens, [False] * (len(tokens) - len(answer)) + [True] * len(answer)))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("batch_tokens", [4, 2048])
def test_the_scores_are_the_same(family: str, batch_tokens: int, monkeypatch: Any) -> None:
    model = made(family).model.eval()
    plain = score(model, examples())
    monkeypatch.setattr(shared_prefix, "score", pytest.fail)
    shared = score_sharing(model, examples(), batch_tokens=batch_tokens)
    for one, other in zip(plain, shared, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4) and one.is_greedy == other.is_greedy


def test_the_beginning_is_read_once(monkeypatch: Any) -> None:
    model, read = made("llama").model.eval(), []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **rest: read.append(tokens.numel()) or real(tokens, **rest))
    score_sharing(model, examples())
    assert read[0] >= 40 and sum(read) < 40 + 7 * (4 + 3)


@pytest.mark.parametrize("family", ["gemma3_text", "rnn"])
def test_where_distances_are_columns_each_is_read_alone(family: str, monkeypatch: Any) -> None:
    model = made(family).model.eval()
    monkeypatch.setattr(shared_prefix, "score", lambda *_, **__: ["plain"])
    assert score_sharing(model, examples()) == ["plain"]


def test_the_token_before_the_first_target_is_read_anew() -> None:
    one = Example([1, 2, 3, 4], [False, False, False, True])
    assert common_beginning([one, one]) == 2
    assert common_beginning([one, Example([1, 9, 3, 4], [False, False, False, True])]) == 1
