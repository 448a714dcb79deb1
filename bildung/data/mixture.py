"""Batches from several sources in given proportions, and rows that grow longer: what each batch holds follows from its
number alone, so that a resumed run sees what the broken-off one would have."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from bildung.core.errors import DataError
from bildung.data.batches import Shuffled

T = TypeVar("T")
B = TypeVar("B")


class Mixture(Generic[T, B]):
    """Batch n takes from each source its share of items, to one item exactly: after k items in all, a source of share w
    has given between w·k - 1 and w·k + 1 of them (the one that is furthest behind gives next).

    Each source is passed through in its own shuffled order, again and again: a small one with a large share repeats.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[T], float]],
        batch_size: int,
        seed: int,
        collate: Callable[[list[T]], B],
    ) -> None:
        total = sum(weight for _, weight in sources)
        if not sources or total <= 0 or any(weight <= 0 for _, weight in sources):
            raise DataError(f"mixture weights {[weight for _, weight in sources]}; every weight must be above 0.")
        self.shares = [weight / total for _, weight in sources]
        self.streams = [Shuffled(items, 1, seed * 1009 + n, lambda one: one[0]) for n, (items, _) in enumerate(sources)]
        self.sizes = [len(items) for items, _ in sources]
        self.batch_size, self.collate = batch_size, collate
        self._pattern = _pattern(self.shares)

    def __call__(self, n: int) -> B:
        """Batch n, counted from 0."""
        places = range(n * self.batch_size, (n + 1) * self.batch_size)
        return self.collate([self._item(place) for place in places])

    def _item(self, place: int) -> T:
        rounds, within = divmod(place, len(self._pattern))
        source = self._pattern[within]
        per_round = self._pattern.count(source)
        return self.streams[source](rounds * per_round + self._pattern[:within].count(source))

    @property
    def batches_per_epoch(self) -> float:
        """Batches until the source that lasts longest was seen once."""
        return max(size / share for size, share in zip(self.sizes, self.shares, strict=True)) / self.batch_size


def _pattern(shares: Sequence[float], length: int = 1000) -> list[int]:
    """Which source gives each of `length` items, after which it repeats."""
    given = [0] * len(shares)
    pattern = []
    for place in range(1, length + 1):
        behind = [share * place - have for share, have in zip(shares, given, strict=True)]
        source = behind.index(max(behind))
        given[source] += 1
        pattern.append(source)
    return pattern


class Phases(Generic[B]):
    """One batch function after the other: `Phases([(100, short), (50, long)])` gives batch 120 as `long(20)`.

    The last goes on without end.
    """

    def __init__(self, phases: Sequence[tuple[int, Callable[[int], B]]]) -> None:
        if not phases or any(count < 1 for count, _ in phases):
            raise DataError(f"phases of {[count for count, _ in phases]} batches; each needs at least 1.")
        self.starts = [0, *accumulate(count for count, _ in phases[:-1])]
        self.parts = [part for _, part in phases]
        self.batches_per_epoch = float(sum(count for count, _ in phases))

    def __call__(self, n: int) -> B:
        """Batch n, counted from 0."""
        phase = bisect_right(self.starts, n) - 1
        return self.parts[phase](n - self.starts[phase])
