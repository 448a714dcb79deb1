"""Tokens per word, bytes per token, unknown rate."""

from __future__ import annotations

import pytest

from bildung.core.errors import DataError
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokenizer.measure import measure


def test_counts_and_rates() -> None:
    tokenizer = learn(["a b c é"], Learning(algorithm="word")).tokenizer
    measured = measure(tokenizer, ["a é", "q  a b"])
    assert (measured.passages, measured.words, measured.bytes, measured.tokens, measured.unknown) == (2, 5, 10, 5, 1)
    assert (measured.tokens_per_word, measured.bytes_per_token, measured.unknown_rate) == (1.0, 2.0, 0.2)
    assert measured.as_dict()["unknown_rate"] == 0.2 and measured.as_dict()["tokens"] == 5
    by_bytes = measure(learn([], Learning(algorithm="byte")).tokenizer, ["a é"])
    assert (by_bytes.tokens, by_bytes.tokens_per_word, by_bytes.unknown) == (4, 2.0, 0)


def test_nothing_to_measure() -> None:
    tokenizer = learn([], Learning(algorithm="byte")).tokenizer
    with pytest.raises(DataError, match="no text to measure"):
        measure(tokenizer, [])
    assert measure(tokenizer, ["   "]).tokens_per_word == 3.0  # no word, and no division by it
