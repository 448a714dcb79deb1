"""Pairs of segments: next-sentence prediction (Devlin et al. 2019, section 3.1) and sentence order (arXiv 1909.11942).

    document    s1 s2 s3 | s4 s5 ...     sentences are gathered until they fill max_length, then split in two at random

    nsp     [CLS] s1 s2 [SEP] s3 [SEP]       label 0: half of the time, B is what follows A
            [CLS] s1 s2 [SEP] r7 r8 [SEP]    label 1: half of the time, B is from another document; s3 is used later
    sop     [CLS] s3 [SEP] s1 s2 [SEP]       label 1: half of the time, the two are swapped (Lan et al. 2020)

Unlike in Google's code, a gathering always has two sentences: there, one that is a single long sentence always becomes
a "random" pair, so more than half are random, and length gives the answer away. Which share was random is told.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from bildung.core.errors import DataError
from bildung.data.masking import Sentences
from bildung.tokens.frames import Frame, shares

Document = Sequence[Sequence[int]]  # sentences, each a list of token ids
Task = Literal["nsp", "sop"]

# The end of a sentence: its mark, closing quotes or brackets, white space, then something that can begin one; or an
# empty line. Rough ("Mr. Bulkington" is cut), and good enough where sentences are only gathered.
END = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z0-9])|\n\s*\n""")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order."""
    pieces, start = [], 0
    for match in END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        pieces.append(text[start:end].strip())
        start = match.end()
    return [piece for piece in (*pieces, text[start:].strip()) if piece]


class Pairs(list[Sentences]):
    """The pairs, and what was left out. leftover: sentences at the end of a document with none after them."""

    leftover = 0

    @property
    def random_share(self) -> float:
        """The share of pairs with label 1."""
        return sum(pair.label == 1 for pair in self) / len(self)


def make_pairs(
    documents: Sequence[Document],
    frame: Frame,
    max_length: int,
    *,
    seed: int | str,
    task: Task = "nsp",
    short: float = 0.1,
) -> Pairs:
    """The pairs of one pass over `documents`, in their order; another seed cuts and pairs them otherwise.

    short: share of gatherings that aim at a random smaller length, so that short inputs are not strange later.
    Raises DataError with fewer than two documents (nsp), or when max_length leaves no room.
    """
    documents = [document for document in documents if document]
    room = max_length - frame.size(pair=True)
    if room < 2:
        raise DataError(f"max_length = {max_length} leaves no room for two sentences beside the special tokens.")
    if task == "nsp" and len(documents) < 2:
        raise DataError(
            f"{len(documents)} documents; next-sentence prediction takes random sentences from another one."
        )
    draw, pairs = random.Random(f"pairs {seed}"), Pairs()

    def aim() -> int:
        return draw.randint(2, room) if draw.random() < short else room

    for number, document in enumerate(documents):
        start, target = 0, aim()
        while start < len(document):
            end = _gather(document, start, target)
            if end - start < 2:
                pairs.leftover += 1
                break
            middle = draw.randint(start + 1, end - 1)
            first, second = _joined(document[start:middle]), _joined(document[middle:end])
            label = int(draw.random() < 0.5)
            if label and task == "sop":
                first, second = second, first
            elif label:
                second = _from_elsewhere(documents, number, document[middle], target - len(first), draw)
                end = middle  # what really follows is used for the next pair
            kept_a, kept_b = shares(len(first), len(second), room)
            # What meets stays: the end of A and the start of B. (BERT drops tokens from either end by a coin.)
            framed = frame.put(first[len(first) - kept_a :], second[:kept_b])
            pairs.append(Sentences(framed.tokens, framed.types, label))
            start, target = end, aim()
    if not pairs:
        raise DataError("no document has two sentences, so there is no pair of them.")
    return pairs


def _gather(document: Document, start: int, target: int) -> int:
    """Where sentences from `start` on, at least two, fill `target` tokens; or the document's end."""
    length, end = 0, start
    while end < len(document) and (length < target or end - start < 2):
        length += len(document[end])
        end += 1
    return end


def _from_elsewhere(
    documents: Sequence[Document], here: int, true_next: Sequence[int], wanted: int, draw: random.Random
) -> list[int]:
    """Sentences of another document, at least one, up to `wanted` tokens. Never the true next one, which a document
    that repeats this one would hold."""
    for _ in range(100):
        other = draw.randrange(len(documents) - 1)
        document = documents[other + (other >= here)]
        start = draw.randrange(len(document))
        if list(document[start]) != list(true_next):
            end = start + 1
            while end < len(document) and sum(map(len, document[start:end])) < wanted:
                end += 1
            return _joined(document[start:end])
    raise DataError("the documents repeat one another: 100 draws found no other sentence; remove the repetitions.")


def _joined(pieces: Document) -> list[int]:
    return [token for piece in pieces for token in piece]
