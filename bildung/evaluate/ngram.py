"""The best model that only counts: interpolated Kneser-Ney n-grams, the baseline beside every small language model.

    p_n(w | h) = max(c(h w) - D, 0) / c(h)  +  D · types(h) / c(h) · p_{n-1}(w | h without its first token)

c(h w) counts occurrences at the highest order. Below it counts continuations: how many different tokens were seen
before `h w` ("Francisco" is frequent but follows only "San", so it is a poor guess in general). D = n1 / (n1 + 2 n2)
per order, from how many n-grams were seen once and twice. The last step down is 1 / V.
(Kneser & Ney 1995; Chen & Goodman 1999, eq. 21, with one discount per order.)

No table of all n-grams is kept. The held-out text asks after some thousands of them; what the training text says of
those is counted order by order, a share of the text's n-grams at a time. From n + 1 to n, one place of every distinct
(n + 1)-gram is enough, as each is one continuation of its last n tokens:

    places of all tokens  --distinct 5-grams-->  places  --distinct 4-grams-->  places  ...  -->  one place per word

So millions of tokens take some 25 bytes each, where the tables would take hundreds.
"""

# T tokens of all documents, P places, G distinct n-grams, H tokens of the held-out text

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd multiplier: n-grams become 64-bit keys; collisions are ~ G² / 2^65
SHARES = 16  # n-grams are sorted in so many shares, by the last bits of their keys
AT_ONCE = 2**18  # places whose keys are computed at a time

Keys = NDArray[np.uint64]
Places = NDArray[np.unsignedinteger]
Documents = Sequence[ArrayLike]


def kneser_ney_nats(documents: Documents, held_out: Documents, *, order: int, vocab_size: int) -> NDArray[np.float64]:
    """-log p of every token of `held_out` given those before it in its document (H,), by the n-grams of `documents`.

    order: tokens of the longest n-grams. Tokens lie in [0, vocab_size).
    """
    text, places = _joined(documents, order, vocab_size)
    asked, asked_H = _joined(held_out, order, vocab_size)
    found = []
    for n in range(order, 0, -1):
        question = _Question(_keys(asked, asked_H, n), _keys(asked, asked_H, n - 1, skip_last=True))
        places = question.count(text, places, n)
        found.append(question.terms())
    probability_H = np.full(len(asked_H), 1 / vocab_size)
    for seen_H, share_H, left_H in reversed(found):
        probability_H = np.where(seen_H, share_H + left_H * probability_H, probability_H)
    return -np.log(probability_H)


class _Question:
    """What the training text says of some n-grams and their contexts."""

    def __init__(self, gram_H: Keys, context_H: Keys):
        self.gram_G, self._gram_H = np.unique(gram_H, return_inverse=True)
        self.context_C, self._context_H = np.unique(context_H, return_inverse=True)
        self.count_G = np.zeros(len(self.gram_G), np.int64)
        self.total_C, self.types_C = np.zeros((2, len(self.context_C)), np.int64)
        self.ones = self.twos = 0  # of all n-grams, not only of those that are asked for

    def count(self, text: NDArray[np.uint32], places: Places, n: int) -> Places:
        """Take in the n-grams that end at these places; returns one place of each distinct one."""
        gram_P = _keys(text, places, n)
        share_P = (gram_P % np.uint64(SHARES)).astype(np.uint8)
        kept = []
        for share in range(SHARES):
            inside = np.flatnonzero(share_P == share)
            gram, first, counts = np.unique(gram_P[inside], return_index=True, return_counts=True)
            kept.append(places[inside[first]])
            context = _keys(text, kept[-1], n - 1, skip_last=True)
            self.ones += int((counts == 1).sum())
            self.twos += int((counts == 2).sum())
            _add(self.count_G, self.gram_G, gram, counts)
            _add(self.total_C, self.context_C, context, counts)
            _add(self.types_C, self.context_C, context, np.ones_like(counts))
        return np.concatenate(kept)

    def terms(self) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
        """Of each token: whether its context was seen, the n-gram's own share, and the weight left for shorter ones."""
        discount = self.ones / (self.ones + 2 * self.twos) if self.ones and self.twos else 0.5
        count_H = self.count_G[self._gram_H]
        total_H, types_H = self.total_C[self._context_H], self.types_C[self._context_H]
        share_H = np.maximum(count_H - discount, 0) / np.maximum(total_H, 1)
        return total_H > 0, share_H, discount * types_H / np.maximum(total_H, 1)


def _add(sums: NDArray[np.int64], wanted: Keys, keys: Keys, numbers: NDArray[np.int64]) -> None:
    """Add the numbers to the sums of those keys that are wanted (sorted); the others are nobody's concern."""
    place = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    is_wanted = wanted[place] == keys
    np.add.at(sums, place[is_wanted], numbers[is_wanted])


def _joined(documents: Documents, order: int, vocab_size: int) -> tuple[NDArray[np.uint32], Places]:
    """All documents in one stream, each after `order` - 1 marks of its beginning; and where its tokens are."""
    lengths = [len(document) for document in documents]  # type: ignore[arg-type]
    size = sum(lengths) + len(lengths) * (order - 1)
    stream, is_real = np.full(size, vocab_size, dtype=np.uint32), np.zeros(size, dtype=bool)
    at = 0
    for document, length in zip(documents, lengths, strict=True):
        at += order - 1
        stream[at : at + length] = document
        is_real[at : at + length] = True
        at += length
    return stream, np.flatnonzero(is_real).astype(np.uint32 if size < 2**32 else np.uint64)


def _keys(stream: NDArray[np.uint32], places: Places, n: int, skip_last: bool = False) -> Keys:
    """At each of the places the key of the n tokens that end there (skip_last: of the n before it)."""
    shift = 1 if skip_last else 0
    keys = np.full(len(places), n, dtype=np.uint64)
    for start in range(0, len(places), AT_ONCE):
        key, here = keys[start : start + AT_ONCE], places[start : start + AT_ONCE]
        for back in range(n - 1 + shift, shift - 1, -1):
            key *= MIX
            key += stream[here - here.dtype.type(back)]
            key += np.uint64(1)
            key ^= key >> np.uint64(29)
    return keys
