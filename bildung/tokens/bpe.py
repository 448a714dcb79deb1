"""Byte-pair encoding, step by step (Sennrich et al. 2016, *Neural machine translation of rare words*, algorithm 1).

Training counted neighbours and joined the most frequent pair, again and again. What it leaves is the list of these
merges in the order they were learned, and that order is the tokenizer: a new word is cut into symbols, and of all
neighbours in it the pair learned earliest (the lowest rank) is joined, until no pair in the word is in the list.

    l o w e r      rank 0  l o    -> lo
    lo w e r       rank 3  lo w   -> low
    low e r        rank 7  e r    -> er
    low er         (low er) was never learned: done

The vocabulary alone is not enough: with the same pieces learned in another order the same word falls apart otherwise.

In byte-level BPE (Radford et al. 2019, GPT-2) the symbols are the 256 bytes, each written as a printable character
(the space as Ġ), so nothing is ever unknown. Where symbols are characters, one that the vocabulary lacks becomes its
UTF-8 bytes (`<0xE2>`, byte fallback) or the unknown token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Merge:
    """One merge that was applied, and the word after it."""

    rank: int  # its place in the list of merges
    left: str
    right: str
    pieces: tuple[str, ...]


def merge(pieces: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[Merge]:
    """The merges that apply to `pieces`, in the order they do; the last one's `pieces` are the tokens.

    Of several places with the same pair the leftmost is merged first. (The paper merges all places at once, which comes
    to the same, because a pair with the merged piece in it was learned later.)
    """
    pieces = list(pieces)
    steps: list[Merge] = []
    while True:
        known = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not known:
            return steps
        rank, at = min(known)
        left, right = pieces[at : at + 2]
        pieces[at : at + 2] = [left + right]
        steps.append(Merge(rank, left, right, tuple(pieces)))


def symbols(
    word: str, vocabulary: Collection[str], *, unknown: str | None, byte_fallback: bool, fuse_unknown: bool
) -> list[str]:
    """The characters of `word` as far as the vocabulary has them; others as bytes or as the unknown token. Where there
    is neither, they are lost, as in the `tokenizers` library. fuse_unknown: neighbouring unknowns become one."""
    found: list[str] = []
    after_unknown = False
    for character in word:
        pieces = [character] if character in vocabulary else bytes_of(character) if byte_fallback else []
        if not pieces or any(piece not in vocabulary for piece in pieces):
            pieces = [] if unknown is None or (after_unknown and fuse_unknown) else [unknown]
            after_unknown = True
        else:
            after_unknown = False
        found += pieces
    return found


def bytes_of(text: str) -> list[str]:
    """The names SentencePiece gives to the UTF-8 bytes of `text`: "é" is ["<0xC3>", "<0xA9>"]."""
    return [f"<0x{byte:02X}>" for byte in text.encode()]
