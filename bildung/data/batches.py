"""Batches: examples padded or packed into tensors, in an order that is a function of (seed, number of the batch).

Padding puts one example in a row and fills up; packing puts several in a row, each seeing only itself: `segments` tell
the examples of a row apart (attention stays inside equal segments) and `positions` restart, so packed and padded give
the same logits. Both masks are explicit: no token id means "padding", because pad is often the same id as end-of-text.
"""

# Shapes: B rows, L tokens per row.

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.data.examples import (
    Example,
    Examples,
    PairExample,
    chat_examples,
    clm_examples,
    num_targets,
    pair_examples,
)

__all__ = [
    "Batch",
    "Example",
    "Examples",
    "PairBatch",
    "PairExample",
    "Shuffled",
    "chat_examples",
    "clm_examples",
    "num_targets",
    "pack",
    "pad",
    "pad_packed",
    "pad_pairs",
    "pair_examples",
]

T = TypeVar("T")
B = TypeVar("B")


@dataclass(frozen=True)
class Batch:
    """tokens_BL int64; loss_mask_BL bool, True = target; keep_BL bool, True = real token, False = padding;
    positions_BL int64; segments_BL int64 (1, 2, ... per row, 0 = padding) or None where a row is one example."""

    tokens_BL: Tensor
    loss_mask_BL: Tensor
    keep_BL: Tensor
    positions_BL: Tensor
    segments_BL: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        segments_BL = None if self.segments_BL is None else self.segments_BL.to(device)
        tokens_BL, loss_mask_BL = self.tokens_BL.to(device), self.loss_mask_BL.to(device)
        return Batch(tokens_BL, loss_mask_BL, self.keep_BL.to(device), self.positions_BL.to(device), segments_BL)

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.keep_BL.sum())

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask_BL.sum())


@dataclass(frozen=True)
class PairBatch:
    """Row b of `chosen` and row b of `rejected` answer the same prompt."""

    chosen: Batch
    rejected: Batch

    def to(self, device: torch.device | str) -> PairBatch:
        return PairBatch(self.chosen.to(device), self.rejected.to(device))

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens

    @property
    def num_targets(self) -> int:
        return self.chosen.num_targets + self.rejected.num_targets


def pad(examples: Sequence[Example], pad_id: int | None, multiple: int = 8) -> Batch:
    """One example per row, padded on the right to the longest, rounded up to a multiple of `multiple` (kernels and
    compiled graphs like few distinct lengths). `pad_id` None: id 0 fills the gaps; nobody looks at it."""
    return _tensors([[example] for example in examples], pad_id, multiple, segments=False)


def pad_packed(rows: Sequence[Sequence[Example]], pad_id: int | None, multiple: int = 8) -> Batch:
    """Rows from `pack`, padded likewise; segments count 1, 2, ... and positions restart at each example."""
    return _tensors(rows, pad_id, multiple, segments=True)


def pad_pairs(pairs: Sequence[PairExample], pad_id: int | None, multiple: int = 8) -> PairBatch:
    """Chosen and rejected sides padded each on its own."""
    chosen = pad([pair.chosen for pair in pairs], pad_id, multiple)
    return PairBatch(chosen, pad([pair.rejected for pair in pairs], pad_id, multiple))


def _tensors(rows: Sequence[Sequence[Example]], pad_id: int | None, multiple: int, segments: bool) -> Batch:
    if not rows or not all(rows):
        raise DataError("a batch needs at least one row, and every row at least one example")
    longest = max(sum(len(example) for example in row) for row in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    tokens_BL = torch.full(shape, pad_id or 0, dtype=torch.int64)
    loss_mask_BL, keep_BL = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    positions_BL, segments_BL = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        end = 0
        for number, example in enumerate(row, start=1):
            start, end = end, end + len(example)
            tokens_BL[b, start:end] = torch.tensor(example.tokens)
            loss_mask_BL[b, start:end] = torch.tensor(example.loss_mask)
            positions_BL[b, start:end] = torch.arange(len(example))
            segments_BL[b, start:end] = number
        keep_BL[b, :end] = True
    return Batch(tokens_BL, loss_mask_BL, keep_BL, positions_BL, segments_BL if segments else None)


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Whole examples into as few rows of at most `length` tokens as best-fit decreasing finds: the longest first, each
    into the fullest row that still takes it (Ding et al. 2024, arXiv:2404.10830: no document is cut to fill a gap).
    Raises DataError for an example longer than `length`."""
    rows_with_room: dict[int, list[list[Example]]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, sorted
    packed: list[list[Example]] = []
    for example in sorted(examples, key=len, reverse=True):
        if len(example) > length:
            raise DataError(f"an example of {len(example)} tokens does not fit a row of {length}: lower max_length")
        at = bisect.bisect_left(rooms, len(example))
        if at == len(rooms):
            row: list[Example] = []
            packed.append(row)
            room = length
        else:
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[at]
        row.append(example)
        room -= len(example)
        if room not in rows_with_room:
            bisect.insort(rooms, room)
            rows_with_room[room] = []
        rows_with_room[room].append(row)
    return packed


class Shuffled(Generic[T, B]):
    """An endless, shuffled stream of batches with random access: `shuffled(n)` is batch n, whatever was asked before.

    Every epoch holds every item exactly once, in an order given by (seed, epoch); a batch at the border takes the end
    of one epoch and the start of the next, so all batches have `batch_size` items. Resuming needs n and nothing else.
    """

    def __init__(self, items: Sequence[T], batch_size: int, seed: int, collate: Callable[[list[T]], B]) -> None:
        if not items:
            raise DataError("nothing to draw batches from")
        if batch_size < 1:
            raise DataError(f"batch_size = {batch_size}: at least 1")
        self.items, self.batch_size, self.seed, self.collate = items, batch_size, seed, collate
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def __call__(self, n: int) -> B:
        """Batch n, counted from 0."""
        if n < 0:
            raise DataError(f"batch {n}: batches are counted from 0")
        return self.collate([self.items[index] for index in self.indices(n)])

    def indices(self, n: int) -> list[int]:
        """Which items batch n holds."""
        places = range(n * self.batch_size, (n + 1) * self.batch_size)
        return [self._order(place // len(self.items))[place % len(self.items)] for place in places]

    @property
    def batches_per_epoch(self) -> float:
        return len(self.items) / self.batch_size

    def _order_of_epoch(self, epoch: int) -> list[int]:
        order = list(range(len(self.items)))
        # A str seed is hashed with SHA-512: seeds 0 and 1 or epochs 0 and 1 share nothing.
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order
