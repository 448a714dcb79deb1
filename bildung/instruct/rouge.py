"""ROUGE-L, and a pool of texts that knows quickly whether it holds something similar.

    LCS(a, b)        length of the longest common subsequence of words
    ROUGE-L F        2 LCS / (|a| + |b|)                 Lin 2004, section 3.1, with beta = 1

The authors of Self-Instruct compare every new instruction with the whole pool, so a pool of n costs n² comparisons. The
words that two texts share, counted, bound their LCS from above; an index from words to texts counts them for all texts
at once, and only the few that could exceed the limit are compared in full. The answer is the same.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits: the words of the rouge-score package, without its stemmer."""
    return re.findall(r"[a-z0-9]+", text.lower())


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """By dynamic programming, one row at a time."""
    row = [0] * (len(b) + 1)
    for one in a:
        above_left = 0
        for at, other in enumerate(b, start=1):
            above = row[at]
            row[at] = above_left + 1 if one == other else max(above, row[at - 1])
            above_left = above
    return row[-1]


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F of two texts as words; 0 when either has none."""
    return 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0


class Pool:
    """Texts, each as words, in the order they were added."""

    def __init__(self, texts: Iterable[str] = ()):
        self.texts: list[list[str]] = []
        self._where: dict[tuple[str, int], list[int]] = defaultdict(list)  # n-th occurrence of a word -> texts
        self.compared = 0  # texts that had to be compared in full
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Take a text in."""
        self.texts.append(words(text))
        for key in _numbered(self.texts[-1]):
            self._where[key].append(len(self.texts) - 1)

    def most_similar(self, text: str, above: float) -> tuple[float, int] | None:
        """(ROUGE-L, number) of the most similar text of the pool; None when none is above the limit."""
        new = words(text)
        shared = Counter(number for key in _numbered(new) for number in self._where.get(key, ()))
        best: tuple[float, int] | None = None
        limit = above
        for number, count in shared.most_common():
            if 2 * count / (len(new) + len(self.texts[number])) <= limit:
                continue  # not even if all the words they share stood in the same order
            self.compared += 1
            found = rouge_l(new, self.texts[number])
            if found > limit:
                best, limit = (found, number), found
        return best


def _numbered(words_: Sequence[str]) -> set[tuple[str, int]]:
    """("the", 0), ("the", 1) ...: shared ones are counted as often as both texts have them."""
    seen: Counter[str] = Counter()
    found = set()
    for word in words_:
        found.add((word, seen[word]))
        seen[word] += 1
    return found
