"""Many words at once give what each alone gives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bildung.tokens.unigram import Unigram
from bildung.tokens.unigram_lattice import best_paths, expected_uses, groups, pieces_on
from tests.tokens.test_unigram import all_segmentations

SCORES = {"a": -2.0, "b": -2.5, "ab": -3.0, "ba": -3.5, "aba": -6.0, "bab": -5.0, "abab": -5.5}
WORDS = ["a", "abab", "babab", "aabb", "xaba", "abx"]
NUMBERS = {piece: number for number, piece in enumerate(SCORES)}
SCORES_V = np.array(list(SCORES.values()))


def test_expected_uses_are_those_of_all_segmentations() -> None:
    model = Unigram(SCORES)
    uses, counts = np.zeros(len(SCORES)), np.arange(1.0, len(WORDS) + 1)
    log_z = np.zeros(len(WORDS))
    for group in groups(WORDS, NUMBERS, 4):
        found, log_z[group.places_W] = expected_uses(group, SCORES_V, counts[group.places_W])
        uses += found
    expected = dict.fromkeys(SCORES, 0.0)
    for word, count, found_z in zip(WORDS, counts, log_z, strict=True):
        paths = all_segmentations(model, word)
        total = math.fsum(math.exp(path.score) for path in paths)
        assert found_z == pytest.approx(math.log(total), abs=1e-12)
        for path in paths:
            for piece in path.pieces:
                if piece in expected:
                    expected[piece] += count * math.exp(path.score) / total
    assert uses == pytest.approx(np.array(list(expected.values())), abs=1e-12)


def test_best_paths_are_viterbis() -> None:
    model = Unigram(SCORES)
    for group in groups(WORDS, NUMBERS, 4):
        lengths_WL, score_W = best_paths(group, SCORES_V)
        numbers_WL = pieces_on(group, lengths_WL, SCORES_V)
        for place, lengths, numbers, score in zip(group.places_W, lengths_WL, numbers_WL, score_W, strict=True):
            (best, *_) = model.best(WORDS[place])
            assert score == pytest.approx(best.score) and [n for n in lengths if n][::-1] == [*map(len, best.pieces)]
            used = [NUMBERS.get(piece, len(SCORES)) for piece in best.pieces]
            assert [n for n in numbers if n <= len(SCORES)][::-1] == used


def test_without_itself_a_word_is_spelled_by_others() -> None:
    (group,) = groups(["abab"], NUMBERS, 4)
    assert best_paths(group, SCORES_V)[0][0].tolist() == [4, 0, 0, 0]
    lengths, score = best_paths(group, SCORES_V, without_itself=True)
    assert lengths[0].tolist() == [2, 2, 0, 0] and score[0] == -6.0


def test_a_removed_piece_is_on_no_path() -> None:
    (group,) = groups(["abab"], NUMBERS, 4)
    gone = np.where(np.array([piece in ("abab", "a") for piece in SCORES]), -np.inf, SCORES_V)
    assert best_paths(group, gone)[0][0].tolist() == [2, 2, 0, 0]
    lengths, _ = best_paths(group, np.where(np.array([len(p) > 1 for p in SCORES]), -np.inf, gone))
    assert pieces_on(group, lengths, np.where(np.isfinite(gone), gone, -np.inf))[0].tolist() == [
        NUMBERS["b"],
        len(SCORES),  # "a" is unknown now
        NUMBERS["b"],
        len(SCORES),
    ]
