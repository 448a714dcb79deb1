"""Sentences whose words carry labels, and the running text that a model is to read instead of a list of words.

    {"words": ["``", "No", "''", ",", "he", "said", "."], "tags": [...]}    ->    "No", he said.

A row is a sentence, or a document whose `words` and `tags` are lists of sentences (nursery:brown). A model has read
prose, not tokens with spaces around each, so words are put together as prose is; `spans` says where each stands.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from bildung.core.errors import DataError
from bildung.data.brown_tags import coarse
from bildung.data.rows import Row, Unusable
from bildung.data.sources import rows

T = TypeVar("T")
Label = str | float
TagSet = Literal["auto", "coarse", "raw", "number"]

OPENING, CLOSING, DOUBLED = {"``", "(", "["}, {",", ".", ";", ":", "?", "!", ")", "]", "%", "''"}, {";", "?", "!"}
QUOTES = {"``": '"', "''": '"'}


@dataclass(frozen=True)
class Tagged:
    """One sentence. place: where it stands in the source, "cj23:17"."""

    words: list[str]
    labels: list[Label]
    place: str


def read_tagged(
    source: str,
    *,
    words: str = "words",
    tags: str = "tags",
    tag_set: TagSet = "auto",
    limit: int | None = None,
) -> tuple[list[Tagged], list[str]]:
    """(sentences, notes on what was left out). limit: so many sentences, drawn from all of the source.

    tag_set: coarse are the twelve classes of data/brown_tags.py, raw the labels as they are, number for regression;
    auto is number where all labels are numbers, coarse where all are Brown's, else raw. Raises DataError.
    """
    found = rows(source).then(lambda row: _sentences(row, words, tags))
    sentences: list[Tagged] = []
    for number, (name, inside) in enumerate(found):
        sentences += [
            Tagged(its, labels, f"{name or number + 1}:{i + 1}") for i, (its, labels) in enumerate(inside) if its
        ]
    if limit is not None and limit < len(sentences):
        sentences = sample(sentences, limit)
    notes = [f"{source}: {report}"] if (report := found.report()) else []
    return _with_set(source, sentences, tag_set), notes


def sample(items: Sequence[T], count: int) -> list[T]:
    """So many of them, always the same, in their order. (Every n-th one would meet the pattern of a sorted source.)"""
    return [items[place] for place in sorted(random.Random(0).sample(range(len(items)), count))]


def _sentences(row: Row, words: str, tags: str) -> tuple[str, list[tuple[list[str], list[Label]]]]:
    its, labels = row.get(words), row.get(tags)
    if not isinstance(its, list) or not isinstance(labels, list) or not its:
        raise Unusable(f"no lists of words and labels in {words!r} and {tags!r}")
    if not isinstance(its[0], list):
        its, labels = [its], [labels]
    if len(its) != len(labels) or any(
        not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b)
        for a, b in zip(its, labels, strict=False)
    ):
        raise Unusable("not as many labels as words")
    if not all(isinstance(word, str) and word for sentence in its for word in sentence):
        raise Unusable("a word that is no text")
    if not all(isinstance(label, str | int | float) for sentence in labels for label in sentence):
        raise Unusable("a label that is neither text nor number")
    return str(row.get("sample") or ""), list(zip(its, labels, strict=True))


def _with_set(source: str, sentences: list[Tagged], tag_set: TagSet) -> list[Tagged]:
    kinds = Counter(label for sentence in sentences for label in sentence.labels)
    numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in kinds)
    classes: dict[Label, Label] = {}
    if tag_set == "number" or (tag_set == "auto" and numbers):
        if not numbers:
            odd = next(label for label in kinds if not isinstance(label, int | float))
            raise DataError(f"{source}: the label {odd!r} is no number; tag_set = number is for regression.")
        classes = {label: float(label) for label in kinds}
    elif tag_set in ("auto", "coarse"):
        try:
            classes = {label: coarse(str(label)) for label in kinds}
        except Unusable as problem:
            if tag_set == "coarse":
                raise DataError(f"{source}: {problem}; tag_set = raw takes labels as they are.") from None
    classes = classes or {label: str(label) for label in kinds}
    return [Tagged(one.words, [classes[label] for label in one.labels], one.place) for one in sentences]


def prose(words: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """(text, the [start, end) of every word in it). A second ; ? or ! of two, as Brown writes them, is not spelled."""
    text, spans, before = "", [], ""
    for word in words:
        if word == before and word in DOUBLED:
            spans.append((len(text), len(text)))
            before = ""
            continue
        if text and word not in CLOSING and before not in OPENING:
            text += " "
        spans.append((len(text), len(text) + len(QUOTES.get(word, word))))
        text += QUOTES.get(word, word)
        before = word
    return text, spans
