"""Texts with a class each, and batches of them: rows {"text": ..., "label": ...}, or two texts judged together."""

# B texts, L tokens per row

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError, nearest
from bildung.data.rows import Row, Unusable
from bildung.data.sources import rows
from bildung.tokens.frames import Frame, Framed, encode_sentence, frame_of
from bildung.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Labelled:
    """texts (each with its second text or None) and, for each, the number of its class in `classes`."""

    texts: list[tuple[str, str | None]]
    labels: list[int]
    classes: tuple[str, ...]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Labelled:
        """These of the texts."""
        texts, labels = [self.texts[place] for place in places], [self.labels[place] for place in places]
        return Labelled(texts, labels, self.classes, self.notes)


@dataclass(frozen=True)
class TextBatch:
    """tokens_BL; keep_BL bool, False = padding; types_BL the segment of each token; labels_B numbers of classes."""

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
) -> Labelled:
    """The labelled texts of `source`, from these columns.

    classes: the classes to expect, by name or number (default: those that occur, numbers in their order, then names in
    theirs). Raises DataError for a label that is none of them.
    """

    def usable(row: Row) -> tuple[str, str | None, str | int]:
        texts = [row.get(name) for name in (text, second) if name is not None]
        for name, value in zip((text, second), texts, strict=False):
            if not isinstance(value, str) or not value.strip():
                raise Unusable(f"no text in {name!r}")
        its = row.get(label)
        if not isinstance(its, str | int) or its == "":
            raise Unusable(f"no class in {label!r}")
        return str(texts[0]), str(texts[1]) if second is not None else None, int(its) if isinstance(its, bool) else its

    found = rows(source).then(usable, limit)
    read = list(found)
    occurring = {its for *_, its in read}
    ordered = sorted(occurring, key=lambda its: (isinstance(its, str), its if isinstance(its, int) else 0, str(its)))
    names = tuple(classes) if classes is not None else tuple(dict.fromkeys(map(str, ordered)))
    numbers = {name: number for number, name in enumerate(names)}
    for its in ordered:
        if str(its) not in numbers:
            raise DataError(
                f"{source}: the class {its!r} is none of the {len(names)} known: {', '.join(names[:10])}. "
                f"{nearest(str(its), names)}".rstrip()
            )
    if len(names) < 2:
        raise DataError(f"{source}: the only class is {names[0]!r}; at least two are needed.")
    notes = [f"{source}: {report}"] if (report := found.report()) else []
    return Labelled([(a, b) for a, b, _ in read], [numbers[str(its)] for *_, its in read], names, notes)


def encode_labelled(
    tokenizer: Tokenizer, data: Labelled, max_length: int, frame: Frame | None = None
) -> list[tuple[Framed, int]]:
    """Each text in its frame (default: that of an encoder), cut to `max_length` tokens, with its class."""
    frame = frame_of(tokenizer) if frame is None else frame
    framed = (encode_sentence(tokenizer, frame, first, second, max_length) for first, second in data.texts)
    return list(zip(framed, data.labels, strict=True))


def pad_texts(items: Sequence[tuple[Framed, int]], pad_id: int | None, multiple: int = 8) -> TextBatch:
    """One text per row, padded on the right to the longest, rounded up to a multiple."""
    shape = (len(items), -(-max(len(framed.tokens) for framed, _ in items) // multiple) * multiple)
    tokens_BL, types_BL = torch.full(shape, pad_id or 0, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    keep_BL = torch.zeros(shape, dtype=torch.bool)
    for b, (framed, _) in enumerate(items):
        length = len(framed.tokens)
        tokens_BL[b, :length], types_BL[b, :length] = torch.tensor(framed.tokens), torch.tensor(framed.types)
        keep_BL[b, :length] = True
    return TextBatch(tokens_BL, keep_BL, types_BL, torch.tensor([label for _, label in items]))


def text_batches(items: Sequence[tuple[Framed, int]], size: int, pad_id: int | None) -> Iterator[TextBatch]:
    """All of them once, in their order."""
    return (pad_texts(items[start : start + size], pad_id) for start in range(0, len(items), size))
