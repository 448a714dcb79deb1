"""Batches of rows of similar length, as many of them as fit a number of tokens (the 2017 Transformer's batches).

    a batch of 8 random rows            a bucket of 48 tokens
    a b c . . . . .                     a b c d
    a b c d e f g h                     a b c d      12 rows of 4, or 6 of 8: the same work,
    a . . . . . . .                     a b c .      hardly any padding

Rows are put in the order of their lengths, equal ones among each other shuffled anew in each epoch, and cut into
batches; the batches come in an order of their own. The sequence of lengths is the same in each epoch, so the cuts are
too: batch n is a function of (seed, n), and resuming needs n and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence, Sized
from functools import lru_cache
from typing import Generic, TypeVar

from bildung.core.errors import DataError

T = TypeVar("T", bound=Sized)
B = TypeVar("B")


class Bucketed(Generic[T, B]):
    """An endless stream of batches with random access, like batches.Shuffled: `bucketed(n)` is batch n.

    tokens: the most a batch takes, padding counted: rows times the longest of them. Every epoch holds every item once.
    """

    def __init__(self, items: Sequence[T], tokens: int, seed: int, collate: Callable[[list[T]], B]) -> None:
        if not items:
            raise DataError("nothing to draw batches from")
        if (longest := max(map(len, items))) > tokens:
            raise DataError(f"an example of {longest} tokens does not fit a batch of {tokens}; raise batch_tokens.")
        self.items, self.tokens, self.seed, self.collate = items, tokens, seed, collate
        self._cuts = self._cut(sorted(map(len, items)))
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)

    def __call__(self, n: int) -> B:
        """Batch n, counted from 0."""
        if n < 0:
            raise DataError(f"batch {n}: batches are counted from 0")
        return self.collate([self.items[index] for index in self.indices(n)])

    def indices(self, n: int) -> list[int]:
        """Which items batch n holds."""
        epoch, place = divmod(n, len(self._cuts))
        order, batches = self._epoch(epoch)
        start, end = self._cuts[batches[place]]
        return order[start:end]

    @property
    def batches_per_epoch(self) -> float:
        return len(self._cuts)

    def _cut(self, lengths: list[int]) -> list[tuple[int, int]]:
        """(start, end) of each batch in the sorted lengths; the last row of a batch is its longest."""
        cuts, start = [], 0
        for end, length in enumerate(lengths):
            if (end + 1 - start) * length > self.tokens:
                cuts.append((start, end))
                start = end
        return [*cuts, (start, len(lengths))]

    def _order_of_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The items by length, and the batches in the order in which they come."""
        draws = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.items)))
        draws.shuffle(order)
        order.sort(key=lambda index: len(self.items[index]))  # stable: equal lengths stay shuffled
        batches = list(range(len(self._cuts)))
        draws.shuffle(batches)
        return order, batches
