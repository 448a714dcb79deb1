"""Exam row 23: pairs for next-sentence prediction are half true next sentences, half random ones."""

from __future__ import annotations

from bildung.data.sentence_pairs import make_pairs
from bildung.tokens.frames import Frame


def test_half_true_half_random_and_never_the_true_one_by_accident() -> None:
    documents = [[[1000 * d + s] for s in range(200)] for d in range(1, 101)]  # sentence s of document d
    pairs = make_pairs(documents, Frame((1,), (2,), (2,), 1), 9, seed=0)
    right = {0: 0, 1: 0}
    for pair in pairs:
        middle = pair.tokens.index(2)
        last, following = pair.tokens[middle - 1], pair.tokens[middle + 1]
        follows = following == last + 1
        assert follows == (pair.label == 0)
        assert pair.label == 0 or following // 1000 != last // 1000
        right[pair.label or 0] += 1
    n = sum(right.values())
    assert n > 4000 and abs(right[0] / n - 0.5) < 3 * (0.25 / n) ** 0.5
