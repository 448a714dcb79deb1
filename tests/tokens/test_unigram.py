"""The best segmentation and the runner-up."""

from __future__ import annotations

import itertools
import math

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from bildung.tokens.unigram import Segmentation, Unigram

pieces = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(-40, -1), min_size=1, max_size=10)


def all_segmentations(model: Unigram, word: str) -> list[Segmentation]:
    """By trying every set of cuts."""
    found = []
    for cuts in itertools.product((False, True), repeat=len(word) - 1):
        ends = [*(at + 1 for at, cut in enumerate(cuts) if cut), len(word)]
        parts = tuple(word[start:end] for start, end in zip([0, *ends], ends, strict=False))
        scores = [model.score(part) for part in parts]
        if None not in scores:
            found.append(Segmentation(parts, math.fsum(scores)))  # type: ignore[arg-type]
    return found


@given(pieces, st.text("abcd", min_size=1, max_size=8))
def test_the_best_two_are_the_best_two_of_all(scores: dict[str, int], word: str) -> None:
    model = Unigram({piece: score / 4 for piece, score in scores.items()})
    best = model.best(word)
    every = all_segmentations(model, word)
    assert [path.score for path in best] == sorted((path.score for path in every), reverse=True)[:2]
    assert len(set(best)) == len(best) and set(best) <= set(every)


@given(pieces, st.text("abcd", min_size=1, max_size=10))
def test_equals_the_library(scores: dict[str, int], word: str) -> None:
    vocabulary = [("<unk>", 0.0), *((piece, score / 4) for piece, score in scores.items())]
    library = tokenizers.Tokenizer(models.Unigram(vocabulary, 0, False))
    model = Unigram(dict(vocabulary), "<unk>")
    ours = [piece if piece in model.scores else "<unk>" for piece in model.fused(model.best(word)[0])]
    ids = [[piece for piece, _ in vocabulary].index(piece) for piece in ours]
    assert ids == library.encode(word).ids


def test_unknown_characters_cost_ten_more_than_the_rarest_piece_and_join() -> None:
    model = Unigram({"a": -1.0, "b": -3.0}, "<unk>")
    (best,) = model.best("axyb")
    assert best == Segmentation(("a", "x", "y", "b"), pytest.approx(-1 - 13 - 13 - 3))
    assert model.fused(best) == ["a", "xy", "b"]
