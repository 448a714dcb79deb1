"""All segmentations of many words at once: forward-backward and Viterbi over whole groups of words of one length.

The substrings of every word are looked up once. A piece that leaves the vocabulary later keeps its number and gets the
score -inf, so that no path takes it; a character without a piece costs the unknown score.

Shapes: W words of one length, L characters in them, K characters in the longest piece, V pieces.
index_WLK[w, i, k] is the piece that is k + 1 characters long and starts at i; V where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bildung.tokens.unigram import UNKNOWN_PENALTY

Array = np.ndarray
MOST_ENTRIES = 2_000_000  # of one group's arrays


@dataclasses.dataclass(frozen=True)
class Group:
    """The words of one length: their places in the list they came from, and their pieces."""

    places_W: Array
    index_WLK: Array

    @property
    def length(self) -> int:
        """L."""
        return int(self.index_WLK.shape[1])

    def scores(self, scores_V: Array) -> Array:
        """scores_WLK of the pieces, with the unknown score for characters that have none."""
        found_WLK = np.append(scores_V, -np.inf)[self.index_WLK]
        unknown = scores_V[np.isfinite(scores_V)].min() - UNKNOWN_PENALTY
        found_WLK[:, :, 0] = np.where(np.isfinite(found_WLK[:, :, 0]), found_WLK[:, :, 0], unknown)
        return found_WLK


def groups(words: Sequence[str], numbers: Mapping[str, int], longest: int) -> Iterator[Group]:
    """The words grouped by length, in parts that fit the memory. numbers: the number of each piece, 0 to V - 1."""
    by_length: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        by_length.setdefault(len(word), []).append(place)
    none = len(numbers)
    for length, places in sorted(by_length.items()):
        rows = max(1, MOST_ENTRIES // (length * min(longest, length)))
        for first in range(0, len(places), rows):
            part = places[first : first + rows]
            index_WLK = np.full((len(part), length, min(longest, length)), none, dtype=np.int32)
            for row, place in enumerate(part):
                word = words[place]
                for start in range(length):
                    for end in range(start + 1, min(start + longest, length) + 1):
                        index_WLK[row, start, end - start - 1] = numbers.get(word[start:end], none)
            yield Group(np.array(part), index_WLK)


def expected_uses(group: Group, scores_V: Array, counts_W: Array) -> tuple[Array, Array]:
    """How often each piece is used over all segmentations, each weighted by its probability, and log Z of every word.

    Forward-backward: the share of the segmentations of a word that use its piece from i to j is
    alpha(i) p(piece) beta(j) / Z, where alpha(i) sums over all ways to reach i, beta(j) over all from j to the end.
    """
    scores_WLK = group.scores(scores_V)
    W, L, K = scores_WLK.shape
    alpha, beta = np.full((W, L + 1), -np.inf), np.full((W, L + 1), -np.inf)
    alpha[:, 0] = beta[:, L] = 0.0
    for at in range(1, L + 1):
        k = np.arange(min(K, at))
        alpha[:, at] = _log_sum(alpha[:, at - 1 - k] + scores_WLK[:, at - 1 - k, k])
    for at in range(L - 1, -1, -1):
        k = np.arange(min(K, L - at))
        beta[:, at] = _log_sum(beta[:, at + 1 + k] + scores_WLK[:, at, k])
    log_z_W = alpha[:, L]
    ends = np.minimum(np.arange(L)[:, None] + 1 + np.arange(K), L)  # beyond the end no piece has a score
    share_WLK = np.exp(alpha[:, :L, None] + scores_WLK + beta[:, ends] - log_z_W[:, None, None])
    weights = (share_WLK * counts_W[:, None, None]).ravel()
    return np.bincount(group.index_WLK.ravel(), weights, len(scores_V) + 1)[:-1], log_z_W


def best_paths(group: Group, scores_V: Array, without_itself: bool = False) -> tuple[Array, Array]:
    """Viterbi: (lengths_WL, score_W). The row of a word holds the lengths of its pieces, the last piece first, then 0.

    without_itself: the word as one single piece is not allowed. Of equal scores the longer last piece wins.
    """
    scores_WLK = group.scores(scores_V)
    W, L, K = scores_WLK.shape
    if without_itself and K == L:
        scores_WLK[:, 0, L - 1] = -np.inf
    best, last = np.full((W, L + 1), -np.inf), np.zeros((W, L + 1), dtype=np.int64)
    best[:, 0] = 0.0
    for at in range(1, L + 1):
        k = np.arange(min(K, at))[::-1]
        ways = best[:, at - 1 - k] + scores_WLK[:, at - 1 - k, k]
        choice_W = ways.argmax(1)
        best[:, at], last[:, at] = np.take_along_axis(ways, choice_W[:, None], 1)[:, 0], k[choice_W] + 1
    lengths_WL, at_W, rows = np.zeros((W, L), dtype=np.int64), np.full(W, L), np.arange(W)
    for step in range(L):
        lengths_WL[:, step] = last[rows, at_W]
        at_W = at_W - lengths_WL[:, step]
    return lengths_WL, best[:, L]


def pieces_on(group: Group, lengths_WL: Array, scores_V: Array) -> Array:
    """The numbers of the pieces on paths, numbers_WL, the last first; V for a character without a piece, V + 1 after
    the path's end."""
    V = len(scores_V)
    alive = np.append(np.isfinite(scores_V), False)
    ends_WL = group.length - np.cumsum(lengths_WL, 1)  # where each piece starts
    found_WL = group.index_WLK[np.arange(len(lengths_WL))[:, None], ends_WL, np.maximum(lengths_WL, 1) - 1]
    return np.where(lengths_WL == 0, V + 1, np.where(alive[found_WL], found_WL, V))


def _log_sum(terms_WK: Array) -> Array:
    """log of the sum of exponentials over the last axis; one term of each row must be finite."""
    most_W = terms_WK.max(1)
    return most_W + np.log(np.exp(terms_WK - most_W[:, None]).sum(1))
