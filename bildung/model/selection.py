"""Which part of an activation: `layers.3.attn.z[:, 5, 2]` is position 5 of head 2, in every row.

    SITE[index, index, ...]      one index per letter of the site's shape (`bildung sites DIR`), in its order; those
                                 left out are taken whole
    SITE[L=5, N=2]               the same by letters, for patterns whose sites have several shapes

    an index    :    all             5    one           2:7, 3:, ::2    a range as in Python           1|4|9    these

Positions (L, S, P) are absolute: 5 is the sixth real token of a row, whatever was padded and however many tokens a KV
cache has read before, so the same selection means the same tokens in a forward pass and in generation. Negative ones
count from the end of the prompt, -1 is its last token, and `-1:` also all that is generated after it. Of heads,
features and rows negative ones count from their end. A chosen part keeps all its axes: [:, 5] of B L D is B 1 D.
"""

# B rows, L query and S key positions, P patches

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import NoSuchSite

POSITIONS = ("L", "S", "P")
# A bracket at the end that holds a digit, a comma or a colon selects; others ([qk]) are a shell pattern's.
FORM = re.compile(r"(?P<pattern>.+?)\[(?P<inside>[^\[\]]*[,:=\d][^\[\]]*)\]")
ALLOWED = "an index is  :  5  -1  2:7  1|4  or a letter of the shape with one, L=5"


@dataclass(frozen=True)
class Place:
    """What one pass of a stack reads: `length` tokens after `past` ones. keep_BS: False marks padding, among past and
    new columns. prompt: so many columns were the prompt, from whose end negative positions count."""

    past: int
    length: int
    keep_BS: Tensor | None = None
    prompt: int | None = None

    def columns(self, index: Index, keys: bool) -> list[list[int]]:
        """Columns of this pass (with `keys`: of all that is read) that the index chooses: one list for all rows, or
        one per row where there is padding."""
        first = 0 if keys else self.past
        if self.keep_BS is None:
            return [[c - first for c in index.positions(self.past + self.length, self._prompt) if c >= first]]
        found = []
        for kept in self.keep_BS.tolist():
            real = [column for column, keep in enumerate(kept) if keep]
            chosen = index.positions(len(real), sum(kept[: self._prompt]))
            found.append([real[position] - first for position in chosen if real[position] >= first])
        return found

    @property
    def _prompt(self) -> int:
        return self.past + self.length if self.prompt is None else self.prompt


@dataclass(frozen=True)
class Index:
    """One index: numbers, or a range (start, stop, step)."""

    numbers: tuple[int, ...] | None = None
    span: tuple[int | None, int | None, int | None] = (None, None, None)

    @property
    def whole(self) -> bool:
        return self.numbers is None and self.span == (None, None, None)

    def positions(self, read: int, prompt: int) -> list[int]:
        """The chosen positions among the `read` first of a row whose prompt has `prompt`; later ones are left out."""
        at = lambda number: number + prompt if number is not None and number < 0 else number  # noqa: E731
        if self.numbers is None:
            start, stop = at(self.span[0]), at(self.span[1])
            start, stop = max(0, start or 0), read if stop is None else min(read, max(0, stop))
            return list(range(start, stop, self.span[2] or 1))
        if early := [number for number in self.numbers if number + prompt < 0]:
            raise NoSuchSite(f"position {early[0]} lies before the prompt, which has {prompt} tokens.")
        return [place for number in self.numbers if (place := at(number)) < read]

    def among(self, size: int, what: str) -> list[int]:
        """The chosen of `size` heads, features or rows. Raises NoSuchSite for one that is not there."""
        if self.numbers is None:
            return list(range(size))[slice(*self.span)]
        if wrong := [number for number in self.numbers if not -size <= number < size]:
            raise NoSuchSite(f"{what} {wrong[0]} is not there; there are 0 to {size - 1}.")
        return [number % size for number in self.numbers]


@dataclass(frozen=True)
class Selection:
    """The indices of one bracket."""

    text: str
    in_order: tuple[Index, ...]
    by_letter: tuple[tuple[str, Index], ...]

    def axes(self, site: str, shape: str) -> dict[int, Index]:
        """{axis: index} for a site of this shape ("B L N H"). Raises NoSuchSite where they do not fit."""
        letters = shape.split()
        if len(self.in_order) > len(letters):
            raise NoSuchSite(
                f"{site}{self.text} has {len(self.in_order)} indices and {site} the shape {shape}; give one per letter "
                "at most."
            )
        found = dict(enumerate(self.in_order))
        for letter, index in self.by_letter:
            if letter not in letters:
                raise NoSuchSite(f"{site}{self.text}: {site} has the shape {shape}, without {letter}.")
            if letters.index(letter) in found:
                raise NoSuchSite(f"{site}{self.text} has two indices for {letter}; give one, such as {letter}=1|4.")
            found[letters.index(letter)] = index
        return {axis: index for axis, index in found.items() if not index.whole}

    def parts(
        self, site: str, shape: str, x: Tensor, queries: Place | None, keys: Place | None
    ) -> list[tuple[Tensor, ...]]:
        """Where the chosen part of `x` is, as indices for x[...]: one for the whole batch, several where rows of a
        padded batch have other numbers of positions in this pass, none where the chosen positions are not in it."""
        letters = shape.split()
        axes = self.axes(site, shape)
        rows = axes[0].among(x.shape[0], "row") if 0 in axes else list(range(x.shape[0]))
        if x.ndim == len(letters) - 1 and letters[1] == "L":  # only the last position was unembedded
            place = queries or Place(0, 1)
            lists = place.columns(axes[1], keys=False) if 1 in axes else [[place.length - 1]]
            rows = [row for row in rows if place.length - 1 in _of(lists, row)]
            letters, axes = [letters[0], *letters[2:]], {axis - (axis > 1): i for axis, i in axes.items() if axis != 1}
        last = max(axes, default=0)
        chosen: list[list[list[int]]] = []  # per axis one list for all rows, or one per row
        for axis in range(1, last + 1):
            index, letter, size = axes.get(axis, Index()), letters[axis], x.shape[axis]
            if letter not in POSITIONS or index.whole:
                chosen.append([index.among(size, f"{site}{self.text}: {NAMES.get(letter, letter)}")])
            else:
                place = (keys if letter == "S" else queries) or Place(0, size)
                columns = place.columns(index, keys=letter == "S")
                ahead = size - place.past - place.length if letter == "S" else 0  # virtual tokens, which do not count
                chosen.append([[column + ahead for column in one] for one in columns] if ahead else columns)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            counts = tuple(len(_of(lists, row)) for lists in chosen)
            if all(counts):
                groups.setdefault(counts, []).append(row)
        return [_index(chosen, members, x.device) for members in groups.values()]


NAMES = {"N": "head", "K": "key-value head", "F": "neuron", "D": "feature", "H": "feature", "V": "token"}


def _of(lists: list[list[int]], row: int) -> list[int]:
    return lists[row] if len(lists) > 1 else lists[0]


def _index(chosen: list[list[list[int]]], rows: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """Index tensors that broadcast against each other: x[them] is (rows, chosen of axis 1, of axis 2, ...)."""
    axes = 1 + len(chosen)
    found = [torch.tensor(rows, device=device).view(-1, *[1] * (axes - 1))]
    for axis, lists in enumerate(chosen, start=1):
        picked = [_of(lists, row) for row in rows] if len(lists) > 1 else [lists[0]]
        shape = (len(picked), *[1] * (axis - 1), len(picked[0]), *[1] * (axes - 1 - axis))
        found.append(torch.tensor(picked, device=device).view(shape))
    return tuple(found)


def parse(text: str) -> tuple[str, Selection | None]:
    """A site pattern and its selection, if it ends in one. Raises NoSuchSite for what is no index."""
    match = FORM.fullmatch(text)
    if match is None:
        return text, None
    in_order: list[Index] = []
    by_letter: list[tuple[str, Index]] = []
    for one in match["inside"].split(","):
        letter, equals, index = one.strip().rpartition("=")
        if equals and not re.fullmatch(r"\s*[A-Z]\s*", letter):
            raise NoSuchSite(f"{text!r}: {letter.strip()!r} is no letter of a shape; {ALLOWED}.")
        if equals:
            by_letter.append((letter.strip(), _parse_index(index.strip(), text)))
        elif by_letter:
            raise NoSuchSite(f"{text!r}: {index!r} follows an index with a letter; give either order or letters.")
        else:
            in_order.append(_parse_index(index, text))
    return match["pattern"], Selection(f"[{match['inside']}]", tuple(in_order), tuple(by_letter))


def _parse_index(index: str, text: str) -> Index:
    number = r"-?\d+"
    if re.fullmatch(rf"{number}(\s*\|\s*{number})*", index):
        return Index(tuple(int(one) for one in index.split("|")))
    if re.fullmatch(rf"({number})?:({number})?(:\d+)?", index):
        start, stop, step = ([int(one) if one else None for one in index.split(":")] + [None])[:3]
        if step != 0:
            return Index(None, (start, stop, step))
    raise NoSuchSite(f"{text!r}: {index!r} is no index; {ALLOWED}.")
