"""The best model that only counts: interpolated Kneser-Ney n-grams, the baseline beside every small language model.

    p_n(w | h) = max(c(h w) - D, 0) / c(h)  +  D · types(h) / c(h) · p_{n-1}(w | h without its first token)

c(h w) counts occurrences at the highest order. Below it counts continuations: how many different tokens were seen
before `h w` ("Francisco" is frequent but follows only "San", so it is a poor guess in general). D = n1 / (n1 + 2 n2)
per order, from how many n-grams were seen once and twice. The last step down is 1 / V.
(Kneser & Ney 1995; Chen & Goodman 1999, eq. 21, with one discount per order.)
"""

# T tokens of all documents, G distinct n-grams

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd multiplier: n-grams become 64-bit keys; collisions are ~ G² / 2^65

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length: sorted keys with counts; sorted keys of their contexts with totals and types."""

    gram_G: Keys
    count_G: NDArray[np.int64]
    context_C: Keys
    total_C: NDArray[np.int64]
    types_C: NDArray[np.int64]
    discount: float


class KneserNey:
    """`KneserNey(documents, order=5, vocab_size=V).nats(documents)` -> -log p of every token, document by document."""

    def __init__(self, documents: Sequence[Sequence[int]], *, order: int, vocab_size: int):
        self.order, self.vocab_size = order, vocab_size
        stream, is_real = _joined(documents, order, vocab_size)
        self.orders: list[_Order] = []
        longer: tuple[Keys, Keys] | None = None  # distinct (n+1)-grams, by the keys of their last n tokens
        for n in range(order, 0, -1):
            gram, context = _keys(stream, n), _keys(stream, n - 1, skip_last=True)
            gram, context = gram[is_real], context[is_real]
            if longer is None:
                kept, counts = np.unique(gram, return_counts=True)
            else:
                kept, counts = np.unique(longer[0], return_counts=True)  # continuations
            _, first = np.unique(gram, return_index=True)
            contexts, place = np.unique(context[first], return_inverse=True)
            totals = np.bincount(place, weights=counts).astype(np.int64)
            types = np.bincount(place)
            ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
            discount = ones / (ones + 2 * twos) if ones and twos else 0.5
            self.orders.insert(0, _Order(kept, counts, contexts, totals, types, discount))
            if n > 1:
                # Distinct n-grams, each known by its last n - 1 tokens: to be counted one order down.
                longer = (_keys(stream, n - 1)[is_real][first], gram[first])

    def nats(self, documents: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """-log p of every token given those before it in its document (T,)."""
        stream, is_real = _joined(documents, self.order, self.vocab_size)
        probability = np.full(int(is_real.sum()), 1 / self.vocab_size)
        for n, known in enumerate(self.orders, start=1):
            gram, context = _keys(stream, n)[is_real], _keys(stream, n - 1, skip_last=True)[is_real]
            count = _look_up(known.gram_G, known.count_G, gram)
            total = _look_up(known.context_C, known.total_C, context)
            types = _look_up(known.context_C, known.types_C, context)
            seen = total > 0
            share = np.maximum(count - known.discount, 0) / np.maximum(total, 1)
            left = known.discount * types / np.maximum(total, 1)
            probability = np.where(seen, share + left * probability, probability)
        return -np.log(probability)


def _joined(documents: Sequence[Sequence[int]], order: int, vocab_size: int) -> tuple[Keys, NDArray[np.bool_]]:
    """All documents in one stream, each after `order` - 1 marks of its beginning; and which of the tokens are real."""
    lengths = [len(document) for document in documents]
    stream = np.full(sum(lengths) + len(lengths) * (order - 1), vocab_size, dtype=np.uint64)
    is_real = np.zeros(len(stream), dtype=bool)
    at = 0
    for document in documents:
        at += order - 1
        stream[at : at + len(document)] = np.asarray(document, dtype=np.uint64)
        is_real[at : at + len(document)] = True
        at += len(document)
    return stream, is_real


def _keys(stream: Keys, n: int, skip_last: bool = False) -> Keys:
    """At every place the key of the n tokens that end there (skip_last: of the n before it)."""
    shift = 1 if skip_last else 0
    key = np.full(len(stream), n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for back in range(n - 1 + shift, shift - 1, -1):
            key = key * MIX + np.roll(stream, back) + np.uint64(1)
            key ^= key >> np.uint64(29)
    return key


def _look_up(keys: Keys, values: NDArray[np.int64], wanted: Keys) -> NDArray[np.int64]:
    """The value of every wanted key, 0 where it is unknown."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
