"""What a tokenizer makes of a text, in three numbers.

tokens per word   how far words fall apart ("fertility"); words are what stands between spaces
bytes per token   how much text one step of a model covers, in UTF-8; unlike words, defined for every script
unknown rate      the share of tokens that are the unknown token: text that is lost
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bildung.core.errors import DataError
from bildung.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Measured:
    """Counts over some passages of text."""

    passages: int
    words: int
    bytes: int
    tokens: int
    unknown: int  # tokens that are the unknown token

    @property
    def tokens_per_word(self) -> float:
        """Of text without any space, the number of tokens."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text per token."""
        return self.bytes / max(1, self.tokens)

    @property
    def unknown_rate(self) -> float:
        """Between 0 and 1."""
        return self.unknown / max(1, self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """Counts and rates, for a record."""
        rates = {name: getattr(self, name) for name in ("tokens_per_word", "bytes_per_token", "unknown_rate")}
        return {**dataclasses.asdict(self), **{name: round(rate, 6) for name, rate in rates.items()}}


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Measured:
    """Encodes the texts and counts. Raises DataError when there is none, TokenizerError for text it cannot encode."""
    passages = words = size = tokens = unknown = 0
    mark = tokenizer.named["unk_token"]
    unknown_id = None if mark is None else tokenizer.id_of(mark)
    for text in texts:
        ids = tokenizer.encode(text, bos=False)
        passages += 1
        words += len(text.split())
        size += len(text.encode())
        tokens += len(ids)
        unknown += ids.count(unknown_id) if unknown_id is not None else 0
    if not passages:
        raise DataError("there is no text to measure a tokenizer on")
    return Measured(passages, words, size, tokens, unknown)
