"""Which tokens a stretch of text became: the way from labels of words to activations, which are of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from bildung.core.errors import TokenizerError
from bildung.tokens.tokenizer import Tokenizer


def encode_with_spans(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(token ids without BOS, the [start, end) of the text that each stands for, without whitespace at its ends)."""
    ids = tokenizer.encode(text, bos=False)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    if encoding.ids != ids:
        raise TokenizerError("the tokenizer split the same text in two ways; is another thread using it?")
    spans = []
    for start, end in encoding.offsets:
        piece = text[start:end]
        left = len(piece) - len(piece.lstrip())
        spans.append((start + left, max(start + left, start + len(piece.rstrip()))))
    return ids, spans


def tokens_of(words: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]) -> list[list[int]]:
    """For each word's [start, end) the numbers of the pieces that stand for some of it. Both in the order of the text;
    a piece that stands for two words ('."' as one token) is given to both."""
    found: list[list[int]] = []
    first = 0
    for start, end in words:
        while first < len(pieces) and pieces[first][1] <= start:
            first += 1
        mine = []
        for number in range(first, len(pieces)):
            low, high = pieces[number]
            if low >= end:
                break
            if max(low, start) < min(high, end):
                mine.append(number)
        found.append(mine)
    return found
