"""Pairs of segments: what follows what, truncation, balance, and no giveaway by length."""

from __future__ import annotations

import pytest

from bildung.core.errors import DataError
from bildung.data.sentence_pairs import make_pairs, sentences
from bildung.tokens.frames import Frame

CLS, SEP = 1, 2
FRAME = Frame((CLS,), (SEP,), (SEP,), 1)


def corpus(documents: int = 30, length: int = 40) -> list[list[list[int]]]:
    """Every sentence is n copies of a number of its own; the next sentence has the next number."""
    made, number = [], 10
    for _ in range(documents):
        document = []
        for _ in range(length):
            document.append([number] * (3 + number * 7 % 11))
            number += 1
        made.append(document)
        number += 1000
    return made


def parts(tokens: list[int]) -> tuple[list[int], list[int]]:
    middle = tokens.index(SEP)
    return tokens[1:middle], tokens[middle + 1 : -1]


def test_next_is_next_and_random_is_from_another_document() -> None:
    pairs = make_pairs(corpus(), FRAME, 48, seed=0)
    for pair in pairs:
        first, second = parts(pair.tokens)
        apart = second[0] - first[-1]
        assert (apart == 1) if pair.label == 0 else (apart != 1 and abs(apart) > 500)
        assert first and second and len(pair) <= 48 and pair.tokens[-1] == SEP
        assert pair.types == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_half_are_random_and_what_was_displaced_is_used_later() -> None:
    documents = corpus(60)
    pairs = make_pairs(documents, FRAME, 48, seed=0)
    assert len(pairs) > 500 and 0.45 < pairs.random_share < 0.55
    firsts = {token for pair in pairs for token in parts(pair.tokens)[0]}
    nexts = {token for pair in pairs if pair.label == 0 for token in parts(pair.tokens)[1]}
    everything = {sentence[0] for document in documents for sentence in document}
    assert len(everything - firsts - nexts) < 0.25 * len(everything)  # cut off by the length, or left over at an end
    assert pairs.leftover <= 60


def test_length_does_not_tell_the_label() -> None:
    pairs = make_pairs(corpus(200), FRAME, 48, seed=0)
    mean = {
        label: sum(len(pair) for pair in pairs if pair.label == label) / sum(pair.label == label for pair in pairs)
        for label in (0, 1)
    }
    assert abs(mean[0] - mean[1]) < 1.5


def test_the_random_one_is_never_the_true_next_one() -> None:
    documents = corpus(2, 30)
    twins = [documents[0], [*documents[0][:29], [7]]]  # the other document holds nearly all true next sentences
    pairs = make_pairs(twins, FRAME, 48, seed=0)
    assert any(pair.label == 1 for pair in pairs)
    for pair in pairs:
        first, second = parts(pair.tokens)
        assert (second[0] - first[-1] == 1 or first[-1] == 7) == (pair.label == 0) or 7 in (first[-1], second[0])
    with pytest.raises(DataError, match="repeat one another"):
        make_pairs([[[5, 6]] * 20] * 4, FRAME, 48, seed=0)


def test_sentence_order() -> None:
    pairs = make_pairs(corpus(), FRAME, 48, seed=0, task="sop")
    assert 0.4 < pairs.random_share < 0.6
    for pair in pairs:
        first, second = parts(pair.tokens)
        assert (second[0] > first[-1]) == (pair.label == 0) and abs(second[0] - first[-1]) < 40
    assert make_pairs(corpus(1), FRAME, 48, seed=0, task="sop")


def test_what_meets_stays_when_a_pair_is_cut() -> None:
    pairs = make_pairs([[[5] * 40, [6] * 40]] * 1, FRAME, 23, seed=0, task="sop", short=0.0)
    assert parts(pairs[0].tokens) in (([5] * 10, [6] * 10), ([6] * 10, [5] * 10))
    documents = [[list(range(100, 140)), list(range(200, 240))]] * 1
    (pair,) = make_pairs(documents, FRAME, 23, seed=2, task="sop", short=0.0)
    first, second = parts(pair.tokens)
    assert first[-1] in (139, 239) and second[0] in (100, 200)


def test_seed_and_short_ones() -> None:
    one, two = (make_pairs(corpus(), FRAME, 48, seed=seed) for seed in (0, 1))
    assert one == make_pairs(corpus(), FRAME, 48, seed=0) and one != two
    assert min(map(len, make_pairs(corpus(), FRAME, 48, seed=0, short=0.5))) < 20
    lengths = [len(pair) for pair in make_pairs(corpus(), FRAME, 48, seed=0, short=0.0)]
    assert sum(length == 48 for length in lengths) > 0.9 * len(lengths)


def test_what_gives_no_pairs() -> None:
    with pytest.raises(DataError, match="1 documents"):
        make_pairs(corpus(1), FRAME, 48, seed=0)
    with pytest.raises(DataError, match="no room"):
        make_pairs(corpus(), FRAME, 4, seed=0)
    with pytest.raises(DataError, match="no document has two sentences"):
        make_pairs([[[5]], [[6]]], FRAME, 48, seed=0)


def test_sentences() -> None:
    text = 'Call me Ishmael. Some years ago, 3.5 of them, I "went." So be it! (Why?) Yes\n\nA new paragraph'
    expected = [
        "Call me Ishmael.",
        'Some years ago, 3.5 of them, I "went."',
        "So be it!",
        "(Why?)",
        "Yes",
        "A new paragraph",
    ]
    assert sentences(text) == expected
    assert sentences("  ") == [] and "".join(sentences(text)).replace(" ", "") == "".join(text.split())
