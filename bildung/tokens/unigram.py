"""Unigram segmentation, step by step (Kudo 2018, *Subword regularization*, section 3.2).

Every piece of the vocabulary has a log-probability, and the pieces of a text are taken to be independent: a
segmentation scores the sum over its pieces, and the best one is found by Viterbi's algorithm. For each end position
the best way to get there is kept, and is all that later positions need to know:

    position    0        1        2          3
                |---h----|        |
                |-------hu--------|---g------|
                |        |-------ug----------|
                |--------------hug-----------|      best(3) = max of best(start) + score(piece) over pieces ending at 3

A vocabulary has many segmentations of the same word. How far the runner-up lies behind the best shows how certain the
cut is, and sampling among them is Kudo's subword regularization.

A character without a piece is unknown: it costs 10 more than the rarest piece, and neighbouring ones become one token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

UNKNOWN_PENALTY = 10.0  # SentencePiece's


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A segmentation and the sum of its pieces' log-probabilities (natural)."""

    pieces: tuple[str, ...]
    score: float


class Unigram:
    """A vocabulary: pieces with their log-probabilities, and which of them stands for unknown characters."""

    def __init__(self, scores: Mapping[str, float], unknown: str | None = None) -> None:
        self.scores, self.unknown = scores, unknown
        self.longest = max(map(len, scores), default=1)  # characters in the longest piece
        self.unknown_score = min(scores.values(), default=0.0) - UNKNOWN_PENALTY  # of one character without a piece

    def score(self, piece: str) -> float | None:
        """The log-probability of a piece; of a character that is none, the unknown score; else None."""
        return self.scores.get(piece, self.unknown_score if len(piece) == 1 else None)

    def best(self, word: str, count: int = 2) -> list[Segmentation]:
        """The `count` best segmentations of `word`, the best first; fewer when there are no more.

        Of equal scores the one found first wins: its last piece is the longer one, as in the `tokenizers` library.
        """
        ends: list[list[tuple[float, int, int]]] = [[] for _ in range(len(word) + 1)]  # (score, start, which of start)
        ends[0] = [(0.0, 0, 0)]
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                if (score := self.score(word[start:end])) is not None:
                    ways = [(before + score, start, which) for which, (before, _, _) in enumerate(ends[start])]
                    ends[end] = sorted(ends[end] + ways, key=lambda way: -way[0])[:count]
        return [self._path(word, ends, which) for which in range(len(ends[-1]))]

    def _path(self, word: str, ends: list[list[tuple[float, int, int]]], which: int) -> Segmentation:
        """Follows the pointers back from the end of the word."""
        end, pieces, total = len(word), [], ends[len(word)][which][0]
        while end:
            _, start, which = ends[end][which]
            pieces.append(word[start:end])
            end = start
        return Segmentation(tuple(reversed(pieces)), total)

    def fused(self, path: Segmentation) -> list[str]:
        """The pieces of a path, neighbouring unknown characters joined."""
        joined: list[str] = []
        after_unknown = False
        for piece in path.pieces:
            is_unknown = piece not in self.scores or piece == self.unknown
            if is_unknown and after_unknown:
                joined[-1] += piece
            else:
                joined.append(piece)
            after_unknown = is_unknown
        return joined
