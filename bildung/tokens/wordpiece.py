"""WordPiece, step by step (Schuster & Nakajima 2012; as BERT uses it, Devlin et al. 2019).

Nothing but a vocabulary is stored. A word is cut greedily: the longest piece of the vocabulary that it begins with,
then the longest that the rest begins with, and so on. Pieces inside a word are written with "##".

    unaffable    unaffable unaffabl ... una -> un       (each tried from long to short, un is in the vocabulary)
    affable      ##affable ##affabl ... -> ##aff
    able         ##able

When at some place no piece fits, not even one letter, the whole word becomes one unknown token: greed never goes back
to try a shorter piece before. Words of more than 100 characters are unknown unread, to bound the work.

(How the vocabulary was chosen is another matter: Schuster & Nakajima take the merge that raises the likelihood most;
the `tokenizers` library, which trains here, takes the most frequent pair, as BPE does.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Match:
    """The search for one piece: what was tried, from long to short, and what was found (None: nothing)."""

    rest: str  # what was still to be cut
    tried: tuple[str, ...]  # the last one is the piece, if any fits
    piece: str | None


def matches(word: str, vocabulary: Collection[str], *, prefix: str = "##", longest: int = 100) -> list[Match]:
    """The greedy longest matches in `word`. It becomes the unknown token when the last match found nothing.

    longest: words of more characters are not looked at; the one match then has tried nothing.
    """
    if len(word) > longest:
        return [Match(word, (), None)]
    found: list[Match] = []
    start = 0
    while start < len(word):
        mark = prefix if start else ""
        tried: list[str] = []
        piece = None
        for end in range(len(word), start, -1):
            tried.append(mark + word[start:end])
            if tried[-1] in vocabulary:
                piece = tried[-1]
                break
        found.append(Match(word[start:], tuple(tried), piece))
        if piece is None:
            break
        start += len(piece) - len(mark)
    return found


def pieces(found: list[Match], unknown: str) -> list[str]:
    """The tokens of a word: its pieces, or one unknown token."""
    parts = [match.piece for match in found if match.piece is not None]
    return parts if len(parts) == len(found) else [unknown]
