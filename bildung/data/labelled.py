"""Texts with what is to be told of them, and batches of them: rows {"text": ..., "label": ...}, or two texts together.

single_label   "label": "good"               one class of each text      -> its number
multi_label    "label": ["good", "long"]     those that hold, or []      -> 0.0 or 1.0 for every label
regression     "label": 3.5                  a number                    -> itself
"""

# B texts, L tokens per row, C classes or labels

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bildung.core.errors import DataError, nearest
from bildung.data.rows import Row, Unusable
from bildung.data.sources import rows
from bildung.tokens.frames import Cut, Frame, Framed, encode_sentence, frame_of
from bildung.tokens.tokenizer import Tokenizer

Problem = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class Labelled:
    """texts (each with its second text or None) and, for each, its label: the number of its class in `classes`, or a
    tuple of floats (multi_label: one per class; regression: one)."""

    texts: list[tuple[str, str | None]]
    labels: list[Any]
    classes: tuple[str, ...]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Labelled:
        """These of the texts."""
        texts, labels = [self.texts[place] for place in places], [self.labels[place] for place in places]
        return Labelled(texts, labels, self.classes, self.notes)

    def set_aside(self, count: int, seed: int) -> tuple[Labelled, Labelled]:
        """(those to train on, `count` to measure on), chosen by seed.

        Of single classes as large a share of each is held out as of all (Sainte-Laguë's rule for the rounding), and the
        last text of a class stays in training while another can go. Raises DataError when nothing would be left.
        """
        if not 0 <= count < len(self):
            raise DataError(
                f"held_out = {count} of {len(self)} usable rows; at least one must stay to train on. Hold out fewer."
            )
        generator = random.Random(f"held out {seed}")
        order = generator.sample(range(len(self)), len(self))
        if isinstance(self.labels[0], int):
            sizes, seen, turn = Counter(self.labels), Counter[int](), dict[int, float]()
            for place in order:
                label = self.labels[place]
                seen[label] += 1
                turn[place] = (seen[label] - 0.5) / sizes[label] + (seen[label] == sizes[label])
            order.sort(key=turn.__getitem__)
        chosen = set(order[:count])
        kept, aside = self.take([place for place in range(len(self)) if place not in chosen]), self.take(sorted(chosen))
        if count and isinstance(self.labels[0], int) and (missing := aside.absent()):
            self.notes.append(f"of the {count} texts held out none has {_some(missing)}: too rare for a share of it")
        return kept, aside

    def absent(self) -> list[str]:
        """The classes that none of these texts has."""
        if any(isinstance(one, tuple) for one in self.labels):
            return [
                name
                for name, column in zip(self.classes, zip(*self.labels, strict=True), strict=True)
                if not any(column)
            ]
        there = set(self.labels)
        return [name for number, name in enumerate(self.classes) if number not in there]


@dataclass(frozen=True)
class TextBatch:
    """tokens_BL; keep_BL bool, False = padding; types_BL the segment of each token; labels_B numbers of classes (BC
    floats for several labels or a number)."""

    tokens_BL: Tensor
    keep_BL: Tensor
    types_BL: Tensor
    labels_B: Tensor

    def to(self, device: torch.device | str) -> TextBatch:
        return TextBatch(*(tensor.to(device) for tensor in vars(self).values()))

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.keep_BL.sum())

    @property
    def num_targets(self) -> int:
        return len(self.labels_B)


def read_labelled(
    source: str,
    *,
    text: str = "text",
    second: str | None = None,
    label: str = "label",
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    problem: Problem = "single_label",
) -> Labelled:
    """The labelled texts of `source`, from these columns.

    classes: the classes to expect, by name or number (default: those that occur, numbers in their order, then names in
    theirs). Raises DataError for labels that are none of them.
    """
    read_label = {"single_label": _one_class, "multi_label": _several, "regression": _number}[problem]

    def usable(row: Row) -> tuple[str, str | None, Any]:
        texts = [row.get(name) for name in (text, second) if name is not None]
        for name, value in zip((text, second), texts, strict=False):
            if not isinstance(value, str) or not value.strip():
                raise Unusable(f"no text in {name!r}")
        return str(texts[0]), str(texts[1]) if second is not None else None, read_label(row.get(label), label)

    found = rows(source).then(usable, limit)
    try:
        read = list(found)
    except DataError as error:
        if not found.dropped:
            raise
        raise DataError(f"{error}. {_what_there_is(source, text, second, label)}") from None
    texts = [(first, other) for first, other, _ in read]
    notes = [f"{source}: {report}"] if (report := found.report()) else []
    if problem == "regression":
        return Labelled(texts, [its for *_, its in read], (label,), notes)
    held = [its if isinstance(its, tuple) else (its,) for *_, its in read]
    counts = Counter(one for its in held for one in its)
    occurring = set(counts)
    for both in (one for one in occurring if isinstance(one, int) and str(one) in occurring):
        raise DataError(
            f'{source}: in {label!r} stands {both} as a number ({counts[both]} times) and as text, "{both}" '
            f"({counts[str(both)]} times). Are they one class? Write it in one way."
        )
    ordered = sorted(occurring, key=lambda its: (isinstance(its, str), its if isinstance(its, int) else 0, str(its)))
    names = tuple(classes) if classes is not None else tuple(dict.fromkeys(map(str, ordered)))
    if unknown := [str(its) for its in ordered if str(its) not in names]:
        raise DataError(
            f"{source}: the class{'es' if len(unknown) > 1 else ''} {_some(unknown)} "
            f"{'are' if len(unknown) > 1 else 'is'} none of the {len(names)} known: {', '.join(names[:10])}. "
            f"{nearest(unknown[0], names)}".rstrip()
        )
    numbers = {name: number for number, name in enumerate(names)}
    if problem == "multi_label":
        if not names:
            raise DataError(f"{source}: no text has any label in {label!r}.")
        sets = [{numbers[str(one)] for one in its} for its in held]
        return Labelled(texts, [tuple(float(c in its) for c in range(len(names))) for its in sets], names, notes)
    if len(names) < 2:
        left_out = f" {report}." if report else ""
        raise DataError(f"{source}: the only class is {names[0]!r}; at least two are needed.{left_out}")
    return Labelled(texts, [numbers[str(its)] for (its,) in held], names, notes)


def _what_there_is(source: str, text: str, second: str | None, label: str) -> str:
    """What to do where no row could be used, seen from the first."""
    row = next(iter(rows(source)))
    if absent := [name for name in (text, second, label) if name is not None and name not in row]:
        near = " ".join(filter(None, (nearest(name, list(row)) for name in absent)))
        return f"The columns of the first row are: {', '.join(row)}. {near} Name yours with text, second and label."
    return (
        f"The first row has {label} = {row[label]!r}. problem = single_label needs a name or a whole number there, "
        f"multi_label a list of them, regression a number."
    )


def check_same_classes(data: str, test: str, final: Labelled, limit: int | None) -> list[str]:
    """Raises DataError for classes of `data` that none of the texts to measure on, `final`, has: figures would leave
    them out. (Classes that only these have are refused as they are read.) Where a limit cut them off: notes of it.
    """
    if not (absent := final.absent()):
        return []
    names = _some(absent)
    if limit is None:
        raise DataError(
            f"the classes differ: {data} has {names}, which no text of {test} has; measure on texts of all classes, or "
            f"keep some of {data} out of training with held_out."
        )
    return [f"of the first {limit} texts of {test} none has {names}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _one_class(value: Any, label: str) -> str | int:
    if not isinstance(value, str | int) or value == "":
        raise Unusable(f"no class in {label!r}")
    return int(value) if isinstance(value, bool) else value


def _several(value: Any, label: str) -> tuple[str | int, ...]:
    if not isinstance(value, list | tuple) or not all(
        isinstance(one, str | int) and not isinstance(one, bool) and one != "" for one in value
    ):
        raise Unusable(f"no list of labels in {label!r}")
    return tuple(value)


def _number(value: Any, label: str) -> tuple[float]:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable(f"no number in {label!r}")
    return (number,)


def encode_labelled(
    tokenizer: Tokenizer, data: Labelled, max_length: int, frame: Frame | None = None, cut: Cut = "end"
) -> list[tuple[Framed, Any]]:
    """Each text in its frame (default: that of an encoder), cut to `max_length` tokens, with its label."""
    frame = frame_of(tokenizer) if frame is None else frame
    framed = (encode_sentence(tokenizer, frame, first, second, max_length, cut) for first, second in data.texts)
    return list(zip(framed, data.labels, strict=True))


def pad_texts(items: Sequence[tuple[Framed, Any]], pad_id: int | None, multiple: int = 8) -> TextBatch:
    """One text per row, padded on the right to the longest, rounded up to a multiple."""
    shape = (len(items), -(-max(len(framed.tokens) for framed, _ in items) // multiple) * multiple)
    tokens_BL, types_BL = torch.full(shape, pad_id or 0, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    keep_BL = torch.zeros(shape, dtype=torch.bool)
    for b, (framed, _) in enumerate(items):
        length = len(framed.tokens)
        tokens_BL[b, :length], types_BL[b, :length] = torch.tensor(framed.tokens), torch.tensor(framed.types)
        keep_BL[b, :length] = True
    return TextBatch(tokens_BL, keep_BL, types_BL, torch.tensor([label for _, label in items]))


def text_batches(items: Sequence[tuple[Framed, Any]], size: int, pad_id: int | None) -> Iterator[TextBatch]:
    """All of them once, in their order."""
    return (pad_texts(items[start : start + size], pad_id) for start in range(0, len(items), size))
